"""Completions drawn by an engine and scored by rewards, prompt by prompt: what learning, pairs and evaluation share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Protocol

import numpy as np

from upslope.collect.conversations import Conversations, check_drawn, check_template
from upslope.collect.engines.protocol import Completion, Engine, Request
from upslope.collect.errors import NonFiniteError
from upslope.collect.experience import OverlongPenalty
from upslope.collect.rewards.functions import overlong_penalty
from upslope.collect.rewards.protocol import Columns, Failed, Outcome, Reply, Scores
from upslope.collect.tasks.protocol import Example, Examples, Task
from upslope.collect.text_rows import Tokens, completion_text, prompt_tokens
from upslope.errors import UsageError
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.tokenizer import Tokenizer

OVERLONG = "overlong"
"""Name of the reward part that punishes length."""

_MOST_REASONS = 5
_BROKEN = "what answers the policy failed"


class Scorer(Protocol):
    """Who says what completions are worth: a reward pool."""

    def score(self, prompts: Sequence[str], completions: Sequence[str], columns: Columns) -> Scores:
        """One total and one outcome per reward for every completion."""
        ...

    def reply(
        self, prompts: Sequence[str], completions: Sequence[str], turns: Sequence[Sequence[str]], columns: Columns
    ) -> list[Reply]:
        """What the task's dialogue answers; never asked where it has none."""
        ...

    def close(self) -> None:
        """Give back processes."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One completion and what became of it.

    Attributes:
        example: index of the example whose prompt it completes.
        prompt: tokens.
        completion: tokens, their log-probs and whether they ended; replies to the policy's turns among them.
        text: of the completion, without the end token.
        parts: outcome by the name of the reward.
        total: weighted sum; None where a part failed or none applies.
        left_out: why nothing is learnt from it; None where something is.
        row: of the trajectory; None where it was left out.
        group: label of its group within the trajectory; None likewise, and without groups.
    """

    example: int
    prompt: Tokens
    completion: Completion
    text: str
    parts: Mapping[str, Outcome]
    total: float | None
    left_out: str | None = None
    row: int | None = None
    group: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Some groups, one per prompt, and the seconds it took to draw and to score them."""

    groups: tuple[tuple[Sample, ...], ...]
    generate_seconds: float
    reward_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSource:
    """Draws and scores groups of completions.

    Attributes:
        task: whose stop strings end a completion, and whose part `correct` there must be.
        tokenizer: of the policy.
        engine: draws.
        rewards: scores.
        sampling: how tokens are drawn.
        group: completions per prompt.
        limit: most tokens of a completion.
        context: most tokens that the model reads.
        overlong: punish length by a part of its own; None for no such part.

    Raises:
        UsageError: if accuracy cannot be told, or a reward has the name of the part that punishes length.
    """

    task: Task
    tokenizer: Tokenizer
    engine: Engine
    rewards: Scorer
    sampling: Sampling
    group: int
    limit: int
    context: int
    overlong: OverlongPenalty | None = None

    def __post_init__(self) -> None:
        """Refuse names that clash or are missing."""
        names = [reward.name for reward in self.task.rewards]
        if self.task.correct not in names:
            raise UsageError(
                f"task {self.task.name!r} calls {self.task.correct!r} the reward that is 1 for a right answer, and its "
                f"rewards are {', '.join(names) or 'none'}: set Task.correct to one of them"
            )
        if self.overlong is not None and OVERLONG in names:
            raise UsageError(
                f"a reward of task {self.task.name!r} is named {OVERLONG!r}, as is the penalty on length: rename it"
            )

    def draw(self, examples: Examples, indices: Sequence[int], keys: Sequence[tuple[int, ...]], name: str) -> Drawn:
        """A group of completions for each of some examples, in their order.

        Args:
            examples: of the task.
            indices: which of them.
            keys: per prompt, the beginning of its samples' keys; the sample's number within the group is added.
            name: what the examples are called in errors, "training example" say.

        Raises:
            UsageError: if a prompt is empty or, with a completion of `limit` tokens, longer than the context.
            NonFiniteError: if the engine's log-probs are not finite.
        """
        chosen = [examples[index] for index in indices]
        prompts = [self._prompt(*pair, name) for pair in zip(chosen, indices, strict=True)]
        requests = [
            Request(prompt=prompt, key=(*key, sample))
            for prompt, key in zip(prompts, keys, strict=True)
            for sample in range(self.group)
        ]
        begun = perf_counter()
        completions = self._completed(chosen, requests)
        drawn = perf_counter()
        samples = self._scored(chosen, indices, requests, completions)
        groups = tuple(tuple(samples[at : at + self.group]) for at in range(0, len(samples), self.group))
        return Drawn(groups=groups, generate_seconds=drawn - begun, reward_seconds=perf_counter() - drawn)

    def _completed(self, chosen: Sequence[Example], requests: Sequence[Request]) -> list[Completion]:
        """Single turns, or conversations where the task has a dialogue."""
        stop, dialogue = tuple(self.task.stop), self.task.dialogue
        if dialogue is None:
            completions = self.engine.generate(requests, sampling=self.sampling, limit=self.limit, stop=stop)
            check_drawn(completions, requests)
            return completions
        for example in chosen[:1]:
            check_template(self.tokenizer, example, dialogue.role)
        conversations = Conversations(
            dialogue=dialogue,
            replier=self.rewards,
            tokenizer=self.tokenizer,
            engine=self.engine,
            sampling=self.sampling,
            limit=self.limit,
            context=self.context,
            stop=stop,
        )
        asked = [example for example in chosen for _ in range(self.group)]
        texts = [self._prompt_text(*pair) for pair in zip(asked, requests, strict=True)]
        return conversations.hold(asked, requests, texts)

    def _prompt(self, example: Example, index: int, name: str) -> Tokens:
        where = f"{name} {index} of task {self.task.name!r}"
        tokens = prompt_tokens(self.tokenizer, example, where)
        if len(tokens) + self.limit > self.context:
            raise UsageError(
                f"the prompt of {where} has {len(tokens)} tokens; with a completion of up to {self.limit} (limit) that "
                f"is more than the {self.context} that the model reads: leave it out, lower the limit, or take a model "
                "with a longer context"
            )
        return tokens

    def _scored(
        self,
        chosen: Sequence[Example],
        indices: Sequence[int],
        requests: Sequence[Request],
        completions: Sequence[Completion],
    ) -> list[Sample]:
        texts = [completion_text(self.tokenizer, completion.tokens) for completion in completions]
        asked = [example for example in chosen for _ in range(self.group)]
        prompts = [self._prompt_text(*pair) for pair in zip(asked, requests, strict=True)]
        scores = self._scores(prompts, texts, asked, [completion.failed for completion in completions])
        samples: list[Sample] = []
        for place, (request, completion) in enumerate(zip(requests, completions, strict=True)):
            parts = {name: outcomes[place] for name, outcomes in scores.parts.items()}
            total = scores.total[place]
            if total is not None and not math.isfinite(total):
                raise NonFiniteError(f"the rewards of a completion of task {self.task.name!r} add up to {total}")
            sample = Sample(
                example=indices[place // self.group],
                prompt=request.prompt,
                completion=completion,
                text=texts[place],
                parts=parts,
                total=total,
                left_out=None if total is not None else _why(parts, completion.failed),
            )
            samples.append(self._shaped(sample))
        return samples

    def _scores(
        self, prompts: Sequence[str], texts: Sequence[str], asked: Sequence[Example], failed: Sequence[str | None]
    ) -> Scores:
        """Of whole conversations; where one broke off every part has failed."""
        whole = [place for place, reason in enumerate(failed) if reason is None]
        if not whole:
            scores = Scores(total=(), parts={reward.name: () for reward in self.task.rewards})
        else:
            columns = [asked[place].columns for place in whole]
            scores = self.rewards.score([prompts[place] for place in whole], [texts[place] for place in whole], columns)
        if self.task.correct not in scores.parts:
            raise UsageError(
                f"task {self.task.name!r} tells right answers by the reward {self.task.correct!r}, and what scores its "
                f"completions gives {', '.join(scores.parts)}: score them by the task's own rewards"
            )
        if len(whole) == len(failed):
            return scores
        at = {place: number for number, place in enumerate(whole)}
        return Scores(
            total=tuple(scores.total[at[place]] if place in at else None for place in range(len(failed))),
            parts={
                name: tuple(
                    outcomes[at[place]] if place in at else Failed(f"{_BROKEN}: {reason}")
                    for place, reason in enumerate(failed)
                )
                for name, outcomes in scores.parts.items()
            },
        )

    def _prompt_text(self, example: Example, request: Request) -> str:
        """What rewards see: plain prompts as the data has them, messages as the chat template writes them."""
        if isinstance(example.prompt, str):
            return example.prompt
        return self.tokenizer.decode(request.prompt, special=True)

    def _shaped(self, sample: Sample) -> Sample:
        """With the penalty on its length, where there is one."""
        if self.overlong is None:
            return sample
        length, shape = len(sample.completion.tokens), self.overlong
        penalty = overlong_penalty(length, limit=self.limit, buffer=shape.buffer, penalty=shape.penalty)
        total = None if sample.total is None else sample.total + penalty
        return replace(sample, parts={**sample.parts, OVERLONG: penalty}, total=total)


def has_spread(group: Iterable[Sample]) -> bool:
    """Whether the totals of a group differ, in the precision in which they are learnt from (max == min, exactly)."""
    totals = np.asarray([sample.total for sample in group], dtype=np.float32)
    return bool(totals.max() != totals.min())


def reasons(samples: Iterable[Sample]) -> str:
    """Why samples were left out, most frequent first, for an error."""
    counted = Counter(sample.left_out for sample in samples if sample.left_out is not None)
    common = counted.most_common(_MOST_REASONS)
    more = len(counted) - len(common)
    return "; ".join(f"{count} x {reason}" for reason, count in common) + (f"; and {more} more" if more else "")


def _why(parts: Mapping[str, Outcome], broken: str | None) -> str:
    if broken is not None:
        return f"{_BROKEN}: {broken}"
    failed = [f"{name} failed: {outcome.reason}" for name, outcome in parts.items() if isinstance(outcome, Failed)]
    return "; ".join(failed) if failed else "no reward applies"

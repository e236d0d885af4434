"""Completions drawn by an engine and scored by rewards, prompt by prompt: what learning, pairs and evaluation share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Protocol

import numpy as np

from upslope.collect.engines.protocol import Completion, Engine, Request
from upslope.collect.errors import NonFiniteError
from upslope.collect.experience import OverlongPenalty
from upslope.collect.rewards.functions import overlong_penalty
from upslope.collect.rewards.protocol import Columns, Failed, Outcome, Scores
from upslope.collect.tasks.protocol import Example, Examples, Task
from upslope.collect.text_rows import Tokens, completion_text, prompt_tokens
from upslope.errors import UsageError
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.tokenizer import Tokenizer

OVERLONG = "overlong"
"""Name of the reward part that punishes length."""

_MOST_REASONS = 5


class Scorer(Protocol):
    """Who says what completions are worth: a reward pool."""

    def score(self, prompts: Sequence[str], completions: Sequence[str], columns: Columns) -> Scores:
        """One total and one outcome per reward for every completion."""
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
        completion: tokens, their log-probs and whether they ended.
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
        completions = self.engine.generate(
            requests, sampling=self.sampling, limit=self.limit, stop=tuple(self.task.stop)
        )
        drawn = perf_counter()
        _check(completions, requests)
        samples = self._scored(chosen, indices, requests, completions)
        groups = tuple(tuple(samples[at : at + self.group]) for at in range(0, len(samples), self.group))
        return Drawn(groups=groups, generate_seconds=drawn - begun, reward_seconds=perf_counter() - drawn)

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
        scores = self.rewards.score(prompts, texts, [example.columns for example in asked])
        if self.task.correct not in scores.parts:
            raise UsageError(
                f"task {self.task.name!r} tells right answers by the reward {self.task.correct!r}, and what scores its "
                f"completions gives {', '.join(scores.parts)}: score them by the task's own rewards"
            )
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
                left_out=None if total is not None else _why(parts),
            )
            samples.append(self._shaped(sample))
        return samples

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


def _why(parts: Mapping[str, Outcome]) -> str:
    failed = [f"{name} failed: {outcome.reason}" for name, outcome in parts.items() if isinstance(outcome, Failed)]
    return "; ".join(failed) if failed else "no reward applies"


def _check(completions: Sequence[Completion], requests: Sequence[Request]) -> None:
    """Refuse what an engine must not bring."""
    if len(completions) != len(requests):
        raise ValueError(f"the engine brought {len(completions)} completions for {len(requests)} requests")
    for completion, request in zip(completions, requests, strict=True):
        if not completion.tokens or len(completion.tokens) != len(completion.log_prob):
            raise ValueError(
                f"the engine brought {len(completion.tokens)} tokens with {len(completion.log_prob)} log-probs for "
                f"sample {request.key}: every completion has at least one token, and one log-prob for each"
            )
        if not all(map(math.isfinite, completion.log_prob)):
            place = next(at for at, value in enumerate(completion.log_prob) if not math.isfinite(value))
            raise NonFiniteError(
                f"token {place} of sample {request.key} was drawn with a log-prob of {completion.log_prob[place]}: the "
                "policy's weights may have stopped being numbers (lower the learning rate, clip gradients), or the "
                "engine gives log-probs of another distribution than the one it draws from"
            )

"""Prompts, an engine and rewards -> trajectories: completions of the policy's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from upslope.collect.engines.protocol import Engine
from upslope.collect.example_order import ExampleOrder
from upslope.collect.experience import CompletionConfig
from upslope.collect.rewards.protocol import Failed, Outcome, are_shares
from upslope.collect.samples import Sample, SampleSource, Scorer, has_spread, reasons
from upslope.collect.tasks.protocol import Task
from upslope.collect.text_rows import TokenRow, build_rows
from upslope.errors import UsageError
from upslope.policies.language.tokenizer import Tokenizer
from upslope.trajectory import Policy, Trajectory, Tree

Group: TypeAlias = tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """What one update drew, whether or not it is learnt from.

    Attributes:
        update: which.
        samples: all of them, in the order in which they were drawn; `Sample.row` says which row of the trajectory one
            became, `Sample.left_out` why it became none.
        correct: the name of the part whose mean is the accuracy.
        dialogue: whether the policy's turns are answered.
        groups: groups that two or more scored samples are left of (one each where the group size is 1).
        live_groups: those of them whose totals differ; None where the group size is 1.
        rounds: of drawing prompts: 1, and more where groups without spread were replaced.
        generate_seconds: spent by the engine, and by what replies in conversations.
        reward_seconds: spent by the rewards.
    """

    update: int
    samples: tuple[Sample, ...]
    correct: str
    dialogue: bool
    groups: int
    live_groups: int | None
    rounds: int
    generate_seconds: float
    reward_seconds: float

    @property
    def rows(self) -> tuple[Sample, ...]:
        """The samples that are rows of the trajectory, in their order."""
        return tuple(sample for sample in self.samples if sample.row is not None)

    def metrics(self) -> dict[str, float]:
        """Means over everything that was drawn, whether or not it is learnt from, and counts.

        | name | meaning |
        |---|---|
        | `reward`, `reward/NAME` | of the totals, and of each part where it applies, before weighting |
        | `accuracy` | mean of the part that is 1 for a right answer; `score` where one lies outside [0, 1] |
        | `length`, `truncated` | tokens per completion that the policy chose; share that a limit cut |
        | `turns` | of the policy per completion, where a task has a dialogue |
        | `live_groups` | share of groups whose totals differ |
        | `rows` | completions that are learnt from |
        | `failed`, `unscored` | completions of which a reward failed; to which none applies |
        | `left_out` | all completions that are not learnt from |
        | `rounds` | of drawing prompts |
        | `generated_tokens`, `generate_seconds`, `reward_seconds` | cost |

        A mean over nothing is left out.
        """
        samples = self.samples
        found: dict[str, list[float]] = {"reward": [s.total for s in samples if s.total is not None]}
        for name in samples[0].parts:
            found[f"reward/{name}"] = _numbers(sample.parts[name] for sample in samples)
        shares = are_shares(sample.parts[self.correct] for sample in samples)
        found["accuracy" if shares else "score"] = found[f"reward/{self.correct}"]
        found["length"] = [float(sample.completion.length) for sample in samples]
        if self.dialogue:
            found["turns"] = [float(sample.completion.turns) for sample in samples]
        found["truncated"] = [float(not sample.completion.ended) for sample in samples]
        metrics = {name: sum(values) / len(values) for name, values in found.items() if values}
        if self.live_groups is not None and self.groups:
            metrics["live_groups"] = self.live_groups / self.groups
        failed = [any(isinstance(part, Failed) for part in sample.parts.values()) for sample in samples]
        unscored = [sample.total is None for sample in samples]
        return {
            **metrics,
            "rows": float(len(self.rows)),
            "failed": float(sum(failed)),
            "unscored": float(sum(unscored) - sum(failed)),
            "left_out": float(sum(sample.row is None for sample in samples)),
            "rounds": float(self.rounds),
            "generated_tokens": sum(found["length"]),
            "generate_seconds": self.generate_seconds,
            "reward_seconds": self.reward_seconds,
        }

    def lines(self, tokenizer: Tokenizer, advantage: Tensor | None = None) -> Iterator[dict[str, Any]]:
        """One JSON-able record per sample, for the completions file.

        Args:
            tokenizer: writes the prompts as text.
            advantage: [B, T] Psi_t of the trajectory's rows, or None. A record's `advantage` is its mean over the
                chosen tokens; `token_advantage` has one per token where they differ. Replies have none and no log-prob.
        """
        for sample in self.samples:
            yield {
                "update": self.update,
                "example": sample.example,
                "group": sample.group,
                "prompt": tokenizer.decode(sample.prompt, special=True),
                "completion": sample.text,
                "reward": {name: _plain(outcome) for name, outcome in sample.parts.items()},
                "total": sample.total,
                **_advantages(sample, advantage),
                "ended": sample.completion.ended,
                "left_out": sample.left_out,
                "tokens": list(sample.completion.tokens),
                "log_prob": [None if math.isnan(value) else value for value in sample.completion.log_prob],
            }


class CompletionCollector:
    """Completes the task's prompts with the policy, several times each, and scores what comes out; a `Collector`.

    The completions of one prompt are neighbouring rows and a group. What a reward failed on, or none applies to, leaves
    its group and is counted, and so does the last one of a group. Every sample is drawn from a stream of its own, by
    (update, round, prompt, sample): the same update always draws the same from the same weights.

    Args:
        task: prompts, stop strings, the name of the part that is 1 for a right answer.
        tokenizer: of the policy.
        engine: draws with the policy's weights.
        rewards: scores; closed with the collector.
        config: how many, how long, how drawn.
        seed: of the run.
        context: most tokens that the model reads (`LanguagePolicy.context`).

    Attributes:
        last: what the last update drew; None before the first.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        engine: Engine,
        rewards: Scorer,
        config: CompletionConfig,
        *,
        seed: int,
        context: int,
    ) -> None:
        self._source = SampleSource(
            task=task,
            tokenizer=tokenizer,
            engine=engine,
            rewards=rewards,
            sampling=config.sampling,
            group=config.group,
            limit=config.limit,
            context=context,
            overlong=config.overlong,
        )
        self._config = config
        self._order = ExampleOrder(len(task.training), seed=seed)
        self.last: Collected | None = None

    def collect(self, policy: Policy, update: int) -> Trajectory:
        """Complete the next prompts and seal the completions.

        Args:
            policy: whose weights the engine draws with.
            update: version of these weights.

        Raises:
            UsageError: if a prompt does not fit the context, or the rewards leave nothing to learn from.
            NonFiniteError: if a log-prob or a reward is not finite.
        """
        engine = self._source.engine
        if engine.version != update:
            engine.update(update)
        drawing = _Drawing(config=self._config)
        while drawing.wanted:
            self._draw(update, drawing)
        batch = drawing.batch()
        if not batch:
            raise UsageError(
                f"update {update}: the rewards left nothing of {len(drawing.samples)} completions to learn from: "
                + reasons(drawing.samples.values())
            )
        self.last = drawing.collected(update, self._source.task, batch)
        return self._seal(self.last)

    def _draw(self, update: int, drawing: _Drawing) -> None:
        """One more round of prompts."""
        indices = self._order.take(drawing.wanted)
        keys = [(update, drawing.rounds, number) for number in range(len(indices))]
        drawn = self._source.draw(self._source.task.training, indices, keys, "training example")
        drawing.generate_seconds += drawn.generate_seconds
        drawing.reward_seconds += drawn.reward_seconds
        drawing.add(drawn.groups)

    def _seal(self, collected: Collected) -> Trajectory:
        rows = collected.rows
        return build_rows(
            [
                TokenRow(
                    prompt=sample.prompt,
                    answer=sample.completion.tokens,
                    chosen=sample.completion.chosen,
                    log_prob=sample.completion.log_prob,
                    reward=0.0 if sample.total is None else sample.total,
                    ended=sample.completion.ended,
                    hidden=self._config.mask_truncated and not sample.completion.ended,
                )
                for sample in rows
            ],
            end_token=self._source.tokenizer.end_token,
            group=None if self._config.group == 1 else [sample.group for sample in rows if sample.group is not None],
            version=min(sample.completion.version for sample in rows),
        )

    def metrics(self) -> dict[str, float]:
        """Of the last update; nothing before the first."""
        return {} if self.last is None else self.last.metrics()

    def snapshot(self) -> Tree:
        """Which prompts come next; everything random is derived."""
        return {"examples": self._order.snapshot()}

    def restore(self, tree: Tree) -> None:
        """Go on exactly there.

        Raises:
            ValueError: if it was made with another number of examples.
        """
        self._order.restore(tree["examples"])

    def close(self) -> None:
        """Give back the rewards' processes."""
        self._source.rewards.close()


class _Drawing:
    """The samples of one update while its rounds go on: groups that can be learnt from, and those without spread."""

    def __init__(self, *, config: CompletionConfig) -> None:
        self._config = config
        self._kept: list[list[int]] = []
        self._equal: list[list[int]] = []
        self._live = 0
        self._hopeless = False
        self.samples: dict[int, Sample] = {}
        self.rounds = 0
        self.generate_seconds = 0.0
        self.reward_seconds = 0.0

    @property
    def wanted(self) -> int:
        """Prompts to draw in the next round: none once the batch is full, the rounds are used up, or nothing scores."""
        if self._hopeless or self.rounds > self._config.refill:
            return 0
        return self._config.prompts - len(self._kept)

    def add(self, groups: Sequence[Group]) -> None:
        """What a round brought."""
        self.rounds += 1
        scored_groups = 0
        for group in groups:
            first = len(self.samples)
            self.samples.update(enumerate(group, start=first))
            scored = [place for place in range(first, first + len(group)) if self.samples[place].total is not None]
            if self._config.group > 1 and len(scored) < 2:
                self._leave(scored, "alone in its group, the others were left out")
                continue
            scored_groups += bool(scored)
            live = self._config.group > 1 and has_spread(self.samples[place] for place in scored)
            self._live += live
            if scored:
                (self._kept if live or not self._config.refill else self._equal).append(scored)
        self._hopeless = scored_groups == 0

    def batch(self) -> list[list[int]]:
        """The groups to learn from; groups without spread only where there are no others."""
        if self._kept:
            return self._kept
        return self._equal[: self._config.prompts]

    def collected(self, update: int, task: Task, batch: Sequence[Sequence[int]]) -> Collected:
        """Everything, with rows and groups numbered."""
        row = 0
        for number, group in enumerate(batch):
            for place in group:
                label = number if self._config.group > 1 else None
                self.samples[place] = replace(self.samples[place], row=row, group=label)
                row += 1
        for group in self._equal:
            self._leave(
                [place for place in group if self.samples[place].row is None], "all rewards of its group are equal"
            )
        return Collected(
            update=update,
            samples=tuple(self.samples.values()),
            correct=task.correct,
            dialogue=task.dialogue is not None,
            groups=len(self._kept) + len(self._equal),
            live_groups=self._live if self._config.group > 1 else None,
            rounds=self.rounds,
            generate_seconds=self.generate_seconds,
            reward_seconds=self.reward_seconds,
        )

    def _leave(self, places: Sequence[int], why: str) -> None:
        for place in places:
            self.samples[place] = replace(self.samples[place], left_out=why)


def _numbers(outcomes: Iterable[Outcome]) -> list[float]:
    return [float(outcome) for outcome in outcomes if isinstance(outcome, int | float)]


def _plain(outcome: Outcome) -> float | Mapping[str, str] | None:
    """An outcome as JSON holds it: a number, null for "not applicable", or why it failed."""
    if isinstance(outcome, Failed):
        return {"failed": outcome.reason}
    return float(outcome) if isinstance(outcome, int | float) else None


def _advantages(sample: Sample, advantage: Tensor | None) -> dict[str, Any]:
    if advantage is None or sample.row is None:
        return {"advantage": None, "token_advantage": None}
    first, completion = len(sample.prompt) - 1, sample.completion
    every = advantage[sample.row, first : first + len(completion.tokens)].tolist()
    chosen = (True,) * len(every) if completion.chosen is None else completion.chosen
    values = [value for value, own in zip(every, chosen, strict=True) if own]
    alike = all(value == values[0] for value in values)
    tokens = [value if own else None for value, own in zip(every, chosen, strict=True)]
    return {
        "advantage": values[0] if alike else sum(values) / len(values),
        "token_advantage": None if alike else tokens,
    }

"""Judging a language model on held-out examples: its likeliest completion, drawn ones, and what it makes of answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from upslope.algorithms import KTO
from upslope.algorithms.pairs import told_right
from upslope.collect.conversations import demonstration, role_of
from upslope.collect.experience import CompletionConfig, DemonstrationConfig, PairConfig
from upslope.collect.pairs import PairCollector
from upslope.collect.rewards.protocol import Failed, are_shares
from upslope.collect.samples import Sample, SampleSource
from upslope.collect.text_rows import TokenRow, build_rows, check_length
from upslope.errors import UsageError
from upslope.policies.language.sampling import Sampling
from upslope.train.language.config import LanguageRun
from upslope.train.language.frozen import HELD_OUT_PAIRS, Frozen, engine_of, evaluation_seed, on_device, sampling_of
from upslope.trajectory import Trajectory

if TYPE_CHECKING:
    from upslope.policies.language.policy import LanguagePolicy

_ROWS = 64
"""Given answers judged at once."""
_SLOTS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownCompletion:
    """A prompt and what the policy most likely answers.

    Attributes:
        example: index among the held-out ones.
        prompt, completion: texts.
        total: what the completion is worth; None where a reward failed or none applies.
    """

    example: int
    prompt: str
    completion: str
    total: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageReport:
    """How good a language model was on held-out examples.

    | figure | meaning |
    |---|---|
    | greedy_accuracy, sampled_accuracy | mean of the part that is 1 for a right answer |
    | pass@K | how likely one of K drawn completions is right, mean over prompts (unbiased) |
    | greedy_score, sampled_score | in place of these, where a value of that part lies outside [0, 1] |
    | greedy_length, sampled_length | tokens that the policy chose |
    | greedy_truncated, sampled_truncated | share that the length limit cut |
    | greedy/NAME, sampled/NAME | mean of each part of the reward where it applies |
    | greedy_failed, sampled_failed | completions on which a reward or a reply failed; they count in no mean |
    | nll | mean negative log-likelihood per token of the given answers (of the good ones, where some are bad) |
    | pair_accuracy | share of pairs whose chosen answer is rewarded more |
    | prompts | how many were asked |

    Attributes:
        figures: those that could be measured, by name.
        score: what the best policy has most of: greedy accuracy or score, else pair accuracy, else -nll.
        shown: a few completions.
    """

    figures: Mapping[str, float]
    score: float
    shown: tuple[ShownCompletion, ...]

    def record(self) -> dict[str, float | int]:
        """As metrics.jsonl keeps it."""
        return dict(self.figures)


class SamplesKeeper(Protocol):
    """Who keeps the completions of the first and the last evaluation."""

    def keep(self, index: int, shown: Sequence[ShownCompletion]) -> None:
        """Those of the evaluation after `index` updates."""
        ...


class LanguageEvaluator:
    """Judges the policy of one run, on streams of its own; an `Evaluator`.

    Args:
        run: the configuration.
        frozen: what the run begins with.
        samples: keeps some completions, or None.

    Raises:
        UsageError: if there is nothing held out to judge by.
    """

    def __init__(self, run: LanguageRun, frozen: Frozen, samples: SamplesKeeper | None) -> None:
        self._run = run
        self._frozen = frozen
        self._samples = samples
        task = frozen.task
        self._count = min(run.evaluation.prompts, len(task.held_out))
        if run.evaluation.times and not self._count and HELD_OUT_PAIRS not in frozen.pairs:
            raise UsageError(
                f"the task {task.name!r} holds out no examples to judge by: give some, or set evaluation.times to 0"
            )
        slots = run.experience.slots if isinstance(run.experience, CompletionConfig) else _SLOTS
        self._engine = engine_of(frozen.policy, evaluation_seed(run), slots)

    @property
    def times(self) -> int:
        """How often the policy is judged during the run: as configured, but with enough updates in between."""
        settings = self._run.evaluation
        return min(settings.times, self._run.steps // settings.updates_between)

    @property
    def first(self) -> bool:
        """Whether the policy is judged before the first update."""
        return self._run.evaluation.times > 0

    @property
    def last(self) -> bool:
        """Whether it is judged at the end."""
        return self._run.evaluation.times > 0

    def evaluate(self, policy: LanguagePolicy, *, index: int, final: bool) -> LanguageReport:
        """Judge it.

        Args:
            policy: of the run.
            index: updates so far; decides what is drawn.
            final: whether it is the one at the end; all are made alike.
        """
        figures: dict[str, float] = {}
        shown: tuple[ShownCompletion, ...] = ()
        if self._frozen.rewards is not None and not self._run.judges_pairs:
            self._engine.update(index)
            try:
                of_completions, shown = self._of_completions(index)
            finally:
                self._engine.release()
            figures |= of_completions
        if isinstance(self._run.experience, DemonstrationConfig):
            figures |= self._of_answers(policy)
        figures |= self._of_pairs(policy)
        report = LanguageReport(figures=figures, score=_score(figures), shown=shown)
        if self._samples is not None and shown:
            self._samples.keep(index, shown)
        return report

    def close(self) -> None:
        """Nothing to give back: the rewards are the session's."""

    def _of_completions(self, index: int) -> tuple[dict[str, float], tuple[ShownCompletion, ...]]:
        settings, figures = self._run.evaluation, dict[str, float]()
        greedy = self._draw(Sampling(temperature=0.0), 1, (index, 0))
        sampled = self._draw(sampling_of(self._run), settings.samples, (index, 1))
        correct = self._frozen.task.correct
        shares = are_shares(sample.parts[correct] for group in (*greedy, *sampled) for sample in group)
        for name, groups in (("greedy", greedy), ("sampled", sampled)):
            figures |= _means(name, [sample for group in groups for sample in group], correct, shares=shares)
        for k in settings.pass_at if shares else ():
            chances = [_pass_at(group, correct, k) for group in sampled]
            known = [chance for chance in chances if chance is not None]
            if known:
                figures[f"pass@{k}"] = sum(known) / len(known)
        figures["prompts"] = self._count
        tokenizer = self._frozen.policy.tokenizer
        shown = tuple(
            ShownCompletion(
                example=sample.example,
                prompt=tokenizer.decode(sample.prompt, special=True),
                completion=sample.text,
                total=sample.total,
            )
            for (sample,) in greedy[: settings.shown]
        )
        return figures, shown

    def _draw(self, sampling: Sampling, group: int, key: tuple[int, int]) -> tuple[tuple[Sample, ...], ...]:
        run, frozen = self._run, self._frozen
        assert frozen.rewards is not None
        source = SampleSource(
            task=frozen.task,
            tokenizer=frozen.policy.tokenizer,
            engine=self._engine,
            rewards=frozen.rewards,
            sampling=sampling,
            group=group,
            limit=_limit(run),
            context=frozen.policy.context,
        )
        indices = range(self._count)
        keys = [(*key, number) for number in indices]
        return source.draw(frozen.task.held_out, indices, keys, "held-out example").groups

    @torch.no_grad()
    def _of_answers(self, policy: LanguagePolicy) -> dict[str, float]:
        """The mean negative log-likelihood of the held-out answers."""
        total, tokens = 0.0, 0
        for trajectory in self._answers(policy):
            log_prob = policy.evaluate(on_device(self._run.device, trajectory)).log_prob
            total -= float(log_prob.double().sum())
            tokens += int(trajectory.mask.sum())
        return {"nll": total / tokens, "prompts": self._count} if tokens else {}

    def _answers(self, policy: LanguagePolicy) -> Iterator[Trajectory]:
        rows = (self._answer(index) for index in range(self._count))
        present = (row for row in rows if row is not None)
        while part := list(islice(present, _ROWS)):
            yield build_rows(part, end_token=policy.tokenizer.end_token)

    def _answer(self, index: int) -> TokenRow | None:
        policy, task = self._frozen.policy, self._frozen.task
        example, where = task.held_out[index], f"held-out example {index} of task {task.name!r}"
        if example.completion is None or (
            isinstance(self._run.algorithm, KTO) and not example.columns.get("label", True)
        ):
            return None
        row = demonstration(policy.tokenizer, example, where, role=role_of(task))
        check_length(row, policy.context, where)
        return row

    @torch.no_grad()
    def _of_pairs(self, policy: LanguagePolicy) -> dict[str, float]:
        """How often the chosen answer of a held-out pair is worth more than the rejected one; nothing without pairs."""
        run, frozen = self._run, self._frozen
        experience = run.experience
        if not isinstance(experience, PairConfig):
            return {}
        pairs = frozen.task.held_out
        if experience.drawn is not None:
            if HELD_OUT_PAIRS not in frozen.pairs:
                return {}
            pairs = frozen.pairs[HELD_OUT_PAIRS]
        elif frozen.task.held_out[0].rejected is None:
            return {}
        count = min(run.evaluation.prompts, len(pairs))
        collector = PairCollector(pairs, policy.tokenizer, experience, seed=0, context=policy.context)
        right = 0.0
        for first in range(0, count, _ROWS // 2):
            part = range(first, min(first + _ROWS // 2, count))
            worth = self._worth(policy, collector.take(part, version=0))
            right += float(told_right(worth[0::2], worth[1::2]).sum())
        return {"pair_accuracy": right / count, "pairs": count}

    def _worth(self, policy: LanguagePolicy, trajectory: Trajectory) -> Tensor:
        """[B] what the policy makes of whole answers: its reward, its log-ratio to the reference, or its log-prob."""
        trajectory = on_device(self._run.device, trajectory)
        evaluation, mask = policy.evaluate(trajectory), trajectory.mask
        if self._run.judges_pairs:
            assert evaluation.value is not None
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).amax(-1, keepdim=True)
            return evaluation.value.gather(-1, last).squeeze(-1)
        if self._frozen.reference is not None:
            return (evaluation.log_prob - self._frozen.reference.evaluate(trajectory).log_prob).sum(-1)
        return evaluation.log_prob.sum(-1) / mask.sum(-1)


def _limit(run: LanguageRun) -> int:
    """Most tokens of a completion: as in training, where that draws any."""
    experience = run.experience
    if isinstance(experience, CompletionConfig):
        return experience.limit
    if isinstance(experience, PairConfig) and experience.drawn is not None:
        return experience.limit
    return run.evaluation.limit


def _score(figures: Mapping[str, float]) -> float:
    for name in ("greedy_accuracy", "greedy_score", "pair_accuracy"):
        if name in figures:
            return figures[name]
    return -figures["nll"] if "nll" in figures else -math.inf


def _means(name: str, samples: Sequence[Sample], correct: str, *, shares: bool) -> dict[str, float]:
    """Means over those completions to which each figure applies; `shares` as `are_shares` has it."""
    found: dict[str, float] = {}
    for part in samples[0].parts:
        outcomes = [sample.parts[part] for sample in samples]
        numbers = [float(outcome) for outcome in outcomes if isinstance(outcome, int | float)]
        if numbers:
            found[f"{name}/{part}"] = sum(numbers) / len(numbers)
    if f"{name}/{correct}" in found:
        found[f"{name}_{'accuracy' if shares else 'score'}"] = found[f"{name}/{correct}"]
    count = len(samples)
    found[f"{name}_length"] = sum(sample.completion.length for sample in samples) / count
    found[f"{name}_truncated"] = sum(not sample.completion.ended for sample in samples) / count
    failed = [any(isinstance(outcome, Failed) for outcome in sample.parts.values()) for sample in samples]
    found[f"{name}_failed"] = float(sum(failed))
    return found


def pass_at(count: int, right: int, k: int) -> float:
    """How likely one of k completions is right, unbiased from `count` of which `right` are.

        1 - C(n - c, k) / C(n, k)

    Source: Chen et al. 2021, equation 1.

    >>> pass_at(4, 1, 1), pass_at(4, 1, 2), pass_at(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    if not 1 <= k <= count or not 0 <= right <= count:
        raise ValueError(f"k must lie between 1 and count={count}, and right between 0 and it; got {k} and {right}")
    return 1.0 - math.comb(count - right, k) / math.comb(count, k)


def _pass_at(group: Sequence[Sample], correct: str, k: int) -> float | None:
    """Of one prompt; None if fewer than k of its completions could be judged."""
    outcomes = [sample.parts[correct] for sample in group]
    judged = [outcome for outcome in outcomes if isinstance(outcome, int | float)]
    if len(judged) < k:
        return None
    return pass_at(len(judged), sum(outcome >= 1.0 for outcome in judged), k)

"""What a loss follows, in plain words: its mean ascent direction held against every candidate gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from upslope.auditing.candidates import ROUNDING, Candidate, candidates_of
from upslope.auditing.loss import LossFunction, LossSource, asked_for
from upslope.auditing.moments import FEWEST, Moments, exact_moments, sampled_moments
from upslope.auditing.place import Problem, setting_of
from upslope.auditing.report import AuditReport
from upslope.auditing.setting import FiniteSetting
from upslope.auditing.tokens import TokenSetting
from upslope.errors import UsageError
from upslope.trajectory import Trajectory

Follows: TypeAlias = Literal["unbiased", "proportional", "combination", "none", "nothing", "constant", "undetermined"]
"""One gradient itself; a multiple of one; a sum of several; none of the candidates; no direction on average; no
direction in any batch; or the problem has too few directions to tell."""

DEFAULT_SAMPLES = 20_000
"""Trajectories drawn where there are too many batches to weight them all."""

MOST_WEIGHTED = 20_000
"""Batches that are weighted one by one; where there are more, batches are drawn."""

_TOO_MANY = (
    f"There are more than {MOST_WEIGHTED:,} batches to weight: about {DEFAULT_SAMPLES:,} trajectories were drawn "
    "instead; samples sets how many."
)

_CONSISTENT = 1e-3

_RIGHT_ANGLE = 0.1
"""A cosine below this points neither uphill nor downhill."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The mean ascent direction beside one exact gradient.

    Attributes:
        name: of the gradient.
        cosine: between the two.
        factor: of the gradient in the mean, by least squares.
    """

    name: str
    cosine: float
    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Following:
    """What a mean ascent direction follows.

    Attributes:
        kind: how well anything is followed.
        target_name: what is followed, or what is closest, with its factor.
        target: [P] that, as nearly as it comes to the mean.
        downhill: whether it is followed downhill.
        comparisons: with each single gradient, in the order of the candidates.
        exact: whether every batch was weighted; else this is as far as the drawn batches show.
        alike: other gradients that the drawn batches cannot tell from the one named.
    """

    kind: Follows
    target_name: str
    target: Tensor
    downhill: bool
    comparisons: tuple[Comparison, ...]
    exact: bool = True
    alike: tuple[str, ...] = ()

    @property
    def closest(self) -> Comparison:
        """The single gradient with the smallest angle to the mean, or to its opposite; the first of equals."""
        return max(self.comparisons, key=lambda comparison: round(abs(comparison.cosine), 9))

    def comparison(self, name: str) -> Comparison:
        """With one gradient.

        Raises:
            KeyError: if there is none of that name.
        """
        for found in self.comparisons:
            if found.name == name:
                return found
        raise KeyError(f"no candidate is called {name!r}; there are {[found.name for found in self.comparisons]}")

    def __str__(self) -> str:
        """One line."""
        text = self._in_words()
        if self.downhill:
            text = f"points downhill: {text}"
        if self.exact:
            return text
        others = f"; so would {' and '.join(self.alike)} be" if self.alike else ""
        return f"{text} (as far as the drawn batches show{others})"

    def _in_words(self) -> str:
        if self.kind == "unbiased":
            return f"unbiased for {self.target_name}"
        if self.kind == "proportional":
            return f"proportional to {self.closest.name} (factor {self.closest.factor:.4g})"
        if self.kind == "combination":
            return f"follows {self.target_name}"
        if self.kind == "nothing":
            return "follows nothing: its mean gradient is 0, and what single batches have is noise"
        if self.kind == "constant":
            return (
                "follows nothing: the loss does not depend on the policy's log-probabilities here, its gradient is 0 "
                "in every batch"
            )
        if self.kind == "undetermined":
            return (
                "follows anything and nothing: this problem has too few directions to tell the gradients apart; audit "
                "it on another one"
            )
        found = self.closest
        cosine = abs(found.cosine) if self.downhill else found.cosine
        angle = math.degrees(math.acos(max(min(cosine, 1.0), -1.0)))
        return f"follows none of these: closest {found.name}, cosine {found.cosine:.4f}, angle {angle:.3g} degrees"


@dataclass(frozen=True, kw_only=True, slots=True)
class LossAudit:
    """What was found of a loss of the user's own.

    Attributes:
        name: of the function.
        following: what it follows.
        report: its bias and spread against that.
        note: why batches were drawn, if nobody asked for that.
    """

    name: str
    following: Following
    report: AuditReport
    note: str = ""

    def tree(self) -> dict[str, object]:
        """For machines: what it follows, beside each single gradient, and the report's figures."""
        beside = {found.name: {"cosine": found.cosine, "factor": found.factor} for found in self.following.comparisons}
        words = {"follows": str(self.following), "kind": self.following.kind, "downhill": self.following.downhill}
        return {**words, "beside": beside, **self.report.tree()}

    def __str__(self) -> str:
        """What it follows, the report, and the angle to each single gradient."""
        width = max(len(found.name) for found in self.following.comparisons)
        table = [
            f"  {found.name:<{width}}  {found.cosine:9.6f}  {found.factor:10.4g}"
            for found in self.following.comparisons
        ]
        head = f"  {'beside each exact gradient':<{width}}  {'cosine':>9}  {'factor':>10}"
        note = [self.note] if self.note else []
        return "\n".join([f"{self.name}: {self.following}", *note, "", str(self.report), "", head, *table])


@torch.enable_grad()
def audit_loss(
    function: LossFunction,
    problem: Problem = "tokens",
    *,
    samples: int | None = None,
    size: int = 2,
    gamma: float | None = None,
    seed: int = 0,
) -> LossAudit:
    """Find out what a loss follows.

    Every batch there can be is weighted by its probability: of whole episodes one by one, of completions group by
    group. Where there are more than `MOST_WEIGHTED` of them, `DEFAULT_SAMPLES` trajectories are drawn. A loss that uses
    what several batches have in common, such as a batch's standard deviation, is better asked for `samples`, drawn in
    batches of 32 episodes or 4 groups.

    Args:
        function: the loss; see `upslope.auditing.loss` for what it can ask for.
        problem: a name (`upslope.exact.TOKEN_PROBLEMS` and `PROBLEMS`), a problem of your own, which gets a random
            policy, or a setting of your own.
        samples: how many trajectories to draw; None draws only where it must.
        size: completions in a group; a setting has its own.
        gamma: discount of a control problem; the problem's own if None.
        seed: of the policy's parameters (a setting has its own), and of the drawing.

    Raises:
        UsageError: if there is no such problem, its exact gradient is 0 or not defined, samples are too few, or the
            function asks for what is not there, or returns no loss.
    """
    asked_for(function)
    setting = setting_of(problem, size, gamma, seed)
    candidates = candidates_of(setting)
    if not candidates:
        raise UsageError(
            f"the exact gradient is 0 on {setting.name}: nothing to hold a loss against. Choose a problem whose "
            "rewards depend on the actions"
        )
    tokens = isinstance(setting, TokenSetting)
    source = LossSource(function, gamma=setting.gamma if tokens else setting.mdp.gamma)
    if tokens:
        source = replace(source, reference=setting.reference)
    ascents, moments = _measured(source, setting, samples, seed)
    rows = 1 if moments.exact else setting.rows
    following = what_it_follows(moments, candidates, directions=_directions(ascents))
    report = AuditReport(
        subject=source.name,
        problem=setting.name,
        target_name=following.target_name,
        target=following.target,
        moments=moments,
        trajectories=rows * setting.trajectories_per_row,
        steps=rows * setting.steps_per_row,
        batches=len(ascents),
    )
    return LossAudit(
        name=source.name, following=following, report=report, note=_TOO_MANY if samples is None and rows > 1 else ""
    )


def _measured(
    source: LossSource, setting: TokenSetting | FiniteSetting, samples: int | None, seed: int
) -> tuple[Tensor, Moments]:
    """[K, P] the ascent of each batch, and what is known of it."""
    policy, parameters = setting.policy, setting.parameters
    weighted = _every(setting) if samples is None else None
    if weighted is not None:
        ascents = torch.stack([source.ascent(policy, parameters, batch) for _, batch in weighted])
        return ascents, exact_moments((chance, own) for (chance, _), own in zip(weighted, ascents, strict=True))
    batches = _batches(setting, samples)
    ascents = torch.stack([source.ascent(policy, parameters, batch) for batch in setting.drawn(batches, seed)])
    return ascents, sampled_moments(ascents)


def _every(setting: TokenSetting | FiniteSetting) -> list[tuple[float, Trajectory]] | None:
    """All batches with their probabilities; None if there are too many."""
    try:
        found = list(islice(setting.every(), MOST_WEIGHTED + 1))
    except ValueError:
        return None
    return None if len(found) > MOST_WEIGHTED else found


def _batches(setting: TokenSetting | FiniteSetting, samples: int | None) -> int:
    """How many batches have this many trajectories."""
    each = setting.rows * setting.trajectories_per_row
    if samples is None:
        return max(math.ceil(DEFAULT_SAMPLES / each), FEWEST)
    if samples <= (FEWEST - 1) * each:
        raise UsageError(
            f"{samples} samples are too few to know their spread: at least {FEWEST} batches of {each:g} trajectories "
            f"are needed. Ask for {math.ceil(FEWEST * each)} samples or more"
        )
    return math.ceil(samples / each)


def _directions(ascents: Tensor) -> int:
    """How many independent directions the batches have, counted up to 64."""
    generator = torch.Generator().manual_seed(0)
    few = ascents
    for _ in range(2):
        if few.shape[1] > 64:
            few = few @ torch.randn(few.shape[1], 64, generator=generator, dtype=few.dtype)
        few = few.mT
    return int(torch.linalg.matrix_rank(few))


def what_it_follows(moments: Moments, candidates: Sequence[Candidate], *, directions: int) -> Following:
    """The simplest candidate that the mean follows, or the closest one.

    Args:
        moments: of the ascent direction.
        candidates: the simplest first; at least one is a single gradient.
        directions: how many independent directions the batches have; a candidate of as many terms fits anything. 0 if
            all of them are 0.
    """
    mean = moments.mean
    singles = [candidate for candidate in candidates if len(candidate.terms) == 1]
    comparisons = tuple(_compare(candidate, mean) for candidate in singles)

    def found(
        kind: Follows, name: str, target: Tensor, *, downhill: bool = False, alike: tuple[str, ...] = ()
    ) -> Following:
        return Following(
            kind=kind,
            target_name=name,
            target=target,
            downhill=downhill,
            comparisons=comparisons,
            exact=moments.exact,
            alike=alike,
        )

    first = singles[0]
    if directions == 0:
        return found("constant", first.terms[0], first.basis[0])
    if _nothing_left(moments, mean, scale=math.sqrt(moments.variance)):
        return found("nothing", first.terms[0], first.basis[0])
    by_distance = sorted(singles, key=lambda single: float((mean - single.basis[0]).norm()))
    same = [one for one in by_distance if _nothing_left(moments, mean - one.basis[0], scale=float(mean.norm()))]
    if same:
        alike = tuple(one.terms[0] for one in same[1:])
        return found("unbiased", same[0].terms[0], same[0].basis[0], alike=alike)
    if directions <= 1:
        return found("undetermined", first.terms[0], first.basis[0])
    closest = max(range(len(singles)), key=lambda index: round(abs(comparisons[index].cosine), 9))
    factor, downhill = comparisons[closest].factor, comparisons[closest].factor < 0.0
    name = f"{abs(factor):.4g} x {singles[closest].terms[0]}"
    target = abs(factor) * singles[closest].basis[0]
    parallel = [
        one
        for one, compared in zip(singles, comparisons, strict=True)
        if _nothing_left(moments, mean - compared.factor * one.basis[0], scale=float(mean.norm()))
    ]
    if any(one is singles[closest] for one in parallel):
        lines = [singles[closest]]
        for one in parallel:
            if not any(_same_line(one, other) for other in lines):
                lines.append(one)
        alike = tuple(one.terms[0] for one in lines[1:])
        return found("proportional", name, target, downhill=downhill, alike=alike)
    for candidate in candidates:
        if 1 < len(candidate.terms) < directions:
            nearest = candidate.nearest(mean)
            if _nothing_left(moments, mean - nearest, scale=float(mean.norm())):
                return found("combination", candidate.in_words(candidate.factors(mean)), nearest)
    if abs(comparisons[closest].cosine) < _RIGHT_ANGLE:
        return found("none", singles[closest].terms[0], singles[closest].basis[0])
    return found("none", name, target, downhill=downhill)


def _compare(candidate: Candidate, mean: Tensor) -> Comparison:
    gradient = candidate.basis[0]
    along = float(mean @ gradient)
    return Comparison(
        name=candidate.terms[0],
        cosine=along / max(float(mean.norm() * gradient.norm()), 1e-300),
        factor=along / float(gradient @ gradient),
    )


def _same_line(one: Candidate, other: Candidate) -> bool:
    return abs(float(torch.nn.functional.cosine_similarity(one.basis[0], other.basis[0], dim=0))) > 1.0 - 1e-9


def _nothing_left(moments: Moments, rest: Tensor, *, scale: float) -> bool:
    """Whether the rest is rounding, or what the drawn batches cannot tell from 0.

    In directions that were never drawn, as those of prefixes that hardly ever occur, it may be as long as the standard
    error of the mean.
    """
    rounding = ROUNDING * scale
    if moments.exact:
        return float(rest.norm()) <= rounding
    error = math.sqrt(moments.variance_of_mean)
    return moments.p_value(rest) > _CONSISTENT and moments.undrawn(rest) <= max(rounding, error)

"""What a loss follows, in plain words: its mean ascent direction held against every candidate gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from upslope.auditing.candidates import ROUNDING, Candidate, candidates_of
from upslope.auditing.loss import LossFunction, LossSource
from upslope.auditing.moments import Moments, exact_moments, sampled_moments
from upslope.auditing.report import AuditReport
from upslope.auditing.setting import FiniteSetting
from upslope.auditing.tokens import TokenSetting
from upslope.errors import UsageError
from upslope.exact import PROBLEMS, TOKEN_PROBLEMS, problem

Follows: TypeAlias = Literal["unbiased", "proportional", "combination", "none", "nothing", "undetermined"]
"""One gradient itself; a multiple of one; a sum of several; none of the candidates; no direction on average; or the
problem has too few directions to tell."""

_CONSISTENT = 1e-3


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
    """

    kind: Follows
    target_name: str
    target: Tensor
    downhill: bool
    comparisons: tuple[Comparison, ...]
    exact: bool = True

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
        if self.downhill and self.kind != "nothing":
            text = f"points downhill: {text}"
        return text if self.exact else f"{text} (as far as the drawn batches show)"

    def _in_words(self) -> str:
        if self.kind == "unbiased":
            return f"unbiased for {self.target_name}"
        if self.kind == "proportional":
            return f"proportional to {self.closest.name} (factor {self.closest.factor:.4g})"
        if self.kind == "combination":
            return f"follows {self.target_name}"
        if self.kind == "nothing":
            return "follows nothing: its mean gradient is 0, and what single batches have is noise"
        if self.kind == "undetermined":
            return (
                "follows anything and nothing: this problem has too few directions to tell the gradients apart; audit "
                "it on another one"
            )
        found = self.closest
        angle = math.degrees(math.acos(min(abs(found.cosine), 1.0)))
        return f"follows none of these: closest {found.name}, cosine {found.cosine:.4f}, angle {angle:.3g} degrees"


@dataclass(frozen=True, kw_only=True, slots=True)
class LossAudit:
    """What was found of a loss of the user's own.

    Attributes:
        name: of the function.
        following: what it follows.
        report: its bias and spread against that.
    """

    name: str
    following: Following
    report: AuditReport

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
        return "\n".join([f"{self.name}: {self.following}", "", str(self.report), "", head, *table])


def audit_loss(
    function: LossFunction,
    on: str | TokenSetting | FiniteSetting = "tokens",
    *,
    samples: int | None = None,
    size: int = 2,
    gamma: float | None = None,
    seed: int = 0,
) -> LossAudit:
    """Find out what a loss follows.

    Every batch there can be is weighted by its probability: of whole episodes one by one, of completions group by
    group. A loss that uses what several of them have in common, such as a batch's standard deviation, is better asked
    for `samples`, drawn in batches of 32 episodes or 4 groups.

    Args:
        function: the loss; see `upslope.auditing.loss` for what it can ask for.
        on: a named problem (`upslope.exact.TOKEN_PROBLEMS` and `PROBLEMS`), or a setting of your own.
        samples: how many trajectories to draw; None weights every batch there is.
        size: completions in a group, on a named completion problem.
        gamma: discount on a named control problem; the problem's own if None.
        seed: of the policy's parameters on a named problem, and of the drawing.

    Raises:
        UsageError: if there is no such problem, or the function asks for what is not there, or returns no loss.
        ValueError: if there are too many batches to weight them all (then ask for `samples`).
    """
    setting = _named(on, size, gamma, seed) if isinstance(on, str) else on
    tokens = isinstance(setting, TokenSetting)
    source = LossSource(
        function,
        gamma=setting.gamma if tokens else setting.mdp.gamma,
        reference=setting.reference if tokens else None,
    )
    parameters, rows = setting.parameters, 1
    if samples is None:
        weighted = [(p, source.ascent(setting.policy, parameters, batch)) for p, batch in setting.every()]
        ascents, moments = torch.stack([ascent for _, ascent in weighted]), exact_moments(weighted)
    else:
        rows = setting.rows
        batches = max(math.ceil(samples / (rows * setting.trajectories_per_row)), 1)
        drawn = setting.drawn(batches, seed)
        ascents = torch.stack([source.ascent(setting.policy, parameters, batch) for batch in drawn])
        moments = sampled_moments(ascents)
    following = what_it_follows(moments, candidates_of(setting), directions=int(torch.linalg.matrix_rank(ascents)))
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
    return LossAudit(name=source.name, following=following, report=report)


def _named(name: str, size: int, gamma: float | None, seed: int) -> TokenSetting | FiniteSetting:
    if name in TOKEN_PROBLEMS:
        return TokenSetting.build(name, size=size, seed=seed)
    if name not in PROBLEMS:
        raise UsageError(f"there is no problem {name!r}; there are: {', '.join((*TOKEN_PROBLEMS, *PROBLEMS))}")
    named = problem(name)
    if named.mdp.kind == "continuing":
        raise UsageError(f"{name} goes on without end, and a loss is audited on whole episodes: choose another problem")
    return FiniteSetting.build(named, gamma=named.mdp.gamma if gamma is None else gamma, unit="episodes", seed=seed)


def what_it_follows(moments: Moments, candidates: Sequence[Candidate], *, directions: int) -> Following:
    """The simplest candidate that the mean follows, or the closest one.

    Args:
        moments: of the ascent direction.
        candidates: the simplest first; at least one is a single gradient.
        directions: how many independent directions the batches have; a candidate of as many terms fits anything.
    """
    mean = moments.mean
    singles = [candidate for candidate in candidates if len(candidate.terms) == 1]
    comparisons = tuple(_compare(candidate, mean) for candidate in singles)

    def found(kind: Follows, name: str, target: Tensor, *, downhill: bool = False) -> Following:
        return Following(
            kind=kind,
            target_name=name,
            target=target,
            downhill=downhill,
            comparisons=comparisons,
            exact=moments.exact,
        )

    first = singles[0]
    if _nothing_left(moments, mean, scale=math.sqrt(moments.variance)):
        return found("nothing", first.terms[0], first.basis[0])
    for candidate in sorted(singles, key=lambda single: float((mean - single.basis[0]).norm())):
        if _nothing_left(moments, mean - candidate.basis[0], scale=float(mean.norm())):
            return found("unbiased", candidate.terms[0], candidate.basis[0])
    if directions <= 1:
        return found("undetermined", first.terms[0], first.basis[0])
    closest = max(range(len(singles)), key=lambda index: round(abs(comparisons[index].cosine), 9))
    factor, downhill = comparisons[closest].factor, comparisons[closest].factor < 0.0
    name = f"{abs(factor):.4g} x {singles[closest].terms[0]}"
    target = abs(factor) * singles[closest].basis[0]
    if _nothing_left(moments, mean - factor * singles[closest].basis[0], scale=float(mean.norm())):
        return found("proportional", name, target, downhill=downhill)
    for candidate in candidates:
        if 1 < len(candidate.terms) < directions:
            nearest = candidate.nearest(mean)
            if _nothing_left(moments, mean - nearest, scale=float(mean.norm())):
                return found("combination", candidate.in_words(candidate.factors(mean)), nearest)
    return found("none", name, target, downhill=downhill)


def _compare(candidate: Candidate, mean: Tensor) -> Comparison:
    gradient = candidate.basis[0]
    along = float(mean @ gradient)
    return Comparison(
        name=candidate.terms[0],
        cosine=along / max(float(mean.norm() * gradient.norm()), 1e-300),
        factor=along / float(gradient @ gradient),
    )


def _nothing_left(moments: Moments, rest: Tensor, *, scale: float) -> bool:
    """Whether the rest is rounding, or what the drawn batches cannot tell from 0."""
    rounding = ROUNDING * scale
    if moments.exact:
        return float(rest.norm()) <= rounding
    return moments.p_value(rest) > _CONSISTENT and moments.undrawn(rest) <= rounding

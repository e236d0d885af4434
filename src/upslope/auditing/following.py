"""What a loss follows, in plain words: its mean ascent direction held against every candidate gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from upslope.auditing.candidates import ROUNDING, Candidate
from upslope.auditing.moments import Moments

Follows: TypeAlias = Literal["unbiased", "proportional", "combination", "none", "nothing", "constant", "undetermined"]
"""One gradient itself; a multiple of one; a sum of several; none of the candidates; no direction on average; no
direction in any batch; or the problem has too few directions to tell."""

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


def what_it_follows(moments: Moments, candidates: Sequence[Candidate], *, directions: int) -> Following:
    """The simplest candidate that the mean follows, or the closest one.

    Args:
        moments: of the ascent direction.
        candidates: the simplest first; at least one is a single gradient.
        directions: how many independent directions the batches have; a candidate of as many terms fits anything. 0 if
            all of them are 0.
    """
    mean, singles = moments.mean, [candidate for candidate in candidates if len(candidate.terms) == 1]
    beside = _Beside(moments, singles, tuple(_compare(single, mean) for single in singles))
    if directions == 0:
        return beside.found("constant", singles[0])
    if beside.nothing_left(mean, scale=math.sqrt(moments.variance)):
        return beside.found("nothing", singles[0])
    same = beside.same()
    if same:
        return beside.found("unbiased", same[0], alike=same[1:])
    if directions <= 1:
        return beside.found("undetermined", singles[0])
    parallel = beside.parallel()
    if parallel:
        return beside.multiple("proportional", alike=parallel[1:])
    for candidate in candidates:
        if 1 < len(candidate.terms) < directions and beside.nothing_left(mean - candidate.nearest(mean)):
            return beside.combined(candidate)
    if abs(beside.comparisons[beside.closest].cosine) < _RIGHT_ANGLE:
        return beside.found("none", singles[beside.closest])
    return beside.multiple("none")


@dataclass(frozen=True, slots=True)
class _Beside:
    """The mean of an ascent direction beside every single gradient, and what can be said of the two."""

    moments: Moments
    singles: Sequence[Candidate]
    comparisons: tuple[Comparison, ...]

    @property
    def closest(self) -> int:
        """Which single gradient has the smallest angle to the mean, or to its opposite; the first of equals."""
        return max(range(len(self.singles)), key=lambda index: round(abs(self.comparisons[index].cosine), 9))

    def nothing_left(self, rest: Tensor, *, scale: float | None = None) -> bool:
        """Whether the rest is rounding, or what the drawn batches cannot tell from 0.

        In directions that were never drawn, as those of prefixes that hardly ever occur, it may be as long as the
        standard error of the mean.

        Args:
            rest: [P].
            scale: what rounding is measured by; the length of the mean if None.
        """
        moments = self.moments
        rounding = ROUNDING * (float(moments.mean.norm()) if scale is None else scale)
        if moments.exact:
            return float(rest.norm()) <= rounding
        error = math.sqrt(moments.variance_of_mean)
        return moments.p_value(rest) > _CONSISTENT and moments.undrawn(rest) <= max(rounding, error)

    def same(self) -> list[Candidate]:
        """The single gradients that the mean is, the nearest first."""
        mean = self.moments.mean
        by_distance = sorted(self.singles, key=lambda single: float((mean - single.basis[0]).norm()))
        return [one for one in by_distance if self.nothing_left(mean - one.basis[0])]

    def parallel(self) -> list[Candidate]:
        """The single gradients that the mean is a multiple of, one of each line, if the closest is among them."""
        mean, closest = self.moments.mean, self.singles[self.closest]
        fitting = [
            one
            for one, compared in zip(self.singles, self.comparisons, strict=True)
            if self.nothing_left(mean - compared.factor * one.basis[0])
        ]
        if not any(one is closest for one in fitting):
            return []
        lines = [closest]
        for one in fitting:
            if not any(_same_line(one, other) for other in lines):
                lines.append(one)
        return lines

    def found(self, kind: Follows, single: Candidate, *, alike: Sequence[Candidate] = ()) -> Following:
        """In words that name a single gradient as it is."""
        return self._following(kind, single.terms[0], single.basis[0], alike=alike)

    def multiple(self, kind: Follows, *, alike: Sequence[Candidate] = ()) -> Following:
        """In words that name the closest gradient with its factor."""
        closest, factor = self.singles[self.closest], self.comparisons[self.closest].factor
        name, target = f"{abs(factor):.4g} x {closest.terms[0]}", abs(factor) * closest.basis[0]
        return self._following(kind, name, target, downhill=factor < 0.0, alike=alike)

    def combined(self, candidate: Candidate) -> Following:
        """In words that name each term of a sum with its factor."""
        mean = self.moments.mean
        return self._following("combination", candidate.in_words(candidate.factors(mean)), candidate.nearest(mean))

    def _following(
        self, kind: Follows, name: str, target: Tensor, *, downhill: bool = False, alike: Sequence[Candidate] = ()
    ) -> Following:
        return Following(
            kind=kind,
            target_name=name,
            target=target,
            downhill=downhill,
            comparisons=self.comparisons,
            exact=self.moments.exact,
            alike=tuple(one.terms[0] for one in alike),
        )


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

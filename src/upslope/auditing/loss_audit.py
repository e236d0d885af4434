"""Find out what a loss of the user's own follows, and how far from that and how scattered it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from upslope.auditing.candidates import candidates_of
from upslope.auditing.following import Following, what_it_follows
from upslope.auditing.loss import LossFunction, LossSource, asked_for
from upslope.auditing.moments import FEWEST, Moments, exact_moments, sampled_moments
from upslope.auditing.place import Problem, setting_of
from upslope.auditing.report import AuditReport
from upslope.auditing.setting import FiniteSetting
from upslope.auditing.tokens import TokenSetting
from upslope.errors import UsageError
from upslope.trajectory import Trajectory

DEFAULT_SAMPLES = 20_000
"""Trajectories drawn where there are too many batches to weight them all."""

MOST_WEIGHTED = 20_000
"""Batches that are weighted one by one; where there are more, batches are drawn."""

_TOO_MANY = (
    f"There are more than {MOST_WEIGHTED:,} batches to weight: about {DEFAULT_SAMPLES:,} trajectories were drawn "
    "instead; samples sets how many."
)


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

"""Run the code that trains many times at fixed parameters, and hold its mean against the exact gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from upslope.algorithms import Algorithm
from upslope.auditing.declared import Circumstances, declaration, in_words, unit_of
from upslope.auditing.moments import Moments, exact_moments, sampled_moments
from upslope.auditing.report import AuditReport
from upslope.auditing.setting import FiniteSetting, Setting
from upslope.auditing.source import AlgorithmSource, Source
from upslope.auditing.tokens import TokenSetting
from upslope.errors import UsageError
from upslope.exact import PROBLEMS, TOKEN_PROBLEMS, NamedProblem, TokenMDP, problem

DEFAULT_SAMPLES = 100_000
"""Trajectories drawn where not every batch can be weighted."""


def measure(setting: Setting, source: Source, *, batches: int | None = None, seed: int = 0) -> tuple[Moments, int]:
    """The moments of the ascent direction, and how many batches they come from.

    Args:
        setting: where.
        source: what computes the ascent of a batch.
        batches: how many to draw; None weights every batch of one row there is.
        seed: of the drawing.
    """
    policy, parameters = setting.policy, setting.parameters
    if batches is None:
        weighted = [(p, source.ascent(policy, parameters, trajectory)) for p, trajectory in setting.every()]
        return exact_moments(weighted), len(weighted)
    ascents = [source.ascent(policy, parameters, trajectory) for trajectory in setting.drawn(batches, seed)]
    return sampled_moments(torch.stack(ascents)), batches


def report(
    setting: Setting,
    source: Source,
    *,
    subject: str,
    target: Tensor,
    target_name: str,
    declared: Literal["unbiased", "biased"] | None = None,
    reason: str = "",
    samples: int | None = None,
    seed: int = 0,
) -> AuditReport:
    """Measure and hold against one exact gradient.

    Args:
        setting: where.
        source: what computes the ascent of a batch.
        subject: what to call it.
        target: [P] the exact gradient.
        target_name: that in words.
        declared: what is declared of it here.
        reason: what biases it here.
        samples: how many trajectories to draw; None weights every batch there is.
        seed: of the drawing.
    """
    rows, batches = 1, None
    if samples is not None:
        rows = setting.rows
        batches = max(math.ceil(samples / (rows * setting.trajectories_per_row)), 1)
    moments, count = measure(setting, source, batches=batches, seed=seed)
    return AuditReport(
        subject=subject,
        problem=setting.name,
        target_name=target_name,
        target=target,
        moments=moments,
        trajectories=rows * setting.trajectories_per_row,
        steps=rows * setting.steps_per_row,
        batches=count,
        declared=declared,
        reason=reason,
    )


def audit(
    algorithm: Algorithm,
    on: str | NamedProblem | TokenMDP = "six-state",
    *,
    samples: int | None = None,
    circumstances: Circumstances | None = None,
    rows: int = 32,
    row_steps: int = 3,
    seed: int = 0,
) -> AuditReport:
    """Hold an algorithm, through the training step, against the gradient it declares to follow.

    Every batch of one row (a whole episode or completion, or `row_steps` steps) is weighted by its probability, so that
    bias is exact to rounding. Where rows of a batch change one another's gradient, or `samples` is given, batches are
    drawn as training draws them.

    Args:
        algorithm: its gamma is the discount of the problem (of completions it must be 1).
        on: a named problem (`upslope.exact.PROBLEMS` and `TOKEN_PROBLEMS`), or one of your own.
        samples: trajectories to draw; None draws only where it must, and then 100,000.
        circumstances: critic, behaviour, time limit; an exact critic, on-policy and the problem's own limit if None.
        rows: per drawn batch.
        row_steps: T of a fragment, for algorithms that learn from fragments.
        seed: of the policy's parameters, the drawing and the shuffling.

    Returns:
        The figures, with what the algorithm declares in these circumstances.

    Raises:
        UsageError: if the problem is unknown, or the algorithm does not go with it.
        ValueError: if it has too many batches to weight them all (then ask for `samples`).
    """
    target = algorithm.target
    setting, given = _setting(algorithm, on, circumstances or Circumstances(), rows, row_steps, seed)
    declared, reason = declaration(target, given)
    if samples is None and target.batchwise:
        samples = DEFAULT_SAMPLES
    return report(
        setting,
        AlgorithmSource(algorithm, seed=seed),
        subject=type(algorithm).__name__,
        target=setting.exact_gradient(target),
        target_name=in_words(target),
        declared=declared,
        reason=reason,
        samples=samples,
        seed=seed,
    )


def _setting(
    algorithm: Algorithm,
    on: str | NamedProblem | TokenMDP,
    given: Circumstances,
    rows: int,
    row_steps: int,
    seed: int,
) -> tuple[FiniteSetting | TokenSetting, Circumstances]:
    """The setting, and the circumstances with the problem's own time limit."""
    if isinstance(on, TokenMDP) or (isinstance(on, str) and on in TOKEN_PROBLEMS):
        if algorithm.gamma != 1.0:
            raise UsageError(f"completions have no discount: set gamma to 1 (it is {algorithm.gamma})")
        if given.limit is not None:
            raise UsageError("a completion problem has a length limit of its own: leave limit out")
        stale = given.behaviour == "stale"
        setting = TokenSetting.build(on, size=1, critic=given.critic, stale=stale, rows=rows, seed=seed)
        return setting, replace(given, limit_in_task=True, unit="episodes")
    if isinstance(on, str) and on not in PROBLEMS:
        raise UsageError(f"there is no problem {on!r}; there are: {', '.join((*PROBLEMS, *TOKEN_PROBLEMS))}")
    named = problem(on) if isinstance(on, str) else on
    if named.mdp.kind == "continuing":
        raise UsageError(f"{named.name} goes on without end, and this algorithm follows no average reward")
    given = replace(given, limit=named.limit if given.limit is None else given.limit)
    finite = FiniteSetting.build(
        named,
        gamma=algorithm.gamma,
        unit=given.unit or unit_of(algorithm),
        critic=given.critic,
        behaviour=given.behaviour,
        limit=given.limit,
        rows=rows,
        row_steps=row_steps,
        seed=seed,
    )
    return finite, given

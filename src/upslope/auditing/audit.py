"""Hold an algorithm, through the code that trains, against the exact gradient it declares to follow."""

from __future__ import annotations

from dataclasses import replace

import torch

from upslope.algorithms import Algorithm, Traces
from upslope.auditing.checks import check_numbers, checked_algorithm
from upslope.auditing.declared import Circumstances, claim_of
from upslope.auditing.ground import AlgorithmSetting, BatchShape, Ground, Problem, setting_of
from upslope.auditing.measuring import DEFAULT_SAMPLES, Drawing, Progress, report
from upslope.auditing.report import AuditReport
from upslope.auditing.setting import Audited, FiniteSetting
from upslope.auditing.source import AlgorithmSource, Source, TraceSource
from upslope.auditing.tokens import Network, TokenSetting
from upslope.errors import checking_usage
from upslope.exact import solve


def audit(
    algorithm: Algorithm,
    problem: Problem = "six-state",
    *,
    samples: int | None = None,
    circumstances: Circumstances | None = None,
    policy: Audited | None = None,
    rows: int = 32,
    row_steps: int = 3,
    size: int | None = None,
    groups: int = 1,
    network: Network = "table",
    seed: int = 0,
    progress: Progress | None = None,
) -> AuditReport:
    """Hold an algorithm, through the training step, against the gradient it declares to follow.

    Every batch of one row (a whole episode or completion, or `row_steps` steps) is weighted by its probability, so that
    bias is exact to rounding. Where rows of a batch change one another's gradient, where updates are cut into
    minibatches, where there are too many batches to list, or where `samples` is given, batches are drawn as training
    draws them.

    Args:
        algorithm: its gamma is the discount of the problem (of completions it must be 1).
        problem: a named problem (`upslope.exact.PROBLEMS` and `TOKEN_PROBLEMS`), or one of your own.
        samples: trajectories to draw; None draws only where it must, and then 100,000.
        circumstances: critic, behaviour, time limit; an exact critic, on-policy and the problem's own limit if None.
        policy: in float64, whose steps stand on their own; the problem's own if None. It is copied. A critic that is no
            table stays what it is: say `Circumstances(critic="perturbed")` for algorithms that use it.
        rows: per drawn batch.
        row_steps: T of a fragment, for algorithms that learn from fragments.
        size: completions or episodes in a group; None for 2 where the algorithm compares a group, else 1.
        groups: groups in the smallest batch, on completion problems.
        network: what completes prompts: a table of free choices, a small transformer, or ("language") a model of
            transformers' that learns and generates as one in training does; needs the extra `language`.
        seed: of the policy's parameters, the drawing and the shuffling.
        progress: told after each drawn batch how many there are so far, and of how many.

    Returns:
        The figures, with what the algorithm declares in these circumstances.

    Raises:
        UsageError: if the problem is unknown, the algorithm or the policy does not go with it, a number makes no sense,
            or the exact gradient is 0; or if the algorithm learns from given data and follows no return.
    """
    ground = Ground(problem=problem, policy=policy, circumstances=circumstances, network=network, seed=seed)
    shape = BatchShape(rows=rows, row_steps=row_steps, size=size, groups=groups)
    return _audited(algorithm, ground, shape, Drawing(samples=samples, seed=seed, progress=progress))


def _audited(algorithm: Algorithm, ground: Ground, shape: BatchShape, drawing: Drawing) -> AuditReport:
    target = checked_algorithm(algorithm).target
    check_numbers(drawing.samples, shape.rows, shape.row_steps, drawing.seed)
    setting, circumstances = setting_of(algorithm, ground, shape)
    listed = isinstance(setting, TokenSetting) and shape.groups > 1
    if drawing.samples is None and ((target.batchwise and not listed) or algorithm.passes.minibatches > 1):
        drawing = replace(drawing, samples=DEFAULT_SAMPLES)
    with checking_usage():
        exact = setting.exact_gradient(target)
    return report(
        setting,
        _source(algorithm, setting, drawing.seed),
        claim_of(target, exact, circumstances),
        subject=type(algorithm).__name__,
        drawing=drawing,
    )


def _source(algorithm: Algorithm, setting: AlgorithmSetting, seed: int) -> Source:
    """The code that trains, with the true average reward where the algorithm carries one."""
    state, reference = algorithm.initial_state(), None
    if isinstance(setting, TokenSetting):
        reference = setting.reference
    elif isinstance(setting, FiniteSetting) and algorithm.target.gradient == "average_reward":
        with torch.no_grad():
            state = {**state, "average_reward": float(solve(setting.mdp, setting.policy).objective)}
    if isinstance(algorithm.passes.rule, Traces):
        return TraceSource(algorithm, state=state)
    return AlgorithmSource(algorithm, seed=seed, reference=reference, state=state)

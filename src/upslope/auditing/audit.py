"""Run the code that trains many times at fixed parameters, and hold its mean against the exact gradient."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from upslope.algorithms import Algorithm, Target
from upslope.auditing.declared import Circumstances, declaration, in_words, unit_of
from upslope.auditing.groups import GroupSetting
from upslope.auditing.moments import Moments, exact_moments, sampled_moments
from upslope.auditing.report import AuditReport
from upslope.auditing.setting import Audited, Behaviour, Critic, FiniteSetting, Setting, Unit
from upslope.auditing.source import AlgorithmSource, Source, TraceSource
from upslope.auditing.tokens import Network, TokenSetting
from upslope.errors import UsageError, checking_usage
from upslope.exact import PROBLEMS, TOKEN_PROBLEMS, FiniteMDP, NamedProblem, StatePolicy, TabularPolicy, TokenMDP, solve
from upslope.exact import problem as named_problem
from upslope.trajectory import Trajectory

DEFAULT_SAMPLES = 100_000
"""Trajectories drawn where not every batch can be weighted."""

Problem: TypeAlias = str | NamedProblem | FiniteMDP | TokenMDP
"""By name, or one of one's own."""

Progress: TypeAlias = Callable[[int, int], None]
"""Told after each drawn batch how many there are so far, and of how many."""

_FEWEST_BATCHES = 20
_NO_GRADIENT = 1e-13


def measure(
    setting: Setting, source: Source, *, batches: int | None = None, seed: int = 0, progress: Progress | None = None
) -> tuple[Moments, int]:
    """The moments of the ascent direction, and how many batches they come from.

    Args:
        setting: where.
        source: what computes the ascent of a batch.
        batches: how many to draw; None weights every batch of one row there is.
        seed: of the drawing.
        progress: told of each drawn batch.
    """
    if batches is None:
        weighted = _weighted(setting, source, setting.every())
        return exact_moments(weighted), len(weighted)
    policy, parameters, ascents = setting.policy, setting.parameters, list[Tensor]()
    for trajectory in setting.drawn(batches, seed):
        ascents.append(source.ascent(policy, parameters, trajectory))
        if progress is not None:
            progress(len(ascents), batches)
    return sampled_moments(torch.stack(ascents)), batches


def _weighted(
    setting: Setting, source: Source, every: Iterable[tuple[float, Trajectory]]
) -> list[tuple[float, Tensor]]:
    policy, parameters = setting.policy, setting.parameters
    return [(probability, source.ascent(policy, parameters, trajectory)) for probability, trajectory in every]


def _listed(setting: Setting) -> Iterator[tuple[float, Trajectory]] | None:
    """Every batch of one row, or None where there are too many to list."""
    every = setting.every()
    try:
        first = next(every)
    except ValueError:
        return None
    return chain([first], every)


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
    progress: Progress | None = None,
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
        samples: how many trajectories to draw; None weights every batch there is, and draws 100,000 trajectories where
            there are too many batches for that.
        seed: of the drawing.
        progress: told of each drawn batch.

    Raises:
        UsageError: if these are too few samples, or the gradient is 0.
    """
    with checking_usage():
        trajectories, steps = setting.trajectories_per_row, setting.steps_per_row
    if float(target.norm()) < _NO_GRADIENT:
        raise UsageError(
            f"the exact gradient is 0 here: there is nothing to hold it against. With this policy and this discount no "
            f"action of {setting.name} is better than another: take another problem, gamma or policy"
        )
    moments, count, rows = None, 0, 1
    every = _listed(setting) if samples is None else None
    if every is not None:
        weighted = _weighted(setting, source, every)
        if abs(math.fsum(probability for probability, _ in weighted) - 1.0) <= 1e-9:
            moments, count = exact_moments(weighted), len(weighted)
    if moments is None:
        rows = setting.rows
        batches = _batches(DEFAULT_SAMPLES if samples is None else samples, rows * trajectories)
        moments, count = measure(setting, source, batches=batches, seed=seed, progress=progress)
    return AuditReport(
        subject=subject,
        problem=setting.name,
        target_name=target_name,
        target=target,
        moments=moments,
        trajectories=rows * trajectories,
        steps=rows * steps,
        batches=count,
        declared=declared,
        reason=reason,
    )


def _batches(samples: int, trajectories: float) -> int:
    batches = math.ceil(samples / trajectories)
    if batches < _FEWEST_BATCHES:
        raise UsageError(
            f"{samples} samples make {batches} {'batch' if batches == 1 else 'batches'} of about {trajectories:.3g} "
            f"trajectories, too few to know their spread: ask for at least {math.ceil(_FEWEST_BATCHES * trajectories)} "
            "samples"
        )
    return batches


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
    target = _checked_algorithm(algorithm).target
    given = circumstances or Circumstances()
    _check_numbers(samples, rows, row_steps, seed)
    _check_circumstances(given)
    if isinstance(problem, TokenMDP) or (isinstance(problem, str) and problem in TOKEN_PROBLEMS):
        if policy is not None:
            raise UsageError("completion problems have a policy of their own: leave policy out")
        setting, given = _on_completions(
            algorithm, problem, given, rows, seed, size=size, groups=groups, network=network
        )
    else:
        _check_on_states(algorithm, size, groups, network)
        named = _named(problem, average_reward=target.gradient == "average_reward")
        looking, given = _policy(named, policy, algorithm, given, asked=circumstances is not None, seed=seed)
        setting, given = _on_states(algorithm, named, looking, given, rows, row_steps)
        if algorithm.passes.groups:
            setting = GroupSetting(alone=setting, size=2 if size is None else size)
    declared, reason = declaration(target, given)
    listed = isinstance(setting, TokenSetting) and groups > 1
    if samples is None and ((target.batchwise and not listed) or algorithm.passes.minibatches > 1):
        samples = DEFAULT_SAMPLES
    with checking_usage():
        exact = setting.exact_gradient(target)
    return report(
        setting,
        _source(algorithm, setting, seed),
        subject=type(algorithm).__name__,
        target=exact,
        target_name=in_words(target),
        declared=declared,
        reason=reason,
        samples=samples,
        seed=seed,
        progress=progress,
    )


def _source(algorithm: Algorithm, setting: TokenSetting | GroupSetting | FiniteSetting[Audited], seed: int) -> Source:
    """The code that trains, with the true average reward where the algorithm carries one."""
    state, reference = algorithm.initial_state(), None
    if isinstance(setting, TokenSetting):
        reference = setting.reference
    elif isinstance(setting, FiniteSetting) and algorithm.target.gradient == "average_reward":
        with torch.no_grad():
            state = {**state, "average_reward": float(solve(setting.mdp, setting.policy).objective)}
    if algorithm.passes.traces is not None:
        return TraceSource(algorithm, state=state)
    return AlgorithmSource(algorithm, seed=seed, reference=reference, state=state)


def _checked_algorithm(algorithm: Any) -> Algorithm:
    if isinstance(algorithm, type):
        name = algorithm.__name__
        raise UsageError(f"{name} is a class: audit one of its objects, such as {name}(gamma=0.9)")
    if isinstance(algorithm, str):
        raise UsageError(
            f"{algorithm!r} is a name: give the algorithm itself, such as upslope.Reinforce(gamma=0.9); names are for "
            "the command `upslope audit`"
        )
    if inspect.isroutine(algorithm):
        raise UsageError(f"{algorithm.__name__} is a function: audit a loss with upslope.audit_loss")
    if not isinstance(getattr(algorithm, "target", None), Target):
        raise UsageError(
            f"a {type(algorithm).__name__} declares no target, so that it is no algorithm to audit: give it a property "
            "`target` that returns an upslope.algorithms.Target, or audit a plain loss with upslope.audit_loss"
        )
    found: Algorithm = algorithm
    if found.target.gradient == "given_data":
        raise UsageError(
            f"{type(algorithm).__name__} learns from given data and follows no gradient of a return: its rows in the "
            "verification table hold it against the gradient of its own loss"
        )
    if found.target.gradient == "prediction":
        raise UsageError(
            f"{type(algorithm).__name__} learns values and leaves the policy as it is: its rows in the verification "
            "table hold the critic's update against the exact one"
        )
    if not 0.0 <= found.gamma <= 1.0:
        raise UsageError(f"gamma is a discount from 0 to 1, got {found.gamma}: set the algorithm's gamma within that")
    return found


def _check_numbers(samples: int | None, rows: int, row_steps: int, seed: int) -> None:
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be at least 1, got {samples}: leave it out to weight every batch there is")
    for name, number, least in (("rows", rows, 1), ("row_steps", row_steps, 1), ("seed", seed, 0)):
        if number < least:
            raise UsageError(f"{name} must be at least {least}, got {number}")


def _check_circumstances(given: Circumstances) -> None:
    for name, value, values in (
        ("critic", given.critic, get_args(Critic)),
        ("behaviour", given.behaviour, get_args(Behaviour)),
        ("unit", given.unit, (*get_args(Unit), None)),
    ):
        if value not in values:
            raise UsageError(f"{name} must be {' or '.join(map(repr, values))}; got {value!r}")
    if given.limit is not None and given.limit < 1:
        raise UsageError(f"limit must be at least 1 step, got {given.limit}: leave it out for the problem's own limit")


def _on_completions(
    algorithm: Algorithm,
    problem: str | TokenMDP,
    given: Circumstances,
    rows: int,
    seed: int,
    *,
    size: int | None,
    groups: int,
    network: Network,
) -> tuple[TokenSetting, Circumstances]:
    if algorithm.gamma != 1.0:
        raise UsageError(f"completions have no discount: set gamma to 1 (it is {algorithm.gamma})")
    if given.limit is not None:
        raise UsageError("a completion problem has a length limit of its own: leave limit out")
    if given.unit == "fragments":
        raise UsageError("completions come whole: leave unit out")
    if size is None:
        size = 2 if algorithm.passes.groups else 1
    if algorithm.passes.groups and size < 2:
        raise UsageError(f"{type(algorithm).__name__} compares the completions of a group: ask for a size of 2 or more")
    penalty = algorithm.target.penalty
    setting = TokenSetting.build(
        problem,
        size=size,
        groups=groups,
        network=network,
        critic=given.critic,
        stale=given.behaviour == "stale",
        rows=rows,
        seed=seed,
        beta=penalty.coefficient if penalty is not None and penalty.of == "trajectories" else 0.0,
    )
    return setting, replace(given, limit_in_task=True, unit="episodes")


def _check_on_states(algorithm: Algorithm, size: int | None, groups: int, network: Network) -> None:
    name = type(algorithm).__name__
    if algorithm.passes.reference != "none":
        raise UsageError(f"only completion problems have a reference: audit this {name} on {', '.join(TOKEN_PROBLEMS)}")
    if size is not None and not algorithm.passes.groups:
        raise UsageError(f"size is for what compares a group, and {name} sees single episodes: leave it out")
    if groups != 1:
        raise UsageError("groups are of completions: leave the number out")
    if network != "table":
        raise UsageError(f"network says what completes prompts: leave it out, or audit on {', '.join(TOKEN_PROBLEMS)}")


def _named(problem: object, *, average_reward: bool = False) -> NamedProblem:
    if isinstance(problem, str) and problem in PROBLEMS:
        named = named_problem(problem)
    elif isinstance(problem, NamedProblem):
        named = problem
    elif isinstance(problem, FiniteMDP):
        named = NamedProblem(name="a problem of your own", summary="", mdp=problem, policy=_random_table(problem))
    else:
        what = f"no problem {problem!r}" if isinstance(problem, str) else f"no auditing on a {type(problem).__name__}"
        raise UsageError(
            f"there is {what}; there are: {', '.join((*PROBLEMS, *TOKEN_PROBLEMS))}, and any "
            "FiniteMDP, NamedProblem or TokenMDP"
        )
    if named.mdp.kind == "continuing" and not average_reward:
        raise UsageError(f"{named.name} goes on without end, and this algorithm follows no average reward")
    if named.mdp.kind != "continuing" and average_reward:
        endless = [name for name in PROBLEMS if named_problem(name).mdp.kind == "continuing"]
        raise UsageError(
            f"this algorithm follows the average reward of a task without end, and {named.name} has ends: audit it on "
            f"{', '.join(endless)}"
        )
    return named


def _random_table(mdp: FiniteMDP) -> Callable[[int], StatePolicy]:
    def build(seed: int) -> StatePolicy:
        if mdp.observation.dim() != 1 or mdp.observation.is_floating_point() or int(mdp.observation.min()) < 0:
            raise UsageError("the observations of this problem are no whole numbers from 0: say which policy sees them")
        looks = int(mdp.observation.max()) + 1
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(looks, mdp.actions, generator=generator, dtype=torch.float64)
        return TabularPolicy(looks, mdp.actions, 0.7 * normal)

    return build


def _policy(
    named: NamedProblem, policy: Audited | None, algorithm: Algorithm, given: Circumstances, *, asked: bool, seed: int
) -> tuple[Audited, Circumstances]:
    """The policy to look at the problem with, and the circumstances with what its critic knows."""
    if policy is None:
        return named.policy(seed), given
    if not isinstance(policy, nn.Module):
        raise UsageError(f"policy must be an nn.Module that is a Policy, got {type(policy).__name__}")
    if policy.sequential:
        raise UsageError(
            "this policy looks at earlier steps of its row: an audit needs one whose steps stand on their own"
        )
    if any(parameter.dtype != torch.float64 for parameter in policy.parameters()):
        raise UsageError("an audit computes in float64: give policy.double()")
    if not isinstance(policy, StatePolicy):
        if given.critic == "exact" and asked and algorithm.passes.critic:
            raise UsageError(
                "the critic of this policy is its own, and not the exact one: say "
                "circumstances=Circumstances(critic='perturbed')"
            )
        given = replace(given, critic="perturbed")
    return copy.deepcopy(policy), given


def _on_states(
    algorithm: Algorithm, named: NamedProblem, policy: Audited, given: Circumstances, rows: int, row_steps: int
) -> tuple[FiniteSetting[Audited], Circumstances]:
    """The setting, and the circumstances as they are in it: time limit, unit, and whether states look alike."""
    if given.unit == "fragments" and algorithm.passes.whole_episodes:
        raise UsageError(f"{type(algorithm).__name__} learns from whole episodes: leave unit out, or say 'episodes'")
    unit = given.unit or unit_of(algorithm)
    with checking_usage():
        setting = FiniteSetting.of(
            named,
            policy,
            gamma=algorithm.gamma,
            unit=unit,
            critic=given.critic,
            behaviour=given.behaviour,
            limit=given.limit,
            rows=rows,
            row_steps=row_steps,
        )
        return setting, replace(given, limit=setting.limit, unit=unit, aliased=setting.aliased)

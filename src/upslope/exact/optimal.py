"""The best policy of a finite MDP: policy iteration and value iteration, with everything on the way.

    evaluate    v = r_pi + gamma P_pi v              q(s,a) = sum_s' p(s'|s,a) [r(s,a,s') + gamma v(s')]
    improve     pi'(s) = argmax_a q(s,a)             another action is taken only where it is strictly better

Continuing, with average reward (Howard's multichain policy iteration), P* the limit of the averages of P_pi^k:

    evaluate    g = P* r_pi                          h = (I - P_pi + P*)^-1 (I - P*) r_pi
    improve     argmax_a sum_s' p(s'|s,a) g(s'), and among those actions argmax_a sum_s' p(s'|s,a) [r(s,a,s') + h(s')]

The policies here see the state, even where it looks like another one to a learner: for the best policy of what is seen
see `upslope.exact.best_policy`. Howard (1960); Puterman, Markov Decision Processes (1994), chapters 6 to 9.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from upslope.exact._chain import closed_classes, reachable
from upslope.exact.finite import FiniteMDP
from upslope.exact.policies import TabularPolicy
from upslope.exact.solve import solve, stationary

STRICT = 1e-10
"""An action is better than another by more than this times 1 + max |v|, or not at all."""
_LAZY = 0.5
"""Share of steps that relative value iteration stays where it is, so that no chain is periodic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Iteration:
    """One deterministic policy, and what is true of it.

    Attributes:
        actions: [S] the action in each state; 0 on terminal states, where none is taken.
        value: [S] v(s), 0 on terminal states; in a continuing problem the differential h(s). NaN where it is not
            defined: for states that the start does not lead to and from which an episode cannot end.
        action_value: [S, A] q(s, a); in a continuing problem differential.
        objective: J; in a continuing problem the average reward.
        changed: in how many states the improvement that follows takes another action; 0 of the last policy.
    """

    actions: Tensor
    value: Tensor
    action_value: Tensor
    objective: float
    changed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyIteration:
    """The whole of a policy iteration.

    Attributes:
        iterations: from the first policy to one that no other is better than.
    """

    iterations: tuple[Iteration, ...]

    @property
    def best(self) -> Iteration:
        """The last policy, which is optimal."""
        return self.iterations[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueIteration:
    """The whole of a value iteration.

    Attributes:
        values: [N, S] from zeros on; in a continuing problem relative to the first state.
        residuals: [N - 1] the largest change of a value in each sweep; in a continuing problem the distance between
            the bounds that the sweep puts on the average reward.
        actions: [S] greedy in the last values; 0 on terminal states.
        objective: J = d_0 . v; in a continuing problem the middle of the bounds on the average reward.
    """

    values: Tensor
    residuals: Tensor
    actions: Tensor
    objective: float


@dataclass(frozen=True, slots=True)
class _Judged:
    """What an improvement goes by: actions by `first`, and among the best of these by `second`."""

    value: Tensor
    action_value: Tensor
    objective: float
    first: Tensor
    second: Tensor


def policy_iteration(mdp: FiniteMDP, *, start: Tensor | None = None) -> PolicyIteration:
    """Evaluate and improve in turn until nothing is strictly better; finitely many steps, since J never falls.

    Args:
        mdp: the problem.
        start: [S] actions to begin with; if None, in undiscounted episodes those that lead towards an end, else action
            0 everywhere.

    Raises:
        ValueError: if at gamma = 1 returns have no upper bound, or episodes of the first policy need not end.
    """
    actions = _begin(mdp) if start is None else _checked(mdp, start)
    iterations: list[Iteration] = []
    while True:
        judged = _average(mdp, actions) if mdp.kind == "continuing" else _episodic(mdp, actions)
        if mdp.kind == "episodic" and mdp.gamma == 1.0:
            _check_bounded(mdp, judged, first=not iterations)
        better = _improved(actions, judged)
        changed = int((better != actions)[~mdp.terminal].sum())
        iterations.append(
            Iteration(
                actions=actions,
                value=judged.value,
                action_value=judged.action_value,
                objective=judged.objective,
                changed=changed,
            )
        )
        if changed == 0:
            return PolicyIteration(iterations=tuple(iterations))
        actions = torch.where(mdp.terminal, 0, better)


def value_iteration(mdp: FiniteMDP, *, tolerance: float = 1e-12, most: int = 100_000) -> ValueIteration:
    """v <- max_a [r + gamma P v] from zeros; in a continuing problem relative to the first state.

    Args:
        mdp: the problem.
        tolerance: end when a sweep changes no value by more.
        most: sweeps.

    Raises:
        ValueError: if that many sweeps are not enough; at gamma = 1 returns may have no upper bound.
    """
    average = mdp.kind == "continuing"
    expected = (mdp.transition * mdp.reward).sum(-1) * (~mdp.terminal).unsqueeze(-1)
    values, residuals = [torch.zeros(mdp.states, dtype=torch.float64)], list[float]()
    share = (1.0 - _LAZY) if average else mdp.gamma
    while True:
        now = values[-1]
        action_value = expected + (mdp.gamma if not average else 1.0) * (mdp.transition @ now)
        backed = action_value.max(-1).values.masked_fill(mdp.terminal, 0.0)
        change = share * (backed - now) if average else backed - now
        lowest, highest = float(change.min()), float(change.max())
        residuals.append((highest - lowest) / share if average else max(highest, -lowest))
        following = now + change
        values.append(following - following[0] if average else following)
        if residuals[-1] <= tolerance:
            break
        if len(residuals) == most:
            raise ValueError(
                f"values still change by {residuals[-1]:.3g} after {most} sweeps: give a larger tolerance or more "
                "sweeps; at gamma = 1 the return may have no upper bound"
            )
    objective = 0.5 * (lowest + highest) / share if average else float(mdp.start @ values[-1])
    return ValueIteration(
        values=torch.stack(values),
        residuals=torch.tensor(residuals, dtype=torch.float64),
        actions=action_value.argmax(-1).masked_fill(mdp.terminal, 0),
        objective=objective,
    )


def deterministic(mdp: FiniteMDP, actions: Tensor) -> Tensor:
    """pi(a|s) of one action per state, [S, A] float64.

    Args:
        mdp: the problem.
        actions: [S].
    """
    return torch.nn.functional.one_hot(actions, mdp.actions).to(torch.float64)


def expected_return(mdp: FiniteMDP, policy: Tensor, *, limit: int) -> float:
    """The mean undiscounted return of an episode cut after `limit` steps: what an evaluation of a learner measures.

        v_0 = 0,   v_(k+1) = r_pi + P_pi v_k,   d_0 . v_limit

    Args:
        mdp: the problem; its gamma is not read.
        policy: [S, A] pi(a|s).
        limit: steps, at least 1.

    Raises:
        ValueError: if limit < 1.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1 step; got {limit}")
    going = (~mdp.terminal).to(torch.float64)
    move = torch.einsum("sa,sax->sx", policy, mdp.transition) * going.unsqueeze(-1)
    reward = (policy * (mdp.transition * mdp.reward).sum(-1)).sum(-1) * going
    value = torch.zeros_like(reward)
    for _ in range(limit):
        value = reward + move @ value
    return float(mdp.start @ value)


def _begin(mdp: FiniteMDP) -> Tensor:
    """Actions of which each leads nearer to an end with some probability: a policy whose episodes end."""
    actions = torch.zeros(mdp.states, dtype=torch.long)
    if mdp.kind == "continuing" or mdp.gamma < 1.0:
        return actions
    done = mdp.terminal.clone()
    while True:
        chance = mdp.transition[:, :, done].sum(-1)
        nearer = (chance > 0).any(-1) & ~done
        if not bool(nearer.any()):
            return actions
        actions = torch.where(nearer, chance.argmax(-1), actions)
        done = done | nearer


def _checked(mdp: FiniteMDP, start: Tensor) -> Tensor:
    fits = start.shape == (mdp.states,) and not start.is_floating_point()
    if not fits or not bool(((start >= 0) & (start < mdp.actions)).all()):
        raise ValueError(
            f"start must be an action from 0 to {mdp.actions - 1} for each of the {mdp.states} states; got "
            f"{start.dtype} of shape {tuple(start.shape)}: {start.tolist()}"
        )
    return torch.where(mdp.terminal, 0, start)


def _episodic(mdp: FiniteMDP, actions: Tensor) -> _Judged:
    preferences = deterministic(mdp, actions).log()
    seen = replace(mdp, observation=torch.arange(mdp.states))
    with torch.no_grad():
        solution = solve(seen, TabularPolicy(mdp.states, mdp.actions, preferences))
    same = torch.zeros_like(solution.action_value)
    return _Judged(
        value=solution.value,
        action_value=solution.action_value,
        objective=float(solution.objective),
        first=same,
        second=solution.action_value,
    )


def _average(mdp: FiniteMDP, actions: Tensor) -> _Judged:
    """Gain and bias, on the states that the start leads to; NaN elsewhere."""
    known = reachable((mdp.transition > 0).any(1), mdp.start > 0)
    inside = known.nonzero().squeeze(-1)
    transition = mdp.transition[inside][:, :, inside]
    expected = (mdp.transition * mdp.reward).sum(-1)[inside]
    rows = torch.arange(len(inside))
    chain, reward = transition[rows, actions[inside]], expected[rows, actions[inside]]
    limit = _limiting(chain)
    gain = limit @ reward
    bias = torch.linalg.solve(torch.eye(len(inside), dtype=torch.float64) - chain + limit, reward - gain)

    def spread(part: Tensor) -> Tensor:
        whole = torch.full((mdp.states, *part.shape[1:]), torch.nan, dtype=torch.float64)
        return whole.index_copy(0, inside, part)

    action_value = expected - gain.unsqueeze(-1) + transition @ bias
    return _Judged(
        value=spread(bias),
        action_value=spread(action_value),
        objective=float(mdp.start[inside] @ gain),
        first=spread(transition @ gain),
        second=spread(expected + transition @ bias),
    )


def _limiting(chain: Tensor) -> Tensor:
    """P*, [S, S]: how likely each closed class is where one ends up, times its stationary distribution."""
    states = len(chain)
    everywhere = torch.ones(states, dtype=torch.bool)
    classes = closed_classes(chain > 0, everywhere)
    passing = everywhere.clone()
    for members in classes:
        passing[members] = False
    transient = passing.nonzero().squeeze(-1)
    system = torch.eye(len(transient), dtype=torch.float64) - chain[transient][:, transient]
    limit = torch.zeros(states, states, dtype=torch.float64)
    for members in classes:
        chance = torch.zeros(states, dtype=torch.float64)
        chance[members] = 1.0
        chance[transient] = torch.linalg.solve(system, chain[transient][:, members].sum(-1))
        limit[:, members] = chance.unsqueeze(-1) * stationary(chain[members][:, members])
    return limit


def _improved(actions: Tensor, judged: _Judged) -> Tensor:
    """The action that is best by `first`, then by `second`; the present one unless another is strictly better."""
    first = judged.first.nan_to_num(nan=-torch.inf)
    second = judged.second.nan_to_num(nan=-torch.inf)
    present = actions.unsqueeze(-1)
    near_first, near_second = _near(first), _near(second)
    top = first.max(-1, keepdim=True).values
    allowed = first >= top - near_first
    best = torch.where(allowed, second, -torch.inf)
    behind_first = ~allowed.gather(-1, present).squeeze(-1)
    behind_second = best.gather(-1, present).squeeze(-1) < best.max(-1).values - near_second
    return torch.where(behind_first | behind_second, best.argmax(-1), actions)


def _near(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return STRICT * (1.0 + float(finite.abs().max())) if len(finite) else STRICT


def _check_bounded(mdp: FiniteMDP, judged: _Judged, *, first: bool) -> None:
    """Refuse a policy under which episodes need not end.

    An improvement of a policy whose episodes end brings one about only where a loop has a positive mean reward, since
    q(s, pi'(s)) >= v(s), with > where the action is new, sums to it over the loop's steps.
    """
    known = reachable((mdp.transition > 0).any(1) & ~mdp.terminal.unsqueeze(-1), mdp.start > 0)
    endless = (known & judged.value.isnan()).nonzero().squeeze(-1).tolist()
    if not endless:
        return
    if first:
        raise ValueError(
            f"episodes of the first policy need not end from states {endless}: leave start out, or give actions that "
            "lead to an end"
        )
    raise ValueError(
        f"at gamma = 1 the return has no upper bound: from states {endless} a loop with a positive mean reward can be "
        "walked for ever; give a gamma below 1"
    )

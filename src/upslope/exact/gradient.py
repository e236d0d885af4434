"""The policy gradient theorem, computed: exact gradients on finite MDPs, as flat vectors over given parameters.

    grad J_gamma            = sum_s eta_gamma(s) sum_a grad pi(a|s) q_gamma(s, a)          discounted
    (no gradient of J)        sum_s eta_1(s)     sum_a grad pi(a|s) q_gamma(s, a)          undiscounted_states
    grad r_bar              = sum_s mu(s)        sum_a grad pi(a|s) q~(s, a)               average_reward

Sutton et al. (1999); that the second is the gradient of no function: Nota & Thomas (2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from upslope.estimators import discount_weight, flatten
from upslope.exact.enumeration import Rows, state_time_occupancy
from upslope.exact.finite import FiniteMDP
from upslope.exact.solve import Solution, action_probabilities, solve
from upslope.trajectory import Policy

Gradient: TypeAlias = Literal["discounted", "undiscounted_states", "average_reward"]
"""Which states count how much: eta_gamma, eta_1, or mu of a continuing problem."""


def policy_gradient(
    mdp: FiniteMDP,
    policy: Policy,
    *,
    gradient: Gradient = "discounted",
    limit: int | None = None,
    parameters: Sequence[nn.Parameter] | None = None,
) -> Tensor:
    """sum_s w(s) sum_a grad pi(a|s) q(s, a), [P] float64, by the theorem: w and q are solved for and held fixed.

    Args:
        mdp: the problem.
        policy: any whose steps stand on their own.
        gradient: which weights w; see the module.
        limit: count the visits of episodes truncated after this many steps, with q still that of the problem without
            limit: what an estimator follows that bootstraps with the true v where it is cut. None: no limit. For a
            limit that is part of the task see `time_limited`.
        parameters: with respect to which; all of the policy's that require gradient if None. 0 where the policy does
            not depend on one.

    Raises:
        ValueError: if the gradient does not go with the problem or the policy (see `solve`).
    """
    with torch.no_grad():
        solution = solve(mdp, policy)
        weight = state_weights(mdp, policy, gradient=gradient, limit=limit, solution=solution)
    counted = weight > 0
    probabilities = action_probabilities(mdp, policy)[counted]
    surrogate = (weight[counted].unsqueeze(-1) * probabilities * solution.action_value[counted]).sum()
    return _flat_gradient(surrogate, parameters_of(policy, parameters))


def objective_gradient(mdp: FiniteMDP, policy: Policy, *, parameters: Sequence[nn.Parameter] | None = None) -> Tensor:
    """grad J (of r_bar in a continuing problem), [P] float64, by autograd through the linear solve.

    The theorem is not used: where `policy_gradient` agrees with it, both are right.

    Args:
        mdp, policy, parameters: as in `policy_gradient`.
    """
    return _flat_gradient(solve(mdp, policy).objective, parameters_of(policy, parameters))


def enumerated_gradient(
    rows: Rows, policy: Policy, gamma: float, *, parameters: Sequence[nn.Parameter] | None = None
) -> Tensor:
    """grad of sum_rows Pr(row) G(row), [P] float64, by autograd through the rows' log-probs.

    G(row) = sum_t gamma^t r_t, without bootstrap: truncated episodes count as ended. For policies that look at
    earlier steps too, since only the log-prob of whole rows is asked for.

    Args:
        rows: all episodes (`enumerate_episodes`).
        policy: the one to differentiate; [R, T] observations and actions in, log-probs out.
        gamma: discount factor.
        parameters: as in `policy_gradient`.
    """
    trajectory = rows.trajectory
    log_prob = policy.log_prob(trajectory.observation, trajectory.action).to(torch.float64)
    gain = discount_weight(trajectory.time, gamma, dtype=torch.float64) * trajectory.reward
    returns = gain.masked_fill(~trajectory.mask, 0.0).sum(-1)
    return _flat_gradient(rows.probability(log_prob) @ returns, parameters_of(policy, parameters))


def time_limited(mdp: FiniteMDP, limit: int) -> FiniteMDP:
    """The same problem with a time limit as part of the task: after `limit` steps the episode has ended for good.

    State (s, t) has the number t * S + s, t = 0..limit; those with t = limit are terminal. The policy still sees
    o(s): its gradient on this problem is that of the return up to the limit. Pardo et al. (2018).

    Args:
        mdp: an episodic problem.
        limit: steps, at least 1.

    Raises:
        ValueError: if the problem is continuing, or limit < 1.
    """
    if mdp.kind == "continuing":
        raise ValueError("a continuing problem has no time limit: take an episodic one")
    if limit < 1:
        raise ValueError(f"limit must be at least 1 step; got {limit}")
    states, layers = mdp.states, limit + 1

    def unroll(table: Tensor) -> Tensor:
        """Put [S, A, S, ...] where a layer leads to the next one."""
        whole = torch.zeros(layers, states, mdp.actions, layers, states, *table.shape[3:], dtype=torch.float64)
        for time in range(limit):
            whole[time, :, :, time + 1] = table
        return whole.view(layers * states, mdp.actions, layers * states, *table.shape[3:])

    terminal = mdp.terminal.repeat(layers)
    terminal[limit * states :] = True
    return replace(
        mdp,
        transition=unroll(mdp.transition),
        reward=unroll(mdp.reward),
        start=torch.cat([mdp.start, torch.zeros(limit * states, dtype=torch.float64)]),
        terminal=terminal,
        observation=mdp.observation.repeat(layers, *[1] * (mdp.observation.dim() - 1)),
        reward_value=None if mdp.reward_value is None else unroll(mdp.reward_value),
        reward_probability=None if mdp.reward_probability is None else unroll(mdp.reward_probability),
    )


def state_weights(
    mdp: FiniteMDP,
    policy: Policy,
    *,
    gradient: Gradient = "discounted",
    limit: int | None = None,
    solution: Solution | None = None,
) -> Tensor:
    """w(s), [S], how much each state counts in a gradient: eta_gamma, eta_1 or mu; detached.

    Args:
        mdp, policy, gradient, limit: as in `policy_gradient`.
        solution: that of `solve`, where it is at hand.

    Raises:
        ValueError: if the gradient does not go with the problem.
    """
    if (gradient == "average_reward") != (mdp.kind == "continuing"):
        raise ValueError(
            f"gradient {gradient!r} does not go with a problem of kind {mdp.kind!r}: continuing problems have the "
            "gradient 'average_reward', episodic ones 'discounted' and 'undiscounted_states'"
        )
    if gradient not in ("discounted", "undiscounted_states", "average_reward"):
        raise ValueError(f"gradient must be 'discounted', 'undiscounted_states' or 'average_reward'; got {gradient!r}")
    if limit is not None:
        if gradient == "average_reward":
            raise ValueError("a continuing problem has no time limit: leave limit out")
        occupancy = state_time_occupancy(mdp, policy, limit=limit)
        gamma = mdp.gamma if gradient == "discounted" else 1.0
        return discount_weight(torch.arange(len(occupancy)), gamma, dtype=torch.float64) @ occupancy
    with torch.no_grad():
        known = solve(mdp, policy) if solution is None else solution
    if gradient == "average_reward":
        return known.on_policy.detach()
    weight = known.visits if gradient == "discounted" else known.undiscounted_visits
    if not bool(weight.isfinite().all()):
        raise ValueError(
            "episodes of this policy need not end, so that states are visited without end: take the gradient "
            "'discounted' with gamma < 1, or give a limit"
        )
    return weight.detach()


def parameters_of(policy: Policy, parameters: Sequence[nn.Parameter] | None) -> list[nn.Parameter]:
    """The given parameters, or all of the policy's that require gradient.

    Raises:
        ValueError: if there are none, or none are given and the policy is no `nn.Module`.
    """
    if parameters is None:
        if not isinstance(policy, nn.Module):
            raise ValueError(f"{type(policy).__name__} is no nn.Module: say with respect to which parameters")
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("there is no parameter to differentiate with respect to")
    return list(parameters)


def _flat_gradient(objective: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    if not objective.requires_grad:
        return torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    return flatten(torch.autograd.grad(objective, parameters, materialize_grads=True)).to(torch.float64)

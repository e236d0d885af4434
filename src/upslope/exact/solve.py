"""Exact values, visits and objectives of a policy on a finite MDP, by linear algebra.

    v = r_pi + gamma P_pi v                  q(s,a) = sum_s' p(s'|s,a) [r(s,a,s') + gamma v(s')]
    eta_gamma = d_0 + gamma P_pi' eta_gamma  J = d_0 . v = sum_s eta_gamma(s) r_pi(s)

Continuing, with average reward r_bar:

    mu = P_pi' mu                            r_bar = sum_s mu(s) r_pi(s)
    v~ = r_pi - r_bar + P_pi v~              q~(s,a) = sum_s' p(s'|s,a) [r(s,a,s') - r_bar + v~(s')]

Everything is differentiable in the policy's probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from upslope.exact._chain import closed_classes, reachable
from upslope.exact.finite import FiniteMDP
from upslope.trajectory import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """What is true of a policy on a problem.

    Attributes:
        policy: [S, A] pi(a|s).
        value: [S] v(s), 0 on terminal states; in a continuing problem v~(s), with sum_s mu(s) v~(s) = 0. NaN where it
            is not defined: at gamma = 1 where the policy need not come to an end, in a continuing problem where the
            start does not lead.
        action_value: [S, A] q(s, a), 0 on terminal states; in a continuing problem q~(s, a). NaN as above.
        visits: [S] eta_gamma(s) = sum_t gamma^t Pr(s_t = s); 0 on terminal states.
        undiscounted_visits: [S] eta_1(s), with infinite entries where episodes need not end.
        on_policy: [S] mu(s): the share of steps spent in s.
        objective: J; in a continuing problem r_bar.
        mean_length: mean steps of an episode (infinite where they need not end).
        average_reward: r_bar in a continuing problem, else None.
    """

    policy: Tensor
    value: Tensor
    action_value: Tensor
    visits: Tensor
    undiscounted_visits: Tensor
    on_policy: Tensor
    objective: Tensor
    mean_length: Tensor
    average_reward: Tensor | None = None

    @property
    def advantage(self) -> Tensor:
        """[S, A] q - v."""
        return self.action_value - self.value.unsqueeze(-1)


def action_probabilities(mdp: FiniteMDP, policy: Policy) -> Tensor:
    """pi(a|s), [S, A] float64, differentiable, for any policy whose steps stand on their own.

    Raises:
        ValueError: if the policy's distributions depend on earlier steps.
    """
    if policy.sequential:
        raise ValueError(
            "this policy looks at earlier steps of its row, so that no table pi(a|s) describes it: enumerate its "
            "trajectories instead (upslope.exact.enumerate_episodes, and enumerated_gradient of them)"
        )
    action = torch.arange(mdp.actions).expand(mdp.states, mdp.actions)
    shape = (mdp.states, mdp.actions, *mdp.observation.shape[1:])
    observation = mdp.observation.unsqueeze(1).expand(shape)
    return policy.log_prob(observation, action).to(torch.float64).exp()


def solve(mdp: FiniteMDP, policy: Policy) -> Solution:
    """Values, visits and objective of a policy, by linear solves; differentiable in its parameters.

    Args:
        mdp: the problem.
        policy: any whose steps stand on their own.

    Raises:
        ValueError: if the policy's distributions depend on earlier steps, or if in a continuing problem it can end up
            in more than one part of the states for good, so that there is no one average reward.
    """
    probabilities = action_probabilities(mdp, policy)
    return _continuing(mdp, probabilities) if mdp.kind == "continuing" else _episodic(mdp, probabilities)


def observed_value(mdp: FiniteMDP, solution: Solution) -> Tensor:
    """The best values by what a policy sees, [O]: for each o the mean of v(s) over the steps with o(s) = o.

    Where every state looks different it is v itself; where states look alike no critic of observations is exact. An
    observation that the policy never comes to has the plain mean of its states.

    Args:
        mdp: a problem whose observations are numbers; O is one more than the largest.
        solution: of the policy whose values these are.

    Raises:
        ValueError: if observations are not single whole numbers.
    """
    seen = mdp.observation
    if seen.dim() != 1 or seen.is_floating_point():
        raise ValueError(f"observations must be whole numbers, [S]; got {seen.dtype} of shape {tuple(seen.shape)}")
    count = int(seen.max()) + 1
    visited = torch.zeros(count, dtype=torch.float64).index_add(0, seen, solution.on_policy)
    weight = torch.where(visited[seen] > 0, solution.on_policy, (~mdp.terminal).to(torch.float64))
    total = torch.zeros_like(visited).index_add(0, seen, weight)[seen]
    share = weight / torch.where(total > 0, total, 1.0)
    return torch.zeros_like(visited).index_add(0, seen, torch.where(share > 0, share * solution.value, 0.0))


def _episodic(mdp: FiniteMDP, policy: Tensor) -> Solution:
    going = ~mdp.terminal
    move = torch.einsum("sa,sax->sx", policy * going.unsqueeze(-1), mdp.transition)
    possible = move.detach() > 0
    visited = reachable(possible, mdp.start > 0) & going
    closed = closed_classes(possible, visited)
    value, action_value = _values(mdp, policy, move, possible)
    undiscounted = _visits(move, mdp.start, 1.0, visited, closed)
    discounted = undiscounted if mdp.gamma == 1.0 else _visits(move, mdp.start, mdp.gamma, visited, [])
    begin = mdp.start > 0
    return Solution(
        policy=policy,
        value=value,
        action_value=action_value,
        visits=discounted,
        undiscounted_visits=undiscounted,
        on_policy=_shares(move, mdp.start, undiscounted, closed) if closed else undiscounted / undiscounted.sum(),
        objective=mdp.start[begin] @ value[begin],
        mean_length=undiscounted.sum(),
    )


def _values(mdp: FiniteMDP, policy: Tensor, move: Tensor, possible: Tensor) -> tuple[Tensor, Tensor]:
    """v and q; NaN where they are not defined."""
    going = ~mdp.terminal
    defined = going
    if mdp.gamma == 1.0:
        endless = going & ~reachable(possible.mT, mdp.terminal)
        defined = going & ~reachable(possible.mT, endless)
    expected = (mdp.transition * mdp.reward).sum(-1) * going.unsqueeze(-1)
    inside = defined.nonzero().squeeze(-1)
    system = torch.eye(len(inside), dtype=torch.float64) - mdp.gamma * move[inside][:, inside]
    solved = torch.linalg.solve(system, (policy * expected).sum(-1)[inside])
    value = torch.zeros(mdp.states, dtype=torch.float64).index_copy(0, inside, solved)
    action_value = expected + mdp.gamma * (mdp.transition @ value) * going.unsqueeze(-1)
    undefined = going & ~defined
    unknown = (mdp.transition[..., undefined] > 0).any(-1) & going.unsqueeze(-1)
    return value.masked_fill(undefined, torch.nan), action_value.masked_fill(unknown, torch.nan)


def _visits(move: Tensor, start: Tensor, gamma: float, visited: Tensor, closed: list[Tensor]) -> Tensor:
    """eta_gamma, [S]; infinite in the classes that are never left."""
    passing = visited.clone()
    for members in closed:
        passing[members] = False
    inside = passing.nonzero().squeeze(-1)
    system = torch.eye(len(inside), dtype=torch.float64) - gamma * move[inside][:, inside]
    visits = torch.zeros_like(start).index_copy(0, inside, torch.linalg.solve(system.mT, start[inside]))
    return visits.masked_fill(visited & ~passing, torch.inf)


def _shares(move: Tensor, start: Tensor, visits: Tensor, closed: list[Tensor]) -> Tensor:
    """mu of episodes that need not end: each closed class by the probability of ending up there."""
    passing = visits.isfinite()
    entering = torch.where(passing, visits, 0.0) @ move + start
    chance = torch.stack([entering[members].sum() for members in closed])
    share = torch.zeros_like(start)
    for members, likely in zip(closed, chance / chance.sum(), strict=True):
        share = share.index_copy(0, members, likely * stationary(move[members][:, members]))
    return share


def stationary(move: Tensor) -> Tensor:
    """mu = P' mu with sum 1, of a chain with one closed class, [S]: (I - P + 1/n)' mu = 1/n.

    Args:
        move: [S, S] P.
    """
    states = len(move)
    even = torch.full((states,), 1.0 / states, dtype=torch.float64)
    return torch.linalg.solve((torch.eye(states, dtype=torch.float64) - move + 1.0 / states).mT, even)


def _continuing(mdp: FiniteMDP, policy: Tensor) -> Solution:
    move = torch.einsum("sa,sax->sx", policy, mdp.transition)
    known = reachable((mdp.transition > 0).any(1), mdp.start > 0)
    closed = closed_classes(move.detach() > 0, known)
    if len(closed) > 1:
        raise ValueError(
            f"under this policy the chain stays for good in one of the classes {[c.tolist() for c in closed]}, so that "
            "there is no one average reward: give every action a positive probability"
        )
    inside = known.nonzero().squeeze(-1)
    chain = move[inside][:, inside]
    share_inside = stationary(chain)
    expected = (mdp.transition * mdp.reward).sum(-1)
    reward = (policy * expected).sum(-1)[inside]
    average = share_inside @ reward
    system = torch.eye(len(inside), dtype=torch.float64) - chain + share_inside
    value = torch.zeros_like(mdp.start).index_copy(0, inside, torch.linalg.solve(system, reward - average))
    share = torch.zeros_like(mdp.start).index_copy(0, inside, share_inside)
    endless = torch.where(share > 0, torch.inf, 0.0).to(torch.float64)
    return Solution(
        policy=policy,
        value=value.masked_fill(~known, torch.nan),
        action_value=(expected - average + mdp.transition @ value).masked_fill(~known.unsqueeze(-1), torch.nan),
        visits=endless,
        undiscounted_visits=endless,
        on_policy=share,
        objective=average,
        mean_length=torch.tensor(torch.inf, dtype=torch.float64),
        average_reward=average,
    )

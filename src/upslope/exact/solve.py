"""Exact values, visits and objectives of a policy on a finite MDP, by linear algebra.

    v = r_pi + gamma P_pi v                  q(s,a) = sum_s' p(s'|s,a) [r(s,a,s') + gamma v(s')]
    eta_gamma = d_0 + gamma P_pi' eta_gamma  J = d_0 . v = sum_s eta_gamma(s) r_pi(s)

Everything is differentiable in the policy's probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from upslope.exact.finite import FiniteMDP
from upslope.trajectory import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """What is true of a policy on a problem.

    Attributes:
        policy: [S, A] pi(a|s).
        value: [S] v(s), 0 on terminal states.
        action_value: [S, A] q(s, a), 0 on terminal states.
        visits: [S] eta_gamma(s) = sum_t gamma^t Pr(s_t = s); 0 on terminal states.
        undiscounted_visits: [S] eta_1(s), or infinite entries where episodes need not end.
        on_policy: [S] mu(s): the share of steps spent in s.
        objective: J.
        mean_length: mean steps of an episode (infinite where there are none).
    """

    policy: Tensor
    value: Tensor
    action_value: Tensor
    visits: Tensor
    undiscounted_visits: Tensor
    on_policy: Tensor
    objective: Tensor
    mean_length: Tensor

    @property
    def advantage(self) -> Tensor:
        """[S, A] q - v."""
        return self.action_value - self.value.unsqueeze(-1)


def action_probabilities(mdp: FiniteMDP, policy: Policy) -> Tensor:
    """pi(a|s), [S, A], differentiable, for any policy whose steps stand on their own.

    Raises:
        ValueError: if the policy's distributions depend on earlier steps.
    """
    if policy.sequential:
        raise ValueError(
            "this policy looks at earlier steps of its row, so that no table pi(a|s) describes it: enumerate its "
            "trajectories instead (upslope.exact.enumerate_episodes)"
        )
    action = torch.arange(mdp.actions).expand(mdp.states, mdp.actions)
    shape = (mdp.states, mdp.actions, *mdp.observation.shape[1:])
    observation = mdp.observation.unsqueeze(1).expand(shape)
    return policy.log_prob(observation, action).exp()

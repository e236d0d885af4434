"""Two episodes small enough for paper: one that terminates, one that a time limit ends, with what Psi is there."""

from __future__ import annotations

import torch
from tabular_world import TabularPolicy
from torch import Tensor

from upslope.algorithms.reinforce import Psi
from upslope.trajectory import Trajectory

VALUE = (1.0, 2.0, 3.0, 2.0, 4.0, 10.0, 99.0)
"""Of states 0 to 2 (first episode), 3 and 4 (second), 5 (where the time limit left it), 6 (padding)."""

EXPECTED: dict[Psi, tuple[list[float], list[float]]] = {
    "total_reward": ([3.0, 3.0, 3.0], [5.0, 5.0]),
    "reward_to_go": ([3.0, 4.0, 4.0], [5.0, 6.0]),
    "baselined": ([2.0, 2.0, 1.0], [5.5, 7.0]),
    "action_value": ([2.4375, 3.75, 4.0], [5.75, 11.0]),
    "advantage": ([1.4375, 1.75, 1.0], [3.75, 7.0]),
    "td_residual": ([1.0, 1.5, 1.0], [2.0, 7.0]),
}
"""With gamma = lambda = 0.5. Choices with a critic bootstrap from state 5: G = 6 + 0.5 x 10, then 2 + 0.5 x 11."""

BOOTSTRAPPED_RETURN = ([3.0, 4.0, 4.0], [7.5, 11.0])
"""What the baseline learns."""


def two_episodes(policy: TabularPolicy) -> Trajectory:
    observation = torch.tensor([[0, 1, 2], [3, 4, 6]])
    action = torch.tensor([[0, 1, 0], [1, 1, 0]])
    return Trajectory(
        observation=observation,
        action=action,
        reward=torch.tensor([[1.0, 2.0, 4.0], [2.0, 6.0, 1e6]], dtype=torch.float64),
        terminated=torch.tensor([[False, False, True], [False, False, False]]),
        truncated=torch.tensor([[False, False, False], [False, True, False]]),
        mask=torch.tensor([[True, True, True], [True, True, False]]),
        behaviour_log_prob=policy.log_prob(observation, action).detach(),
        time=torch.tensor([[0, 1, 2], [0, 1, 0]]),
        final_observation=torch.tensor([5]),
        final_index=torch.tensor([4]),
    )


def policy_with_values() -> TabularPolicy:
    policy = TabularPolicy(states=7)
    with torch.no_grad():
        policy.value.copy_(torch.tensor(VALUE))
    return policy


def chosen(trajectory: Trajectory, value: Tensor) -> tuple[list[float], list[float]]:
    first, second = (value[row][trajectory.mask[row]].tolist() for row in range(2))
    return first, second

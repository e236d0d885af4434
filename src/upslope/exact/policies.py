"""Policies small enough to be looked at whole: softmax over a table of preferences or over linear ones, in float64."""

from __future__ import annotations

from abc import abstractmethod
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from upslope.policies import Categorical, HeadDistribution
from upslope.trajectory import AskedTwice, Evaluation, Memoryless, Observation, ObservationArrays, Steps, Trajectory


class StatePolicy(AskedTwice, nn.Module):
    """A softmax policy with a critic, both functions of the number seen; a `Policy`.

    That is the state's number, unless the problem's observations let states look alike.

    Attributes:
        value: [S] the critic's table.
    """

    def __init__(self, states: int, actions: int) -> None:
        super().__init__()
        self.head = Categorical(actions)
        self.value = nn.Parameter(torch.zeros(states, dtype=torch.float64))

    @abstractmethod
    def preferences(self) -> Tensor:
        """h(s, a), [S, A]: the policy is its softmax."""

    @property
    def sequential(self) -> bool:
        """Each step stands on its own."""
        return False

    def sampler(self) -> TableSampler:
        """The table of preferences as it is now."""
        return TableSampler(self.head, self.preferences().detach().numpy())

    def log_prob(self, observation: Observation, action: Tensor) -> Tensor:
        """log pi(a|s), any leading shape."""
        assert isinstance(observation, Tensor)
        return self.preferences().log_softmax(-1)[observation, action]

    def evaluate(self, steps: Steps) -> Evaluation:
        """log-prob, entropy, distribution and value at once, differentiable."""
        observation = steps.observation
        assert isinstance(observation, Tensor)
        log_policy = self.preferences().log_softmax(-1)
        entropy = -(log_policy.exp() * log_policy).sum(-1)
        return Evaluation(
            log_prob=log_policy[observation, steps.action],
            entropy=entropy[observation],
            distribution=HeadDistribution(self.head, log_policy[observation]),
            value=self.value[observation],
        )

    def values(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """V_t and V'_t, both [B, T]."""
        assert isinstance(trajectory.observation, Tensor)
        assert isinstance(trajectory.final_observation, Tensor)
        value = self.value[trajectory.observation]
        return value, trajectory.next_value(value, self.value[trajectory.final_observation])


@final
class TabularPolicy(StatePolicy):
    """pi(a|s) = softmax of a free preference for each state and action.

    Args:
        states: S.
        actions: A.
        preferences: [S, A] to begin with; zeros (the uniform policy) if None.
    """

    def __init__(self, states: int, actions: int, preferences: Tensor | None = None) -> None:
        super().__init__(states, actions)
        if preferences is not None and preferences.shape != (states, actions):
            raise ValueError(f"preferences must have shape {(states, actions)}, got {tuple(preferences.shape)}")
        begin = torch.zeros(states, actions) if preferences is None else preferences
        self.theta = nn.Parameter(begin.to(torch.float64).clone())

    def preferences(self) -> Tensor:
        """The table itself."""
        return self.theta


@final
class LinearPolicy(StatePolicy):
    """pi(a|s) = softmax of theta . x(s, a) (Sutton & Barto, equation 13.3): states with equal features look alike.

    Args:
        features: x, [S, A, D].
        theta: [D] to begin with; zeros if None.
    """

    features: Tensor

    def __init__(self, features: Tensor, theta: Tensor | None = None) -> None:
        if features.dim() != 3:
            raise ValueError(f"features must have shape [S, A, D], got {tuple(features.shape)}")
        if theta is not None and theta.shape != features.shape[2:]:
            raise ValueError(f"theta must have shape {tuple(features.shape[2:])}, got {tuple(theta.shape)}")
        super().__init__(features.shape[0], features.shape[1])
        self.register_buffer("features", features.to(torch.float64))
        begin = torch.zeros(features.shape[2]) if theta is None else theta
        self.theta = nn.Parameter(begin.to(torch.float64).clone())

    def preferences(self) -> Tensor:
        """theta . x(s, a)."""
        return self.features @ self.theta


@final
class TableSampler(Memoryless):
    """NumPy in, NumPy out: samples from rows of a table of preferences; a `Sampler`."""

    def __init__(self, head: Categorical, preferences: np.ndarray) -> None:
        self._head, self._preferences = head, preferences

    def noise(self, generator: np.random.Generator, steps: int, environments: int) -> np.ndarray:
        """All the randomness of a rollout, [steps, environments, A]."""
        return self._head.noise(generator, steps, environments)

    def sample(self, observation: ObservationArrays, noise: np.ndarray) -> np.ndarray:
        """One action per environment, [N]."""
        return self._head.sample(self._rows(observation), noise)

    def mode(self, observation: ObservationArrays) -> np.ndarray:
        """The most likely action per environment."""
        return self._head.mode(self._rows(observation))

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """The action as it is."""
        return self._head.to_environment(action)

    def _rows(self, observation: ObservationArrays) -> np.ndarray:
        assert isinstance(observation, np.ndarray)
        return self._preferences[observation]

"""Actions at random, for trying environments out and as a baseline."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from upslope.collect.masks import mask_of
from upslope.policies.masking import action_sizes
from upslope.spaces import Box, Discrete, Leaf, MultiBinary, MultiDiscrete
from upslope.trajectory import AskedTwice, Evaluation, Memoryless, Observation, ObservationArrays, Steps, Trajectory


def random_action(
    space: Leaf, generator: np.random.Generator, count: int, mask: np.ndarray | None = None
) -> np.ndarray:
    """Uniform actions as the environment takes them, [count] or [count, A]; normal where a bound is missing.

    Args:
        space: of the actions.
        generator: of the choice.
        count: how many.
        mask: [count, sum of choices] which are valid; None where all are.
    """
    sizes = action_sizes(space)
    if mask is not None and sizes is not None:
        return _valid_action(space, sizes, generator.random((count, sum(sizes))), mask)
    match space:
        case Discrete():
            return generator.integers(space.n, size=count) + space.start
        case MultiDiscrete():
            return generator.integers(space.choices, size=(count, len(space.choices))) + np.array(space.start)
        case MultiBinary():
            return generator.integers(2, size=(count, space.n), dtype=np.int8)
        case Box():
            low = np.broadcast_to(np.reshape(space.low, space.shape if np.ndim(space.low) else ()), space.shape)
            high = np.broadcast_to(np.reshape(space.high, space.shape if np.ndim(space.high) else ()), space.shape)
            below, above = np.isfinite(low), np.isfinite(high)
            low, high = np.where(below, low, 0.0), np.where(above, high, 0.0)
            uniform = low + (high - low) * generator.random((count, *space.shape))
            normal = generator.standard_normal((count, *space.shape))
            one_sided = np.where(below, low + np.abs(normal), np.where(above, high - np.abs(normal), normal))
            return np.where(below & above, uniform, one_sided).astype(np.float32)


def _valid_action(space: Leaf, sizes: tuple[int, ...], chance: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """For each choice the valid value with the largest of the uniform numbers `chance`, any where none is valid."""
    preference, ends = np.where(mask, chance, -1.0), np.cumsum(sizes)
    parts = [preference[:, end - size : end].argmax(axis=1) for end, size in zip(ends, sizes, strict=True)]
    start = np.array(space.start) if isinstance(space, Discrete | MultiDiscrete) else 0
    return (parts[0] if isinstance(space, Discrete) else np.stack(parts, axis=1)) + start


class RandomPolicy(Memoryless, AskedTwice):
    """Uniform valid actions whatever is seen; its own sampler. Its log-probs are zeros, right up to a constant.

    Args:
        space: of the actions.
        masked: whether the observations hold masks of valid actions.
    """

    def __init__(self, space: Leaf, *, masked: bool = False) -> None:
        self._space = space
        self._sizes = action_sizes(space) if masked else None

    @property
    def sequential(self) -> bool:
        """Each step stands on its own."""
        return False

    def sampler(self) -> RandomPolicy:
        """Itself."""
        return self

    def noise(self, generator: np.random.Generator, steps: int, environments: int) -> np.ndarray:
        """The actions themselves, as the environment takes them; uniform numbers to choose by where there are masks."""
        if self._sizes is not None:
            return generator.random((steps, environments, sum(self._sizes)))
        return np.stack([random_action(self._space, generator, environments) for _ in range(steps)])

    def sample(self, observation: ObservationArrays, noise: np.ndarray) -> np.ndarray:
        """What was drawn."""
        mask = mask_of(observation)
        if self._sizes is None or mask is None:
            return noise
        return _valid_action(self._space, self._sizes, noise, mask)

    def mode(self, observation: ObservationArrays) -> np.ndarray:
        """No action is likelier than another: always the same random ones."""
        first = next(iter(observation.values())) if isinstance(observation, dict) else observation
        return random_action(self._space, np.random.default_rng(0), len(first), mask_of(observation))

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """As it is."""
        return action

    def log_prob(self, observation: Observation, action: Tensor) -> Tensor:
        """Zeros."""
        first = next(iter(observation.values())) if isinstance(observation, dict) else observation
        return torch.zeros(first.shape[:2])

    def evaluate(self, steps: Steps) -> Evaluation:
        """Refused: it has no parameters."""
        raise NotImplementedError("a random policy cannot be trained")

    def values(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """Zeros."""
        return torch.zeros_like(trajectory.reward), torch.zeros_like(trajectory.reward)

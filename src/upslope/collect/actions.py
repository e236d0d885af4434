"""Actions at random, for trying environments out."""

from __future__ import annotations

import numpy as np

from upslope.spaces import Box, Discrete, Leaf, MultiBinary, MultiDiscrete


def random_action(space: Leaf, generator: np.random.Generator, count: int) -> np.ndarray:
    """Uniform actions as the environment takes them, [count] or [count, A]; standard normal where there is no bound."""
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
            bounded = np.isfinite(low) & np.isfinite(high)
            low, high = np.where(bounded, low, 0.0), np.where(bounded, high, 0.0)
            uniform = low + (high - low) * generator.random((count, *space.shape))
            normal = generator.standard_normal((count, *space.shape))
            return np.where(bounded, uniform, normal).astype(np.float32)

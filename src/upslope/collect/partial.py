"""Environments of which the policy is shown a part."""

from __future__ import annotations

from typing import Any, final

import gymnasium
import numpy as np

from upslope.collect.errors import UnsupportedSpaceError


@final
class KeptEntries(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Shows only some entries of observations that are vectors, so that the rest must be remembered or guessed.

    Args:
        environment: whose observations are vectors.
        entries: which of them are kept, in this order.

    Raises:
        UnsupportedSpaceError: if observations are no vectors, or have no such entries.
    """

    def __init__(self, environment: gymnasium.Env[Any, Any], entries: tuple[int, ...]) -> None:
        super().__init__(environment)
        space = environment.observation_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise UnsupportedSpaceError(
                f"environment.observation_entries keeps entries of a vector, and the observations are {space}: leave "
                "it out"
            )
        if max(entries) >= space.shape[0]:
            raise UnsupportedSpaceError(
                f"environment.observation_entries is {entries}, and observations have the entries 0 to "
                f"{space.shape[0] - 1}"
            )
        self._entries = np.array(entries)
        low, high = space.low[self._entries], space.high[self._entries]
        self.observation_space = gymnasium.spaces.Box(low, high, dtype=space.dtype.type)

    def observation(self, observation: Any) -> Any:
        """The entries that are kept."""
        return observation[self._entries]


def keep_entries(environment: gymnasium.Env[Any, Any], entries: tuple[int, ...] | None) -> gymnasium.Env[Any, Any]:
    """The environment, of whose observations only some entries are shown; all where `entries` is None."""
    return environment if entries is None else KeptEntries(environment, entries)

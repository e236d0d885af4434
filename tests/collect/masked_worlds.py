"""An environment that counts to 5 and refuses invalid actions, with its masks wherever they may be."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

LENGTH = 5
VALID = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]], dtype=np.int8)
"""Of a Discrete, by the count; nothing is valid at the end."""
SEVERAL = np.array(
    [[1, 0, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]],
    dtype=np.int8,
)
"""Of a MultiDiscrete of 2 and 3."""


def action_space(several: bool) -> gymnasium.Space[Any]:
    return gymnasium.spaces.MultiDiscrete([2, 3], start=[1, 0]) if several else gymnasium.spaces.Discrete(3, start=4)


def is_valid(several: bool, count: int, action: Any) -> bool:
    if several:
        return bool(SEVERAL[count][int(action[0]) - 1] and SEVERAL[count][2 + int(action[1])])
    return bool(VALID[count][int(action) - 4])


class Masked(gymnasium.Env[Any, Any]):
    """Observes k/5; the mask lies in `info`, comes from `action_masks()`, or is the entry "legal" of a Dict.

    Args:
        place: of the mask: info, method, observation, or nowhere.
        several: a MultiDiscrete instead of a Discrete.
        truncating: end by truncation.
        broken: what a reset or step at count 2 gives in place of the mask; "absent" for nothing.
    """

    def __init__(
        self, place: str = "info", *, several: bool = False, truncating: bool = False, broken: Any = None
    ) -> None:
        self.place, self.several, self.truncating, self.broken, self.count = place, several, truncating, broken, 0
        table = SEVERAL if several else VALID
        self.action_space = action_space(several)
        clock = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
        legal = gymnasium.spaces.MultiBinary(table.shape[1])
        self.observation_space = clock
        if place == "observation":
            self.observation_space = gymnasium.spaces.Dict({"clock": clock, "legal": legal})
        if place == "method":
            self.action_masks = self._mask

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self._observe(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not is_valid(self.several, self.count, action):
            raise RuntimeError(f"the action {action} is invalid at {self.count}")
        self.count += 1
        ended = self.count == LENGTH
        return self._observe(), 1.0, ended and not self.truncating, ended and self.truncating, self._info()

    def get_state(self) -> dict[str, Any]:
        return {"count": self.count}

    def set_state(self, state: dict[str, Any]) -> None:
        self.count = int(state["count"])

    def _mask(self) -> Any:
        if self.broken is not None and self.count == 2:
            return None if isinstance(self.broken, str) else self.broken
        if self.several and self.place == "info":
            return SEVERAL[self.count][:2], SEVERAL[self.count][2:]
        return (SEVERAL if self.several else VALID)[self.count].astype(bool)

    def _info(self) -> dict[str, Any]:
        mask = self._mask()
        return {} if self.place != "info" or mask is None else {"action_mask": mask}

    def _observe(self) -> Any:
        clock = np.array([self.count / LENGTH], dtype=np.float32)
        return {"clock": clock, "legal": self._mask().astype(np.int8)} if self.place == "observation" else clock


class MaskedVector(VectorEnv[Any, Any, Any]):
    """A vectorisation of its own make, with arrays of masks in `info` and no word on whom they are of."""

    def __init__(self, num_envs: int, mode: AutoresetMode, *, broken: int | None = None) -> None:
        self.metadata = {"autoreset_mode": mode}
        self.num_envs, self.mode, self.broken = num_envs, mode, broken
        self.single_observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
        self.single_action_space = action_space(False)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.count = np.zeros(num_envs, dtype=np.int64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count[slice(None) if options is None else options["reset_mask"]] = 0
        return self._observation(), self._info()

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        over = self.count == LENGTH
        for row in np.flatnonzero(~over):
            if not is_valid(False, int(self.count[row]), actions[row]):
                raise RuntimeError(f"the action {actions[row]} is invalid at {self.count[row]}")
        self.count = np.where(over, 0, self.count + 1)
        ended = self.count == LENGTH
        info: dict[str, Any] = {}
        if self.mode is AutoresetMode.SAME_STEP and ended.any():
            info = {"final_obs": self._observation(), "final_info": {"action_mask": VALID[self.count]}}
            self.count[ended] = 0
        return self._observation(), np.where(over, 0.0, 1.0), ended, np.zeros_like(ended), {**info, **self._info()}

    def get_state(self) -> dict[str, Any]:
        return {"count": self.count}

    def set_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]

    def _observation(self) -> np.ndarray:
        return (self.count / LENGTH).astype(np.float32)[:, None]

    def _info(self) -> dict[str, Any]:
        masks = VALID[self.count]
        if self.broken is not None:
            masks[self.broken, :] *= self.count[self.broken] != 3
        return {"action_mask": masks}

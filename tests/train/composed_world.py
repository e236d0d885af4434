"""A world that can be seen, acted in and masked in every way, and a set of runs in which each two choices meet."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import gymnasium
import numpy as np

LENGTH = 6
WORLD = "Composed-v0"


class Composed(gymnasium.Env[Any, Any]):
    """Six steps through three cells; the reward is for naming the cell, which moves at random.

    Args:
        seen: vector, image, or both in a Dict.
        acts: discrete, several (a MultiDiscrete) or real.
        endless: end by truncation alone.
    """

    def __init__(self, seen: str = "vector", acts: str = "discrete", *, endless: bool = False) -> None:
        self.seen, self.acts, self.endless = seen, acts, endless
        vector = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
        image = gymnasium.spaces.Box(0, 255, (6, 6, 1), np.uint8)
        both = gymnasium.spaces.Dict({"vector": vector, "image": image})
        self.observation_space = {"vector": vector, "image": image, "both": both}[seen]
        self.action_space = {
            "discrete": gymnasium.spaces.Discrete(3, start=1),
            "several": gymnasium.spaces.MultiDiscrete([3, 2]),
            "real": gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32),
        }[acts]
        self.cell = self.count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cell, self.count = int(self.np_random.integers(3)), 0
        return self._observe(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        parts = np.atleast_1d(action)
        first = int(parts[0]) - (self.acts == "discrete")
        if self.acts != "real":
            mask = self.action_masks()
            valid = bool(mask[first]) and (self.acts == "discrete" or bool(mask[3 + int(parts[1])]))
            info = {"invalid": not valid}
        else:
            info = {"invalid": False}
        reward = float(first == self.cell) if self.acts != "real" else -float(np.abs(parts).sum())
        self.cell, self.count = int(self.np_random.integers(3)), self.count + 1
        ended = self.count >= LENGTH and not self.endless
        return self._observe(), reward, ended, False, {**self._info(), **info}

    def action_masks(self) -> np.ndarray:
        """The cell itself and the next one; the second choice is free in the first cell alone."""
        mask = np.array([self.cell != (k + 1) % 3 for k in range(3)])
        return mask if self.acts == "discrete" else np.append(mask, [True, self.cell == 0])

    def get_state(self) -> dict[str, Any]:
        state = self.np_random.bit_generator.state["state"]
        return {"cell": self.cell, "count": self.count, "random": [str(state["state"]), str(state["inc"])]}

    def set_state(self, state: dict[str, Any]) -> None:
        self.cell, self.count = int(state["cell"]), int(state["count"])
        value, increment = (int(text) for text in state["random"])
        random = self.np_random.bit_generator.state
        self.np_random.bit_generator.state = {
            **random,
            "state": {"state": value, "inc": increment},
            "has_uint32": 0,
            "uinteger": 0,
        }

    def _info(self) -> dict[str, Any]:
        return {} if self.acts == "real" else {"action_mask": self.action_masks().astype(np.int8)}

    def _observe(self) -> Any:
        vector = np.zeros(3, dtype=np.float32)
        vector[self.cell] = 1.0
        image = np.zeros((6, 6, 1), dtype=np.uint8)
        image[2 * self.cell : 2 * self.cell + 2] = 255
        return {"vector": vector, "image": image, "both": {"vector": vector, "image": image}}[self.seen]


if WORLD not in gymnasium.registry:
    gymnasium.register(WORLD, f"{__name__}:Composed")


def covering(factors: dict[str, list[str]]) -> list[dict[str, str]]:
    """Few combinations in which any two choices of two factors that go together are together at least once (greedy)."""
    names = list(factors)
    every = [row for row in product(*factors.values()) if _goes(dict(zip(names, row, strict=True)))]
    pairs = {row: {((i, row[i]), (j, row[j])) for i, j in combinations(range(len(names)), 2)} for row in every}
    left = set[Any]().union(*pairs.values())
    chosen: list[dict[str, str]] = []
    while left:
        best = max(every, key=lambda row: len(pairs[row] & left))
        left -= pairs[best]
        chosen.append(dict(zip(names, best, strict=True)))
    return chosen


def _goes(row: dict[str, str]) -> bool:
    return row["mask"] == "none" or row["acts"] != "real"

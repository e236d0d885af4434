"""Small environments that the tests act in."""

from __future__ import annotations

import ctypes
import faulthandler
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Walk(gymnasium.Env):
    """A random walk; ends at random, by termination or truncation."""

    def __init__(self, observation_space=None, action_space=None):
        self.observation_space = observation_space or spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = action_space or spaces.Discrete(3)
        self.position = np.zeros(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=3)
        return self.position, {}

    def step(self, action):
        self.position = self.position + self.np_random.normal(size=3) + float(np.sum(action))
        chance = self.np_random.random()
        return self.position, float(self.position[0]), bool(chance < 0.05), bool(0.05 <= chance < 0.15), {}


class Remembering(Walk):
    """The same, able to say all it remembers."""

    def get_state(self) -> Any:
        state = self.np_random.bit_generator.state
        inner = {name: str(number) for name, number in state["state"].items()}
        return {"position": self.position.copy(), "random": inner, "rest": [state["has_uint32"], state["uinteger"]]}

    def set_state(self, state: Any) -> None:
        self.position = np.asarray(state["position"]).copy()
        bits = np.random.PCG64()
        bits.state = {
            "bit_generator": "PCG64",
            "state": {name: int(number) for name, number in state["random"].items()},
            "has_uint32": state["rest"][0],
            "uinteger": state["rest"][1],
        }
        self.np_random = np.random.Generator(bits)


class Forgetful(Remembering):
    """Claims to remember, but leaves its random numbers out."""

    def set_state(self, state: Any) -> None:
        self.position = np.asarray(state["position"]).copy()


class Spoken(gymnasium.Env):
    """Returns samples of its observation space, whatever is done."""

    def __init__(self, observation_space, action_space=None):
        self.observation_space = observation_space
        self.action_space = action_space or spaces.Discrete(2)
        self.taken: list[Any] = []
        self.shown: list[Any] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self._show(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.taken.append(action)
        return self._show(), 0.0, False, False, {}

    def _show(self):
        self.shown.append(self.observation_space.sample())
        return self.shown[-1]


class Faulty(gymnasium.Env):
    """Behaves until its k-th step, then does something bad."""

    def __init__(self, fault: str, at: int = 7):
        self.observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3)})
        self.action_space = spaces.Discrete(2)
        self.fault, self.at, self.count = fault, at, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"a": np.zeros(2, np.float32), "b": 1}, {}

    def step(self, action):
        self.count += 1
        observation, reward = {"a": np.zeros(2, np.float32), "b": 1}, 1.0
        if self.count == self.at:
            match self.fault:
                case "raise":
                    raise RuntimeError("the door is stuck")
                case "segfault":
                    faulthandler.disable()
                    ctypes.string_at(0)
                case "hang":
                    time.sleep(3600)
                case "observation":
                    observation["a"][1] = np.nan
                case "reward":
                    reward = float("inf")
                case "large":
                    reward = 1e300
                case "final":
                    observation["a"][0] = -np.inf
                    return observation, reward, False, True, {}
        if self.fault == "observation" and self.count > self.at:
            raise RuntimeError("a consequence")
        return observation, reward, False, False, {}

"""The Tick suite: does a whole collector, and the advantage behind it, treat ends of episodes exactly?

An environment that counts: observation k/5 before its step k, reward 1, truncated after 5 steps, never terminated. With
the critic V(o) = 10 o, gamma 0.9 and lambda 0.8 the generalised advantages of 12 steps can be worked out by hand
(`TICK_ADVANTAGES`); its terminating twin has others (`TERMINATING_ADVANTAGES`). A collector that confuses truncation
with termination, samples reset steps or bootstraps from the wrong observation is off by 5 to 9.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from upslope.collect.autoreset import GymnasiumVector
from upslope.collect.environments import EnvironmentCollector
from upslope.collect.vector import SyncEnvironments, VectorEnvironment
from upslope.collect.workers import AsyncEnvironments
from upslope.estimators import gae
from upslope.trajectory import AskedTwice, Evaluation, Memoryless, Observation, ObservationArrays, Steps, Trajectory

TICK_LENGTH = 5
TICK_ADVANTAGES = (7.27478272, 6.214976, 5.0208, 3.64, 2.0)
TERMINATING_ADVANTAGES = (4.85613568, 2.855744, 0.3552, -2.84, -7.0)
TICK_TAIL = (4.672, 2.6)
"""Advantages of the first episodes' five steps, and of two steps of an episode that the data cuts."""


class Tick(gymnasium.Env[Any, Any]):
    """Counts to 5 and is truncated.

    Args:
        terminating: terminate instead.
        named: observe a Dict, `{"clock": {"k": [k/5]}, "constant": 3}`, instead of an array.
    """

    def __init__(self, *, terminating: bool = False, named: bool = False) -> None:
        self._terminating = terminating
        self._named = named
        self._count = 0
        self.observation_space, self.action_space = _tick_spaces(named)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin at 0."""
        super().reset(seed=seed)
        self._count = 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Count on; the action means nothing."""
        assert self._count < TICK_LENGTH, "stepped after the end of an episode"
        self._count += 1
        ended = self._count == TICK_LENGTH
        return self._observation(), 1.0, ended and self._terminating, ended and not self._terminating, {}

    def _observation(self) -> Any:
        clock = np.array([self._count / TICK_LENGTH], dtype=np.float32)
        return {"clock": {"k": clock}, "constant": 3} if self._named else clock


class TickVector(VectorEnv[Any, Any, Any]):
    """A vector environment of its own make, in each of the ways to reset.

    Args:
        num_envs: N.
        mode: how it resets.
        terminating: terminate instead of truncating.
        named: observe a Dict.
    """

    def __init__(self, num_envs: int, mode: AutoresetMode, *, terminating: bool = False, named: bool = False) -> None:
        self.metadata = {"autoreset_mode": mode}
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = _tick_spaces(named)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._mode = mode
        self._terminating = terminating
        self._named = named
        self._count = np.zeros(num_envs, dtype=np.int64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin at 0, everywhere or where `options["reset_mask"]` says."""
        super().reset(seed=seed)
        self._count[slice(None) if options is None else options["reset_mask"]] = 0
        return self._observation(), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Count on; the actions mean nothing."""
        over = self._count == TICK_LENGTH
        assert self._mode is AutoresetMode.NEXT_STEP or not over.any(), "stepped after the end of an episode"
        self._count = np.where(over, 0, self._count + 1)
        ended = self._count == TICK_LENGTH
        reward = np.where(over, 0.0, 1.0)
        info: dict[str, Any] = {}
        if self._mode is AutoresetMode.SAME_STEP and ended.any():
            info = {"final_obs": self._observation()}
            self._count[ended] = 0
        return self._observation(), reward, ended & self._terminating, ended & (not self._terminating), info

    def _observation(self) -> Any:
        clock = (self._count / TICK_LENGTH).astype(np.float32)[:, None]
        return {"clock": {"k": clock}, "constant": np.full(self.num_envs, 3)} if self._named else clock


def _tick_spaces(named: bool) -> tuple[gymnasium.Space[Any], gymnasium.spaces.Discrete]:
    clock = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
    if not named:
        return clock, gymnasium.spaces.Discrete(2)
    inner = gymnasium.spaces.Dict({"k": clock})
    return (
        gymnasium.spaces.Dict({"clock": inner, "constant": gymnasium.spaces.Discrete(4, start=2)}),
        gymnasium.spaces.Discrete(2),
    )


class TickPolicy(Memoryless, AskedTwice):
    """Fair coins, and the critic V(o) = 10 o. Its own sampler."""

    @property
    def sequential(self) -> bool:
        """Each step stands on its own."""
        return False

    def sampler(self) -> TickPolicy:
        """Itself."""
        return self

    def noise(self, generator: np.random.Generator, steps: int, environments: int) -> np.ndarray:
        """Uniform numbers, [steps, environments]."""
        return generator.random((steps, environments))

    def sample(self, observation: ObservationArrays, noise: np.ndarray) -> np.ndarray:
        """Coins."""
        return (noise < 0.5).astype(np.int64)

    def mode(self, observation: ObservationArrays) -> np.ndarray:
        """Zeros."""
        clock = observation["clock/k"] if isinstance(observation, dict) else observation
        return np.zeros(len(clock), dtype=np.int64)

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """As it is."""
        return action

    def log_prob(self, observation: Observation, action: Tensor) -> Tensor:
        """log 1/2."""
        return torch.full(action.shape, float(np.log(0.5)))

    def evaluate(self, steps: Steps) -> Evaluation:
        """Refused: it has no parameters."""
        raise NotImplementedError("the policy of the Tick suite cannot be trained")

    def values(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """V_t = 10 o_t and V'_t."""
        value = self.value(trajectory.observation)
        return value, trajectory.next_value(value, self.value(trajectory.final_observation))

    def value(self, observation: Observation) -> Tensor:
        """10 o, for any leading shape."""
        clock = observation["clock/k"] if isinstance(observation, dict) else observation
        return 10.0 * clock[..., 0]


def tick_advantages(
    environments: VectorEnvironment, *, steps: int, gamma: float = 0.9, gae_lambda: float = 0.8
) -> list[list[float]]:
    """Advantages of the steps that count, one list per environment, through the whole collector.

    Args:
        environments: of `Tick` or `TickVector`; closed afterwards.
        steps: of each environment, steps that only reset included.
        gamma, gae_lambda: of the estimator.
    """
    policy = TickPolicy()
    collector = EnvironmentCollector(environments, steps=steps, seed=0)
    trajectory = collector.collect(policy, 0)
    collector.close()
    value, next_value = policy.values(trajectory)
    advantage = gae(
        trajectory.reward,
        trajectory.discount(gamma),
        value,
        next_value,
        trajectory.cut,
        gae_lambda=gae_lambda,
        mask=trajectory.mask,
    )
    return [row[mask].tolist() for row, mask in zip(advantage, trajectory.mask, strict=True)]


@dataclass(frozen=True, slots=True)
class TickCase:
    """One way to step Tick.

    Attributes:
        name: of the case.
        make: makes the environments.
        terminating: which twin.
        reset_steps: steps per episode that only reset.
    """

    name: str
    make: Callable[[], VectorEnvironment]
    terminating: bool
    reset_steps: int

    def error(self) -> float:
        """Largest absolute error of 12 steps' advantages, over all environments; infinite if steps are missing."""
        episode = TERMINATING_ADVANTAGES if self.terminating else TICK_ADVANTAGES
        expected = np.array([*episode, *episode, *TICK_TAIL])
        rows = tick_advantages(self.make(), steps=len(expected) + 2 * self.reset_steps)
        if any(len(row) != len(expected) for row in rows):
            return float("inf")
        return float(np.abs(np.array(rows) - expected).max())


def tick_cases(*, processes: bool = True) -> list[TickCase]:
    """Tick, its terminating and its Dict twin; one and four environments; every way to step and to reset them.

    Args:
        processes: include those in worker processes.
    """
    cases: list[TickCase] = []
    for twin, terminating, named in (("tick", False, False), ("terminating", True, False), ("dict", False, True)):
        for count in (1, 4):
            cases += _ways(f"{twin} x {count}", count, terminating, named, processes)
    return cases


def _ways(name: str, count: int, terminating: bool, named: bool, processes: bool) -> list[TickCase]:
    def one() -> gymnasium.Env[Any, Any]:
        return Tick(terminating=terminating, named=named)

    factories = [one] * count
    cases = [TickCase(f"{name}, sync", lambda: SyncEnvironments(factories), terminating, 0)]
    if processes:
        cases.append(TickCase(f"{name}, async", lambda: AsyncEnvironments(factories), terminating, 0))
    for mode in AutoresetMode:
        extra = 1 if mode is AutoresetMode.NEXT_STEP else 0

        def gymnasium_sync(mode: AutoresetMode = mode) -> VectorEnvironment:
            return GymnasiumVector(SyncVectorEnv(factories, autoreset_mode=mode))

        def gymnasium_async(mode: AutoresetMode = mode) -> VectorEnvironment:
            return GymnasiumVector(AsyncVectorEnv(factories, autoreset_mode=mode))

        def custom(mode: AutoresetMode = mode) -> VectorEnvironment:
            return GymnasiumVector(TickVector(count, mode, terminating=terminating, named=named))

        cases.append(TickCase(f"{name}, SyncVectorEnv {mode.name}", gymnasium_sync, terminating, extra))
        if processes:
            cases.append(TickCase(f"{name}, AsyncVectorEnv {mode.name}", gymnasium_async, terminating, extra))
        cases.append(TickCase(f"{name}, custom VectorEnv {mode.name}", custom, terminating, extra))
    return cases

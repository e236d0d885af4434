"""Finite problems, given by their tables, as environments: one by one for Gymnasium, and many stepped at once.

Both draw the same uniform numbers in the same order: an episode's start takes one, a step takes one for the state that
follows and, where rewards are random, one for the reward. An environment with some seed therefore does the same alone
and among others, to the last bit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import gymnasium
import numpy as np

from upslope.collect._finite_tables import Lookup, Tables
from upslope.collect.convert import ObservationLayout
from upslope.collect.vector import Resume, Step
from upslope.spaces import Discrete, Leaf, Space
from upslope.trajectory import Tree

_BLOCK = 1 << 18
"""How many uniform numbers are drawn ahead, over all environments: 2 MiB."""


@final
class FiniteEnvironment(gymnasium.Env[Any, Any]):
    """A finite problem as a Gymnasium environment.

    Observations that are whole numbers from 0 are `Discrete`, others a `Box`.

    Args:
        tables: the problem.
        time_limit: steps after which an episode is truncated, unless it terminates there; None for none.

    Raises:
        ValueError: if the time limit is no positive number.
    """

    def __init__(self, tables: Tables, time_limit: int | None = None) -> None:
        self._lookup = Lookup.build(tables)
        self._limit = _checked_limit(time_limit)
        self.observation_space = _observation_space(self._lookup.observation)
        self.action_space = gymnasium.spaces.Discrete(self._lookup.actions)
        self.state: int | None = None
        self.elapsed = 0
        self._thresholds = self._lookup.threshold.tolist()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        lookup = self._lookup
        self.state = int(lookup.start[bisect_right(lookup.start_threshold, self.np_random.random())])
        self.elapsed = 0
        return self._observe(self.state), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one step.

        Raises:
            ResetNeeded: if no episode is under way.
            ValueError: if there is no such action.
        """
        lookup = self._lookup
        if self.state is None or lookup.terminal[self.state]:
            raise gymnasium.error.ResetNeeded("no episode is under way: call reset() first")
        chosen = np.asarray(action)
        if chosen.ndim or chosen.dtype.kind not in "iu" or not 0 <= chosen < lookup.actions:
            raise ValueError(f"actions are 0 to {lookup.actions - 1}, whole numbers; got {action}")
        row = self.state * lookup.actions + int(chosen)
        place = row * lookup.width + bisect_right(self._thresholds[row], self.np_random.random())
        reward = lookup.reward[place]
        if lookup.reward_threshold is not None and lookup.reward_value is not None:
            picked = bisect_right(lookup.reward_threshold[place], self.np_random.random())
            reward = lookup.reward_value[place, picked]
        self.state = int(lookup.following[place])
        self.elapsed += 1
        terminated = bool(lookup.terminal[self.state])
        truncated = not terminated and self._limit is not None and self.elapsed >= self._limit
        return self._observe(self.state), float(reward), terminated, truncated, {}

    def _observe(self, state: int) -> Any:
        seen = self._lookup.observation[state]
        return int(seen) if isinstance(self.observation_space, gymnasium.spaces.Discrete) else np.array(seen)


@final
class FiniteVectorEnvironment:
    """`count` environments of one finite problem, stepped together; a `VectorEnvironment`.

    In the step that ends an episode the next one begins; `final` has the true last observations.

    Args:
        tables: the problem.
        count: N.
        time_limit: steps after which an episode is truncated, unless it terminates there; None for none.
        resume: whether snapshots, which always hold, are to be used.

    Raises:
        ValueError: if count or time limit are no positive numbers.
    """

    vectorization = "native"

    def __init__(
        self, tables: Tables, count: int, time_limit: int | None = None, *, resume: Resume = "snapshot"
    ) -> None:
        if count < 1:
            raise ValueError(f"at least one environment is needed, got count={count}")
        self.num_envs = count
        self.resume: Resume = resume
        self._lookup = Lookup.build(tables)
        self._limit = _checked_limit(time_limit)
        self.observation_space: Space = ObservationLayout(_observation_space(self._lookup.observation)).space
        self.action_space: Leaf = Discrete(self._lookup.actions)
        self._state = np.zeros(count, dtype=np.int64)
        self._elapsed = np.zeros(count, dtype=np.int64)
        self._never = np.zeros(count, dtype=bool)
        self._streams: _Streams | None = None

    def reset(self, seeds: Sequence[int] | None) -> np.ndarray:
        """Begin new episodes everywhere; None goes on with the random numbers there are."""
        if seeds is not None:
            self._streams = _Streams(np.array(seeds, dtype=np.int64), np.zeros(self.num_envs, dtype=np.int64))
        elif self._streams is None:
            entropy = np.random.SeedSequence().generate_state(self.num_envs, np.uint32)
            self._streams = _Streams(entropy.astype(np.int64), np.zeros(self.num_envs, dtype=np.int64))
        self._state = self._begin(self._streams, np.arange(self.num_envs))
        self._elapsed[:] = 0
        return self._lookup.observation[self._state]

    def step(self, action: np.ndarray) -> Step:
        """Take one action, [N], in each environment; where an episode ends, the next one begins at once.

        Raises:
            ResetNeeded: before the first reset.
            ValueError: if there is no such action.
        """
        lookup, streams = self._lookup, self._streams
        if streams is None:
            raise gymnasium.error.ResetNeeded("no episode is under way: call reset() first")
        if action.dtype.kind not in "iu" or action.min() < 0 or action.max() >= lookup.actions:
            raise ValueError(
                f"actions are 0 to {lookup.actions - 1}, whole numbers; got {action.min()} to {action.max()}"
            )
        row = self._state * lookup.actions + action
        place = row * lookup.width + _pick(lookup.threshold[row], streams.draw())
        reward = lookup.reward[place]
        if lookup.reward_threshold is not None and lookup.reward_value is not None:
            reward = lookup.reward_value[place, _pick(lookup.reward_threshold[place], streams.draw())]
        following = lookup.following[place]
        self._elapsed += 1
        terminated = lookup.terminal[following]
        truncated = self._never if self._limit is None else (self._elapsed >= self._limit) & ~terminated
        finished = np.flatnonzero(terminated | truncated)
        self._state = following
        if not len(finished):
            return Step(lookup.observation[following], reward, terminated, truncated, None, None, None)
        final_observation = lookup.observation[following[finished]]
        following[finished] = self._begin(streams, finished)
        self._elapsed[finished] = 0
        observation = lookup.observation[following]
        return Step(observation, reward, terminated, truncated, finished, final_observation, None)

    def _begin(self, streams: _Streams, which: np.ndarray) -> np.ndarray:
        lookup = self._lookup
        return lookup.start[np.searchsorted(lookup.start_threshold, streams.draw(which), side="right")]

    def snapshot(self) -> Tree:
        """States, times, and how far each environment has come in the random numbers of its seed.

        Raises:
            ResetNeeded: before the first reset.
        """
        if self._streams is None:
            raise gymnasium.error.ResetNeeded("there is nothing to take a snapshot of: call reset() first")
        return {
            "state": self._state.copy(),
            "elapsed": self._elapsed.copy(),
            "seed": self._streams.seeds.copy(),
            "drawn": self._streams.drawn(),
        }

    def restore(self, tree: Tree) -> np.ndarray:
        """Put that back.

        Raises:
            ValueError: if the snapshot is of another number of environments, or of another problem.
        """
        arrays = {name: np.array(tree[name], dtype=np.int64) for name in ("state", "elapsed", "seed", "drawn")}
        count, states = len(arrays["state"]), len(self._lookup.terminal)
        if count != self.num_envs:
            raise ValueError(
                f"the checkpoint holds the states of {count} environments, this run has {self.num_envs}; resume with "
                f"count={count}"
            )
        if arrays["state"].min() < 0 or arrays["state"].max() >= states:
            raise ValueError(
                f"the checkpoint holds the state {arrays['state'].max()}, this problem has the states 0 to "
                f"{states - 1}; resume with the environment the run was started with"
            )
        self._state, self._elapsed = arrays["state"], arrays["elapsed"]
        self._streams = _Streams(arrays["seed"], arrays["drawn"])
        return self._lookup.observation[self._state]

    def rebuild(self, seeds: Sequence[int]) -> np.ndarray:
        """Begin anew with these seeds."""
        return self.reset(seeds)

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, slots=True)
class FiniteFactory:
    """Makes environments of one finite problem, alone and together: what `train(run, environments=...)` takes.

    Attributes:
        tables: the problem.
        time_limit: steps after which an episode is truncated; `EnvironmentConfig.time_limit` takes its place.
    """

    tables: Tables
    time_limit: int | None = None

    @property
    def endless(self) -> bool:
        """Whether no episode ever ends."""
        return self.time_limit is None and not bool(self.tables.terminal.any())

    def __call__(self) -> FiniteEnvironment:
        """One environment."""
        return FiniteEnvironment(self.tables, self.time_limit)

    def together(self, count: int, *, resume: Resume = "snapshot") -> FiniteVectorEnvironment:
        """`count` environments stepped at once."""
        return FiniteVectorEnvironment(self.tables, count, self.time_limit, resume=resume)


def _pick(threshold: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """The first entry of each row [N, K] that lies above its number [N]."""
    return np.count_nonzero(threshold <= uniform[:, None], axis=1)


class _Streams:
    """One stream of uniform numbers per environment, drawn ahead in blocks.

    Args:
        seeds: [N].
        drawn: [N] how many numbers of each are used up.
    """

    def __init__(self, seeds: np.ndarray, drawn: np.ndarray) -> None:
        self.seeds = seeds
        self._generators: list[np.random.Generator] = []
        for seed, used in zip(seeds.tolist(), drawn.tolist(), strict=True):
            bits = np.random.PCG64(np.random.SeedSequence(seed))
            self._generators.append(np.random.Generator(bits.advance(used) if used else bits))
        self._columns = int(np.clip(_BLOCK // len(seeds), 32, 512))
        self._block = np.empty((len(seeds), self._columns))
        self._first = np.arange(len(seeds)) * self._columns
        self._place = self._first + self._columns
        self._before = drawn - self._columns
        self._left = 0

    def draw(self, which: np.ndarray | None = None) -> np.ndarray:
        """The next number of each of these environments, or of all."""
        if self._left == 0:
            self._left = self._columns - int((self._place - self._first).max())
            if self._left == 0:
                self._refill()
        self._left -= 1
        if which is None:
            uniform = self._block.reshape(-1)[self._place]
            self._place += 1
        else:
            uniform = self._block.reshape(-1)[self._place[which]]
            self._place[which] += 1
        return uniform

    def drawn(self) -> np.ndarray:
        """[N] how many numbers of each are used up."""
        return self._before + self._place - self._first

    def _refill(self) -> None:
        used = self._place - self._first
        for row, generator, gone in zip(self._block, self._generators, used.tolist(), strict=True):
            kept = self._columns - gone
            row[:kept] = row[gone:]
            generator.random(out=row[kept:])
        self._before += used
        self._place = self._first.copy()
        self._left = self._columns


def _observation_space(observation: np.ndarray) -> gymnasium.Space[Any]:
    """Of the observations of all states, [S, ...]."""
    low, high = observation.min(), observation.max()
    if observation.ndim == 1 and observation.dtype.kind == "i" and low >= 0:
        return gymnasium.spaces.Discrete(int(high) + 1)
    dtype: Any = observation.dtype
    return gymnasium.spaces.Box(low, high, observation.shape[1:], dtype)


def _checked_limit(limit: int | None) -> int | None:
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int | np.integer) or limit < 1:
        raise ValueError(f"a time limit is at least 1 step, a whole number, or None for no limit; got {limit}")
    return int(limit)

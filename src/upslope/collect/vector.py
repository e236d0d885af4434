"""Several environments stepped at once: what the collector asks of them, and the plain loop that answers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import gymnasium
import numpy as np

from upslope.collect.convert import ObservationLayout, action_cast, convert_action_space, copy_arrays
from upslope.collect.errors import (
    ActionMaskError,
    EnvironmentFailureError,
    MissingActionMaskError,
    UnknownEnvironmentError,
    UnsupportedSpaceError,
)
from upslope.collect.snapshot import restore_environment, snapshot_environment
from upslope.spaces import Discrete, Leaf, Space
from upslope.trajectory import ObservationArrays, Tree, map_observation

Factory = Callable[[], gymnasium.Env[Any, Any]]
"""Makes one environment."""

Resume = Literal["snapshot", "rebuild"]
"""How environments go on after a checkpoint: from their state, or made anew with open episodes cut."""


class Step(NamedTuple):
    """What one step of all `N` environments brought. Arrays may be overwritten by the next step.

    Attributes:
        observation: [N, ...] what the next action is chosen on (where an episode ended: the new one's first).
        reward: [N].
        terminated, truncated: [N] bool.
        finished: indices of the environments whose episode ended, ascending, or None.
        final: [len(finished), ...] the true last observations of those, or None.
        live: [N] bool, False where the action was ignored since the environment only reset, or None if all counted.
    """

    observation: ObservationArrays
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    finished: np.ndarray | None
    final: ObservationArrays | None
    live: np.ndarray | None


class VectorEnvironment(Protocol):
    """`num_envs` environments that reset themselves; the only thing the collector knows of the outside."""

    @property
    def num_envs(self) -> int:
        """N."""
        ...

    @property
    def observation_space(self) -> Space:
        """Of one environment."""
        ...

    @property
    def action_space(self) -> Leaf:
        """Of one environment."""
        ...

    @property
    def vectorization(self) -> str:
        """`"sync"`, `"async"`, `"native"` or `"vector"`."""
        ...

    @property
    def resume(self) -> Resume:
        """Whether `snapshot` holds, or only `rebuild` does."""
        ...

    def reset(self, seeds: Sequence[int] | None) -> ObservationArrays:
        """Begin new episodes everywhere; None goes on with the random numbers the environments have."""
        ...

    def step(self, action: np.ndarray) -> Step:
        """Take one action in each environment ([N] or [N, A], as the environment takes it)."""
        ...

    def snapshot(self) -> Tree:
        """The state of all environments as plain values and arrays."""
        ...

    def restore(self, tree: Tree) -> ObservationArrays:
        """Put that state back; returns the observation to act on."""
        ...

    def rebuild(self, seeds: Sequence[int]) -> ObservationArrays:
        """Forget everything: make the environments anew where that is possible, and reset them with these seeds."""
        ...

    def close(self) -> None:
        """Give back processes and windows."""
        ...


@dataclass(frozen=True, slots=True)
class StepArrays:
    """The memory a step is written into, [N, ...]; `current` holds the index of the environment at work."""

    observation: ObservationArrays
    final: ObservationArrays
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    current: np.ndarray

    @classmethod
    def allocate(cls, layout: ObservationLayout, count: int) -> StepArrays:
        """Ordinary memory."""
        return cls(
            layout.allocate(count),
            layout.allocate(count),
            np.zeros(count),
            np.zeros(count, dtype=bool),
            np.zeros(count, dtype=bool),
            np.zeros(1, dtype=np.int64),
        )


class SyncEnvironments:
    """Environments stepped one after the other in this process, each reset in the step its episode ends.

    Args:
        factories: one per environment.
        resume: whether snapshots are to be used (`resume_problem` tells whether they hold).
        remake: whether `rebuild` may close the environments and call the factories again; otherwise it only resets.
        arrays: memory to write steps into; own memory if None.
        first_index: what the first environment is called in error messages.

    Raises:
        UnsupportedSpaceError: if no policy of ours can see or act in it.
        ValueError: if the environments differ in their spaces.
    """

    vectorization = "sync"

    def __init__(
        self,
        factories: Sequence[Factory],
        *,
        resume: Resume = "rebuild",
        remake: bool = True,
        arrays: StepArrays | None = None,
        first_index: int = 0,
    ) -> None:
        if not factories:
            raise ValueError("at least one environment is needed, got none")
        self.num_envs = len(factories)
        self.resume: Resume = resume
        self._factories = list(factories)
        self._remake = remake
        self._first_index = first_index
        self._environments: list[gymnasium.Env[Any, Any]] = []
        self._make()
        first = self._environments[0]
        self._layout = ObservationLayout(first.observation_space)
        self.observation_space: Space = self._layout.space
        self.action_space: Leaf = convert_action_space(first.action_space)
        self._cast = action_cast(first.action_space)
        self._scalar_action = isinstance(self.action_space, Discrete)
        for index, environment in enumerate(self._environments):
            ours = (
                ObservationLayout(environment.observation_space).space,
                convert_action_space(environment.action_space),
            )
            if ours != (self.observation_space, self.action_space):
                raise ValueError(
                    f"environment {index} has the spaces {ours}, the first has {self.observation_space} and "
                    f"{self.action_space}; environments stepped together must agree"
                )
        self._arrays = arrays or StepArrays.allocate(self._layout, self.num_envs)
        self._write = self._layout.writer(self._arrays.observation)
        self._write_final = self._layout.writer(self._arrays.final)
        self._seeds: list[int | None] = [None] * self.num_envs
        self._ended = False

    def _make(self) -> None:
        for index, factory in enumerate(self._factories):
            try:
                self._environments.append(factory())
            except (UnknownEnvironmentError, UnsupportedSpaceError, ActionMaskError):
                raise
            except Exception as error:
                raise self._failure(index, error, "could not be made") from error
        self._steps = [environment.step for environment in self._environments]

    def _failure(self, index: int, error: Exception, what: str) -> EnvironmentFailureError:
        seed = self._seeds[index] if self._environments and len(self._environments) > index else None
        seeded = f", last seeded with {seed}" if seed is not None else ""
        fault = ". The fault is in the environment; `upslope check-env` tries it on its own"
        return EnvironmentFailureError(
            f"environment {self._first_index + index} {what}{seeded}: {type(error).__name__}: {error}"
            f"{'' if isinstance(error, MissingActionMaskError) else fault}",
            self._first_index + index,
        )

    def reset(self, seeds: Sequence[int] | None) -> ObservationArrays:
        """Begin new episodes everywhere."""
        for index, environment in enumerate(self._environments):
            self._arrays.current[0] = index
            if seeds is not None:
                self._seeds[index] = seeds[index]
            try:
                observation, _ = environment.reset(seed=None if seeds is None else seeds[index])
                self._layout.check(observation)
                self._write(index, observation)
            except Exception as error:
                raise self._failure(index, error, "failed in reset()") from error
        self._arrays.terminated[:] = False
        self._arrays.truncated[:] = False
        return self._arrays.observation

    def step(self, action: np.ndarray) -> Step:
        """Take one action in each environment; where an episode ends, the next one begins at once."""
        arrays, write = self._arrays, self._write
        reward, terminated, truncated = arrays.reward, arrays.terminated, arrays.truncated
        if self._ended:
            terminated[:] = False
            truncated[:] = False
        actions = action.tolist() if self._scalar_action else self._cast(action)
        finished: list[int] = []
        index, current = 0, arrays.current
        try:
            for step, chosen in zip(self._steps, actions, strict=True):
                current[0] = index
                observation, reward[index], ended, cut, _ = step(chosen)
                if ended or cut:
                    terminated[index] = ended
                    truncated[index] = cut
                    finished.append(index)
                    self._write_final(index, observation)
                    observation, _ = self._environments[index].reset()
                write(index, observation)
                index += 1
        except Exception as error:
            raise self._failure(index, error, "raised in step() or reset()") from error
        self._ended = bool(finished)
        if not finished:
            return Step(arrays.observation, reward, terminated, truncated, None, None, None)
        which = np.array(finished)
        final = map_observation(lambda array: array[which], arrays.final)
        return Step(arrays.observation, reward, terminated, truncated, which, final, None)

    def snapshot(self) -> Tree:
        """The state of all environments and the observation to act on."""
        return {
            "observation": copy_arrays(self._arrays.observation),
            "environments": self.snapshot_states(),
        }

    def snapshot_states(self) -> list[Tree]:
        """The state of each environment."""
        return [snapshot_environment(environment) for environment in self._environments]

    def restore_states(self, states: Sequence[Tree]) -> None:
        """Put back the state of each environment."""
        for environment, state in zip(self._environments, states, strict=True):
            restore_environment(environment, state)

    def restore(self, tree: Tree) -> ObservationArrays:
        """Put that state back.

        Raises:
            ValueError: if the snapshot is of another number of environments.
        """
        states = tree["environments"]
        if len(states) != self.num_envs:
            raise ValueError(
                f"the checkpoint holds the states of {len(states)} environments, this run has {self.num_envs}; "
                f"resume with count={len(states)}"
            )
        self.restore_states(states)
        write_observation(self._arrays.observation, tree["observation"])
        return self._arrays.observation

    def rebuild(self, seeds: Sequence[int]) -> ObservationArrays:
        """Make all environments anew (if `remake`) and reset them with these seeds."""
        if self._remake:
            self.close()
            self._make()
        return self.reset(seeds)

    def close(self) -> None:
        """Close every environment."""
        while self._environments:
            self._environments.pop().close()


def write_observation(target: ObservationArrays, source: Any) -> None:
    """Copy an observation (arrays or tensors) into arrays of the same names and shapes."""
    if isinstance(target, dict):
        for name, array in target.items():
            array[...] = np.asarray(source[name])
    else:
        target[...] = np.asarray(source)

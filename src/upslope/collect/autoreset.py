"""Any Gymnasium vector environment, whichever way it resets itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from upslope.collect.convert import ObservationLayout, action_cast, convert_action_space, copy_arrays
from upslope.collect.errors import EnvironmentFailureError, UnsupportedAutoresetError
from upslope.collect.snapshot import restore_environment, snapshot_environment
from upslope.collect.vector import Resume, Step
from upslope.spaces import Leaf, Space
from upslope.trajectory import ObservationArrays, Tree, map_observation

VectorFactory = Callable[[], VectorEnv[Any, Any, Any]]
"""Makes one vector environment."""


def autoreset_mode(environment: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """How a vector environment resets, as its metadata say.

    Raises:
        UnsupportedAutoresetError: if they say nothing, or nothing known.
    """
    declared = environment.metadata.get("autoreset_mode")
    known = {mode.value: mode for mode in AutoresetMode} | {mode.name: mode for mode in AutoresetMode}
    if isinstance(declared, AutoresetMode):
        return declared
    if isinstance(declared, str) and declared in known:
        return known[declared]
    says = "does not say how it resets" if declared is None else f"declares the unknown autoreset mode {declared!r}"
    raise UnsupportedAutoresetError(
        f"{environment} {says}. Guessing would put false transitions into the data: set metadata['autoreset_mode'] of "
        "its class to a gymnasium.vector.AutoresetMode: NEXT_STEP (the step after an end ignores its action and "
        "returns the first observation), SAME_STEP (the ending step returns it, and info['final_obs'] has the last "
        "one) or DISABLED (reset(options={'reset_mask': mask}) is called for it)"
    )


class GymnasiumVector:
    """A `upslope.collect.vector.VectorEnvironment` out of a Gymnasium one.

    - NEXT_STEP: the step after an end only resets; it is marked as not live and is no sample.
    - SAME_STEP: the true last observation is taken from `info["final_obs"]`.
    - DISABLED: `reset(options={"reset_mask": ...})` is called at the end of each episode.

    Args:
        environment: to be adapted.
        vectorization: `"native"` for an environment's own vectorisation, `"vector"` for one brought by a user.
        factory: makes the same environment anew, for `rebuild`; without it `rebuild` only resets.
        resume: whether snapshots are to be used.

    Raises:
        UnsupportedAutoresetError: if it does not say how it resets.
        UnsupportedSpaceError: if no policy of ours can see or act in it.
    """

    def __init__(
        self,
        environment: VectorEnv[Any, Any, Any],
        *,
        vectorization: str = "vector",
        factory: VectorFactory | None = None,
        resume: Resume = "rebuild",
    ) -> None:
        self.mode = autoreset_mode(environment)
        self.vectorization = vectorization
        self.resume: Resume = resume
        self.num_envs = environment.num_envs
        self._environment = environment
        self._factory = factory
        self._layout = ObservationLayout(environment.single_observation_space)
        self.observation_space: Space = self._layout.space
        self.action_space: Leaf = convert_action_space(environment.single_action_space)
        self._cast = action_cast(environment.single_action_space)
        self._resetting = np.zeros(self.num_envs, dtype=bool)
        self._observation: ObservationArrays = self._layout.allocate(self.num_envs)

    def reset(self, seeds: Sequence[int] | None) -> ObservationArrays:
        """Begin new episodes everywhere. An environment that takes one seed gets the first."""
        separate = isinstance(self._environment.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        seed: Any = None if seeds is None else list(seeds) if separate else seeds[0]
        observation, _ = self._environment.reset(seed=seed)
        self._resetting = np.zeros(self.num_envs, dtype=bool)
        self._observation = self._layout.batch(observation, self.num_envs)
        return self._observation

    def step(self, action: np.ndarray) -> Step:
        """Take one action in each environment."""
        try:
            theirs, reward, terminated, truncated, info = self._environment.step(self._cast(action))
        except Exception as error:
            raise EnvironmentFailureError(
                f"the vector environment {self._environment} raised in step(): {type(error).__name__}: {error}", -1
            ) from error
        reward, terminated, truncated = np.asarray(reward), np.asarray(terminated), np.asarray(truncated)
        observation = self._layout.batch(theirs, self.num_envs)
        live = None
        if self._resetting.any():
            live = ~self._resetting
            reward, terminated, truncated = reward * live, terminated & live, truncated & live
        done = terminated | truncated
        finished = final = None
        if done.any():
            finished = np.flatnonzero(done)
            final, observation = self._ends(done, finished, observation, info)
        if self.mode is AutoresetMode.NEXT_STEP:
            self._resetting = done
        self._observation = observation
        return Step(observation, reward, terminated, truncated, finished, final, live)

    def _ends(
        self, done: np.ndarray, finished: np.ndarray, observation: ObservationArrays, info: Mapping[str, Any]
    ) -> tuple[ObservationArrays, ObservationArrays]:
        """The true last observations of finished episodes, and the observation to act on next."""
        if self.mode is AutoresetMode.SAME_STEP:
            return announced_observations(self._environment, self._layout, finished, info), observation
        final = map_observation(lambda array: array[finished], observation)
        if self.mode is AutoresetMode.DISABLED:
            theirs, _ = self._environment.reset(options={"reset_mask": done})
            observation = self._layout.batch(theirs, self.num_envs)
        return final, observation

    def snapshot(self) -> Tree:
        """The state of the environment and the observation to act on."""
        return {
            "observation": copy_arrays(self._observation),
            "resetting": self._resetting.copy(),
            "environment": snapshot_environment(self._environment),
        }

    def restore(self, tree: Tree) -> ObservationArrays:
        """Put that state back.

        Raises:
            ValueError: if the snapshot is of another number or kind of environments.
        """
        resetting = np.asarray(tree["resetting"]).astype(bool)
        if len(resetting) != self.num_envs:
            raise ValueError(
                f"the checkpoint holds the states of {len(resetting)} environments, this run has {self.num_envs}; "
                f"resume with count={len(resetting)}"
            )
        restore_environment(self._environment, tree["environment"])
        self._resetting = resetting
        self._observation = map_observation(lambda a: np.asarray(a).copy(), tree["observation"])
        return self._observation

    def rebuild(self, seeds: Sequence[int]) -> ObservationArrays:
        """Make the environment anew if there is a factory, and reset it with these seeds."""
        if self._factory is not None:
            self._environment.close()
            self._environment = self._factory()
        return self.reset(seeds)

    def close(self) -> None:
        """Close the environment."""
        self._environment.close()


def announced_observations(
    environment: VectorEnv[Any, Any, Any], layout: ObservationLayout, finished: np.ndarray, info: Mapping[str, Any]
) -> ObservationArrays:
    """The true last observations, [len(finished), ...], that a SAME_STEP environment puts into `info["final_obs"]`.

    Raises:
        UnsupportedAutoresetError: if they are not there.
    """
    if "final_obs" not in info:
        raise UnsupportedAutoresetError(
            f"{environment} declares autoreset_mode SAME_STEP but its step() gave no info['final_obs'] when "
            f"an episode ended (info has {sorted(info)}); without it truncated episodes cannot be bootstrapped. "
            "Add it, or declare and implement NEXT_STEP"
        )
    announced = info["final_obs"]
    if (isinstance(announced, np.ndarray) and announced.dtype != object) or isinstance(announced, dict | tuple):
        whole = layout.batch(announced, environment.num_envs)
        return map_observation(lambda array: array[finished], whole)
    rows = layout.allocate(len(finished))
    write = layout.writer(rows)
    for row, index in enumerate(finished):
        write(row, announced[index])
    return rows

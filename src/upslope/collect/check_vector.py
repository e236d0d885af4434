"""Trying a vector environment out: whether its transitions are what its autoreset mode says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from upslope.collect.actions import random_action
from upslope.collect.autoreset import announced_observations, autoreset_mode
from upslope.collect.convert import ObservationLayout, action_cast, convert_action_space
from upslope.collect.errors import EnvironmentFailureError
from upslope.collect.masks import mask_of
from upslope.collect.resume import freeze
from upslope.trajectory import ObservationArrays, map_observation

_STARTS = 16


class _WrongError(ValueError):
    """What is wrong with the environment."""


class VectorWalk:
    """A vector environment walked through with random actions, every transition judged by the declared mode.

    - NEXT_STEP: the step after an end has reward 0, no flag, and does the same whatever its action is.
    - SAME_STEP: an ending step has `info["final_obs"]`, and that is not the next episode's first observation.
    - DISABLED: `reset(options={"reset_mask": mask})` begins new episodes there and leaves the others alone.

    Args:
        environment: to be tried; it is reset, and not closed.
        steps: of all environments together.
        seed: of starts and actions.

    Attributes:
        problem: the first thing wrong, or None.
        ended: how many episodes ended.
        steps: how many steps were taken, over all environments.

    Raises:
        UnsupportedAutoresetError: if it does not say how it resets.
        UnsupportedSpaceError: if no policy of ours can see or act in it.
        EnvironmentFailureError: if it raises.
    """

    def __init__(self, environment: VectorEnv[Any, Any, Any], steps: int, seed: int) -> None:
        self.mode = autoreset_mode(environment)
        self.observation_space = ObservationLayout(environment.single_observation_space).space
        self.action_space = convert_action_space(environment.single_action_space)
        self.problem: str | None = None
        self.ended = self.steps = 0
        self._environment = environment
        self._layout = ObservationLayout(environment.single_observation_space)
        self._cast = action_cast(environment.single_action_space)
        self._length = -(-steps // environment.num_envs)
        self._seed = seed
        self._moved = False
        self._compared = self._unlike = 0
        self._start: Any = None
        try:
            self._start = self._only_start()
            self._try()
        except _WrongError as wrong:
            self.problem = str(wrong)

    def _try(self) -> None:
        first = self._walk(None)
        self.steps = self._length * self._environment.num_envs
        if self._compared and self._moved and not self._unlike:
            raise _WrongError(
                "info['final_obs'] is always the first observation of the next episode instead of the last one of the "
                "episode that ended. Copy it before resetting"
                if self.mode is AutoresetMode.SAME_STEP
                else "reset(options={'reset_mask': mask}) leaves the observations of ended episodes as they were. "
                "Begin new episodes where the mask is True"
            )
        ended = self.ended
        if self._walk(None) != first:
            raise _WrongError(
                "the same seed and actions gave other observations, rewards or flags the second time: runs cannot be "
                "repeated. Draw all random numbers from a generator that reset(seed=seed) seeds, and reset everything"
            )
        if self.mode is AutoresetMode.NEXT_STEP and self._walk(np.random.default_rng(self._seed + 1)) != first:
            raise _WrongError(
                "the action of the step after an end changes what follows: the environment resets in the same step "
                "though it declares NEXT_STEP. Ignore that action and only reset, or declare SAME_STEP and put the "
                "true last observation into info['final_obs']"
            )
        self.ended = ended

    def _only_start(self) -> Any:
        """The observation that every episode begins with, if there is but one."""
        starts: list[Any] = []
        while len(starts) < _STARTS:
            seed = self._seed + len(starts)
            theirs, _ = self._call("reset()", lambda seed=seed: self._environment.reset(seed=seed))
            observation = self._see(theirs, "reset()")
            starts += [freeze(_rows(observation, np.array([row]))) for row in range(self._environment.num_envs)]
        return starts[0] if all(start == starts[0] for start in starts) else None

    def _begins(self, observation: ObservationArrays, which: np.ndarray, where: str) -> None:
        if self._start is None:
            return
        for row in np.flatnonzero(which):
            if freeze(_rows(observation, np.array([row]))) != self._start:
                raise _WrongError(
                    f"{where}: the observation of environment {row} should begin an episode, and is not the one that "
                    f"reset() gives. Its autoreset_mode is declared as {self.mode.name}: does it reset that way?"
                )

    def _walk(self, other: np.random.Generator | None) -> list[Any]:
        """Everything seen; `other` draws the actions that should be ignored."""
        environment, count = self._environment, self._environment.num_envs
        generator = np.random.default_rng(self._seed)
        theirs, _ = self._call("reset()", lambda: environment.reset(seed=self._seed))
        before = self._see(theirs, "reset()")
        trace: list[Any] = [freeze(before)]
        resetting, self.ended = np.zeros(count, dtype=bool), 0
        for number in range(1, self._length + 1):
            action = self._cast(random_action(self.action_space, generator, count, mask_of(before)))
            if other is not None and resetting.any():
                action[resetting] = self._cast(random_action(self.action_space, other, count, mask_of(before)))[
                    resetting
                ]
            theirs, reward, terminated, truncated, info = self._call(
                f"step {number}", lambda action=action: environment.step(action)
            )
            observation = self._see(theirs, f"step {number}")
            reward, done = self._judge(number, reward, terminated, truncated, resetting)
            trace.append(freeze([observation, reward, np.asarray(terminated), np.asarray(truncated)]))
            self._moved = self._moved or freeze(observation) != freeze(before)
            self._begins(observation, resetting, f"step {number}, after an end")
            before, resetting = observation, done if self.mode is AutoresetMode.NEXT_STEP else resetting
            if done.any():
                self.ended += int(done.sum())
                before = self._end(number, observation, done, info)
        return trace

    def _end(self, number: int, observation: ObservationArrays, done: np.ndarray, info: Any) -> ObservationArrays:
        if self.mode is AutoresetMode.SAME_STEP:
            final = announced_observations(self._environment, self._layout, np.flatnonzero(done), info)
            self._compare(final, _rows(observation, done))
            self._begins(observation, done, f"step {number}, which ends an episode")
        if self.mode is not AutoresetMode.DISABLED:
            return observation
        where = f"reset(options={{'reset_mask': mask}}) after step {number}"
        kept = map_observation(np.copy, observation)
        theirs, _ = self._call(where, lambda: self._environment.reset(options={"reset_mask": done.copy()}))
        after = self._see(theirs, where)
        if freeze(_rows(after, ~done)) != freeze(_rows(kept, ~done)):
            raise _WrongError(f"{where} changed environments where the mask is False. Leave them as they are")
        self._compare(_rows(kept, done), _rows(after, done))
        self._begins(after, done, where)
        return after

    def _compare(self, last: ObservationArrays, first: ObservationArrays) -> None:
        self._compared += 1
        self._unlike += freeze(last) != freeze(first)

    def _call(self, where: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:
            raise EnvironmentFailureError(f"{where} raised {type(error).__name__}: {error}", -1) from error

    def _see(self, theirs: Any, where: str) -> ObservationArrays:
        space = self._environment.observation_space
        if not space.contains(theirs):
            raise _WrongError(
                f"{where}: the observation is not in observation_space {space}: {theirs!r:.120}. Correct the space, or "
                "the type and range of what is returned"
            )
        observation = map_observation(np.copy, self._layout.batch(theirs, self._environment.num_envs))
        for array in observation.values() if isinstance(observation, dict) else [observation]:
            if not np.isfinite(array).all():
                raise _WrongError(f"{where}: the observation is not finite: {theirs!r:.120}")
        return observation

    def _judge(
        self, number: int, reward: Any, terminated: Any, truncated: Any, resetting: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        reward, flags = np.asarray(reward), [np.asarray(terminated), np.asarray(truncated)]
        shape = (self._environment.num_envs,)
        if reward.shape != shape or reward.dtype.kind not in "fiub" or not np.isfinite(reward).all():
            raise _WrongError(f"step {number}: rewards must be {shape[0]} finite numbers, they are {reward!r:.80}")
        for name, flag in zip(("terminated", "truncated"), flags, strict=True):
            if flag.shape != shape or flag.dtype != bool:
                raise _WrongError(f"step {number}: {name} must be {shape[0]} booleans, it is {flag!r:.80}")
        done = flags[0] | flags[1]
        if (reward[resetting] != 0).any() or done[resetting].any():
            raise _WrongError(
                f"step {number}, after an end, has rewards {reward[resetting]} and ends {done[resetting]} where it "
                "should only reset: reward 0 and no flag. The environment resets in the same step though it declares "
                "NEXT_STEP; declare SAME_STEP and put the true last observation into info['final_obs']"
            )
        return reward.copy(), done


def _rows(observation: ObservationArrays, which: np.ndarray) -> ObservationArrays:
    return map_observation(lambda array: array[which], observation)

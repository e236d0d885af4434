"""Environments -> trajectories: the rollout loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from upslope.collect.evaluation import EPISODE_LIMIT, environment_seeds, episode_quota, few_threads, refuse_endless
from upslope.collect.finite_check import refuse_unfinite_rollout
from upslope.collect.rollout import Rollout, concatenate
from upslope.collect.sealing import Truncation, seal_episodes, seal_fragments, with_log_prob
from upslope.collect.vector import VectorEnvironment
from upslope.spaces import Leaf, Space
from upslope.streams import Purpose, stream
from upslope.trajectory import ObservationArrays, Policy, Sampler, Trajectory, Tree, map_observation

_CHUNK = 32


class EnvironmentCollector:
    """Acts in environments and seals what happened; a `upslope.trajectory.Collector`.

    With `steps`, every update brings `steps` steps of each environment, one row per environment, and episodes go on
    from one update into the next. With `episodes`, every update brings that many whole episodes, one row each; every
    environment brings a number fixed beforehand, so that short episodes are not preferred.

    Args:
        environments: to act in.
        steps: T, or None.
        episodes: per update over all environments, or None.
        seed: of the run.
        truncation: what a time limit means.
        episode_limit: steps after which an episode counts as endless, where whole episodes are collected.
        row_steps: with `steps`, cut what an environment brings into rows of so many steps, a divisor of `steps`; None
            for one row. Each begins with the memory that the policy carried there.
        log_prob: with `steps`, whether to work out `behaviour_log_prob`, without which a learner that takes no ratios
            does; else it is NaN.

    What a policy with a memory carries goes on from one update into the next where episodes do.

    Attributes:
        steps_taken: environment steps of the last update, also those of episodes begun and left out.

    Raises:
        ValueError: unless exactly one of `steps` and `episodes` is given and positive, and `row_steps` divides `steps`.
    """

    def __init__(
        self,
        environments: VectorEnvironment,
        *,
        steps: int | None = None,
        episodes: int | None = None,
        seed: int,
        truncation: Truncation = "bootstrap",
        episode_limit: int = EPISODE_LIMIT,
        row_steps: int | None = None,
        log_prob: bool = True,
    ) -> None:
        if (steps is None) == (episodes is None):
            raise ValueError(f"give either steps or episodes per update, got steps={steps} and episodes={episodes}")
        if (steps or episodes or 0) < 1:
            raise ValueError(f"an update needs at least one step or episode, got steps={steps}, episodes={episodes}")
        if row_steps is not None and (steps is None or row_steps < 1 or steps % row_steps):
            raise ValueError(f"rows of row_steps={row_steps} steps must divide the {steps} steps of an update")
        self.environments = environments
        self._length = steps
        self._row_steps = row_steps
        self._log_prob = log_prob
        self._quota = episode_quota(episodes, environments.num_envs) if episodes is not None else None
        self._seed = seed
        self._truncation: Truncation = truncation
        self._episode_limit = episode_limit
        self._observation: ObservationArrays | None = None
        self._memory: ObservationArrays | None = None
        self._action: np.ndarray | None = None
        self._time = np.zeros(environments.num_envs, dtype=np.int64)
        self._returns = np.zeros(environments.num_envs)
        self._finished: list[tuple[float, int]] = []
        self._next_update = 0
        self.steps_taken = 0

    @property
    def observation_space(self) -> Space:
        """What the policy will see."""
        return self.environments.observation_space

    @property
    def action_space(self) -> Leaf:
        """What the policy may do."""
        return self.environments.action_space

    def collect(self, policy: Policy, update: int) -> Trajectory:
        """Act with the policy and seal what happened.

        Raises:
            NonFiniteError: if an observation, action or reward is NaN or infinite.
            EnvironmentFailureError: if an environment raises, crashes or hangs.
            EndlessEpisodeError: if whole episodes are wanted and one does not end.
        """
        if self._length is None:
            return self.collect_wave(policy, update, 0)
        trajectory = self._collect_steps(policy, update, self._length)
        self._next_update = update + 1
        return trajectory

    def _collect_steps(self, policy: Policy, update: int, steps: int) -> Trajectory:
        generator = stream(self._seed, Purpose.ACTION, 0, update)
        if self._observation is None:
            self._observation = self.environments.reset(self._seeds(update))
        sampler = policy.sampler()
        rollout = self._run(sampler, generator, self._observation, steps, update, self._memory)
        self._observation, self._memory = rollout.last, sampler.memory
        self.steps_taken = int(rollout.live.sum())
        time = rollout.decision_times(self._time)
        episodes, self._returns = rollout.episode_returns(self._returns)
        self._finished += [(total, int(time[row, position]) + 1) for position, row, total in episodes]
        self._time = time[:, -1].copy()
        trajectory = seal_fragments(rollout, time[:, :-1], update, self._truncation, self._row_steps)
        return with_log_prob(trajectory, policy) if self._log_prob else trajectory

    def collect_wave(self, policy: Policy, update: int, wave: int) -> Trajectory:
        """Play the `episodes` once, begun anew in every environment, for updates that take several such waves.

        Args:
            policy: who acts.
            update: its version.
            wave: counted from 0; each has seeds and random numbers of its own.

        Raises:
            ValueError: if `steps` are collected, not `episodes`; else as `collect`.
        """
        quota = self._quota
        if quota is None:
            raise ValueError(f"waves are of whole episodes: give episodes per update instead of steps={self._length}")
        generator = stream(self._seed, Purpose.ACTION, wave, update)
        observation = self.environments.reset(self._seeds(update, wave))
        sampler, chunks, counted = policy.sampler(), list[Rollout](), np.zeros_like(quota)
        lengths = np.zeros_like(quota)
        while (counted < quota).any():
            chunks.append(
                self._run(sampler, generator, observation, _CHUNK, update, sampler.memory if chunks else None)
            )
            assert chunks[-1].last is not None
            observation = chunks[-1].last
            done = chunks[-1].terminated | chunks[-1].truncated
            counted += done.sum(axis=1)
            lengths = np.where(done.any(axis=1), done[:, ::-1].argmax(axis=1), lengths + _CHUNK)
            refuse_endless(lengths, counted < quota, self._episode_limit)
        rollout = concatenate(chunks)
        self.steps_taken = int(rollout.live.sum())
        time = rollout.decision_times(np.zeros_like(self._time))
        episodes, _ = rollout.episode_returns(np.zeros_like(self._returns))
        taken = np.zeros_like(quota)
        for position, row, total in episodes:
            if taken[row] < quota[row]:
                taken[row] += 1
                self._finished.append((total, int(time[row, position]) + 1))
        trajectory = with_log_prob(seal_episodes(rollout, quota, update, self._truncation), policy)
        self._next_update = update + 1
        return trajectory

    def _run(
        self,
        sampler: Sampler,
        generator: np.random.Generator,
        first: ObservationArrays,
        steps: int,
        update: int,
        memory: ObservationArrays | None,
    ) -> Rollout:
        environments = self.environments
        noise = sampler.noise(generator, steps, environments.num_envs)
        with few_threads(environments.num_envs):
            if self._action is None:
                sampler.begin(None, environments.num_envs)
                self._action = sampler.sample(first, noise[0])
            rollout = Rollout.allocate(first, self._action, steps)
            sampler.begin(memory, environments.num_envs)
            try:
                _loop(environments, sampler, noise, rollout, first, self._row_steps or steps)
            finally:
                refuse_unfinite_rollout(rollout, update)
        return rollout

    def _seeds(self, update: int, wave: int = 0) -> list[int]:
        return environment_seeds(self._seed, Purpose.ENVIRONMENT, wave, update, self.environments.num_envs)

    def finished(self) -> list[tuple[float, int]]:
        """(raw return, length) of the episodes that ended since this was last asked."""
        finished, self._finished = self._finished, []
        return finished

    def rebuild(self, update: int) -> None:
        """Make the environments anew for `update`, from derived seeds; open episodes end here.

        They end as truncated ones: the rows already sealed bootstrap from the last observation seen.
        """
        self._observation, self._memory = self.environments.rebuild(self._seeds(update)), None
        self._time[:] = 0
        self._returns[:] = 0.0

    def snapshot(self) -> Tree:
        """Everything needed to go on exactly here.

        Where the environments' state cannot be taken (`environments.resume == "rebuild"`) this run, too, gets new
        environments now, so that a resumed run and one that went on do the same.
        """
        common: dict[str, Tree] = {"update": self._next_update, "finished": [list(entry) for entry in self._finished]}
        if self.environments.resume == "rebuild":
            self.rebuild(self._next_update)
            return {"mode": "rebuild", **common}
        if self._length is None or self._observation is None:
            return {"mode": "fresh", **common}
        return {
            "mode": "snapshot",
            "time": self._time.copy(),
            "returns": self._returns.copy(),
            "memory": self._memory,
            "environments": self.environments.snapshot(),
            **common,
        }

    def restore(self, tree: Tree) -> None:
        """Go on exactly there.

        Raises:
            ValueError: if the snapshot is of other environments.
        """
        self._next_update = int(tree["update"])
        self._finished = [(float(total), int(length)) for total, length in tree["finished"]]
        if tree["mode"] == "rebuild":
            self.rebuild(self._next_update)
        elif tree["mode"] == "snapshot":
            self._observation = self.environments.restore(tree["environments"])
            self._time = np.asarray(tree["time"]).astype(np.int64)
            self._returns = np.asarray(tree["returns"]).astype(np.float64)
            memory = tree["memory"]
            self._memory = None if memory is None else map_observation(np.array, memory)

    def close(self) -> None:
        """Close the environments."""
        self.environments.close()


def _loop(
    environments: VectorEnvironment,
    sampler: Sampler,
    noise: np.ndarray,
    rollout: Rollout,
    observation: ObservationArrays,
    row_steps: int,
) -> None:
    """Everything that cannot wait until the rollout is over, and nothing else."""
    record = _recorder(rollout.observation)
    sample, to_environment, advance = sampler.sample, sampler.to_environment, environments.step
    actions, rewards = rollout.action, rollout.reward
    for position, chance in enumerate(noise):
        if position % row_steps == 0:
            rollout.memory.append(sampler.memory)
        record(position, observation)
        rollout.filled = position + 1
        action = sample(observation, chance)
        actions[:, position] = action
        step = advance(to_environment(action))
        observation = step.observation
        rewards[:, position] = step.reward
        if step.finished is not None:
            assert step.final is not None
            rollout.terminated[:, position] = step.terminated
            rollout.truncated[:, position] = step.truncated
            rollout.ends.append((position, step.finished, step.final))
            sampler.restart(step.finished)
        if step.live is not None:
            rollout.live[:, position] = step.live
            sampler.restart(np.flatnonzero(~step.live))
    rollout.last = observation


def _recorder(target: ObservationArrays) -> Callable[[int, ObservationArrays], None]:
    if isinstance(target, dict):

        def record_entries(position: int, observation: ObservationArrays) -> None:
            assert isinstance(observation, dict)
            for name, rows in target.items():
                rows[:, position] = observation[name]

        return record_entries

    def record(position: int, observation: ObservationArrays) -> None:
        target[:, position] = observation

    return record

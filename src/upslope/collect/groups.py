"""Episodes in groups from one start: what group-relative algorithms (GRPO, RLOO) compare.

The environments of a group begin alike, by the same seed or from a copy of one environment's state; only the actions,
drawn independently, tell their episodes apart. Random numbers of the world are then common to a group, too, and that
keeps a baseline made of the other episodes unbiased: given the start and the world's numbers, the others' returns do
not depend on this episode's actions, and E[grad log pi(a_t|s_t) | s_t, those numbers] = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np
import torch

from upslope.collect.environments import EnvironmentCollector
from upslope.collect.rows import join_rows
from upslope.collect.sealing import Truncation
from upslope.collect.vector import Resume, Step, VectorEnvironment
from upslope.errors import UsageError
from upslope.spaces import Leaf, Space
from upslope.trajectory import ObservationArrays, Policy, Trajectory, Tree, map_observation

GroupStart: TypeAlias = Literal["seed", "snapshot"]
"""How the environments of a group come to begin alike: reset with one seed, or given the state of one of them."""


class GroupedEnvironments:
    """Environments whose episodes begin alike, `size` by `size`; a `upslope.collect.vector.VectorEnvironment`.

    Args:
        environments: to be begun in groups.
        size: G, environments in a group.
        start: how they come to begin alike.

    Raises:
        UsageError: if the environments are not made of whole groups, or cannot begin in that way.
    """

    def __init__(self, environments: VectorEnvironment, *, size: int, start: GroupStart) -> None:
        if environments.num_envs % size:
            raise UsageError(
                f"{environments.num_envs} environments make no whole groups of {size}: set environment.count to a "
                f"multiple of rollout.group_size"
            )
        if start == "snapshot" and environments.resume != "snapshot":
            raise UsageError(
                "the state of these environments cannot be taken, so that no other can begin in it: set "
                "rollout.group_start to 'seed', or give the environment get_state() and set_state(state) (see "
                "environment.resume)"
            )
        self._environments = environments
        self._start: GroupStart = start
        self._leader = np.arange(environments.num_envs) // size * size

    @property
    def num_envs(self) -> int:
        """N."""
        return self._environments.num_envs

    @property
    def observation_space(self) -> Space:
        """Of one environment."""
        return self._environments.observation_space

    @property
    def action_space(self) -> Leaf:
        """Of one environment."""
        return self._environments.action_space

    @property
    def vectorization(self) -> str:
        """As without groups."""
        return self._environments.vectorization

    @property
    def resume(self) -> Resume:
        """As without groups."""
        return self._environments.resume

    def reset(self, seeds: Sequence[int] | None) -> ObservationArrays:
        """Begin new episodes everywhere, alike within each group.

        Args:
            seeds: one per environment; that of a group's first counts for all of it.

        Raises:
            UsageError: if they do not begin alike.
        """
        if self._start == "snapshot":
            self._environments.reset(seeds)
            observation = self._environments.restore(self._copied(self._environments.snapshot()))
        else:
            own = None if seeds is None else [seeds[index] for index in self._leader.tolist()]
            observation = self._environments.reset(own)
        for name, array in observation.items() if isinstance(observation, dict) else [("", observation)]:
            unlike = (array != array[self._leader]).reshape(len(array), -1).any(axis=-1)
            if unlike.any():
                index = int(np.flatnonzero(unlike)[0])
                raise UsageError(
                    f"environments {int(self._leader[index])} and {index} are of one group and do not begin alike"
                    f"{f' ({name!r} differs)' if name else ''}: {self._remedy()}"
                )
        return observation

    def _copied(self, tree: Tree) -> Tree:
        if not isinstance(tree, dict) or not isinstance(tree.get("environments"), list):
            raise UsageError(
                "these environments are stepped together and have one state, not one each, to begin others in: set "
                "environment.vectorization to 'sync' or 'async', or rollout.group_start to 'seed'"
            )
        states, leader = tree["environments"], self._leader
        observation = map_observation(lambda array: np.asarray(array)[leader], tree["observation"])
        return {**tree, "observation": observation, "environments": [states[index] for index in leader.tolist()]}

    def _remedy(self) -> str:
        if self._start == "snapshot":
            return "what the environment says of its state is not all of it; mend its get_state() and set_state(state)"
        return (
            "each must take a seed of its own, and its first observation follow from it. Environments stepped together "
            "(environment.vectorization='native') take one seed: set it to 'sync' or 'async'; or set "
            "rollout.group_start to 'snapshot' where the environment's state can be taken"
        )

    def step(self, action: np.ndarray) -> Step:
        """Take one action in each environment."""
        return self._environments.step(action)

    def snapshot(self) -> Tree:
        """The state of all environments."""
        return self._environments.snapshot()

    def restore(self, tree: Tree) -> ObservationArrays:
        """Put that state back."""
        return self._environments.restore(tree)

    def rebuild(self, seeds: Sequence[int]) -> ObservationArrays:
        """Make the environments anew."""
        return self._environments.rebuild(seeds)

    def close(self) -> None:
        """Give back processes and windows."""
        self._environments.close()


class GroupCollector:
    """Brings whole episodes in groups that share a start; a `upslope.trajectory.Collector`.

    Every environment plays one episode at a time, in as many waves as it takes. Row i is of group i // size.

    Args:
        environments: to act in.
        episodes: per update over all environments, a multiple of their number.
        size: G, episodes in a group; the number of environments is a multiple of it.
        start: how the episodes of a group come to begin alike.
        seed: of the run.
        truncation: what a time limit means.

    Attributes:
        environments: as they are stepped.
        steps_taken: environment steps of the last update, also those played while others came to their end.

    Raises:
        UsageError: if the numbers do not divide, or the environments cannot begin alike.
    """

    def __init__(
        self,
        environments: VectorEnvironment,
        *,
        episodes: int,
        size: int,
        start: GroupStart,
        seed: int,
        truncation: Truncation = "bootstrap",
    ) -> None:
        count = environments.num_envs
        if episodes < 1 or episodes % count:
            raise UsageError(
                f"{episodes} episodes in groups are not so many for each of {count} environments: set rollout.episodes "
                "to a multiple of environment.count"
            )
        self.environments = GroupedEnvironments(environments, size=size, start=start)
        self._alone = EnvironmentCollector(self.environments, episodes=count, seed=seed, truncation=truncation)
        self._waves = episodes // count
        self._group = torch.arange(episodes) // size
        self.steps_taken = 0

    def collect(self, policy: Policy, update: int) -> Trajectory:
        """Play the episodes of an update, wave by wave.

        Raises:
            UsageError: if the environments of a group do not begin alike; else as `EnvironmentCollector.collect`.
        """
        parts: list[Trajectory] = []
        self.steps_taken = 0
        for wave in range(self._waves):
            parts.append(self._alone.collect_wave(policy, update, wave))
            self.steps_taken += self._alone.steps_taken
        return replace(join_rows(parts), group=self._group.clone())

    def finished(self) -> list[tuple[float, int]]:
        """(raw return, length) of the episodes that ended since this was last asked."""
        return self._alone.finished()

    def rebuild(self, update: int) -> None:
        """Make the environments anew for `update`."""
        self._alone.rebuild(update)

    def snapshot(self) -> Tree:
        """Everything needed to go on exactly here: between updates no episode is open."""
        return {"waves": self._alone.snapshot()}

    def restore(self, tree: Tree) -> None:
        """Go on exactly there."""
        self._alone.restore(tree["waves"])

    def close(self) -> None:
        """Close the environments."""
        self.environments.close()

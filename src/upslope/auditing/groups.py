"""Where an algorithm that compares episodes is audited in tables: groups of episodes that begin in one state."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor, nn

from upslope.algorithms import Target
from upslope.auditing.setting import Audited, FiniteSetting
from upslope.collect.finite import FiniteVectorEnvironment
from upslope.collect.groups import GroupCollector
from upslope.errors import UsageError
from upslope.exact import NamedProblem, Rows, enumerate_episodes
from upslope.trajectory import Trajectory, map_observation

_MOST_GROUPS = 50_000
"""More are drawn instead of listed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupSetting:
    """Groups of whole episodes of a finite MDP, the start of each drawn once for all its episodes.

    Attributes:
        alone: the same problem with single episodes.
        size: G, episodes in a group.
    """

    alone: FiniteSetting[Any]
    size: int

    @classmethod
    def build(cls, problem: NamedProblem, *, size: int, stale: bool = False, rows: int = 8) -> GroupSetting:
        """A setting on a named problem, with its own policy; the discount is 1.

        Args:
            problem: episodic.
            size: G.
            stale: a policy with other parameters acts.
            rows: groups in a drawn batch.
        """
        behaviour = "stale" if stale else "on_policy"
        alone = FiniteSetting.build(problem, gamma=1.0, unit="episodes", behaviour=behaviour, rows=rows)
        return cls(alone=alone, size=size)

    def __post_init__(self) -> None:
        """Refuse a group in which there is nothing to compare."""
        if self.size < 2:
            raise UsageError(
                f"the episodes of a group are compared with each other: ask for a size of 2 or more, got {self.size}"
            )

    @property
    def name(self) -> str:
        """The problem's, and how episodes are grouped."""
        return f"{self.alone.name} (1 group of {self.size})"

    @property
    def policy(self) -> Audited:
        """The policy differentiated."""
        return self.alone.policy

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The actor's."""
        return self.alone.parameters

    @property
    def rows(self) -> int:
        """Groups in a drawn batch."""
        return self.alone.rows

    @property
    def trajectories_per_row(self) -> float:
        """Episodes in a group."""
        return float(self.size)

    @property
    def steps_per_row(self) -> float:
        """Mean steps in a group."""
        return self.size * self.alone.mean_length

    def every(self) -> Iterator[tuple[float, Trajectory]]:
        """Each group there is, with its probability; groups of the same episodes in another order count as one.

        Raises:
            ValueError: if there are too many.
        """
        mdp, acted = self.alone.mdp, self.alone.behaviour
        starts = mdp.start.nonzero().flatten().tolist()
        episodes = {start: enumerate_episodes(mdp, acted, limit=self.alone.limit, start=start) for start in starts}
        groups = sum(math.comb(len(rows) + self.size - 1, self.size) for rows in episodes.values())
        if groups > _MOST_GROUPS:
            raise ValueError(f"there are {groups} groups of {self.size} episodes, more than {_MOST_GROUPS}: draw some")
        for start, rows in episodes.items():
            chance = rows.behaviour_probability.tolist()
            for members in combinations_with_replacement(range(len(rows)), self.size):
                orders = math.factorial(self.size) / math.prod(math.factorial(n) for n in Counter(members).values())
                probability = float(mdp.start[start]) * orders * math.prod(chance[row] for row in members)
                yield probability, self._group(rows, members)

    def _group(self, rows: Rows, members: tuple[int, ...]) -> Trajectory:
        return replace(rows.select(members), group=torch.zeros(self.size, dtype=torch.long))

    def drawn(self, batches: int, seed: int) -> Iterator[Trajectory]:
        """Batches from the collector that training uses, where a group has the world's random numbers in common."""
        count = self.rows * self.size
        environments = FiniteVectorEnvironment(self.alone.mdp, count, time_limit=self.alone.limit)
        collector = GroupCollector(environments, episodes=count, size=self.size, start="seed", seed=seed)
        for update in range(batches):
            trajectory = collector.collect(self.alone.behaviour, update)
            yield replace(
                trajectory,
                observation=map_observation(_doubled, trajectory.observation),
                final_observation=map_observation(_doubled, trajectory.final_observation),
                reward=trajectory.reward.to(torch.float64),
            )

    def exact_gradient(self, target: Target) -> Tensor:
        """[P] what a declared target is here."""
        shrunk = (self.size - 1) / self.size if target.group_mean else 1.0
        return shrunk * self.alone.exact_gradient(target)


def _doubled(observation: Tensor) -> Tensor:
    return observation.to(torch.float64) if observation.is_floating_point() else observation

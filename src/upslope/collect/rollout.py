"""What the rollout loop writes down, and the times and returns worked out from it once the loop is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from upslope.trajectory import ObservationArrays, map_observation

_LONG_AGO = np.iinfo(np.int64).min


@dataclass(slots=True)
class Rollout:
    """Raw experience, [N, T, ...] with time second.

    Attributes:
        observation, action, reward, terminated, truncated: one entry per step.
        live: False where the environment only reset and ignored the action.
        filled: how many positions are written.
        ends: (position, environments, final observations) wherever episodes ended.
        last: [N, ...] the observation after the last step.
        memory: [N, ...] what the policy remembered at the first position of each row that is to be made; None for
            nothing.
    """

    observation: ObservationArrays
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    live: np.ndarray
    filled: int = 0
    ends: list[tuple[int, np.ndarray, ObservationArrays]] = field(default_factory=list)
    last: ObservationArrays | None = None
    memory: list[ObservationArrays | None] = field(default_factory=list["ObservationArrays | None"])

    @classmethod
    def allocate(cls, observation: ObservationArrays, action: np.ndarray, steps: int) -> Rollout:
        """Fresh memory for `steps` steps; the arguments, [N, ...], show shapes and types."""
        count = len(action)
        return cls(
            observation=map_observation(lambda a: np.zeros((count, steps, *a.shape[1:]), a.dtype), observation),
            action=np.zeros((count, steps, *action.shape[1:]), action.dtype),
            reward=np.zeros((count, steps)),
            terminated=np.zeros((count, steps), dtype=bool),
            truncated=np.zeros((count, steps), dtype=bool),
            live=np.ones((count, steps), dtype=bool),
        )

    def joined_ends(self) -> tuple[np.ndarray, np.ndarray, ObservationArrays]:
        """Positions [K], environments [K] and final observations [K, ...] of all ends, in order of time."""
        nothing = map_observation(lambda a: a[:0, 0], self.observation)
        if not self.ends:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), nothing
        position = np.repeat([position for position, _, _ in self.ends], [len(each) for _, each, _ in self.ends])
        environment = np.concatenate([np.zeros(0, dtype=np.int64), *(each for _, each, _ in self.ends)])
        return (
            position.astype(np.int64),
            environment,
            join_observations([nothing, *(final for _, _, final in self.ends)]),
        )

    def decision_times(self, start: np.ndarray) -> np.ndarray:
        """Decisions since the episode's start, [N, T + 1]; the last column is that of the next step.

        Args:
            start: [N] the time of the first position.
        """
        before = np.zeros((len(start), self.live.shape[1] + 1), dtype=np.int64)
        np.cumsum(self.live, axis=1, out=before[:, 1:])
        if not self.ends:
            return before + start[:, None]
        origin = np.full_like(before, _LONG_AGO)
        origin[:, 0] = -start
        done = self.terminated | self.truncated
        origin[:, 1:][done] = before[:, 1:][done]
        return before - np.maximum.accumulate(origin, axis=1)

    def episode_returns(self, running: np.ndarray) -> tuple[list[tuple[int, int, float]], np.ndarray]:
        """Returns of the episodes that ended, and what the open ones have gathered.

        Args:
            running: [N] gathered before the first position.

        Returns:
            (position, environment, return) in order of time, and the new [N] running sums.
        """
        count, steps = self.reward.shape
        if not self.ends:
            return [], running + np.where(self.live, self.reward, 0.0).sum(axis=1)
        done = self.terminated | self.truncated
        starts = np.zeros((count, steps + 1), dtype=bool)
        starts[:, 0] = True
        starts[:, 1:] = done
        padded = np.zeros((count, steps + 1))
        padded[:, :-1] = np.where(self.live, self.reward, 0.0)
        sums = np.add.reduceat(padded.reshape(-1), np.flatnonzero(starts))
        row, position = np.nonzero(starts)
        first = position == 0
        sums[first] += running
        ends_here = ~np.append(first[1:], True)
        episodes = [(int(position[k + 1]) - 1, int(row[k]), float(sums[k])) for k in np.flatnonzero(ends_here)]
        return sorted(episodes), sums[~ends_here]


def concatenate(rollouts: list[Rollout]) -> Rollout:
    """Rollouts that follow one another as one."""
    offset, ends = 0, []
    for rollout in rollouts:
        ends += [(offset + position, environments, final) for position, environments, final in rollout.ends]
        offset += rollout.filled
    names = ("action", "reward", "terminated", "truncated", "live")
    joined = {name: np.concatenate([getattr(rollout, name) for rollout in rollouts], axis=1) for name in names}
    observation = join_observations([rollout.observation for rollout in rollouts], axis=1)
    return Rollout(observation=observation, filled=offset, ends=ends, last=rollouts[-1].last, memory=[], **joined)


def join_observations(parts: Sequence[ObservationArrays], axis: int = 0) -> ObservationArrays:
    """Arrays of the same spaces, at least one, one after the other along an axis."""
    first = parts[0]
    if isinstance(first, dict):
        entries = [part for part in parts if isinstance(part, dict)]
        return {name: np.concatenate([entry[name] for entry in entries], axis=axis) for name in first}
    return np.concatenate([part for part in parts if isinstance(part, np.ndarray)], axis=axis)

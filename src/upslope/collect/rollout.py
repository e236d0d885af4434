"""What the rollout loop writes down, and all that is worked out from it once the loop is over."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from upslope.collect.errors import NonFiniteError
from upslope.trajectory import Observation, ObservationArrays, Policy, Trajectory, map_observation

Truncation = Literal["bootstrap", "as_termination"]
"""What a time limit means: the episode would go on (right), or death (wrong, and there to show that it is)."""

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
        return position.astype(np.int64), environment, _join([nothing, *(final for _, _, final in self.ends)])

    def decision_times(self, start: np.ndarray) -> np.ndarray:
        """Decisions since the episode's start, [N, T + 1]; the last column is that of the next step.

        Args:
            start: [N] the time of the first position.
        """
        before = np.zeros((len(start), self.live.shape[1] + 1), dtype=np.int64)
        np.cumsum(self.live, axis=1, out=before[:, 1:])
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

    def check_finite(self, update: int) -> None:
        """Refuse NaN and infinity, naming the first of them.

        Raises:
            NonFiniteError: with environment, step, what and value.
        """
        filled = self.filled
        faults: list[tuple[int, int, int, str]] = []
        _find(faults, 0, "observation", map_observation(lambda a: a[:, :filled], self.observation))
        _find(faults, 1, "action", self.action[:, :filled])
        _find(faults, 2, "reward", self.reward[:, :filled])
        position, environment, final = self.joined_ends()
        for row in _unfinite(final):
            found: list[tuple[int, int, int, str]] = []
            _find(found, 3, "final observation", map_observation(lambda a, row=row: a[row, None, None], final))
            faults.append((int(position[row]), 3, int(environment[row]), found[0][3]))
        for row in _unfinite(self.last) if self.last is not None else ():
            found = []
            _find(found, 3, "observation", map_observation(lambda a, row=row: a[row, None, None], self.last))
            faults.append((filled, 3, int(row), found[0][3]))
        if not faults:
            return
        first, kind, where, text = min(faults)
        remedy = (
            "The policy has diverged: lower the learning rate, clip gradients, or normalise observations and rewards"
            if kind == 1
            else "The environment gave it: `upslope check-env` tries the environment on its own"
        )
        raise NonFiniteError(f"environment {where}, step {first} of update {update}: {text}. {remedy}")


def _finite(array: np.ndarray) -> np.ndarray:
    """Which values are finite as float32."""
    if array.dtype == np.float32:
        return np.isfinite(array)
    with np.errstate(over="ignore"):
        return np.isfinite(array.astype(np.float32))


def _unfinite(arrays: ObservationArrays) -> np.ndarray:
    """Rows with a value that is not finite."""
    rows: list[np.ndarray] = []
    for array in arrays.values() if isinstance(arrays, dict) else [arrays]:
        finite = np.isfinite(array) if array.dtype.kind == "f" else None
        if finite is not None and not finite.all():
            rows.append(np.flatnonzero(~finite.all(axis=tuple(range(1, array.ndim)))))
    return np.unique(np.concatenate(rows)) if rows else np.zeros(0, dtype=np.int64)


def _find(faults: list[tuple[int, int, int, str]], kind: int, what: str, arrays: ObservationArrays) -> None:
    """Append (position, kind, environment, text) of the first value that is not finite as float32."""
    for name, array in arrays.items() if isinstance(arrays, dict) else [("", arrays)]:
        if array.dtype.kind != "f":
            continue
        finite = _finite(array)
        if finite.all():
            continue
        flat = finite.reshape(*array.shape[:2], -1)
        position = int(np.argmin(flat.all(axis=(0, 2))))
        environment = int(np.argmin(flat[:, position].all(axis=1)))
        element = int(np.argmin(flat[environment, position]))
        value = array.reshape(*array.shape[:2], -1)[environment, position, element]
        label = f"{what} {name!r}" if name else what
        where = f" (element {element})" if flat.shape[2] > 1 else ""
        faults.append((position, kind, environment, f"the {label} is {value}{where}"))


def concatenate(rollouts: list[Rollout]) -> Rollout:
    """Rollouts that follow one another as one."""
    first, offset, ends = rollouts[0], 0, []
    for rollout in rollouts:
        ends += [(offset + position, environments, final) for position, environments, final in rollout.ends]
        offset += rollout.filled
    names = ("action", "reward", "terminated", "truncated", "live")
    joined = {name: np.concatenate([getattr(rollout, name) for rollout in rollouts], axis=1) for name in names}
    observations = [rollout.observation for rollout in rollouts]
    observation: ObservationArrays
    if isinstance(first.observation, dict):
        observation = {
            name: np.concatenate([entry[name] for entry in observations if isinstance(entry, dict)], axis=1)
            for name in first.observation
        }
    else:
        observation = np.concatenate([entry for entry in observations if isinstance(entry, np.ndarray)], axis=1)
    return Rollout(observation=observation, filled=offset, ends=ends, last=rollouts[-1].last, memory=[], **joined)


def seal_fragments(
    rollout: Rollout,
    time: np.ndarray,
    policy: Policy,
    update: int,
    truncation: Truncation,
    row_steps: int | None = None,
    *,
    log_prob: bool = True,
) -> Trajectory:
    """One row per environment, cut where the rollout ends; or several of `row_steps` each, those of one in order.

    Args:
        rollout: [N, T].
        time: [N, T] decisions since each episode's start.
        policy: who acted.
        update: its version.
        truncation: what a time limit means.
        row_steps: positions of a row, a divisor of T; None for T.
        log_prob: whether to work out that of the actions; else it is NaN.
    """
    count, steps = rollout.reward.shape
    length = steps if row_steps is None else row_steps
    terminated, truncated = _facts(rollout, truncation)
    index, final = _open_ends(rollout, terminated, steps)
    assert rollout.last is not None
    indices, finals = [index], [final]
    for position in range(length - 1, steps, length):
        open_rows = np.flatnonzero(rollout.live[:, position] & ~(terminated[:, position] | truncated[:, position]))
        indices.append(open_rows * steps + position)
        following = rollout.last if position == steps - 1 else _at(rollout.observation, position + 1)
        finals.append(map_observation(lambda a, rows=open_rows: a[rows], following))

    def cut(array: np.ndarray) -> np.ndarray:
        return array.reshape(count * (steps // length), length, *array.shape[2:])

    rows = Rollout(
        observation=map_observation(cut, rollout.observation),
        action=cut(rollout.action),
        reward=cut(rollout.reward),
        terminated=cut(terminated),
        truncated=cut(truncated),
        live=cut(rollout.live),
    )
    return _seal(
        rows,
        rows.terminated,
        rows.truncated,
        rows.live,
        cut(np.ascontiguousarray(time)),
        (np.concatenate(indices), _join(finals)),
        policy,
        update,
        _memory_of_rows(rollout.memory),
        log_prob=log_prob,
    )


def _at(observation: ObservationArrays, position: int) -> ObservationArrays:
    return map_observation(lambda array: array[:, position], observation)


def _memory_of_rows(memory: list[ObservationArrays | None]) -> Observation | None:
    """[N * R, ...] from R memories [N, ...], those of one environment in order."""
    known = [each for each in memory if each is not None]
    if not known:
        return None
    names = known[0]
    if not isinstance(names, dict):
        return torch.from_numpy(np.stack([each for each in known if isinstance(each, np.ndarray)], axis=1)).flatten(
            0, 1
        )
    parts = [each for each in known if isinstance(each, dict)]
    return {name: torch.from_numpy(np.stack([part[name] for part in parts], axis=1)).flatten(0, 1) for name in names}


def seal_episodes(
    rollout: Rollout, quota: np.ndarray, policy: Policy, update: int, truncation: Truncation
) -> Trajectory:
    """One row per episode, the first `quota[n]` of each environment, padded to the longest.

    Args:
        rollout: [N, T], long enough.
        quota: [N] episodes wanted of each environment.
        policy: who acted.
        update: its version.
        truncation: what a time limit means.
    """
    steps = rollout.reward.shape[1]
    terminated, truncated = _facts(rollout, truncation)
    done = terminated | truncated
    spans: list[tuple[int, int, int]] = []
    for environment, wanted in enumerate(quota):
        begin = 0
        for end in np.flatnonzero(done[environment])[:wanted]:
            begin += int(np.argmax(rollout.live[environment, begin:]))
            spans.append((environment, begin, int(end) + 1))
            begin = int(end) + 1
    longest = max(end - begin for _, begin, end in spans)
    mask = np.zeros((len(spans), longest), dtype=bool)
    place = np.full((len(rollout.reward), steps), -1, dtype=np.int64)
    for row, (environment, begin, end) in enumerate(spans):
        mask[row, : end - begin] = True
        place[environment, begin:end] = row * longest + np.arange(end - begin)
    source = np.flatnonzero(place.reshape(-1) >= 0)
    target = place.reshape(-1)[source]

    def arrange(array: np.ndarray) -> np.ndarray:
        flat = np.zeros((mask.size, *array.shape[2:]), array.dtype)
        flat[target] = array.reshape(-1, *array.shape[2:])[source]
        return flat.reshape(*mask.shape, *array.shape[2:])

    index, final = _open_ends(rollout, terminated, steps)
    moved = place.reshape(-1)[index]
    kept = moved >= 0
    rows = Rollout(
        observation=map_observation(arrange, rollout.observation),
        action=arrange(rollout.action),
        reward=arrange(rollout.reward),
        terminated=arrange(terminated),
        truncated=arrange(truncated),
        live=mask,
    )
    time = np.where(mask, np.arange(longest), 0)
    ends = (moved[kept], map_observation(lambda a: a[kept], final))
    return _seal(rows, rows.terminated, rows.truncated, mask, time, ends, policy, update)


def _facts(rollout: Rollout, truncation: Truncation) -> tuple[np.ndarray, np.ndarray]:
    if truncation == "bootstrap":
        return rollout.terminated, rollout.truncated
    return rollout.terminated | rollout.truncated, np.zeros_like(rollout.truncated)


def _open_ends(rollout: Rollout, terminated: np.ndarray, steps: int) -> tuple[np.ndarray, ObservationArrays]:
    """Where (n * T + t) episodes ended without termination, and what was seen there."""
    position, environment, final = rollout.joined_ends()
    going_on = np.flatnonzero(~terminated[environment, position])
    index = environment[going_on] * steps + position[going_on]
    return index, map_observation(lambda a: a[going_on], final)


def _seal(
    rows: Rollout,
    terminated: np.ndarray,
    truncated: np.ndarray,
    mask: np.ndarray,
    time: np.ndarray,
    ends: tuple[np.ndarray, ObservationArrays],
    policy: Policy,
    update: int,
    memory: Observation | None = None,
    *,
    log_prob: bool = True,
) -> Trajectory:
    index, final = ends
    order = np.argsort(index, kind="stable")
    chosen = torch.from_numpy(mask)
    trajectory = Trajectory(
        observation=_tensors(rows.observation),
        action=torch.from_numpy(rows.action),
        reward=torch.from_numpy(rows.reward.astype(np.float32)),
        terminated=torch.from_numpy(terminated),
        truncated=torch.from_numpy(truncated),
        mask=chosen,
        behaviour_log_prob=torch.full(mask.shape, torch.nan).masked_fill_(~chosen, 0.0),
        time=torch.from_numpy(np.ascontiguousarray(time)),
        final_observation=_tensors(map_observation(lambda a: a[order], final)),
        final_index=torch.from_numpy(index[order]),
        policy_version=update,
        memory=memory,
    )
    return with_log_prob(trajectory, policy) if log_prob else trajectory


@torch.no_grad()
def with_log_prob(trajectory: Trajectory, policy: Policy) -> Trajectory:
    """The trajectory with b_t, that of the actions under who took them.

    Args:
        trajectory: sealed.
        policy: who acted, unchanged since then.

    Raises:
        NonFiniteError: if one of them is NaN or infinite.
    """
    if policy.sequential:
        log_prob = policy.evaluate(trajectory).log_prob
    else:
        log_prob = policy.log_prob(trajectory.observation, trajectory.action)
    log_prob = log_prob.detach().masked_fill(~trajectory.mask, 0.0)
    if not bool(torch.isfinite(log_prob).all()):
        row, position = (int(k) for k in torch.nonzero(~torch.isfinite(log_prob))[0])
        raise NonFiniteError(
            f"the log-probability of the action taken is {float(log_prob[row, position])} in row {row}, step "
            f"{position} of update {trajectory.policy_version}: the policy has diverged, or its sampler and its "
            "log_prob disagree. Lower the learning rate or clip gradients"
        )
    return replace(trajectory, behaviour_log_prob=log_prob)


def _join(parts: list[ObservationArrays]) -> ObservationArrays:
    first = parts[0]
    if isinstance(first, dict):
        return {name: np.concatenate([part[name] for part in parts if isinstance(part, dict)]) for name in first}
    return np.concatenate([part for part in parts if isinstance(part, np.ndarray)])


def _tensors(arrays: ObservationArrays) -> Observation:
    return map_observation(torch.from_numpy, arrays)

"""What the rollout loop wrote down -> a trajectory: rows, masks and what followed their open ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from upslope.collect.errors import NonFiniteError
from upslope.collect.rollout import Rollout, join_observations
from upslope.trajectory import Observation, ObservationArrays, Policy, Trajectory, map_observation

Truncation = Literal["bootstrap", "as_termination"]
"""What a time limit means: the episode would go on (right), or death (wrong, and there to show that it is)."""


def seal_fragments(
    rollout: Rollout, time: np.ndarray, update: int, truncation: Truncation, row_steps: int | None = None
) -> Trajectory:
    """One row per environment, cut where the rollout ends; or several of `row_steps` each, those of one in order.

    `behaviour_log_prob` is NaN where the mask is True (see `with_log_prob`).

    Args:
        rollout: [N, T].
        time: [N, T] decisions since each episode's start.
        update: the version of the policy that acted.
        truncation: what a time limit means.
        row_steps: positions of a row, a divisor of T; None for T.
    """
    count, steps = rollout.reward.shape
    length = steps if row_steps is None else row_steps
    rollout = _as_meant(rollout, truncation)
    index, final = _open_ends(rollout)
    assert rollout.last is not None
    indices, finals = [index], [final]
    for position in range(length - 1, steps, length):
        done = rollout.terminated[:, position] | rollout.truncated[:, position]
        open_rows = np.flatnonzero(rollout.live[:, position] & ~done)
        indices.append(open_rows * steps + position)
        following = rollout.last if position == steps - 1 else _at(rollout.observation, position + 1)
        finals.append(map_observation(lambda a, rows=open_rows: a[rows], following))

    def cut(array: np.ndarray) -> np.ndarray:
        return array.reshape(count * (steps // length), length, *array.shape[2:])

    ends = (np.concatenate(indices), join_observations(finals))
    return _seal(
        _arranged(rollout, cut), cut(np.ascontiguousarray(time)), ends, update, _memory_of_rows(rollout.memory)
    )


def _at(observation: ObservationArrays, position: int) -> ObservationArrays:
    return map_observation(lambda array: array[:, position], observation)


def _memory_of_rows(memory: list[ObservationArrays | None]) -> Observation | None:
    """[N * R, ...] from R memories [N, ...], those of one environment in order."""
    known = [map_observation(lambda a: a[:, None], each) for each in memory if each is not None]
    if not known:
        return None
    return map_observation(lambda a: torch.from_numpy(a).flatten(0, 1), join_observations(known, axis=1))


def seal_episodes(rollout: Rollout, quota: np.ndarray, update: int, truncation: Truncation) -> Trajectory:
    """One row per episode, the first `quota[n]` of each environment, padded to the longest.

    `behaviour_log_prob` is NaN where the mask is True (see `with_log_prob`).

    Args:
        rollout: [N, T], long enough.
        quota: [N] episodes wanted of each environment.
        update: the version of the policy that acted.
        truncation: what a time limit means.
    """
    rollout = _as_meant(rollout, truncation)
    done = rollout.terminated | rollout.truncated
    spans: list[tuple[int, int, int]] = []
    for environment, wanted in enumerate(quota):
        begin = 0
        for end in np.flatnonzero(done[environment])[:wanted]:
            begin += int(np.argmax(rollout.live[environment, begin:]))
            spans.append((environment, begin, int(end) + 1))
            begin = int(end) + 1
    longest = max(end - begin for _, begin, end in spans)
    mask = np.zeros((len(spans), longest), dtype=bool)
    place = np.full(rollout.reward.shape, -1, dtype=np.int64)
    for row, (environment, begin, end) in enumerate(spans):
        mask[row, : end - begin] = True
        place[environment, begin:end] = row * longest + np.arange(end - begin)
    source = np.flatnonzero(place.reshape(-1) >= 0)
    target = place.reshape(-1)[source]

    def arrange(array: np.ndarray) -> np.ndarray:
        flat = np.zeros((mask.size, *array.shape[2:]), array.dtype)
        flat[target] = array.reshape(-1, *array.shape[2:])[source]
        return flat.reshape(*mask.shape, *array.shape[2:])

    index, final = _open_ends(rollout)
    moved = place.reshape(-1)[index]
    kept = moved >= 0
    time = np.where(mask, np.arange(longest), 0)
    ends = (moved[kept], map_observation(lambda a: a[kept], final))
    return _seal(replace(_arranged(rollout, arrange), live=mask), time, ends, update)


def _as_meant(rollout: Rollout, truncation: Truncation) -> Rollout:
    """With time limits as what they mean."""
    if truncation == "bootstrap":
        return rollout
    done = rollout.terminated | rollout.truncated
    return replace(rollout, terminated=done, truncated=np.zeros_like(done))


def _arranged(rollout: Rollout, arrange: Callable[[np.ndarray], np.ndarray]) -> Rollout:
    """Rows of other positions, without what is known of ends."""
    return Rollout(
        observation=map_observation(arrange, rollout.observation),
        action=arrange(rollout.action),
        reward=arrange(rollout.reward),
        terminated=arrange(rollout.terminated),
        truncated=arrange(rollout.truncated),
        live=arrange(rollout.live),
    )


def _open_ends(rollout: Rollout) -> tuple[np.ndarray, ObservationArrays]:
    """Where (n * T + t) episodes ended without termination, and what was seen there."""
    position, environment, final = rollout.joined_ends()
    going_on = np.flatnonzero(~rollout.terminated[environment, position])
    index = environment[going_on] * rollout.reward.shape[1] + position[going_on]
    return index, map_observation(lambda a: a[going_on], final)


def _seal(
    rows: Rollout,
    time: np.ndarray,
    ends: tuple[np.ndarray, ObservationArrays],
    update: int,
    memory: Observation | None = None,
) -> Trajectory:
    """Rows whose live positions are the chosen ones; ends in any order."""
    index, final = ends
    order = np.argsort(index, kind="stable")
    mask = torch.from_numpy(rows.live)
    return Trajectory(
        observation=_tensors(rows.observation),
        action=torch.from_numpy(rows.action),
        reward=torch.from_numpy(rows.reward.astype(np.float32)),
        terminated=torch.from_numpy(rows.terminated),
        truncated=torch.from_numpy(rows.truncated),
        mask=mask,
        behaviour_log_prob=torch.full(mask.shape, torch.nan).masked_fill_(~mask, 0.0),
        time=torch.from_numpy(np.ascontiguousarray(time)),
        final_observation=_tensors(map_observation(lambda a: a[order], final)),
        final_index=torch.from_numpy(index[order]),
        policy_version=update,
        memory=memory,
    )


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


def _tensors(arrays: ObservationArrays) -> Observation:
    return map_observation(torch.from_numpy, arrays)

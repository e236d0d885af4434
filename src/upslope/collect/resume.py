"""Whether snapshots of some environments hold, found out by trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from upslope.collect.actions import random_action
from upslope.collect.vector import VectorEnvironment


def resume_problem(make: Callable[[], VectorEnvironment], *, seed: int = 0, steps: int = 20) -> str | None:
    """Why snapshots of these environments do not hold, or None if they do.

    Some environments take a few steps, are snapshotted and go on; fresh ones get the snapshot and the same actions.
    Every observation, reward and flag must agree to the last bit.

    Args:
        make: makes the environments to be tried; called twice.
        seed: of starts and actions.
        steps: how far the two are followed.
    """
    first, second = make(), make()
    try:
        generator = np.random.default_rng(seed)
        actions = [random_action(first.action_space, generator, first.num_envs) for _ in range(7 + steps)]
        first.reset([seed] * first.num_envs)
        _walk(first, actions[:7])
        tree = first.snapshot()
        expected = _walk(first, actions[7:])
        second.reset([seed + 1] * second.num_envs)
        second.restore(tree)
        if expected != _walk(second, actions[7:]):
            return "an environment restored from a snapshot went on differently"
    except ValueError as error:
        return str(error)
    finally:
        first.close()
        second.close()
    return None


def _walk(environments: VectorEnvironment, actions: list[np.ndarray]) -> list[Any]:
    trace: list[Any] = []
    for action in actions:
        step = environments.step(action)
        trace.append(freeze([step.observation, step.reward, step.terminated, step.truncated, step.final]))
    return trace


def freeze(tree: Any) -> Any:
    """Nested values as bytes: what compares equal is equal to the last bit, NaN included."""
    match tree:
        case None:
            return None
        case dict():
            return {key: freeze(value) for key, value in tree.items()}
        case list() | tuple():
            return [freeze(value) for value in tree]
        case _:
            array = np.asarray(tree)
            return (array.shape, str(array.dtype), array.tobytes())

"""Whether snapshots of some environments hold, found out by trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from upslope.collect.actions import random_action
from upslope.collect.masks import mask_of
from upslope.collect.vector import Step, VectorEnvironment
from upslope.trajectory import ObservationArrays


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
        observation, _, _ = _wander(first, first.reset([seed] * first.num_envs), generator, 7)
        tree = first.snapshot()
        _, expected, actions = _wander(first, observation, generator, steps)
        second.reset([seed + 1] * second.num_envs)
        second.restore(tree)
        if expected != _walk(second, actions):
            return "an environment restored from a snapshot went on differently"
    except ValueError as error:
        return str(error)
    finally:
        first.close()
        second.close()
    return None


def _wander(
    environments: VectorEnvironment, observation: ObservationArrays, generator: np.random.Generator, steps: int
) -> tuple[ObservationArrays, list[Any], list[np.ndarray]]:
    """The observation after valid random actions, what they brought, and the actions."""
    trace, actions = list[Any](), list[np.ndarray]()
    for _ in range(steps):
        chosen = random_action(environments.action_space, generator, environments.num_envs, mask_of(observation))
        step = environments.step(chosen)
        observation = step.observation
        actions.append(chosen)
        trace.append(_seen(step))
    return observation, trace, actions


def _walk(environments: VectorEnvironment, actions: list[np.ndarray]) -> list[Any]:
    trace: list[Any] = []
    for action in actions:
        trace.append(_seen(environments.step(action)))
    return trace


def _seen(step: Step) -> Any:
    return freeze([step.observation, step.reward, step.terminated, step.truncated, step.final])


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

"""The tables of a finite problem, laid out for stepping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor


class Tables(Protocol):
    """A finite problem: what an `upslope.exact.FiniteMDP` is made of."""

    @property
    def transition(self) -> Tensor:
        """[S, A, S] p(s'|s,a)."""
        ...

    @property
    def reward(self) -> Tensor:
        """[S, A, S] expected reward of each transition."""
        ...

    @property
    def start(self) -> Tensor:
        """[S] distribution of the first state."""
        ...

    @property
    def terminal(self) -> Tensor:
        """[S] bool: nothing follows."""
        ...

    @property
    def observation(self) -> Tensor:
        """[S, ...] what is seen of each state."""
        ...

    @property
    def reward_value(self) -> Tensor | None:
        """[S, A, S, R] the rewards there are, where they are random."""
        ...

    @property
    def reward_probability(self) -> Tensor | None:
        """[S, A, S, R] and their probabilities."""
        ...


@dataclass(frozen=True, slots=True)
class Lookup:
    """Tables as the environments read them: of each state and action only what can follow, K states at most.

    A uniform number u picks the first entry whose threshold, the sum of probabilities up to it, lies above u.

    Attributes:
        actions, width: A and K.
        threshold: [S A, K] infinite from the last state that can follow on.
        following, reward: [S A K].
        terminal: [S] bool.
        start_threshold, start: [number of states to begin in].
        observation: [S, ...].
        reward_threshold, reward_value: [S A K, R], where rewards are random.
    """

    actions: int
    width: int
    threshold: np.ndarray
    following: np.ndarray
    reward: np.ndarray
    terminal: np.ndarray
    start_threshold: np.ndarray
    start: np.ndarray
    observation: np.ndarray
    reward_threshold: np.ndarray | None
    reward_value: np.ndarray | None

    @classmethod
    def build(cls, tables: Tables) -> Lookup:
        states, actions, _ = tables.transition.shape
        threshold, following = _thresholds(tables.transition.reshape(states * actions, states).numpy())
        row = np.arange(len(following))[:, None]
        start_threshold, start = _thresholds(tables.start.numpy()[None])
        reward_threshold = reward_value = None
        if tables.reward_value is not None and tables.reward_probability is not None:
            shape = (states * actions, states, tables.reward_value.shape[-1])
            chance = tables.reward_probability.reshape(shape).numpy()[row, following]
            value = tables.reward_value.reshape(shape).numpy()[row, following].reshape(-1, shape[-1])
            reward_threshold, chosen = _thresholds(chance.reshape(-1, shape[-1]))
            reward_value = np.take_along_axis(value, chosen, axis=1)
        return cls(
            actions=actions,
            width=following.shape[1],
            threshold=threshold,
            following=following.reshape(-1),
            reward=tables.reward.reshape(states * actions, states).numpy()[row, following].reshape(-1),
            terminal=tables.terminal.numpy().copy(),
            start_threshold=start_threshold[0],
            start=start[0],
            observation=_observation_array(tables.observation),
            reward_threshold=reward_threshold,
            reward_value=reward_value,
        )


def _thresholds(probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row [M, X]: thresholds and indices of the entries that are not 0, both [M, K]."""
    possible = probability > 0.0
    count = possible.sum(axis=1, keepdims=True)
    width = max(int(count.max()), 1)
    index = np.argsort(~possible, axis=1, kind="stable")[:, :width]
    threshold = np.cumsum(np.take_along_axis(probability, index, axis=1), axis=1, dtype=np.float64)
    threshold[np.arange(width) >= count - 1] = np.inf
    return threshold, np.ascontiguousarray(index)


def _observation_array(observation: Tensor) -> np.ndarray:
    array = observation.detach().numpy().copy()
    return array.astype(np.int64 if array.dtype.kind in "iu" and array.ndim == 1 else _seen_dtype(array), copy=False)


def _seen_dtype(array: np.ndarray) -> np.dtype[Any]:
    return array.dtype if array.dtype.kind in "iu" else np.dtype(np.float32)

"""Finite Markov decision processes given by their tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from upslope.exact._toy_text import ToyText, read_toy_text
from upslope.exact._validation import (
    check_continuing,
    check_episodes_end,
    check_reward_distribution,
    check_tables,
    normalised,
)

Kind: TypeAlias = Literal["episodic", "continuing"]
"""Whether J is the expected (discounted) return of an episode, or the average reward per step of an endless one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FiniteMDP:
    """States 0..S-1, actions 0..A-1 and the tables of what follows. All tensors float64 but `terminal`.

    | symbol | field | shape | meaning |
    |---|---|---|---|
    | p(s'|s,a) | `transition` | [S, A, S] | rows sum to 1 (those of terminal states are not read) |
    | r(s,a,s') | `reward` | [S, A, S] | expected reward of each transition |
    | | `start` | [S] | distribution of the first state; 0 on terminal states |
    | | `terminal` | [S] bool | nothing follows |
    | gamma | `gamma` | float | discount factor; unused where `kind` is "continuing" |
    | o(s) | `observation` | [S, ...] | what a policy sees of each state: its number, unless states are to look alike |
    | | `reward_value`, `reward_probability` | [S, A, S, K] or None | distribution of the reward, where it is random |

    An episodic problem with gamma < 1 need not have terminal states. Probabilities may miss their sum of 1 by 1e-9, and
    are then divided by it.

    Raises:
        ValueError: if the tables do not describe such a problem: a shape, type or number; a sum of probabilities that
            is not 1; at gamma = 1, states from which episodes cannot end; in a continuing problem, terminal states or
            states that do not all reach each other; rewards that are not the mean of their distribution.
    """

    transition: Tensor
    reward: Tensor
    start: Tensor
    terminal: Tensor
    gamma: float = 1.0
    kind: Kind = "episodic"
    observation: Tensor = field(default_factory=lambda: torch.zeros(0))
    reward_value: Tensor | None = None
    reward_probability: Tensor | None = None

    def __post_init__(self) -> None:
        """Let a policy see the state's number where nothing else is said; check everything, and make sums exact."""
        if self.observation.shape == (0,):
            object.__setattr__(self, "observation", torch.arange(self.states))
        check_tables(self.transition, self.reward, self.start, self.terminal, self.observation, self.gamma)
        if (self.reward_value is None) != (self.reward_probability is None):
            raise ValueError("a random reward needs both reward_value and reward_probability, [S, A, S, K] each")
        if self.reward_value is not None and self.reward_probability is not None:
            check_reward_distribution(self.transition, self.reward, self.reward_value, self.reward_probability)
            object.__setattr__(self, "reward_probability", normalised(self.reward_probability))
        object.__setattr__(self, "transition", normalised(self.transition))
        object.__setattr__(self, "start", normalised(self.start))
        if self.kind == "continuing":
            check_continuing(self.transition, self.start, self.terminal)
        elif self.kind == "episodic":
            if self.gamma == 1.0:
                check_episodes_end(self.transition, self.start, self.terminal)
        else:
            raise ValueError(f"kind must be 'episodic' or 'continuing'; got {self.kind!r}")

    @property
    def states(self) -> int:
        """S."""
        return self.transition.shape[0]

    @property
    def actions(self) -> int:
        """A."""
        return self.transition.shape[1]

    @classmethod
    def from_tables(
        cls,
        transition: ArrayLike,
        reward: ArrayLike,
        *,
        start: ArrayLike | int = 0,
        terminal: Sequence[int] | Sequence[bool] | np.ndarray = (),
        gamma: float = 1.0,
        kind: Kind = "episodic",
        observation: ArrayLike | None = None,
        reward_value: ArrayLike | None = None,
        reward_probability: ArrayLike | None = None,
    ) -> FiniteMDP:
        """From nested lists or NumPy arrays, converted to float64.

        >>> FiniteMDP.from_tables([[[0, 1]], [[0, 1]]], [[1], [0]], terminal=[1]).reward
        tensor([[[1., 1.]],
        <BLANKLINE>
                [[0., 0.]]], dtype=torch.float64)

        Args:
            transition: [S, A, S], p(s'|s,a).
            reward: [S, A, S], or [S, A] where it does not depend on what follows.
            start: [S], or the number of the one state in which episodes begin.
            terminal: numbers of the terminal states, or [S] booleans.
            gamma, kind, reward_value, reward_probability: as in the class.
            observation: [S, ...]; the state's number if None.

        Raises:
            ValueError: as the class does.
        """
        probability, gain = _double(transition), _double(reward)
        if gain.dim() == 2 and probability.dim() == 3:
            gain = gain.unsqueeze(-1).expand(*gain.shape, probability.shape[-1]).clone()
        states = probability.shape[0]
        if observation is not None and np.size(observation) == 0:
            raise ValueError("observation is empty: give one entry for each state, or None for the state's number")
        return cls(
            transition=probability,
            reward=gain,
            start=_start(start, states),
            terminal=_terminal(terminal, states),
            gamma=gamma,
            kind=kind,
            observation=torch.zeros(0) if observation is None else torch.as_tensor(np.asarray(observation)),
            reward_value=None if reward_value is None else _double(reward_value),
            reward_probability=None if reward_probability is None else _double(reward_probability),
        )

    @classmethod
    def from_toy_text(cls, environment: ToyText, *, gamma: float = 1.0) -> FiniteMDP:
        """From the tables that FrozenLake, CliffWalking, Taxi and their like expose; without their time limit.

        A state that ends an episode on some arrivals and not on others gets a copy, numbered after the environment's
        own states, in which the former end; a policy sees both as the same.

        Args:
            environment: `environment.unwrapped` has `P[s][a] = [(probability, next state, reward, done), ...]` and
                `initial_state_distrib`.
            gamma: discount factor.

        Raises:
            ValueError: if it has not, or as the class does.
        """
        tables = read_toy_text(environment)
        return cls(**tables._asdict(), gamma=gamma)


def _double(table: Any) -> Tensor:
    return torch.as_tensor(np.array(table, dtype=np.float64))


def _start(start: Any, states: int) -> Tensor:
    """A distribution, or the one state that a number names."""
    given = np.asarray(start)
    if given.ndim:
        return _double(given)
    if given.dtype.kind not in "iu" or not 0 <= given < states:
        raise ValueError(f"start must be a state from 0 to {states - 1} or a distribution [S]; got {start}")
    return torch.eye(states, dtype=torch.float64)[int(given)]


def _terminal(terminal: Any, states: int) -> Tensor:
    """[S] bool, from that or from the numbers of the states."""
    given = np.asarray(terminal)
    if given.dtype == bool and given.shape == (states,):
        return torch.from_numpy(given.copy())
    ended = torch.zeros(states, dtype=torch.bool)
    if given.shape == (0,):
        return ended
    mixed = given.ndim == 1 and any(isinstance(entry, bool | np.bool_) for entry in terminal)
    if given.ndim != 1 or given.dtype.kind not in "iu" or mixed:
        raise ValueError(
            f"terminal must be the numbers of the terminal states, or one boolean for each of the {states} states; got "
            f"{terminal}"
        )
    outside = given[(given < 0) | (given >= states)]
    if len(outside):
        raise ValueError(f"terminal must name states from 0 to {states - 1}; got {outside.tolist()}")
    ended[torch.from_numpy(given.astype(np.int64))] = True
    return ended

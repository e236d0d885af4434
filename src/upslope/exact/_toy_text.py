"""The tables of a toy-text environment, `P[s][a] = [(probability, next state, reward, done), ...]`, as dense ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor

ToyTextTable: TypeAlias = Mapping[int, Mapping[int, Sequence[tuple[float, int, float, bool]]]]


class ToyText(Protocol):
    """An environment, or a wrapper around one, whose `unwrapped` is a `ToyTextCore`."""

    @property
    def unwrapped(self) -> object:
        """The environment itself."""
        ...


@runtime_checkable
class ToyTextCore(Protocol):
    """An environment that shows its tables."""

    P: ToyTextTable
    initial_state_distrib: np.ndarray


class Tables(NamedTuple):
    """What a `FiniteMDP` is made of."""

    transition: Tensor
    reward: Tensor
    start: Tensor
    terminal: Tensor
    observation: Tensor
    reward_value: Tensor | None
    reward_probability: Tensor | None


class _Arrival(NamedTuple):
    state: int
    action: int
    probability: float
    following: int
    reward: float


def read_toy_text(environment: ToyText) -> Tables:
    """Dense tables; a state reached both with and without `done` gets an absorbing copy after the others.

    Raises:
        ValueError: if the environment shows no tables.
    """
    core = environment.unwrapped
    if not isinstance(core, ToyTextCore):
        raise ValueError(
            f"{type(core).__name__} has no tables P and initial_state_distrib as toy-text environments do "
            "(FrozenLake, CliffWalking, Taxi): write its tables down with FiniteMDP.from_tables"
        )
    table, begin = core.P, torch.as_tensor(np.asarray(core.initial_state_distrib), dtype=torch.float64)
    arrivals, terminal, observation = _separate_ends(table, begin)
    states, actions = len(observation), len(table[0])
    transition = torch.zeros(states, actions, states, dtype=torch.float64)
    weighted = torch.zeros_like(transition)
    where = tuple(torch.tensor([arrival[i] for arrival in arrivals]) for i in (0, 1, 3))
    chance = torch.tensor([arrival.probability for arrival in arrivals], dtype=torch.float64)
    gain = torch.tensor([arrival.reward for arrival in arrivals], dtype=torch.float64)
    transition.index_put_(where, chance, accumulate=True)
    weighted.index_put_(where, chance * gain, accumulate=True)
    reward = torch.where(transition > 0, weighted / transition, 0.0)
    value, probability = _reward_distribution(arrivals, transition, reward)
    padded = torch.cat([begin, torch.zeros(states - len(begin), dtype=torch.float64)])
    return Tables(transition, reward, padded, terminal, observation, value, probability)


def _separate_ends(table: ToyTextTable, start: Tensor) -> tuple[list[_Arrival], Tensor, Tensor]:
    """Arrivals with their `done` turned into terminal states: the state itself, or its copy if life goes on there."""
    alive, waiting = set[int](), [int(s) for s in start.nonzero().flatten()]
    while waiting:
        state = waiting.pop()
        if state not in alive:
            alive.add(state)
            waiting += [x for outcomes in table[state].values() for p, x, _, done in outcomes if p > 0 and not done]
    ends = {x for s in alive for outcomes in table[s].values() for p, x, _, done in outcomes if p > 0 and done}
    number = {state: len(table) + i for i, state in enumerate(sorted(ends & alive))}
    terminal = torch.zeros(len(table) + len(number), dtype=torch.bool)
    terminal[[number.get(state, state) for state in ends]] = True
    arrivals = [
        _Arrival(int(s), int(a), float(p), int(number.get(x, x) if done else x), float(r))
        for s, choices in table.items()
        if not terminal[s]
        for a, outcomes in choices.items()
        for p, x, r, done in outcomes
        if p > 0
    ]
    return arrivals, terminal, torch.tensor([*range(len(table)), *number])


def _reward_distribution(
    arrivals: list[_Arrival], transition: Tensor, reward: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The distribution of rewards, where one transition can bring different ones; else (None, None)."""
    shares: dict[tuple[int, int, int], dict[float, float]] = {}
    for s, a, p, x, r in arrivals:
        share = shares.setdefault((s, a, x), {})
        share[r] = share.get(r, 0.0) + p
    most = max(len(share) for share in shares.values())
    if most == 1:
        return None, None
    value = reward.unsqueeze(-1).repeat(1, 1, 1, most)
    probability = torch.zeros_like(value)
    probability[..., 0] = 1.0
    for where, share in shares.items():
        count = len(share)
        value[where][:count] = torch.tensor(list(share), dtype=torch.float64)
        probability[where][:count] = torch.tensor(list(share.values()), dtype=torch.float64) / transition[where]
    return value, probability

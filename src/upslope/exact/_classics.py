"""Problems from the literature, with the answers printed there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from upslope.exact._named import NamedProblem, random_table
from upslope.exact.finite import FiniteMDP
from upslope.exact.policies import LinearPolicy, StatePolicy, TabularPolicy

BOOK = "Sutton & Barto, Reinforcement Learning: An Introduction, 2nd edition (2018)"

LEFT, RIGHT = 0, 1

CLIFF_ROWS, CLIFF_COLUMNS = 4, 12


def short_corridor() -> NamedProblem:
    """Three states that look alike, in the second of which the actions are exchanged."""
    transition, reward = _empty(4, 2)
    for state, left, right in ((0, 0, 1), (1, 2, 0), (2, 1, 3)):
        transition[state, LEFT, left] = transition[state, RIGHT, right] = 1.0
    reward[:3] = -1.0
    features = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)

    def policy(seed: int) -> StatePolicy:
        generator = torch.Generator().manual_seed(seed)
        return LinearPolicy(features, 0.5 * torch.randn(2, generator=generator, dtype=torch.float64))

    return NamedProblem(
        name="short-corridor",
        summary="three states that look alike; right is left in the second: the best policy is stochastic",
        mdp=_episodic(transition, reward, start=0, terminal=[3], observation=torch.zeros(4, dtype=torch.long)),
        policy=policy,
        published={
            "best probability of right": 2.0 - math.sqrt(2.0),
            "value of the best policy": -(6.0 + 4.0 * math.sqrt(2.0)),
            "value of right with probability 0.95": -44.0,
            "value of right with probability 0.05": -82.0,
        },
        source=f"{BOOK}, example 13.1",
    )


def random_walk_5() -> NamedProblem:
    """Five states in a row; right of the last one there is a reward of 1."""
    return NamedProblem(
        name="random-walk-5",
        summary="five states in a row, episodes end on either side, reward 1 on the right",
        mdp=_walk(5, left_reward=0.0),
        policy=random_table(7, 2, spread=0.4),
        published={f"value of state {state} of the even walk": state / 6 for state in range(1, 6)},
        source=f"{BOOK}, examples 6.2 and 7.1",
    )


def random_walk_19() -> NamedProblem:
    """Nineteen states in a row; a reward of -1 left of the first, of 1 right of the last."""
    return NamedProblem(
        name="random-walk-19",
        summary="nineteen states in a row, episodes end on either side, reward -1 on the left and 1 on the right",
        mdp=_walk(19, left_reward=-1.0),
        policy=random_table(21, 2, spread=0.4),
        published={f"value of state {state} of the even walk": (state - 10) / 10 for state in range(1, 20)},
        source=f"{BOOK}, example 7.1 and section 12.1",
    )


def cliff_walking() -> NamedProblem:
    """A grid of 4 x 12 with a cliff along the lower edge between start and goal."""
    states, width, height = CLIFF_ROWS * CLIFF_COLUMNS, CLIFF_COLUMNS, CLIFF_ROWS
    start, goal = (height - 1) * width, states - 1
    transition, reward = _empty(states, 4)
    for state in range(states):
        row, column = divmod(state, width)
        for action, (down, across) in enumerate(((-1, 0), (0, 1), (1, 0), (0, -1))):
            to_row, to_column = min(max(row + down, 0), height - 1), min(max(column + across, 0), width - 1)
            following = to_row * width + to_column
            falls = start < following < goal
            transition[state, action, start if falls else following] = 1.0
            reward[state, action] = -100.0 if falls else -1.0
    likely = torch.tensor([0.3, 0.6, -0.3, -0.3], dtype=torch.float64)

    def policy(seed: int) -> StatePolicy:
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(states, 4, generator=generator, dtype=torch.float64)
        return TabularPolicy(states, 4, likely + 0.3 * normal)

    return NamedProblem(
        name="cliff-walking",
        summary="4 x 12 grid, actions up, right, down, left; -1 a step, -100 and back to the start off the cliff",
        mdp=_episodic(transition, reward, start=start, terminal=[goal]),
        policy=policy,
        published={"return of the best path": -13.0, "return of the safest path": -17.0},
        source=f"{BOOK}, example 6.6",
    )


def baird() -> NamedProblem:
    """Seven states without reward, on which semi-gradient TD with another policy's data diverges."""
    transition = torch.zeros(7, 2, 7, dtype=torch.float64)
    transition[:, 0, :6] = 1.0 / 6.0
    transition[:, 1, 6] = 1.0
    return NamedProblem(
        name="baird",
        summary="action 0 leads to one of six states, action 1 to the seventh; no rewards, no end, gamma 0.99",
        mdp=FiniteMDP(
            transition=transition,
            reward=torch.zeros_like(transition),
            start=torch.full((7,), 1.0 / 7.0, dtype=torch.float64),
            terminal=torch.zeros(7, dtype=torch.bool),
            gamma=0.99,
        ),
        policy=random_table(7, 2),
        published={"value of every state": 0.0},
        source=f"{BOOK}, section 11.2 and example 11.2",
    )


def baird_features() -> Tensor:
    """Features of the book's linear value function, [7, 8]: 2 w_i + w_8 of the upper six, w_7 + 2 w_8 of the last."""
    features = torch.zeros(7, 8, dtype=torch.float64)
    features[:6, :6] = 2.0 * torch.eye(6, dtype=torch.float64)
    features[:6, 7] = 1.0
    features[6, 6], features[6, 7] = 1.0, 2.0
    return features


def _walk(states: int, *, left_reward: float) -> FiniteMDP:
    """States 1..n between two ends, begun in the middle."""
    transition, reward = _empty(states + 2, 2)
    for state in range(1, states + 1):
        transition[state, LEFT, state - 1] = transition[state, RIGHT, state + 1] = 1.0
    reward[1, LEFT, 0], reward[states, RIGHT, states + 1] = left_reward, 1.0
    return _episodic(transition, reward, start=(states + 1) // 2, terminal=[0, states + 1])


def _empty(states: int, actions: int) -> tuple[Tensor, Tensor]:
    table = torch.zeros(states, actions, states, dtype=torch.float64)
    return table, table.clone()


def _episodic(
    transition: Tensor, reward: Tensor, *, start: int, terminal: list[int], observation: Tensor | None = None
) -> FiniteMDP:
    """An undiscounted problem with one start."""
    ended = torch.zeros(len(transition), dtype=torch.bool)
    ended[terminal] = True
    return FiniteMDP(
        transition=transition,
        reward=reward,
        start=torch.eye(len(transition), dtype=torch.float64)[start],
        terminal=ended,
        observation=torch.arange(len(transition)) if observation is None else observation,
    )

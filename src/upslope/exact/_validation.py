"""What is wrong with the tables of a finite Markov decision process, and what to do about it."""

from __future__ import annotations

import torch
from torch import Tensor

from upslope.exact._chain import closed_classes, reachable

TOLERANCE = 1e-9
"""How far a sum of probabilities may be from 1, and an expected reward from the mean of its distribution."""
_ROUNDING = 1e-15


def normalised(table: Tensor) -> Tensor:
    """Probabilities along the last axis, their sums brought to 1 to rounding where they were within the tolerance.

    Without that a product over many steps would be off by as many times the tolerance.
    """
    total = table.sum(-1, keepdim=True)
    distance = (total - 1.0).abs()
    close = (distance > _ROUNDING) & (distance <= TOLERANCE)
    return torch.where(close, table / total, table) if bool(close.any()) else table


def check_tables(
    transition: Tensor, reward: Tensor, start: Tensor, terminal: Tensor, observation: Tensor, gamma: float
) -> None:
    """Shapes, types, finiteness and sums.

    Raises:
        ValueError: with the table, the state and the action that is wrong.
    """
    if transition.dim() != 3 or transition.shape[0] != transition.shape[2] or 0 in transition.shape:
        raise ValueError(
            f"transition must have shape [S, A, S], p(s'|s,a), with S and A at least 1; got {tuple(transition.shape)}"
        )
    states, actions, _ = transition.shape
    for name, table, shape in (
        ("reward", reward, (states, actions, states)),
        ("start", start, (states,)),
        ("terminal", terminal, (states,)),
    ):
        if table.shape != shape:
            raise ValueError(f"{name} must have shape {shape} to go with transition; got {tuple(table.shape)}")
    if observation.dim() == 0 or observation.shape[0] != states or observation.numel() == 0:
        raise ValueError(
            f"observation must have one entry for each of the {states} states, terminal ones included; got shape "
            f"{tuple(observation.shape)}"
        )
    unseen = (~observation.isfinite()).nonzero()
    if len(unseen):
        raise ValueError(f"the observation of state {int(unseen[0, 0])} is not finite: every entry must be a number")
    if terminal.dtype != torch.bool:
        raise ValueError(f"terminal must be boolean; got {terminal.dtype}: use .bool()")
    for name, table in (("transition", transition), ("reward", reward), ("start", start)):
        _check_numbers(name, table)
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1]; got {gamma}")
    _check_probabilities(transition, start, terminal)


def check_reward_distribution(transition: Tensor, reward: Tensor, value: Tensor, probability: Tensor) -> None:
    """A distribution for every possible transition, with the expected reward as its mean.

    Raises:
        ValueError: naming the transition.
    """
    if value.shape != probability.shape or value.dim() != 4 or value.shape[:3] != transition.shape:
        raise ValueError(
            f"reward_value and reward_probability must have shape [S, A, S, K] = {(*transition.shape, 'K')}; got "
            f"{tuple(value.shape)} and {tuple(probability.shape)}"
        )
    _check_numbers("reward_value", value)
    _check_numbers("reward_probability", probability)
    possible = transition > 0
    negative = (probability < 0).any(-1) & possible
    total = probability.sum(-1)
    wrong_sum = ((total - 1).abs() > TOLERANCE) & possible
    if bool((negative | wrong_sum).any()):
        s, a, x = (negative | wrong_sum).nonzero()[0].tolist()
        raise ValueError(
            f"reward_probability of the transition from state {s} with action {a} to state {x} must be probabilities "
            f"that sum to 1; got {probability[s, a, x].tolist()}"
        )
    mean = (value * probability).sum(-1)
    scale = (value.abs() * probability).sum(-1).clamp(min=1.0)
    differs = ((mean - reward).abs() > TOLERANCE * scale) & possible
    if bool(differs.any()):
        s, a, x = differs.nonzero()[0].tolist()
        raise ValueError(
            f"reward[{s}, {a}, {x}] is {float(reward[s, a, x])}, and the mean of its distribution is "
            f"{float(mean[s, a, x])}: give reward = (reward_value * reward_probability).sum(-1)"
        )


def check_episodes_end(transition: Tensor, start: Tensor, terminal: Tensor) -> None:
    """Without discount, a terminal state can be reached from wherever an episode can come.

    Raises:
        ValueError: naming the states from which none can.
    """
    adjacency = _adjacency(transition, terminal)
    visited = reachable(adjacency, start > 0)
    ends = reachable(adjacency.mT, terminal)
    stuck = (visited & ~ends).nonzero().squeeze(-1).tolist()
    if stuck:
        raise ValueError(
            f"at gamma = 1 every episode must be able to end, but from {_name(stuck)} no terminal state can be "
            "reached: mark a state as terminal, let actions lead to one, take gamma < 1, or kind='continuing'"
        )


def check_continuing(transition: Tensor, start: Tensor, terminal: Tensor) -> None:
    """Nothing terminates, and from every state that can be reached every other can be.

    Raises:
        ValueError: naming the terminal states or the classes of states.
    """
    ended = terminal.nonzero().squeeze(-1).tolist()
    if ended:
        raise ValueError(
            f"a continuing problem has no terminal states, but {_name(ended)} {'is' if len(ended) == 1 else 'are'}: "
            "let them lead back to the start, or take kind='episodic'"
        )
    adjacency = _adjacency(transition, terminal)
    visited = reachable(adjacency, start > 0)
    closed = closed_classes(adjacency, visited)
    transient = visited.clone()
    for members in closed:
        transient[members] = False
    if len(closed) > 1 or bool(transient.any()):
        parts = "; ".join(_name(members.tolist()) for members in closed)
        passing = transient.nonzero().squeeze(-1).tolist()
        never = f"; never to come back to: {_name(passing)}" if passing else ""
        raise ValueError(
            "in a continuing problem every state must be reachable from every other that the start can lead to; "
            f"here the chain ends up for good in: {parts}{never}. Add a way back, or start inside one of these classes"
        )


def _adjacency(transition: Tensor, terminal: Tensor) -> Tensor:
    return (transition > 0).any(1) & ~terminal.unsqueeze(-1)


def _check_numbers(name: str, table: Tensor) -> None:
    if table.dtype != torch.float64:
        raise ValueError(
            f"{name} must be float64; got {table.dtype}: FiniteMDP.from_tables converts lists and arrays, "
            ".to(torch.float64) a tensor"
        )
    finite = table.isfinite()
    if not bool(finite.all()):
        where = (~finite).nonzero()[0].tolist()
        raise ValueError(f"{name}{where} is {float(table[tuple(where)])}: every entry must be a finite number")


def _check_probabilities(transition: Tensor, start: Tensor, terminal: Tensor) -> None:
    going = ~terminal
    negative = (transition < 0) & going[:, None, None]
    if bool(negative.any()):
        s, a, x = negative.nonzero()[0].tolist()
        raise ValueError(f"transition[{s}, {a}, {x}] is {float(transition[s, a, x])}: a probability cannot be negative")
    total = transition.sum(-1)
    wrong = ((total - 1).abs() > TOLERANCE) & going.unsqueeze(-1)
    if bool(wrong.any()):
        s, a = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"the probabilities of what follows state {s} with action {a} must sum to 1; they sum to "
            f"{float(total[s, a]):.12g}: correct transition[{s}, {a}], or mark state {s} as terminal"
        )
    if bool((start < 0).any()):
        s = int((start < 0).nonzero()[0])
        raise ValueError(f"start[{s}] is {float(start[s])}: a probability cannot be negative")
    if abs(float(start.sum()) - 1.0) > TOLERANCE:
        raise ValueError(f"the start distribution must sum to 1; it sums to {float(start.sum()):.12g}")
    ended = (terminal & (start > 0)).nonzero().squeeze(-1).tolist()
    if ended:
        raise ValueError(f"an episode cannot start in a terminal state, but start gives {_name(ended)} a probability")


def _name(states: list[int]) -> str:
    shown = ", ".join(str(state) for state in states[:10]) + (", ..." if len(states) > 10 else "")
    return f"state {shown}" if len(states) == 1 else f"states {shown}"

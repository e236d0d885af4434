"""Problems without end, from the literature: Sutton & Barto, 2nd edition (2018), example 10.2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from upslope.exact._named import NamedProblem, random_table
from upslope.exact.finite import FiniteMDP

SERVERS, FREED, PRIORITIES = 10, 0.06, (1.0, 2.0, 4.0, 8.0)
REJECT, ACCEPT = 0, 1


def access_control() -> NamedProblem:
    """Customers of four priorities queue for ten servers; each is accepted for its priority, or sent away.

    State free * 4 + priority: how many servers are free, and who is at the head of the queue. A customer accepted takes
    a free server; where none is free nobody is accepted, whatever was chosen. Each busy server, that of a customer just
    accepted included, is then freed with probability 0.06, and the next customer comes, of any priority alike.
    """
    kinds = len(PRIORITIES)
    states = (SERVERS + 1) * kinds
    transition = torch.zeros(states, 2, states, dtype=torch.float64)
    reward = torch.zeros_like(transition)
    for free in range(SERVERS + 1):
        for kind, priority in enumerate(PRIORITIES):
            for action in (REJECT, ACCEPT):
                taken = action == ACCEPT and free > 0
                transition[free * kinds + kind, action] = _afterwards(free - taken) / kinds
                reward[free * kinds + kind, action] = priority if taken else 0.0
    return NamedProblem(
        name="access-control",
        summary="customers of priority 1, 2, 4 or 8 queue for ten servers, for ever: accept or reject; average reward",
        mdp=FiniteMDP(
            transition=transition,
            reward=reward,
            start=torch.eye(states, dtype=torch.float64)[SERVERS * kinds :].mean(0),
            terminal=torch.zeros(states, dtype=torch.bool),
            kind="continuing",
        ),
        policy=random_table(states, 2),
    )


def _afterwards(free: int) -> Tensor:
    """[S] how likely each number of free servers is in the next step, repeated for every priority."""
    busy = SERVERS - free
    chance = torch.zeros(SERVERS + 1, dtype=torch.float64)
    for freed in range(busy + 1):
        chance[free + freed] = math.comb(busy, freed) * FREED**freed * (1.0 - FREED) ** (busy - freed)
    return chance.repeat_interleave(len(PRIORITIES))

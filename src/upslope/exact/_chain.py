"""Which states of a chain can be reached from which."""

from __future__ import annotations

import torch
from torch import Tensor


def reachable(adjacency: Tensor, begin: Tensor) -> Tensor:
    """[S] bool: the states of `begin` and those that can be reached from them.

    Args:
        adjacency: [S, S] bool, whether a step can lead from the row's state to the column's.
        begin: [S] bool.
    """
    steps = adjacency.to(torch.float32)
    seen = frontier = begin
    while bool(frontier.any()):
        frontier = ((frontier.to(torch.float32) @ steps) > 0) & ~seen
        seen = seen | frontier
    return seen


def closed_classes(adjacency: Tensor, among: Tensor) -> list[Tensor]:
    """The classes of states that reach each other and nothing else, as sorted [n] indices.

    Args:
        adjacency: [S, S] bool.
        among: [S] bool, the states looked at; no step leads out of them but to states that count as an end.
    """
    states = among.nonzero().squeeze(-1)
    if len(states) == 0:
        return []
    inner = adjacency[states][:, states]
    ends = (adjacency[states] & ~among).any(-1)
    reach = inner | torch.eye(len(states), dtype=torch.bool)
    covered = 1
    while covered < len(states):
        single = reach.to(torch.float32)
        reach, covered = (single @ single) > 0, 2 * covered
    open_ended = (reach & ends).any(-1)
    mutual = reach & reach.mT
    closed = (reach == mutual).all(-1) & ~open_ended
    left = closed.clone()
    classes: list[Tensor] = []
    while bool(left.any()):
        members = mutual[int(left.nonzero()[0])]
        classes.append(states[members])
        left = left & ~members
    return classes

"""What a named problem is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from upslope.exact.finite import FiniteMDP
from upslope.exact.policies import StatePolicy, TabularPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedProblem:
    """A problem that has a name, with a policy to look at it by.

    Attributes:
        name: what to ask for.
        summary: one line.
        mdp: the problem.
        limit: after how many steps episodes are truncated; None never does.
        policy: seed -> a policy with no symmetry that could hide a mistake; its critic is all zeros.
        published: known answers by name.
        source: where problem and answers come from.
    """

    name: str
    summary: str
    mdp: FiniteMDP
    policy: Callable[[int], StatePolicy]
    limit: int | None = None
    published: Mapping[str, float] = field(default_factory=dict[str, float])
    source: str = ""


def random_table(states: int, actions: int, *, spread: float = 0.7) -> Callable[[int], StatePolicy]:
    """Seed -> a table of normally distributed preferences with this standard deviation."""

    def build(seed: int) -> StatePolicy:
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(states, actions, generator=generator, dtype=torch.float64)
        return TabularPolicy(states, actions, spread * normal)

    return build

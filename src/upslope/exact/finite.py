"""Finite Markov decision processes given by their tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

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
        """Let a policy see the state's number where nothing else is said."""
        if self.observation.numel() == 0:
            object.__setattr__(self, "observation", torch.arange(self.states))

    @property
    def states(self) -> int:
        """S."""
        return self.transition.shape[0]

    @property
    def actions(self) -> int:
        """A."""
        return self.transition.shape[1]

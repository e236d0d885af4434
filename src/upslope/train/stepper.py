"""Who moves the parameters: what a step of learning asks of an optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class Stepper(Protocol):
    """Who moves the parameters by the gradients that lie in them."""

    @property
    def micro_batches(self) -> int:
        """Pieces per optimiser step; does not change the gradient."""
        ...

    def zero_gradient(self) -> None:
        """Clear the gradient before the backward passes of one step."""
        ...

    def step(self, learning_rate: float) -> float:
        """Use the gradient; returns its norm."""
        ...

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What it moves."""
        ...

    def step_by(self, move: Callable[[], None]) -> float:
        """Let `move` move the parameters by the gradient, without any moments or clipping; returns its norm."""
        ...

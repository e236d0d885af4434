"""One optimiser step on one flat buffer.

All trainable parameters become views into a single tensor, and their gradients likewise, so that clearing, measuring,
clipping and stepping are one call each however many layers there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, final

import torch
from torch import nn

from upslope.train.config import OptimizerConfig
from upslope.trajectory import Tree


class NonFiniteGradientError(RuntimeError):
    """Too many optimiser steps in a row had a gradient that was not finite."""


class FlatOptimizer:
    """Adam, AdamW, RMSprop or SGD of `torch.optim` over the flattened parameters of a module.

    The parameters of the module are re-pointed into the flat buffer, which must not be undone afterwards (by moving
    the module to another device, say).

    Args:
        module: whose parameters are trained.
        config: kind, learning rate, clipping.

    Raises:
        ValueError: if the module has no trainable parameter, or they differ in type or device.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig) -> None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("the policy has no trainable parameters")
        if len({(parameter.dtype, parameter.device) for parameter in parameters}) != 1:
            raise ValueError("all trainable parameters must have one type and one device")
        self.config = config
        self.skipped = 0
        self.unmoved = 0
        self.held: torch.Tensor | None = None
        self.flat = nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
        self.gradient = torch.zeros_like(self.flat)
        self.flat.grad = self.gradient
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.data = self.flat.data[start:end].view(parameter.shape)
            parameter.grad = self.gradient[start:end].view(parameter.shape)
            start = end
        self.parameters = tuple(parameters)
        self._optimizer = _build(self.flat, config)

    @property
    def micro_batches(self) -> int:
        """Pieces per optimiser step, as configured."""
        return self.config.micro_batches

    def zero_gradient(self) -> None:
        """Clear the gradient before the backward passes of one step."""
        self.gradient.zero_()

    def step(self, learning_rate: float) -> float:
        """Clip and take one step; a gradient that is not finite is skipped and counted.

        Where `held` is set, [parameters] bool, the parameters that it marks have no gradient.

        Args:
            learning_rate: for this step.

        Returns:
            The gradient's norm before clipping.

        Raises:
            NonFiniteGradientError: after `max_skipped` skipped steps in a row.
        """
        norm = self._norm()
        self.skipped = self._in_a_row(self.skipped, norm)
        if self.skipped:
            return norm
        limit = self.config.max_gradient_norm
        if limit is not None and limit < norm + 1e-6:
            self.gradient.mul_(limit / (norm + 1e-6))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        return norm

    def step_by(self, move: Callable[[], None]) -> float:
        """Let `move` move the parameters by the gradient, without any moments or clipping.

        Where `held` is set, the parameters that it marks have no gradient; one that is not finite is skipped, and
        counted apart from those of `step`.

        Args:
            move: reads the gradients of the parameters and moves these in place.

        Returns:
            The gradient's norm.

        Raises:
            NonFiniteGradientError: after `max_skipped` skipped moves in a row.
        """
        norm = self._norm()
        self.unmoved = self._in_a_row(self.unmoved, norm)
        if not self.unmoved:
            move()
        return norm

    def _norm(self) -> float:
        """Of the gradient, without what is held."""
        if self.held is not None:
            self.gradient.masked_fill_(self.held, 0.0)
        return float(torch.linalg.vector_norm(self.gradient))

    def _in_a_row(self, before: int, norm: float) -> int:
        """How many gradients in a row were not finite, with this one."""
        skipped = 0 if norm < float("inf") else before + 1
        if skipped >= self.config.max_skipped:
            raise NonFiniteGradientError(
                f"the gradient was not finite in {skipped} optimiser steps in a row (norm {norm}); lower the "
                "learning rate, or look at the rewards and observations of the last rollout"
            )
        return skipped

    def restart(self) -> None:
        """Forget the moments, as though no step had been taken."""
        self._optimizer.state.clear()

    def state(self) -> Tree:
        """The moments and counters, for a checkpoint."""
        moments = self._optimizer.state[self.flat]
        kept = {name: value.clone() for name, value in moments.items()}
        return {"skipped": self.skipped, "unmoved": self.unmoved, "moments": kept}

    def load_state(self, tree: Tree) -> None:
        """Go on from `state()`."""
        self.skipped, self.unmoved = tree["skipped"], tree["unmoved"]
        self._optimizer.state[self.flat] = {
            name: value.to(self.flat.device if value.dim() else value.device).clone()
            for name, value in tree["moments"].items()
        }


@final
class _RMSprop:
    """`torch.optim.RMSprop` of one tensor, number for number, without what that does for many of any kind.

        v <- decay v + (1 - decay) g^2,  theta <- theta - learning rate * g / (sqrt(v) + epsilon)

    In tiny updates, such as those of A2C, the preparations took longer than the step.
    """

    def __init__(self, flat: nn.Parameter, config: OptimizerConfig) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": config.learning_rate}]
        self.state: defaultdict[torch.Tensor, dict[str, torch.Tensor]] = defaultdict(dict)
        self._flat, self._decay, self._epsilon = flat, config.decay, config.epsilon

    @torch.no_grad()
    def step(self) -> None:
        flat, gradient, moments = self._flat, self._flat.grad, self.state[self._flat]
        assert gradient is not None
        if not moments:
            moments["square_avg"] = torch.zeros_like(flat)
        square = moments["square_avg"].mul_(self._decay).addcmul_(gradient, gradient, value=1.0 - self._decay)
        flat.addcdiv_(gradient, square.sqrt().add_(self._epsilon), value=-self.param_groups[0]["lr"])


def _build(flat: nn.Parameter, config: OptimizerConfig) -> torch.optim.Optimizer | _RMSprop:
    if config.kind == "adam":
        return torch.optim.Adam([flat], lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)
    if config.kind == "adamw":
        return torch.optim.AdamW(
            [flat],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
    if config.kind == "rmsprop":
        return _RMSprop(flat, config)
    return torch.optim.SGD([flat], lr=config.learning_rate, momentum=config.momentum)

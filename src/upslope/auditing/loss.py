"""A loss of the user's own, trajectories in, loss out, as something that can be audited.

A loss is a plain function that returns the scalar to minimise. What it asks for by the names of its parameters, it gets
(`B` rows, `T` positions):

| name | shape | what |
|---|---|---|
| `trajectory` | | the whole `upslope.Trajectory` |
| `evaluation` | | the policy's `Evaluation` of it, differentiable |
| `log_prob` | [B, T] | l_t of the actions taken, differentiable; also where `mask` is False |
| `entropy` | [B, T] | of the policy at each position, exact and differentiable |
| `value` | [B, T] | the critic V_t, differentiable in the critic's parameters |
| `next_value` | [B, T] | V'_t at what really followed: 0 after termination, the final state where cut; no gradient |
| `reward` | [B, T] | r_t |
| `mask` | [B, T] bool | the policy chose this action and it counts |
| `action` | [B, T] | what was chosen |
| `observation` | [B, T, ...] | what the policy saw |
| `terminated` | [B, T] bool | the step ended in a terminal state |
| `truncated` | [B, T] bool | a time or length limit stopped here |
| `cut` | [B, T] bool | nothing of this row follows |
| `time` | [B, T] int64 | decisions since the trajectory's start |
| `group` | [B] int64 | rows that share a prompt |
| `behaviour_log_prob` | [B, T] | of the policy that acted; 0 where `mask` is False in rows of tokens |
| `reference_log_prob` | [B, T] | of a frozen reference policy, no gradient; on completion problems only |
| `gamma` | float | the discount factor of the problem |

A parameter with a default that is not in the list keeps its default.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from upslope.errors import UsageError
from upslope.trajectory import Evaluation, Policy, Trajectory
from upslope.user_code import function_from_file

LossFunction: TypeAlias = Callable[..., Tensor]
"""Parameters by the names of the table above; returns the scalar to minimise."""


def load_loss(place: str) -> LossFunction:
    """A loss from a file: `path/to/my_file.py:my_loss`. The file is the user's own code and is run.

    Raises:
        UsageError: if there is no such file or function, or it asks for what no audit can give.
    """
    if ":" not in place:
        raise UsageError(f"{place!r} names no function: a loss of your own is given as path/to/file.py:function")
    function = function_from_file(place, what="loss")
    asked_for(function)
    return function


def asked_for(function: LossFunction) -> tuple[str, ...]:
    """The names a loss will be given.

    Raises:
        UsageError: if it is no function, needs a name that is not in the table, or hides what it needs.
    """
    if not callable(function):
        raise UsageError(
            f"a loss is a function, and this is {function!r:.80}, a {type(function).__name__}: give the function "
            "itself; upslope.auditing.loss.load_loss('path/to/file.py:function') gets one from a file"
        )
    name = _name(function)
    wanted: list[str] = []
    for parameter in _signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise UsageError(
                f"{name} takes {parameter}: a loss gets what it asks for by name, so give it plain parameters such as "
                "log_prob, reward, mask"
            )
        if parameter.name in NAMES:
            wanted.append(parameter.name)
        elif parameter.default is parameter.empty:
            close = difflib.get_close_matches(parameter.name, NAMES, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UsageError(
                f"{name} asks for {parameter.name!r}, which no audit has: {hint}A loss can ask for "
                f"{', '.join(NAMES)}; give a parameter of its own a default"
            )
    return tuple(wanted)


def _signature(function: LossFunction) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except ValueError as error:
        raise UsageError(
            f"{_name(function)} does not say what its parameters are called: wrap it in a function of your own that "
            "asks for log_prob, reward, mask"
        ) from error


def _name(function: LossFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)


@dataclass(frozen=True, slots=True)
class LossSource:
    """The ascent direction of a user's loss: minus its gradient.

    Attributes:
        function: the loss.
        gamma: what it gets under that name.
        reference: whose log-probs it gets as `reference_log_prob`; None where the problem has no reference policy.

    Raises:
        UsageError: if the function asks for what no audit can give.
    """

    function: LossFunction
    gamma: float = 1.0
    reference: Policy | None = None

    def __post_init__(self) -> None:
        """Look at what it asks for."""
        asked_for(self.function)

    @property
    def name(self) -> str:
        """Of the function."""
        return _name(self.function)

    def ascent(self, policy: Policy, parameters: Sequence[nn.Parameter], trajectory: Trajectory) -> Tensor:
        """[P] minus the gradient of the loss of this batch; 0 for parameters it does not depend on.

        Raises:
            UsageError: if the loss reads what the problem lacks, is no finite real scalar with a gradient, or
                differentiates itself.
        """
        given = _Given(self, policy, trajectory)
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            with torch.enable_grad():
                loss: Any = self.function(**{name: NAMES[name](given) for name in asked_for(self.function)})
                if any(parameter.grad is not None for parameter in parameters):
                    raise UsageError(self._differentiates)
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
        self._check(loss, trajectory)
        ascent = -self._gradient(loss, parameters)
        if not bool(ascent.isfinite().all()):
            raise UsageError(
                f"the gradient of {self.name} is not finite, though its value {float(loss.detach())} is, "
                f"{_where(trajectory)}: look for a square root or a division that is near 0 there"
            )
        return ascent

    @property
    def _differentiates(self) -> str:
        return (
            f"{self.name} differentiates by itself (backward or torch.autograd.grad): return the loss and leave that "
            "to the audit"
        )

    def _gradient(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        try:
            parts = torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise UsageError(self._differentiates) from error
        return torch.cat([part.reshape(-1) for part in parts])

    def _check(self, loss: Any, trajectory: Trajectory) -> None:
        name = self.name
        if not isinstance(loss, Tensor):
            raise UsageError(f"{name} returned {loss!r:.80}, a {type(loss).__name__}: return a scalar tensor, the loss")
        if loss.numel() != 1:
            raise UsageError(
                f"{name} returned a tensor of shape {list(loss.shape)}: return one number, such as its sum or mean"
            )
        if not loss.is_floating_point():
            kind = str(loss.dtype).removeprefix("torch.")
            raise UsageError(
                f"{name} returned a tensor of type {kind}: a loss is a real number, of type float32 or float64; "
                + ("take its real part" if loss.is_complex() else "whole numbers have no gradient")
            )
        if not math.isfinite(float(loss.detach())):
            raise UsageError(f"{name} returned {float(loss.detach())} {_where(trajectory)}: a loss must be finite")
        if not loss.requires_grad:
            raise UsageError(
                f"{name} returned a number without gradient: compute it from log_prob (or evaluation, entropy), and "
                "detach nothing that the gradient must pass through"
            )


class _Given:
    """What a loss may ask for, computed when it does."""

    def __init__(self, source: LossSource, policy: Policy, trajectory: Trajectory) -> None:
        self.source, self.policy, self.trajectory = source, policy, trajectory

    @cached_property
    def evaluation(self) -> Evaluation:
        return self.policy.evaluate(self.trajectory)

    def value(self) -> Tensor:
        value = self.evaluation.value
        if value is None:
            raise UsageError(f"{self.source.name} asks for value, and the policy has no critic: audit it with one")
        return value

    def next_value(self) -> Tensor:
        self.value()
        with torch.no_grad():
            return self.policy.values(self.trajectory)[1]

    def group(self) -> Tensor:
        if self.trajectory.group is None:
            raise UsageError(
                f"{self.source.name} asks for group, and no rows of this problem belong together: audit it on a "
                "completion problem, such as tokens, with groups of 2 completions or more"
            )
        return self.trajectory.group

    def reference_log_prob(self) -> Tensor:
        if self.source.reference is None:
            raise UsageError(
                f"{self.source.name} asks for reference_log_prob, and this problem has no reference policy: audit it "
                "on a completion problem, such as tokens"
            )
        with torch.no_grad():
            return self.source.reference.log_prob(self.trajectory.observation, self.trajectory.action)


def _where(trajectory: Trajectory) -> str:
    """Which batch this is, for error messages."""
    rewards = [round(total, 6) for total in trajectory.reward.sum(-1).tolist()]
    lengths = trajectory.mask.sum(-1).tolist()
    return f"for rows with total rewards {rewards[:8]} and {lengths[:8]} chosen steps"


NAMES: Mapping[str, Callable[[_Given], Any]] = {
    "trajectory": lambda given: given.trajectory,
    "evaluation": lambda given: given.evaluation,
    "log_prob": lambda given: given.evaluation.log_prob,
    "entropy": lambda given: given.evaluation.entropy,
    "value": _Given.value,
    "next_value": _Given.next_value,
    "reward": lambda given: given.trajectory.reward,
    "mask": lambda given: given.trajectory.mask,
    "action": lambda given: given.trajectory.action,
    "observation": lambda given: given.trajectory.observation,
    "terminated": lambda given: given.trajectory.terminated,
    "truncated": lambda given: given.trajectory.truncated,
    "cut": lambda given: given.trajectory.cut,
    "time": lambda given: given.trajectory.time,
    "group": _Given.group,
    "behaviour_log_prob": lambda given: given.trajectory.behaviour_log_prob,
    "reference_log_prob": _Given.reference_log_prob,
    "gamma": lambda given: given.source.gamma,
}
"""What a loss can ask for, and where it comes from."""

"""The gradient that the code under audit computes for one batch: the training step itself, or a user's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from upslope.algorithms import Algorithm, Now
from upslope.streams import Purpose, stream
from upslope.train.step import learn
from upslope.trajectory import Policy, Trajectory


class Source(Protocol):
    """Anything that turns a batch into an ascent direction."""

    def ascent(self, policy: Policy, parameters: Sequence[nn.Parameter], trajectory: Trajectory) -> Tensor:
        """[P] the direction in which this batch moves the parameters, flat, before any optimiser; moves nothing."""
        ...


class Recorder:
    """Stands where the optimiser stands in `upslope.train.step.learn`: keeps each gradient and moves nothing.

    Args:
        parameters: whose gradients are kept, flat and in this order.
        micro_batches: pieces per optimiser step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, micro_batches: int = 1) -> None:
        self.parameters = tuple(parameters)
        self.ascents: list[Tensor] = []
        self._micro_batches = micro_batches

    @property
    def micro_batches(self) -> int:
        """Pieces per optimiser step."""
        return self._micro_batches

    def zero_gradient(self) -> None:
        """Clear the gradient before the backward passes of one step."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, learning_rate: float) -> float:
        """Keep minus the gradient; returns its norm."""
        ascent = torch.cat(
            [torch.zeros(p.numel(), dtype=p.dtype) if p.grad is None else -p.grad.reshape(-1) for p in self.parameters]
        )
        self.ascents.append(ascent)
        return float(ascent.norm())

    def step_by(self, move: Callable[[], None]) -> float:
        """Keep minus the gradient, and leave the step to itself; returns its norm."""
        return self.step(0.0)


@dataclass(slots=True)
class AlgorithmSource:
    """An algorithm, through the training step: advantage, weights, loss, minibatches, micro-batches, passes.

    Attributes:
        algorithm: under audit.
        micro_batches: pieces per optimiser step.
        seed: of the shuffling into minibatches, which is another one for each batch.
        reference: the frozen policy that the algorithm stays close to, where it asks for one.
        batches: how many it has seen.
    """

    algorithm: Algorithm
    micro_batches: int = 1
    seed: int = 0
    reference: Policy | None = None
    batches: int = field(default=0, init=False)

    def ascent(self, policy: Policy, parameters: Sequence[nn.Parameter], trajectory: Trajectory) -> Tensor:
        """The mean over the update's optimiser steps, all at the same parameters; 0 where it stops before the first."""
        recorder = Recorder(parameters, micro_batches=self.micro_batches)
        learn(
            policy,
            self.algorithm,
            recorder,
            trajectory,
            now=Now(state=self.algorithm.initial_state()),
            learning_rate=0.0,
            generator=self._generator(),
            reference=self.reference,
        )
        self.batches += 1
        if len(recorder.ascents) == 1:
            return recorder.ascents[0]
        if not recorder.ascents:
            return torch.cat([torch.zeros(p.numel(), dtype=p.dtype) for p in parameters])
        return torch.stack(recorder.ascents).mean(0)

    def _generator(self) -> np.random.Generator:
        if self.algorithm.passes.minibatches == 1:
            return _UNUSED
        return stream(self.seed, Purpose.SHUFFLE, self.batches)


_UNUSED = np.random.Generator(np.random.Philox(0))

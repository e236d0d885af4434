"""The gradient that the code under audit computes for one batch: the training step itself, or a user's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from upslope.algorithms import Algorithm, Now, Traces
from upslope.algorithms.protocol import State
from upslope.streams import Purpose, stream
from upslope.train.step import learn
from upslope.train.traces import TraceLearner
from upslope.trajectory import Observation, Policy, Trajectory, Tree, map_observation


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

    def state(self) -> Tree:
        """Nothing is carried."""
        return None

    def load_state(self, tree: Tree) -> None:
        """Nothing is carried."""

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
        state: its carried numbers; those before the first update if None.
        batches: how many it has seen.
    """

    algorithm: Algorithm
    micro_batches: int = 1
    seed: int = 0
    reference: Policy | None = None
    state: State | None = None
    batches: int = field(default=0, init=False)

    def ascent(self, policy: Policy, parameters: Sequence[nn.Parameter], trajectory: Trajectory) -> Tensor:
        """The mean over the update's optimiser steps, all at the same parameters; 0 where it stops before the first."""
        recorder = Recorder(parameters, micro_batches=self.micro_batches)
        learn(
            policy,
            self.algorithm,
            recorder,
            trajectory,
            now=Now(state=self.algorithm.initial_state() if self.state is None else self.state),
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


@dataclass(frozen=True, slots=True)
class TraceSource:
    """An algorithm with eligibility traces, through the learner that follows them, step by step with nothing moved.

    Of episodes it is the sum over their steps, of a task without end the mean.

    Attributes:
        algorithm: under audit.
        state: its carried numbers.
    """

    algorithm: Algorithm
    state: State

    def ascent(self, policy: Policy, parameters: Sequence[nn.Parameter], trajectory: Trajectory) -> Tensor:
        """[P] what the steps of the batch, one after the other, add up to for the actor."""
        recorder = Recorder(parameters)
        own = {id(parameter) for parameter in parameters}
        others = [p for p in _module(policy).parameters() if p.requires_grad and id(p) not in own]
        self.follow(TraceLearner(policy, self.algorithm, recorder, actor=parameters, critic=others), trajectory)
        total = torch.stack(recorder.ascents).sum(0)
        rule = self.algorithm.passes.rule
        assert isinstance(rule, Traces)
        return total if rule.average_reward_ratio is None else total / trajectory.shape[1]

    def follow(self, learner: TraceLearner, trajectory: Trajectory) -> None:
        """Let a learner see one step after the other."""
        for step in single_steps(trajectory):
            learner.learn(step, now=Now(state=self.state), learning_rate=0.0)


def single_steps(trajectory: Trajectory) -> Iterator[Trajectory]:
    """The positions of [B, T] one after the other, as [B, 1] with what followed each step that did not terminate."""
    positions = trajectory.shape[1]
    ends = {int(place): entry for entry, place in enumerate(trajectory.final_index)}
    for position in range(positions):
        here = slice(position, position + 1)
        open_rows = (~trajectory.terminated[:, position]).nonzero().squeeze(-1)
        following = [_following(trajectory, int(row), position, ends) for row in open_rows]
        yield replace(
            trajectory,
            observation=map_observation(lambda t, here=here: t[:, here], trajectory.observation),
            action=trajectory.action[:, here],
            reward=trajectory.reward[:, here],
            terminated=trajectory.terminated[:, here],
            truncated=trajectory.truncated[:, here],
            mask=trajectory.mask[:, here],
            behaviour_log_prob=trajectory.behaviour_log_prob[:, here],
            time=trajectory.time[:, here],
            final_observation=_stacked(following, trajectory.final_observation),
            final_index=open_rows,
        )


def _following(trajectory: Trajectory, row: int, position: int, ends: dict[int, int]) -> Observation:
    """What was seen after a step; where nothing was chosen, anything."""
    positions = trajectory.shape[1]
    entry = ends.get(row * positions + position)
    if entry is not None:
        return map_observation(lambda t: t[entry], trajectory.final_observation)
    return map_observation(lambda t: t[row, min(position + 1, positions - 1)], trajectory.observation)


def _stacked(observations: list[Observation], like: Observation) -> Observation:
    if not observations:
        return map_observation(lambda t: t[:0], like)
    if isinstance(like, dict):
        return {name: torch.stack([each[name] for each in observations if isinstance(each, dict)]) for name in like}
    return torch.stack([each for each in observations if isinstance(each, Tensor)])


def _module(policy: Policy) -> nn.Module:
    assert isinstance(policy, nn.Module)
    return policy


_UNUSED = np.random.Generator(np.random.Philox(0))

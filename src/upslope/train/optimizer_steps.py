"""The optimiser steps of one update: passes over a batch, minibatch by minibatch. Knows no algorithm by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from upslope.algorithms.protocol import Algorithm, NaturalStep, Now, Passes
from upslope.diagnostics import Meter
from upslope.estimators import k3
from upslope.streams import Shuffler
from upslope.train.batches import chosen_steps, cut_minibatches, micro_batches, select_units
from upslope.train.natural import natural_update
from upslope.train.stepper import Stepper
from upslope.trajectory import Batch, Evaluation, Policy


@dataclass(frozen=True, slots=True)
class OptimizerSteps:
    """Who takes the optimiser steps of one update, by whose formulas.

    Attributes:
        policy: evaluated, and moved through the optimiser.
        algorithm: whose loss is followed.
        optimizer: takes the steps.
        passes: the algorithm's, with no more minibatches than there are rows.
        now: progress of the run and the algorithm's carried numbers.
        learning_rate: for every step.
        generator: shuffles the steps of each pass.
        meter: watches, if there is one.
        seen: what the policy says of the only step's batch; None where each piece is evaluated as it comes.
        totals: what the steps report.
    """

    policy: Policy
    algorithm: Algorithm
    optimizer: Stepper
    passes: Passes
    now: Now
    learning_rate: float
    generator: Shuffler
    meter: Meter | None
    seen: Evaluation | None
    totals: Totals

    def over(self, batch: Batch, epoch: int) -> bool:
        """One pass over a batch, the `epoch`-th; whether the KL divergence from who acted lets another one follow."""
        passes = self.passes
        for minibatch in cut_minibatches(batch, passes, self.generator):
            if not bool(minibatch.mask.any()):
                continue
            minibatch = self._prepared(minibatch)
            self._differentiate(minibatch)
            if self.meter is not None:
                self.meter.differentiated(minibatch, epoch)
            if passes.kl_stop == "before_step" and self.totals.kl_beyond(passes.target_kl, 1.5):
                return False
            self._move(minibatch)
        return not (passes.kl_stop == "after_epoch" and self.totals.kl_beyond(passes.target_kl))

    def _prepared(self, minibatch: Batch) -> Batch:
        """Weights and advantages of one optimiser step; rows stay whole only where policy or loss needs them."""
        minibatch = self.algorithm.prepare(minibatch)
        rows = self.policy.sequential or self.passes.whole_rows
        return chosen_steps(minibatch) if minibatch.mask.dim() > 1 and not rows else minibatch

    def _differentiate(self, minibatch: Batch) -> None:
        """Leave the gradient of one optimiser step where the optimiser looks for it."""
        self.optimizer.zero_gradient()
        metrics: dict[str, Tensor] = {}
        for piece in micro_batches(minibatch, self.optimizer.micro_batches, self.passes.together):
            evaluation = self.policy.evaluate(piece) if self.seen is None else self.seen
            if self.totals.measure_mismatch:
                apart = _mismatch(piece, evaluation.log_prob)
                metrics["mismatch"] = torch.maximum(metrics["mismatch"], apart) if "mismatch" in metrics else apart
            if self.meter is not None:
                self.meter.evaluated(piece, evaluation)
            loss = self.algorithm.loss(piece, evaluation, self.now)
            for name, part_of_it in loss.metrics.items():
                metrics[name] = metrics[name] + part_of_it if name in metrics else part_of_it
            if self.passes.target_kl is not None and "kl" not in loss.metrics:
                metrics["kl"] = metrics.get("kl", 0.0) + _kl(piece, evaluation.log_prob)
            loss.value.backward()
        self.totals.add(metrics)

    def _move(self, minibatch: Batch) -> None:
        """Use the gradient that lies in the parameters: the optimiser's step, or a natural one."""
        rule = self.passes.rule
        if not isinstance(rule, NaturalStep):
            self.totals.moved(self.optimizer.step(self.learning_rate), {})
            return
        cut = replace(self.passes, minibatches=min(rule.critic_minibatches, len(minibatch.mask)))
        norm, metrics = natural_update(
            self.policy,
            self.algorithm,
            self.optimizer,
            minibatch,
            self.now,
            learning_rate=self.learning_rate,
            first=select_units(minibatch, slice(0, 1)),
            pieces=partial(micro_batches, parts=self.optimizer.micro_batches, together=self.passes.together),
            minibatches=partial(cut_minibatches, passes=cut, generator=self.generator),
        )
        self.totals.moved(norm, metrics)


@torch.no_grad()
def _kl(piece: Batch, log_prob: Tensor) -> Tensor:
    """What these steps bring to the k3 estimate of KL(old || new), for losses that stop at one and do not report it."""
    estimate = k3(piece.behaviour_log_prob, log_prob)[piece.mask]
    return estimate.sum() * (piece.share / max(estimate.numel(), 1))


@torch.no_grad()
def _mismatch(piece: Batch, log_prob: Tensor) -> Tensor:
    """max |l - b|: how far what generated and what learns are apart before anything moved."""
    return torch.where(piece.mask, log_prob - piece.behaviour_log_prob, 0.0).abs().max()


class Totals:
    """Metrics of the optimiser steps of one update, turned into numbers once at the end.

    Args:
        measure_mismatch: whether the first step is to say how far what generated and what learns are apart.
    """

    def __init__(self, *, measure_mismatch: bool) -> None:
        self.measure_mismatch = measure_mismatch
        self._steps: list[dict[str, Tensor]] = []
        self._norms: list[float] = []
        self._of_last: dict[str, float] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """What the loss of one optimiser step reports."""
        self.measure_mismatch = False
        self._steps.append(metrics)

    def moved(self, norm: float, of_step: dict[str, float]) -> None:
        """The parameters have moved by a gradient of this norm; what the step says of itself."""
        self._norms.append(norm)
        self._of_last = of_step

    def kl_beyond(self, target: float | None, factor: float = 1.0) -> bool:
        """Whether the last loss reported more than so much, if there is a target."""
        return target is not None and bool(self._steps) and float(self._steps[-1]["kl"]) > factor * target

    def metrics(self) -> dict[str, float]:
        """The mean of each metric over the steps that report it, and what the last step says of itself."""
        values = [value for step in self._steps for value in step.values()]
        numbers = iter(torch.stack(values).tolist() if values else ())
        found: dict[str, list[float]] = {}
        for step in self._steps:
            for name in step:
                found.setdefault(name, []).append(next(numbers))
        metrics = {name: sum(of_steps) / len(of_steps) for name, of_steps in found.items()}
        metrics["gradient_norm"] = sum(self._norms) / len(self._norms) if self._norms else 0.0
        metrics["optimizer_steps"] = float(len(self._norms))
        return metrics | self._of_last

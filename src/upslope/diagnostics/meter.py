"""Watches the updates of one run from what they compute anyway."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from upslope.diagnostics.noise import MinibatchNoise, SmoothedNoise, SuccessiveNoise
from upslope.diagnostics.signal import psi_variances, zero_advantage_groups
from upslope.diagnostics.steps import StepRecord, effective_sample_size, gradient_shares
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory, Tree

_DECAY_WITHIN, _DECAY_BETWEEN = 0.95, 0.98
"""Estimates from one pair of updates are far noisier than those from the minibatches of one, so they last longer."""


class Meter:
    """Takes figures of updates; nothing it does changes them.

    Of most updates it takes the gradient of the first optimiser step alone; a closer look is for those for which
    `begin` asks for it. What a closer look finds:

    | figure | meaning |
    |---|---|
    | gradient_snr | abs(G)^2 / (tr Sigma / B) for the B steps of the update |
    | noise_scale | tr Sigma / abs(G)^2, in steps |
    | variance/psi, variance/NAME | variance of Psi_t in use, and of the alternatives |
    | reward_deviation, termination_share | whether there is anything to learn from |
    | zero_advantage_groups | share of groups whose rows were all rewarded alike |
    | first_ratio_error | largest abs(ratio - 1) before the first optimiser step |
    | effective_sample_size | of the ratios in the last pass, as a share |
    | dead_gradient_share, clip_share_positive, clip_share_negative | steps without gradient, as a share |

    Signal and noise come from the minibatches of the first pass where there are several, else from the first gradients
    of successive updates. Both are smoothed over updates. The parameters move between the gradients compared. In an
    update of a single optimiser step all ratios are 1, and not reported beyond the first.

    Args:
        gradient: [P] where the gradients of the parameters that serve the actor alone lie after each backward pass.
    """

    def __init__(self, gradient: Tensor) -> None:
        self._gradient = gradient
        self._within, self._between = SmoothedNoise(decay=_DECAY_WITHIN), SmoothedNoise(decay=_DECAY_BETWEEN)
        self._successive = SuccessiveNoise()
        self._looking = False
        self._forget()

    def _forget(self) -> None:
        self._minibatches: MinibatchNoise | None = None
        self._found: dict[str, Tensor] = {}
        self._open: list[tuple[Batch, Tensor]] = []
        self._steps: list[list[StepRecord]] = []
        self._last_pass = 0
        self._epoch = 0
        self._several = False
        self._chosen = 0

    def look(self, *, closely: bool) -> None:
        """Whether the update that follows gets a closer look."""
        self._looking = closely

    @torch.no_grad()
    def begin(
        self,
        trajectory: Trajectory,
        signal: Signal,
        value: Tensor | None,
        next_value: Tensor | None,
        *,
        gamma: float,
        minibatches: int,
    ) -> None:
        """An update begins.

        Args:
            trajectory: [B, T], as the algorithm sees it.
            signal: Psi_t of it.
            value: [B, T], V, or None.
            next_value: [B, T], V', or None.
            gamma: the algorithm's discount factor.
            minibatches: optimiser steps per pass.
        """
        self._forget()
        self._several = minibatches > 1
        if not self._looking:
            return
        if self._several:
            self._minibatches = MinibatchNoise(self._gradient)
        mask, chosen = trajectory.mask, trajectory.mask.sum()
        variances = psi_variances(trajectory, signal.advantage, value, next_value, gamma=gamma)
        self._found = {f"variance/{name}": variance for name, variance in variances.items()}
        self._found["chosen"] = chosen
        reward = trajectory.reward
        mean = (reward * mask).sum() / chosen
        self._found["reward_deviation"] = ((reward - mean).square() * mask).sum().div(chosen).sqrt()
        self._found["termination_share"] = (trajectory.terminated & mask).sum() / chosen
        if trajectory.group is not None:
            self._found["zero_advantage_groups"] = zero_advantage_groups(signal.advantage, mask, trajectory.group)

    def evaluated(self, batch: Batch, evaluation: Evaluation) -> None:
        """A piece of an optimiser step was evaluated; comes before its backward pass."""
        if self._looking:
            if evaluation.log_prob.requires_grad:
                evaluation.log_prob.retain_grad()
            self._open.append((batch, evaluation.log_prob))

    @torch.no_grad()
    def differentiated(self, batch: Batch, epoch: int) -> None:
        """The gradient of a whole optimiser step lies in place.

        Args:
            batch: of the whole step.
            epoch: the pass it is in, from 0.
        """
        if epoch == 0 and not self._several:
            estimate = self._successive.add(self._gradient, _count(batch.mask))
            if estimate is not None:
                self._between.add(estimate)
        if not self._looking:
            return
        if epoch == 0 and self._minibatches is not None:
            self._minibatches.add(self._gradient, _count(batch.mask))
        if epoch != self._epoch:
            self._epoch, self._last_pass = epoch, len(self._steps)
        self._steps.append([_record(piece, log_prob) for piece, log_prob in self._open])
        self._open.clear()

    @torch.no_grad()
    def end(self) -> Mapping[str, float]:
        """The update is over: what a closer look found; nothing without one."""
        if not self._looking:
            return {}
        found = self._found
        first = torch.cat([record.log_ratio for record in self._steps[0]])
        found["first_ratio_error"] = first.expm1().abs().max()
        if len(self._steps) > 1:
            last = [record.log_ratio for step in self._steps[self._last_pass :] for record in step]
            found["effective_sample_size"] = effective_sample_size(torch.cat(last))
        shares = gradient_shares([record for step in self._steps for record in step])
        found.update(shares if len(self._steps) > 1 else {name: shares[name] for name in shares if "clip" not in name})
        numbers = dict(zip(found, torch.stack([entry.double() for entry in found.values()]).tolist(), strict=True))
        chosen = numbers.pop("chosen")
        if self._minibatches is not None:
            estimate = self._minibatches.estimate()
            if estimate is not None:
                self._within.add(estimate)
        smoothed = (self._within if self._several else self._between).estimate
        if smoothed is not None:
            numbers["gradient_snr"], numbers["noise_scale"] = smoothed.ratio(chosen), smoothed.scale
        self._forget()
        return numbers

    def state(self) -> Tree:
        """For a checkpoint between updates."""
        return {
            "within": self._within.state(),
            "between": self._between.state(),
            "successive": self._successive.state(),
        }

    def load_state(self, tree: Tree) -> None:
        """Go on from `state()`."""
        self._within.load_state(tree["within"])
        self._between.load_state(tree["between"])
        self._successive.load_state(tree["successive"])


def _count(mask: Tensor) -> int:
    return mask.shape[0] if mask.dim() == 1 else int(mask.sum())


def _record(batch: Batch, log_prob: Tensor) -> StepRecord:
    gradient, log_prob = log_prob.grad, log_prob.detach()
    log_ratio, advantage = log_prob - batch.behaviour_log_prob, batch.advantage
    if batch.mask.dim() > 1:
        mask = batch.mask
        log_ratio, advantage = log_ratio[mask], advantage[mask]
        gradient = None if gradient is None else gradient[mask]
    return StepRecord(log_ratio=log_ratio, advantage=advantage, gradient=gradient)

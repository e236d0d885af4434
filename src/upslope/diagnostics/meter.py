"""Watches the updates of one run from what they compute anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from upslope.diagnostics.noise import MinibatchNoise, SmoothedNoise, SuccessiveNoise
from upslope.diagnostics.signal import psi_variances, zero_advantage_groups
from upslope.diagnostics.steps import ChosenSteps, gradient_shares
from upslope.estimators import effective_sample_size, k3
from upslope.trajectory import Batch, Evaluation, Policy, Signal, Trajectory, Tree

_WATCHED = 64
_DECAY_WITHIN, _DECAY_BETWEEN = 0.95, 0.98
"""Estimates from one pair of updates are far noisier than those from the minibatches of one, so they last longer."""


class Planned(Protocol):
    """The passes of an update."""

    @property
    def epochs(self) -> int:
        """How many passes."""
        ...

    @property
    def minibatches(self) -> int:
        """Optimiser steps in each."""
        ...


class Meter:
    """Takes figures of those updates that `look` asks for; nothing it does changes them.

    Of an update with many optimiser steps, some 64 evenly spread ones stand for all. What is found:

    | figure | meaning |
    |---|---|
    | gradient_snr | abs(G)^2 / (tr Sigma / B) for the B steps of the update |
    | noise_scale | tr Sigma / abs(G)^2, in steps |
    | variance/psi, variance/NAME | variance of Psi_t in use, and of the alternatives |
    | reward_deviation, termination_share | whether there is anything to learn from |
    | zero_advantage_groups | share of groups whose rows were all rewarded alike |
    | first_ratio_error | largest abs(ratio - 1) before the first optimiser step |
    | kl | KL(old, new) after the last optimiser step (k3), unless the loss reports one |
    | effective_sample_size | of the ratios in the last pass, as a share |
    | dead_gradient_share, clip_share_positive, clip_share_negative | steps without gradient, as a share |

    Signal and noise come from the minibatches of the first pass where there are several, else from the first gradients
    of an update looked at and of the one after it. Both are smoothed over updates. The parameters move between the
    gradients compared. In an update of a single optimiser step all ratios are 1, and not reported beyond the first.

    Args:
        gradient: [P] where the gradients of the parameters that serve the actor alone lie after each backward pass;
            its parts, if they do not lie side by side.
    """

    def __init__(self, *gradient: Tensor) -> None:
        self._parts = gradient
        self._within, self._between = SmoothedNoise(decay=_DECAY_WITHIN), SmoothedNoise(decay=_DECAY_BETWEEN)
        self._successive = SuccessiveNoise()
        self._looking = False
        self._forget()

    @property
    def _gradient(self) -> Tensor:
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)

    def _forget(self) -> None:
        self._minibatches: MinibatchNoise | None = None
        self._found: dict[str, Tensor] = {}
        self._open: list[tuple[Batch, Tensor]] = []
        self._pieces: list[_Piece] = []
        self._optimizer_step = 0
        self._watch_every = 1
        self._several = False
        self._sampled = True

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
        passes: Planned,
    ) -> None:
        """An update begins. Of data that nobody sampled, signal and noise of the gradient alone are found.

        Args:
            trajectory: [B, T], as the algorithm sees it.
            signal: Psi_t of it.
            value: [B, T], V, or None.
            next_value: [B, T], V', or None.
            gamma: the algorithm's discount factor.
            passes: how many, and how many optimiser steps in each.
        """
        self._forget()
        self._several = passes.minibatches > 1
        if not self._looking:
            return
        self._watch_every = max(1, passes.epochs * passes.minibatches // _WATCHED)
        if self._several:
            self._minibatches = MinibatchNoise(self._gradient)
        mask, chosen = trajectory.mask, trajectory.mask.sum()
        self._sampled = bool(trajectory.behaviour_log_prob[mask].isfinite().all())
        if not self._sampled:
            self._found = {"chosen": chosen}
            return
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
        if self._looking and self._optimizer_step % self._watch_every == 0:
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
        if epoch == 0 and not self._several and (self._looking or self._successive.waiting):
            estimate = self._successive.add(self._gradient, _count(batch.mask), keep=self._looking)
            if estimate is not None:
                self._between.add(estimate)
        if not self._looking:
            return
        if epoch == 0 and self._minibatches is not None:
            self._minibatches.add(self._gradient, _count(batch.mask))
        for piece, log_prob in self._open:
            self._pieces.append(
                _Piece(
                    epoch=epoch,
                    first=self._optimizer_step == 0,
                    batch=piece,
                    log_prob=log_prob.detach(),
                    gradient=log_prob.grad,
                )
            )
        self._open.clear()
        self._optimizer_step += 1

    @torch.no_grad()
    def end(self, policy: Policy, *, moved: bool = True) -> Mapping[str, float]:
        """The update is over: what a closer look found; nothing without one.

        Args:
            policy: after its last optimiser step; left as it is.
            moved: whether to find out how far it went from the one that acted, one more forward pass of the actor.
        """
        if not self._looking:
            return {}
        found = self._found
        pieces = self._pieces
        if self._sampled:
            found.update(self._ratios(policy, pieces, moved=moved))
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

    def _ratios(self, policy: Policy, pieces: Sequence[_Piece], *, moved: bool) -> dict[str, Tensor]:
        """What depends on the policy that acted; of data that nobody sampled there is none."""
        first = _steps([piece for piece in pieces if piece.first])
        found = {"first_ratio_error": first.log_ratio.expm1().abs().max()}
        shares = gradient_shares(_steps(pieces))
        last = [piece for piece in pieces if piece.epoch == pieces[-1].epoch]
        if moved:
            found["kl"] = _kl(policy, [piece.batch for piece in last])
        if self._optimizer_step > 1:
            found["effective_sample_size"] = effective_sample_size(_steps(last).log_ratio)
            return found | shares
        return found | {name: share for name, share in shares.items() if "clip" not in name}

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


def _kl(policy: Policy, batches: Sequence[Batch]) -> Tensor:
    """The mean over chosen steps of k3 of KL(old || new), old being the one that acted."""
    with untouched(policy, batches[0].behaviour_log_prob.device):
        estimates = [k3(batch.behaviour_log_prob, _log_prob(policy, batch))[batch.mask] for batch in batches]
    return torch.cat(estimates).mean()


def _log_prob(policy: Policy, batch: Batch) -> Tensor:
    """That of the actions; where a memory was carried into the rows, by going through them."""
    if batch.memory is not None:
        return policy.evaluate(batch).log_prob
    return policy.log_prob(batch.observation, batch.action)


@contextmanager
def untouched(policy: Policy, device: torch.device) -> Iterator[None]:
    """One more forward pass draws no random number and moves no running mean of a network that would.

    Args:
        policy: whose buffers stay as they are.
        device: where it computes.
    """
    buffers = list(policy.buffers()) if isinstance(policy, nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def _count(mask: Tensor) -> int:
    return mask.shape[0] if mask.dim() == 1 else int(mask.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    epoch: int
    first: bool
    batch: Batch
    log_prob: Tensor
    gradient: Tensor | None


def _steps(pieces: Sequence[_Piece]) -> ChosenSteps:
    """The chosen steps of some pieces."""
    log_prob = torch.cat([piece.log_prob for piece in pieces])
    behaviour = torch.cat([piece.batch.behaviour_log_prob for piece in pieces])
    advantage = torch.cat([piece.batch.advantage for piece in pieces])
    gradients = [piece.gradient for piece in pieces if piece.gradient is not None]
    gradient = torch.cat(gradients) if len(gradients) == len(pieces) else None
    log_ratio = log_prob - behaviour
    if log_ratio.dim() > 1:
        mask = torch.cat([piece.batch.mask for piece in pieces])
        log_ratio, advantage = log_ratio[mask], advantage[mask]
        gradient = None if gradient is None else gradient[mask]
    return ChosenSteps(log_ratio=log_ratio, advantage=advantage, gradient=gradient)

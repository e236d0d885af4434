"""From a trajectory to moved parameters: the passes over one batch. Knows no algorithm by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from upslope.algorithms.protocol import Algorithm, NaturalStep, Now, Passes, State
from upslope.diagnostics import Meter, explained_variance
from upslope.errors import UsageError
from upslope.streams import Shuffler
from upslope.train.batches import chosen_steps
from upslope.train.optimizer_steps import OptimizerSteps, Totals
from upslope.train.stepper import Stepper
from upslope.trajectory import Batch, Evaluation, Policy, Signal, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """What an update leaves behind.

    Attributes:
        state: the algorithm's carried numbers.
        metrics: means over its optimiser steps.
        advantage: [B, T], Psi_t before its first pass and before any scaling.
    """

    state: State
    metrics: dict[str, float]
    advantage: Tensor


def learn(
    policy: Policy,
    algorithm: Algorithm,
    optimizer: Stepper,
    trajectory: Trajectory,
    *,
    now: Now,
    learning_rate: float,
    generator: Shuffler,
    meter: Meter | None = None,
    reference: Policy | None = None,
) -> Learned:
    """Update the policy from one trajectory.

    Args:
        policy: evaluated, and moved through the optimiser that holds its parameters.
        algorithm: whose formulas and passes are followed.
        optimizer: takes the steps.
        trajectory: with the reward the algorithm should see (scaled, if the policy scales rewards).
        now: progress of the run and the algorithm's carried numbers.
        learning_rate: for every step of this update.
        generator: shuffles the steps of each pass.
        meter: watches the update, if given, and adds what it finds to the metrics; changes nothing.
        reference: the frozen policy that the algorithm stays close to, where it asks for one.

    Returns:
        The carried numbers after the update and its metrics. Those of a sequential policy have "mismatch", the largest
        |l - b| over the chosen steps of the first optimiser step, where the actions were sampled. A minibatch without
        any chosen step takes no optimiser step, and an update without any changes nothing.

    Raises:
        UsageError: if the algorithm needs a reference and there is none, or the batch is too small to be cut.
    """
    if not bool(trajectory.mask.any()):
        idle = {"gradient_norm": 0.0, "optimizer_steps": 0.0}
        return Learned(state=now.state, metrics=idle, advantage=torch.zeros_like(trajectory.reward))
    passes = _fitting(policy, algorithm.passes, trajectory)
    trajectory = _referenced(passes, trajectory, reference)
    seen = _seen_at_once(policy, passes, optimizer, trajectory)
    trajectory = _anchored(policy, passes, trajectory, seen)
    value, next_value, signal = _signal(policy, algorithm, trajectory, now, seen)
    if meter is not None:
        meter.begin(trajectory, signal, value, next_value, gamma=algorithm.gamma, passes=passes)
    advantage = signal.advantage
    batch = _batch(policy, passes, trajectory, value, signal, reference)
    totals = Totals(measure_mismatch=policy.sequential and _sampled(batch))
    at_once = None if seen is None else seen[0]
    steps = OptimizerSteps(policy, algorithm, optimizer, passes, now, learning_rate, generator, meter, at_once, totals)
    for epoch in range(passes.epochs):
        if epoch and passes.recompute_advantage:
            value, _, signal = _signal(policy, algorithm, trajectory, now)
            batch = replace(batch, **_signal_like(batch, trajectory, signal))
        if not steps.over(batch, epoch):
            break
    metrics = totals.metrics() | {name: float(metric) for name, metric in signal.metrics.items()}
    metrics |= _afterwards(policy, trajectory, batch, value, signal)
    state = algorithm.adapt(now.state, metrics)
    if meter is not None:
        metrics.update(meter.end(policy, moved="kl" not in metrics))
    return Learned(state=state, metrics=metrics, advantage=advantage)


def _afterwards(
    policy: Policy, trajectory: Trajectory, batch: Batch, value: Tensor | None, signal: Signal
) -> dict[str, float]:
    """What is measured once the update is over."""
    metrics: dict[str, float] = {}
    if batch.behaviour_distribution is not None:
        with torch.no_grad():
            kl = batch.behaviour_distribution.kl(policy.evaluate(batch).distribution)
        metrics["kl_after"] = float(kl[batch.mask].mean())
    if value is not None and signal.value_target is not None:
        target, mask = signal.value_target, trajectory.partial_mask
        if mask is not None:
            value, target = value[mask], target[mask]
        metrics["explained_variance"] = explained_variance(value, target)
    return metrics


def _fitting(policy: Policy, passes: Passes, trajectory: Trajectory) -> Passes:
    """The passes with no more minibatches than there are rows: how many are collected can change from update to update.

    Completions are left out where a reward failed, or where no other group with spread was found. Steps, of which
    every update has as many, must go by the settings.
    """
    if not policy.sequential:
        return passes
    return replace(passes, minibatches=min(passes.minibatches, max(1, len(trajectory.mask) // passes.together)))


def _referenced(passes: Passes, trajectory: Trajectory, reference: Policy | None) -> Trajectory:
    """The trajectory with f_t, where that is needed."""
    if passes.reference == "none":
        return trajectory
    if reference is None:
        raise UsageError(
            "the algorithm measures how far the policy is from a frozen reference, and there is none: give one, or set "
            "its KL coefficient to 0"
        )
    if passes.reference == "distribution":
        return trajectory
    with torch.no_grad():
        return replace(trajectory, reference_log_prob=reference.evaluate(trajectory).log_prob.detach())


def _anchored(
    policy: Policy, passes: Passes, trajectory: Trajectory, seen: tuple[Evaluation, Tensor] | None
) -> Trajectory:
    """The trajectory with p_t, of the policy before the update, where Psi needs it."""
    if passes.proximal != "advantage":
        return trajectory
    with torch.no_grad():
        evaluation = policy.evaluate(trajectory) if seen is None else seen[0]
        return replace(trajectory, proximal_log_prob=evaluation.log_prob.detach().view(trajectory.shape))


def _seen_at_once(
    policy: Policy, passes: Passes, optimizer: Stepper, trajectory: Trajectory
) -> tuple[Evaluation, Tensor] | None:
    """What the loss and Psi need of the policy from one look at it; None where they must look at different things.

    They look at the same where the update's only step is on all steps of the trajectory.
    """
    once = passes.epochs * passes.minibatches == 1 and optimizer.micro_batches == 1
    once = once and not isinstance(passes.rule, NaturalStep) and passes.critic and passes.values_first
    if not once or policy.sequential or passes.whole_rows or not bool(trajectory.mask.all()):
        return None
    return policy.evaluate_with_next_value(trajectory)


def _signal(
    policy: Policy,
    algorithm: Algorithm,
    trajectory: Trajectory,
    now: Now,
    seen: tuple[Evaluation, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Signal]:
    with torch.no_grad():
        value = next_value = None
        if seen is not None and seen[0].value is not None:
            value, next_value = seen[0].value.detach().view(trajectory.shape), seen[1]
        elif algorithm.passes.critic and algorithm.passes.values_first:
            value, next_value = policy.values(trajectory)
        return value, next_value, algorithm.advantage(trajectory, value, next_value, now)


def _batch(
    policy: Policy,
    passes: Passes,
    trajectory: Trajectory,
    value: Tensor | None,
    signal: Signal,
    reference: Policy | None,
) -> Batch:
    """The chosen steps of the trajectory, flattened; whole rows where Psi needs whole episodes or the policy rows."""
    batch = Batch(
        observation=trajectory.observation,
        action=trajectory.action,
        mask=trajectory.mask,
        behaviour_log_prob=trajectory.behaviour_log_prob,
        advantage=signal.advantage,
        value_target=signal.value_target,
        behaviour_value=value,
        behaviour_distribution=None,
        weight=trajectory.behaviour_log_prob,
        reference_log_prob=trajectory.reference_log_prob,
        proximal_log_prob=trajectory.proximal_log_prob,
        time=trajectory.time,
        memory=trajectory.memory,
    )
    if policy.sequential or passes.whole_rows:
        hidden = ~trajectory.mask
        batch = replace(batch, behaviour_log_prob=batch.behaviour_log_prob.masked_fill(hidden, 0.0))
    elif not passes.whole_episodes:
        batch = chosen_steps(batch)
    if passes.reference == "distribution" and reference is not None:
        with torch.no_grad():
            batch = replace(batch, reference_distribution=reference.evaluate(batch).distribution.detach())
    if batch.proximal_log_prob is None and _needs_proximal(passes):
        with torch.no_grad():
            batch = replace(batch, proximal_log_prob=policy.evaluate(batch).log_prob.detach())
    if passes.behaviour_distribution:
        with torch.no_grad():
            batch = replace(batch, behaviour_distribution=policy.evaluate(batch).distribution.detach())
    return batch


def _needs_proximal(passes: Passes) -> bool:
    several = passes.epochs * passes.minibatches > 1
    return passes.proximal == "prepare" or (passes.proximal == "loss" and several)


def _signal_like(batch: Batch, trajectory: Trajectory, signal: Signal) -> dict[str, Tensor | None]:
    """The parts of a signal shaped as the batch holds them: whole rows, or the chosen steps alone."""
    if batch.mask.dim() > 1:
        return {"advantage": signal.advantage, "value_target": signal.value_target}
    target = signal.value_target
    return {
        "advantage": signal.advantage[trajectory.mask],
        "value_target": None if target is None else target[trajectory.mask],
    }


def _sampled(batch: Batch) -> bool:
    """Whether a policy sampled these actions: of data that nobody sampled the log-prob is NaN."""
    return bool(batch.behaviour_log_prob[batch.mask].isfinite().all())

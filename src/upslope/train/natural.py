"""A natural step of the actor, and the fit of the critic that follows it. Knows no algorithm by name.

    (F + damping) x = g,   g = -grad loss,   F = Hessian of the mean KL(old || new) at new = old

The actor's parameters are those log pi depends on (log_std among them), and nothing but the step moves them. The
critic's are the others: of a torso that both share, the critic is fitted by its own layers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from upslope.algorithms.protocol import Algorithm, NaturalStep, Now
from upslope.estimators import (
    LineSearch,
    backtracking_line_search,
    conjugate_gradient,
    fisher_vector_product,
    flatten,
    squared_value_error,
    step_mean,
    trust_region_scale,
    unflatten,
    weighted_sum,
)
from upslope.policies import ActorCritic
from upslope.policies.fused_fisher import closed_form_product
from upslope.train.stepper import Stepper
from upslope.trajectory import Batch, Distribution, Policy

Product = Callable[[Tensor], Tensor]
"""v -> F v, flat."""


def natural_update(
    policy: Policy,
    algorithm: Algorithm,
    optimizer: Stepper,
    batch: Batch,
    now: Now,
    *,
    learning_rate: float,
    first: Batch,
    pieces: Callable[[Batch], Iterator[Batch]],
    minibatches: Callable[[Batch], Iterator[Batch]],
) -> tuple[float, dict[str, float]]:
    """Step with the gradient that lies in place, then fit the critic if it has a target.

    Args:
        policy: is moved.
        algorithm: whose loss is to become smaller, and whose passes say how.
        optimizer: holds the gradient, and moves the critic.
        batch: prepared.
        now: where the run stands.
        learning_rate: of the critic.
        first: a row (or step) of the batch.
        pieces: micro-batches of a batch.
        minibatches: of one pass of the critic over a batch.

    Returns:
        The norm of the gradient, and the metrics of the step and of the fit.
    """
    settings = algorithm.passes.rule
    assert isinstance(settings, NaturalStep)
    parts = split(policy, first, optimizer.parameters)
    update = NaturalUpdate(policy, algorithm, parts.actor, list(pieces(batch)), now)
    norm = optimizer.step_by(update.take)
    if batch.value_target is None or not parts.critic:
        return norm, update.metrics
    seen, value = critic_alone(policy, batch)
    fit = CriticFit(value, parts.critic)
    for _ in range(settings.critic_epochs):
        for minibatch in minibatches(seen):
            steps = int(minibatch.mask.sum())
            if steps:
                optimizer.zero_gradient()
                fit.differentiate(pieces(minibatch), steps)
                optimizer.step(learning_rate)
    return norm, {**update.metrics, "value_loss": fit.value_loss}


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Whose parameters are whose, in the order of the optimiser's.

    Attributes:
        actor: those log pi depends on.
        critic: the others; empty where the critic has none of its own, or there is no critic.
    """

    actor: tuple[Tensor, ...]
    critic: tuple[Tensor, ...]


def split(policy: Policy, first: Batch, parameters: Sequence[Tensor]) -> Split:
    """Tell the actor's parameters from the critic's.

    Args:
        policy: asked for the log-probabilities of `first` alone.
        first: one step, or one row.
        parameters: trainable ones.
    """
    with torch.enable_grad():
        log_prob = policy.log_prob(first.observation, first.action).sum()
        found = torch.autograd.grad(log_prob, parameters, allow_unused=True)
    of_actor = [gradient is not None for gradient in found]
    return Split(
        actor=tuple(p for p, mine in zip(parameters, of_actor, strict=True) if mine),
        critic=tuple(p for p, mine in zip(parameters, of_actor, strict=True) if not mine),
    )


class NaturalUpdate:
    """The actor's step on one batch, whose gradient lies in the parameters.

    Args:
        policy: is moved.
        algorithm: whose loss is to become smaller.
        actor: parameters of the actor.
        pieces: the prepared batch, in micro-batches.
        now: where the run stands.

    Attributes:
        metrics: of the step, once it was taken: the mean KL(old || new) and the share of the full step (both 0 if it
            was refused), whether it was accepted, what was gained, and |g - (F + damping) x| / |g|.
    """

    def __init__(
        self, policy: Policy, algorithm: Algorithm, actor: Sequence[Tensor], pieces: Sequence[Batch], now: Now
    ) -> None:
        natural = algorithm.passes.rule
        assert isinstance(natural, NaturalStep)
        self._policy, self._algorithm, self._settings, self._now = policy, algorithm, natural, now
        self._actor, self._pieces = tuple(actor), pieces
        self._steps = sum(int(piece.mask.sum()) for piece in pieces)
        self._old: list[Distribution] = []
        self._before = 0.0
        self.metrics: dict[str, float] = {
            "kl": 0.0,
            "step_fraction": 0.0,
            "accepted": 0.0,
            "surrogate_improvement": 0.0,
            "conjugate_gradient_residual": 0.0,
        }

    def take(self) -> None:
        """Move the actor by a natural step, or leave it bit for bit as it is."""
        gradient = -flatten([_gradient_of(parameter) for parameter in self._actor])
        if not bool(gradient.any()):
            return
        settings = self._settings
        product = self.fisher()
        direction = conjugate_gradient(
            lambda vector: product(vector) + settings.damping * vector, gradient, iterations=settings.iterations
        )
        image = product(direction)
        residual = gradient - image - settings.damping * direction
        self.metrics["conjugate_gradient_residual"] = float(residual.norm() / gradient.norm())
        length = settings.step_size
        if length is None:
            assert settings.max_divergence is not None
            length = trust_region_scale(direction, image, max_divergence=settings.max_divergence)
        self._move(length * direction)

    def _move(self, step: Tensor) -> None:
        """The line search, or the whole step."""
        settings = self._settings
        start = flatten(self._actor).detach().clone()
        if settings.attempts:
            assert settings.max_divergence is not None
            found = backtracking_line_search(
                self._measured,
                start,
                step,
                objective=self._before,
                max_divergence=settings.max_divergence,
                backtrack=settings.backtrack,
                attempts=settings.attempts,
            )
            self._put(found.parameters)
        else:
            found = self._whole(start, step)
        self.metrics["kl"], self.metrics["step_fraction"] = found.divergence, found.fraction
        self.metrics["accepted"] = float(found.fraction > 0.0)
        self.metrics["surrogate_improvement"] = found.objective - self._before

    def _whole(self, start: Tensor, step: Tensor) -> LineSearch:
        """All of the step, or nothing of it where parameters, surrogate or KL would not be finite there."""
        end = start + step
        if bool(end.isfinite().all()):
            objective, divergence = self._measured(end)
            if math.isfinite(objective) and math.isfinite(divergence):
                return LineSearch(end, 1.0, objective, divergence)
        self._put(start)
        return LineSearch(start, 0.0, self._before, 0.0)

    @torch.no_grad()
    def _measured(self, parameters: Tensor) -> tuple[float, float]:
        """The surrogate and the mean KL(old || new) at given parameters, which are left in place."""
        self._put(parameters)
        objective = divergence = 0.0
        for number, piece in enumerate(self._pieces):
            evaluation = self._policy.evaluate(piece)
            objective -= float(self._algorithm.loss(piece, evaluation, self._now).value)
            divergence += float(self._divergence(number, evaluation.distribution))
        return objective, divergence

    @torch.no_grad()
    def _put(self, parameters: Tensor) -> None:
        for parameter, value in zip(self._actor, unflatten(parameters, self._actor), strict=True):
            parameter.copy_(value)

    def _divergence(self, number: int, distribution: Distribution) -> Tensor:
        """What a piece brings to the mean of KL(old || new) over all chosen steps."""
        return self._old[number].kl(distribution)[self._pieces[number].mask].sum() / self._steps

    @torch.no_grad()
    def _look(self) -> None:
        """Keep the surrogate and the distributions before the step."""
        for piece in self._pieces:
            evaluation = self._policy.evaluate(piece)
            self._before -= float(self._algorithm.loss(piece, evaluation, self._now).value)
            self._old.append(evaluation.distribution.detach())

    def fisher(self) -> Product:
        """F v, in closed form where there is one; keeps the distributions and the surrogate before the step."""
        self._look()
        products = [
            closed_form_product(self._policy, piece, old, self._actor, steps=self._steps)
            or fisher_vector_product(self._divergence_of(number), self._actor)
            for number, (piece, old) in enumerate(zip(self._pieces, self._old, strict=True))
        ]
        return lambda vector: torch.stack([product(vector) for product in products]).sum(0)

    def _divergence_of(self, number: int) -> Callable[[], Tensor]:
        def divergence() -> Tensor:
            return self._divergence(number, self._policy.evaluate(self._pieces[number]).distribution)

        return divergence


class CriticFit:
    """Regression of the critic on its targets: the mean of 0.5 (V - target)^2 over chosen steps.

    Args:
        value: V_t of a batch, differentiable.
        critic: the parameters that move.
    """

    def __init__(self, value: Callable[[Batch], Tensor], critic: Sequence[Tensor]) -> None:
        self._value, self._critic = value, list(critic)
        self._errors: list[Tensor] = []

    @property
    def value_loss(self) -> float:
        """The mean error of all optimiser steps so far, each before it was taken."""
        return float(torch.stack(self._errors).mean())

    def differentiate(self, pieces: Iterable[Batch], steps: int) -> None:
        """Add the gradient of one optimiser step to those of the critic's parameters.

        Args:
            pieces: the step's batch, in micro-batches.
            steps: chosen ones in all of them.
        """
        total: Tensor | None = None
        for piece in pieces:
            value, target = self._value(piece), piece.value_target
            assert target is not None
            weight = step_mean(piece.mask, steps=steps, dtype=value.dtype)
            error = weighted_sum(squared_value_error(value, target), weight)
            error.backward(inputs=self._critic)
            total = error.detach() if total is None else total + error.detach()
        if total is not None:
            self._errors.append(total)


def critic_alone(policy: Policy, batch: Batch) -> tuple[Batch, Callable[[Batch], Tensor]]:
    """The batch as the critic sees it, and V_t of it: without what only the actor needs, or moves, where that can be.

    Args:
        policy: whose critic it is.
        batch: the steps of all passes.
    """
    if isinstance(policy, ActorCritic) and policy.critic_encoder is None and not policy.sequential:
        critic = policy.critic
        assert critic is not None
        with torch.no_grad():
            features = policy.features(batch)
            features = features if policy.torso is None else policy.torso(features)
        seen = replace(batch, observation=features.view(*batch.mask.shape, -1))
        return seen, lambda each: critic(_features(each)).squeeze(-1)

    def value(each: Batch) -> Tensor:
        found = policy.evaluate(each).value
        assert found is not None
        return found

    return batch, value


def _features(batch: Batch) -> Tensor:
    assert isinstance(batch.observation, Tensor)
    return batch.observation


def _gradient_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

"""Families of distributions over actions: what a network's outputs mean.

A `Head` is one family with its shapes and bounds. It turns rows of parameters (a network's outputs) into samples
(NumPy, for rollouts) and into log-probabilities, entropies and divergences (torch, differentiable). A rollout's
randomness is drawn once, by `noise`; `sample` is then a deterministic function of parameters and noise.

| head | parameters per action dimension | stored action | the environment gets |
|---|---|---|---|
| `Categorical`, `MultiCategorical` | a logit per choice | 0 .. n-1 | start + action |
| `Bernoulli` | a logit | 0 or 1 | the same |
| `Gaussian` (from here on in `continuous.py`) | mean, log_std | the sample | the sample, clipped to the bounds |
| `SquashedGaussian` | mean, log_std | u, before the squash | low + (high - low) (tanh(u) + 1) / 2 |
| `Beta` | two concentrations | x in (0, 1) | low + (high - low) x |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from upslope.policies.fused_distributions import IMPOSSIBLE, categorical


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), to float64 precision (PyTorch's default switches to x at 20, where the error is still 2e-9)."""
    return torch.nn.functional.softplus(x, threshold=40.0)


class Head(ABC):
    """A family of distributions over actions.

    Attributes:
        size: P, how many parameters describe one distribution.
        constant: how many of the last parameters do not depend on the state.
        initial: [P] what a network should put out, on average, before any training.
        action_dimensions: 0 where an action is one number per step ([B, T]), 1 where it is several ([B, T, A]).
    """

    size: int
    constant: int = 0
    initial: tuple[float, ...]
    action_dimensions: int = 1

    @abstractmethod
    def noise(self, generator: np.random.Generator, steps: int, environments: int) -> np.ndarray:
        """The randomness of a rollout, [steps, environments, ...]; row [t, i] decides that one sample."""

    @abstractmethod
    def sample(self, parameters: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """One stored action per row of `parameters` [N, P], from `noise` [N, ...]."""

    @abstractmethod
    def mode(self, parameters: np.ndarray) -> np.ndarray:
        """The most likely stored action per row (for a squashed Gaussian: the squash of the mean)."""

    @abstractmethod
    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """Stored actions [N] or [N, A] as the environment takes them."""

    @abstractmethod
    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Both [M], summed over action dimensions, for `parameters` [M, P] and stored actions [M] or [M, A]."""

    @abstractmethod
    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        """KL(parameters || other) in closed form, [...], for two sets of parameters [..., P]."""


@final
@dataclass(frozen=True, slots=True)
class HeadDistribution:
    """Distributions of one family, one per step: the `Distribution` that evaluations carry.

    Attributes:
        head: the family.
        parameters: [..., P].
    """

    head: Head
    parameters: Tensor

    def select(self, index: Tensor | slice) -> HeadDistribution:
        """The distributions of some steps (first dimension)."""
        return HeadDistribution(self.head, self.parameters[index])

    def detach(self) -> HeadDistribution:
        """The same without gradient."""
        return HeadDistribution(self.head, self.parameters.detach())

    def kl(self, other: object) -> Tensor:
        """KL(self || other) per step, summed over action dimensions.

        Raises:
            ValueError: if the other is of another family.
        """
        if not isinstance(other, HeadDistribution) or type(other.head) is not type(self.head):
            raise ValueError(
                f"a KL divergence needs two distributions of one family, got {type(self.head).__name__} "
                f"and {type(other.head if isinstance(other, HeadDistribution) else other).__name__}"
            )
        return self.head.kl(self.parameters, other.parameters)

    def log_prob_and_entropy(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(a|s) and entropy, shaped like the steps."""
        steps = self.parameters.shape[:-1]
        flat = action.reshape(-1, *action.shape[len(steps) :])
        log_prob, entropy = self.head.log_prob_and_entropy(self.parameters.reshape(-1, self.head.size), flat)
        return log_prob.view(steps), entropy.view(steps)


def _gumbel(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.gumbel(size=shape).astype(np.float32)


def _categorical_kl(logits: Tensor, other: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, dim=-1)
    # Bounded where p is exactly 0, so that 0 * (-inf) cannot arise.
    log_q = torch.log_softmax(other, dim=-1).clamp(min=torch.finfo(other.dtype).min * 1e-4)
    return (log_p.exp() * (log_p.clamp(min=IMPOSSIBLE) - log_q)).sum(-1)


@final
class Categorical(Head):
    """One of `n` choices: pi(a) = exp(logit_a) / sum_b exp(logit_b). A logit of -inf is never sampled.

    Samples are argmax_a(logit_a + Gumbel noise), which has exactly this distribution.
    """

    action_dimensions = 0

    def __init__(self, n: int, start: int = 0) -> None:
        self.size, self.start, self.initial = n, start, (0.0,) * n

    def noise(self, generator: np.random.Generator, steps: int, environments: int) -> np.ndarray:
        """Gumbel numbers, [steps, environments, n]."""
        return _gumbel(generator, steps, environments, self.size)

    def sample(self, parameters: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Int64 [N] in 0 .. n-1."""
        return (parameters + noise).argmax(axis=-1)

    def mode(self, parameters: np.ndarray) -> np.ndarray:
        """Int64 [N] in 0 .. n-1."""
        return parameters.argmax(axis=-1)

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """`start` .. `start + n - 1`."""
        return action + self.start if self.start else action

    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Exact, finite for the largest logits."""
        return categorical(parameters, action)

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        """sum_a p_a (log p_a - log q_a)."""
        return _categorical_kl(parameters, other)


@final
class MultiCategorical(Head):
    """Several independent choices at once; log-probabilities, entropies and divergences are sums over them."""

    def __init__(self, choices: Sequence[int], start: Sequence[int]) -> None:
        self.choices, self.start = list(choices), np.array(start, dtype=np.int64)
        self.size, self.initial = sum(choices), (0.0,) * sum(choices)
        ends = np.cumsum(self.choices).tolist()
        self._slices = [slice(end - n, end) for end, n in zip(ends, self.choices, strict=True)]

    def noise(self, generator: np.random.Generator, steps: int, environments: int) -> np.ndarray:
        """Gumbel numbers, [steps, environments, sum of choices]."""
        return _gumbel(generator, steps, environments, self.size)

    def sample(self, parameters: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Int64 [N, A], each column in 0 .. choices-1."""
        return self.mode(parameters + noise)

    def mode(self, parameters: np.ndarray) -> np.ndarray:
        """Int64 [N, A], each column in 0 .. choices-1."""
        action = np.empty((len(parameters), len(self.choices)), dtype=np.int64)
        for column, part in enumerate(self._slices):
            parameters[:, part].argmax(axis=-1, out=action[:, column])
        return action

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """`start` added to each column."""
        return action + self.start

    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the choices."""
        pairs = [categorical(parameters[:, part], action[:, i]) for i, part in enumerate(self._slices)]
        return torch.stack([pair[0] for pair in pairs]).sum(0), torch.stack([pair[1] for pair in pairs]).sum(0)

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        """Sum over the choices."""
        parts = [_categorical_kl(parameters[..., part], other[..., part]) for part in self._slices]
        return torch.stack(parts).sum(0)


@final
class Bernoulli(Head):
    """`n` independent bits: pi(a_i = 1) = sigmoid(logit_i)."""

    def __init__(self, n: int) -> None:
        self.size, self.initial = n, (0.0,) * n

    def noise(self, generator: np.random.Generator, steps: int, environments: int) -> np.ndarray:
        """Logistic numbers, [steps, environments, n]."""
        return generator.logistic(size=(steps, environments, self.size)).astype(np.float32)

    def sample(self, parameters: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Int64 [N, n] of 0 and 1: whether logit + noise > 0."""
        return (parameters + noise > 0.0).astype(np.int64)

    def mode(self, parameters: np.ndarray) -> np.ndarray:
        """Int64 [N, n] of 0 and 1."""
        return (parameters > 0.0).astype(np.int64)

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """Bits as signed bytes."""
        return action.astype(np.int8)

    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """log pi = sum_i log sigmoid(+-logit_i); H = sum_i [ softplus(-l_i) + (1 - sigmoid(l_i)) l_i ]."""
        log_prob = logsigmoid((2 * action - 1).to(parameters.dtype) * parameters).sum(-1)
        logits = self._bounded(parameters)
        entropy = (softplus(-logits) + torch.sigmoid(-logits) * logits).sum(-1)
        return log_prob, entropy

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        """sum_i [ p log(p/q) + (1-p) log((1-p)/(1-q)) ]."""
        p, q = self._bounded(parameters), other.clamp(-1e30, 1e30)
        on = torch.sigmoid(p) * (logsigmoid(p) - logsigmoid(q))
        off = torch.sigmoid(-p) * (logsigmoid(-p) - logsigmoid(-q))
        return (on + off).sum(-1)

    @staticmethod
    def _bounded(logits: Tensor) -> Tensor:
        """Logits within the range where both probabilities are normal numbers, so that 0 * inf cannot arise."""
        limit = -math.log(torch.finfo(logits.dtype).tiny)
        return logits.clamp(-limit, limit)

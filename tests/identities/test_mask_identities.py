"""What invalid actions must not change, whichever choices and however many are valid."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from identity_strategies import PROPERTY, SEEDS, close, normal
from torch import Tensor

from upslope.policies.config import ActorCriticConfig, build_head
from upslope.policies.distributions import Head, HeadDistribution
from upslope.policies.masking import Masking
from upslope.spaces import ACTION_MASK, OBSERVATION, ActionMask, Box, Composite, Discrete, MultiDiscrete


class Choices(NamedTuple):
    """Logits [M, P] and which of them are valid; the sizes of the choices, and the parts of P they take."""

    sizes: tuple[int, ...]
    masking: Masking
    head: Head
    logits: Tensor
    valid: Tensor

    @property
    def parts(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.logits.split(self.sizes, -1), self.valid.split(self.sizes, -1), strict=True))

    def masked(self, logits: Tensor) -> HeadDistribution:
        observation = {ACTION_MASK: self.valid, OBSERVATION: torch.zeros(len(logits), 1)}
        return HeadDistribution(self.head, self.masking.apply(logits, observation))

    def first_valid(self) -> Tensor:
        action = torch.stack([valid.int().argmax(-1) for _, valid in self.parts], -1)
        return action[:, 0] if len(self.sizes) == 1 else action


@st.composite
def choices(draw: st.DrawFn) -> Choices:
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    seed, count = draw(SEEDS), 4
    logits = normal(seed, count, sum(sizes)) * draw(st.sampled_from([1.0, 30.0]))
    valid = normal(seed + 1, count, sum(sizes)) > 0.0
    for part in valid.split(sizes, -1):
        part[~part.any(-1), 0] = True
    actions = Discrete(sizes[0]) if len(sizes) == 1 else MultiDiscrete(sizes, (0,) * len(sizes))
    space = Composite(((ACTION_MASK, ActionMask(sizes)), (OBSERVATION, Box((1,), -1.0, 1.0))))
    return Choices(sizes, Masking.of(space, actions), build_head(actions, ActorCriticConfig()), logits, valid)


def alone(logits: Tensor, valid: Tensor) -> list[Tensor]:
    """log pi over the valid choices of each row alone: the others do not exist."""
    return [row[chosen].log_softmax(-1) for row, chosen in zip(logits, valid, strict=True)]


def total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


@PROPERTY
@given(choices())
def test_masked_is_a_distribution_over_the_valid_choices_alone(given: Choices) -> None:
    log_prob, entropy = given.masked(given.logits).log_prob_and_entropy(given.first_valid())
    every = [alone(*part) for part in given.parts]
    close(log_prob, total([torch.stack([row[0] for row in rows]) for rows in every]))
    close(entropy, total([torch.stack([-(row.exp() * row).sum() for row in rows]) for rows in every]))


@PROPERTY
@given(choices())
def test_masked_kl_is_that_over_the_valid_choices_alone(given: Choices) -> None:
    other = given.logits.flip(0) * 0.5
    found = given.masked(given.logits).kl(given.masked(other))
    pairs = [(alone(p, v), alone(q, v)) for (p, v), q in zip(given.parts, other.split(given.sizes, -1), strict=True)]
    expected = [torch.stack([(a.exp() * (a - b)).sum() for a, b in zip(*pair, strict=True)]) for pair in pairs]
    close(found, total(expected))


@PROPERTY
@given(choices())
def test_invalid_choices_get_no_gradient_and_a_single_one_none_at_all(given: Choices) -> None:
    logits = given.logits.requires_grad_()
    distribution = given.masked(logits)
    log_prob, entropy = distribution.log_prob_and_entropy(given.first_valid())
    divergence = distribution.kl(given.masked(given.logits.detach().flip(0)))
    for value in (log_prob, entropy, divergence):
        (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        assert bool(gradient.isfinite().all())
        assert not bool(gradient[~given.valid].any())
        for part, valid in zip(gradient.split(given.sizes, -1), given.valid.split(given.sizes, -1), strict=True):
            assert float(part[valid.sum(-1) == 1].abs().sum()) < 1e-12


@PROPERTY
@given(choices())
def test_masked_second_derivatives_are_finite_and_leave_invalid_choices_alone(given: Choices) -> None:
    logits = given.logits.requires_grad_()
    distribution = given.masked(logits)
    log_prob, entropy = distribution.log_prob_and_entropy(given.first_valid())
    value = (log_prob + entropy + distribution.kl(distribution.detach())).sum()
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), logits)
    assert bool(second.isfinite().all())
    assert not bool(second[~given.valid].any())


@PROPERTY
@given(choices(), SEEDS)
def test_the_sampler_masks_as_the_policy_does_and_takes_valid_choices_alone(given: Choices, seed: int) -> None:
    observation = {ACTION_MASK: given.valid.numpy(), OBSERVATION: np.zeros((len(given.logits), 1))}
    parameters = given.masking.apply_arrays(given.logits.numpy().copy(), observation)
    close(torch.from_numpy(np.exp(parameters)), given.masked(given.logits).parameters.exp())
    noise = given.head.noise(np.random.default_rng(seed), 8, len(given.logits))
    for action in [given.head.mode(parameters), *(given.head.sample(parameters, chance) for chance in noise)]:
        columns = action[:, None] if action.ndim == 1 else action
        for column, (_, valid) in zip(columns.T, given.parts, strict=True):
            assert bool(valid.gather(-1, torch.from_numpy(column)[:, None]).all())


@PROPERTY
@given(choices(), st.integers(0, 2))
def test_a_choice_without_a_valid_value_masks_nothing_and_leaves_the_others(given: Choices, which: int) -> None:
    empty = which % len(given.sizes)
    given.valid.split(given.sizes, -1)[empty][...] = False
    everything = given.valid.clone()
    everything.split(given.sizes, -1)[empty][...] = True
    found = given.masked(given.logits).parameters
    close(found.exp(), torch.where(everything, given.logits, -torch.inf).exp())
    observation = {ACTION_MASK: given.valid.numpy(), OBSERVATION: np.zeros((len(given.logits), 1))}
    close(torch.from_numpy(np.exp(given.masking.apply_arrays(given.logits.numpy().copy(), observation))), found.exp())

"""Fisher-vector products in closed form are those of differentiating the mean KL twice."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from upslope.estimators import fisher_vector_product
from upslope.policies import ActorCritic, ActorCriticConfig
from upslope.policies.fused_fisher import closed_form_product
from upslope.policies.language import token_head
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.token_head import Head, kl_divergence
from upslope.spaces import ActionMask, Box, Composite, Discrete, MultiBinary, MultiDiscrete, Space
from upslope.trajectory import Batch, Observation

STEPS = 9
SEEN = Box((3,), -math.inf, math.inf)
MOVES = Box((2,), -1.0, 3.0)
CASES: dict[str, tuple[Space, dict[str, Any]]] = {
    "categorical": (Discrete(4), {}),
    "multi_categorical": (MultiDiscrete((2, 3), (0, 0)), {"activation": "relu"}),
    "bernoulli": (MultiBinary(3), {"shared": True}),
    "gaussian": (MOVES, {}),
    "gaussian, bounded log_std": (MOVES, {"log_std_bounds": (-2.0, 1.0), "log_std_init": -0.3}),
    "gaussian, log_std of the state": (MOVES, {"state_dependent_std": True}),
    "squashed_gaussian": (MOVES, {"distribution": "squashed_gaussian", "shared": True}),
    "beta": (MOVES, {"distribution": "beta"}),
    "normalised": (Discrete(4), {"normalize_observation": True, "hidden": ()}),
}


def policy_of(observation_space: Space, action_space: Space, **changes: Any) -> ActorCritic:
    config = ActorCriticConfig(**{"hidden": (6, 5), "policy_gain": 1.0, **changes})
    generator = torch.Generator().manual_seed(0)
    policy = ActorCritic(observation_space, action_space, config, generator=generator).double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return policy


def batch_of(policy: ActorCritic, observation: Observation, mask: Tensor | None = None) -> Batch:
    """Steps whose actions do not matter."""
    width = {Discrete: None, MultiDiscrete: 2, MultiBinary: 3, Box: 2}[type(policy.action_space)]
    shape = (STEPS,) if width is None else (STEPS, width)
    real = isinstance(policy.action_space, Box)
    action = torch.full(shape, 0.5, dtype=torch.float64) if real else torch.zeros(shape, dtype=torch.long)
    zeros = torch.zeros(STEPS, dtype=torch.float64)
    return Batch(
        observation=observation,
        action=action,
        mask=torch.ones(STEPS, dtype=torch.bool) if mask is None else mask,
        behaviour_log_prob=zeros,
        advantage=zeros,
        value_target=None,
        behaviour_value=None,
        behaviour_distribution=None,
        weight=zeros,
    )


def both_products(policy: ActorCritic, batch: Batch) -> tuple[Tensor, Tensor]:
    """F v in closed form, and by differentiating twice."""
    parameters = [p for name, p in policy.named_parameters() if not name.startswith("critic")]
    old = policy.evaluate(batch).distribution.detach()
    steps = int(batch.mask.sum())
    closed = closed_form_product(policy, batch, old, parameters, steps=steps)
    assert closed is not None

    def divergence() -> Tensor:
        return old.kl(policy.evaluate(batch).distribution)[batch.mask].sum() / steps

    twice = fisher_vector_product(divergence, parameters)
    vector = torch.arange(sum(p.numel() for p in parameters), dtype=torch.float64).cos()
    return closed(vector), twice(vector)


def observations() -> Tensor:
    return torch.randn(STEPS, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("case", list(CASES))
def test_the_closed_form_is_the_double_backward(case: str) -> None:
    action_space, changes = CASES[case]
    policy = policy_of(SEEN, action_space, **changes)
    closed, twice = both_products(policy, batch_of(policy, observations()))
    assert float(twice.norm()) > 1e-3
    torch.testing.assert_close(closed, twice, rtol=1e-10, atol=1e-12)


def test_steps_that_were_not_chosen_do_not_count() -> None:
    policy = policy_of(SEEN, Discrete(4))
    mask = torch.arange(STEPS) % 3 > 0
    closed, twice = both_products(policy, batch_of(policy, observations(), mask))
    torch.testing.assert_close(closed, twice, rtol=1e-10, atol=1e-12)
    every, _ = both_products(policy, batch_of(policy, observations()))
    assert float((every - closed).norm()) > 1e-3


def test_invalid_actions_have_no_curvature() -> None:
    space = Composite((("observation", SEEN), ("action_mask", ActionMask((4,)))))
    policy = policy_of(space, Discrete(4))
    valid = torch.rand(STEPS, 4, generator=torch.Generator().manual_seed(2)) > 0.4
    valid[:, 1] = True
    batch = replace(batch_of(policy, {"observation": observations(), "action_mask": valid}))
    batch = replace(batch, action=torch.ones(STEPS, dtype=torch.long))
    closed, twice = both_products(policy, batch)
    assert closed.isfinite().all()
    torch.testing.assert_close(closed, twice, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("changes", [{"activation": "gelu"}, {"activation": "silu", "shared": True}], ids=str)
def test_there_is_none_for_other_activations(changes: dict[str, Any]) -> None:
    policy = policy_of(SEEN, Discrete(4), **changes)
    batch = batch_of(policy, observations())
    parameters = [p for name, p in policy.named_parameters() if not name.startswith("critic")]
    old = policy.evaluate(batch).distribution.detach()
    assert closed_form_product(policy, batch, old, parameters, steps=STEPS) is None


def test_there_is_none_for_part_of_the_actor() -> None:
    policy = policy_of(SEEN, Discrete(4))
    batch = batch_of(policy, observations())
    parameters = list(policy.actor.parameters())[1:]
    old = policy.evaluate(batch).distribution.detach()
    assert closed_form_product(policy, batch, old, parameters, steps=STEPS) is None


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["uncapped", "capped"])
def test_a_divergence_over_tokens_can_be_differentiated_twice(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_head, "LARGEST_CHUNK", 2 * 5)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, old, old_weight = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((3, 2), (5, 2), (5,), (3, 2), (5, 2))
    )
    sampling = Sampling(temperature=0.7)

    def divergence(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        q = Head(weight=weight, bias=bias, softcap=softcap, sampling=sampling, dtype=torch.float64)
        p = Head(weight=old_weight, bias=None, softcap=softcap, sampling=sampling, dtype=torch.float64)
        return kl_divergence(old, p, hidden, q)

    inputs = tuple(tensor.requires_grad_() for tensor in (hidden, weight, bias))
    assert torch.autograd.gradgradcheck(divergence, inputs)

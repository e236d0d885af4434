"""A reference is a copy that stays, with a name and a hash of its weights."""

from dataclasses import replace

import pytest
import torch
from language_models import TOKENS, build
from torch import nn

from upslope.policies.language.config import LoraConfig
from upslope.policies.language.description import content_hash
from upslope.policies.language.policy import LanguagePolicy
from upslope.policies.language.reference import freeze
from upslope.policies.language.sampling import Sampling
from upslope.train.config import OptimizerConfig
from upslope.train.optimizer import FlatOptimizer
from upslope.trajectory import Batch


def steps() -> Batch:
    rows, width = TOKENS.shape
    nothing = torch.zeros(rows, width - 1)
    mask = torch.ones(rows, width - 1, dtype=torch.bool)
    mask[:, :3] = False
    return Batch(
        observation=TOKENS[:, :-1],
        action=TOKENS[:, 1:],
        mask=mask,
        behaviour_log_prob=nothing,
        advantage=nothing,
        value_target=None,
        behaviour_value=None,
        behaviour_distribution=None,
        weight=nothing,
    )


def move_adapters(policy: LanguagePolicy) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_a_reference_answers_as_the_policy_did_and_never_moves() -> None:
    policy = build(value_head=True, sampling=Sampling(temperature=0.7, top_k=5))
    before = policy.evaluate(steps())
    reference = freeze(policy, "start")
    optimizer = FlatOptimizer(policy, OptimizerConfig(learning_rate=0.1))
    policy.evaluate(steps()).log_prob.sum().backward()
    optimizer.step(0.1)
    after = reference.evaluate(steps())
    assert (reference.name, after.value, reference.sequential) == ("start", None, True)
    assert torch.equal(after.log_prob, before.log_prob)
    assert torch.equal(after.entropy, before.entropy)
    assert not after.log_prob.requires_grad
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert not torch.allclose(policy.evaluate(steps()).log_prob, before.log_prob, atol=1e-3)
    divergence = policy.evaluate(steps()).distribution.kl(after.distribution)
    assert divergence[steps().mask].min() > 0.0
    assert torch.equal(reference.log_prob(TOKENS[:, :-1], TOKENS[:, 1:])[steps().mask], before.log_prob[steps().mask])


def test_the_hash_is_of_the_weights_alone() -> None:
    policy = build()
    first = freeze(policy, "one")
    assert first.content_hash == freeze(build(value_head=True, precision="bfloat16"), "other").content_hash
    assert first.content_hash == content_hash(policy.model)
    assert len(first.content_hash) == 64
    assert first.content_hash != freeze(build(seed=2), "one").content_hash
    FlatOptimizer(policy, OptimizerConfig())
    assert freeze(policy, "flat").content_hash == first.content_hash
    for parameter in policy.model.parameters():
        flat = parameter.data.view(-1)
        kept = flat[-1].item()
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
        assert freeze(policy, "one").content_hash != first.content_hash
        flat[-1] = kept
    assert freeze(policy, "one").content_hash == first.content_hash


def test_hash_of_known_bytes() -> None:
    """SHA-256 of b"weight\\0torch.float32\\0(2,)\\0" and the little-endian floats 1 and -2."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    expected = "4040ecb1fc3cda2c648103162ea388df85d8156f9109d703be13514040e0051e"
    assert content_hash(module) == expected


def test_adapters_are_merged_not_switched_off() -> None:
    policy = build(lora=LoraConfig(rank=2))
    base = freeze(policy, "before")
    assert base.content_hash == freeze(build(), "plain").content_hash
    move_adapters(policy)
    with_adapters = freeze(policy, "SFT")
    expected = policy.evaluate(steps()).log_prob
    assert torch.allclose(with_adapters.evaluate(steps()).log_prob, expected, atol=1e-5)
    assert not torch.allclose(base.evaluate(steps()).log_prob, expected, atol=1e-2)
    assert not [name for name, _ in with_adapters.named_parameters() if "lora" in name]
    assert any(parameter.requires_grad for parameter in policy.parameters())


def test_a_reference_neither_samples_nor_values() -> None:
    reference = freeze(build(value_head=True), "start")
    with pytest.raises(TypeError, match="completes prompts"):
        reference.sampler()
    with pytest.raises(TypeError, match="no critic"):
        reference.values(replace(steps()))  # pyright: ignore[reportArgumentType]

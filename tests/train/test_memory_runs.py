"""Runs of policies that remember: resumed exactly, cut into micro-batches, saved and loaded, second-differentiated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import remains, tiny

from upslope import (
    ActorCritic,
    ActorCriticConfig,
    CheckpointConfig,
    EnvironmentConfig,
    MemoryConfig,
    RolloutConfig,
    load,
)
from upslope.estimators import fisher_vector_product
from upslope.policies.config import config_from_tree
from upslope.spaces import Box, Discrete
from upslope.train import Snapshot, resume, train
from upslope.train.log import read_metrics

HIDDEN = EnvironmentConfig(id="CartPole-v1", count=2, vectorization="sync", observation_entries=(0, 2))


def remembering(kind: str, **memory: object) -> ActorCriticConfig:
    settings = MemoryConfig(kind=kind, size=8, heads=2, context=4, **memory)  # type: ignore[arg-type]
    return ActorCriticConfig(hidden=(8,), memory=settings, normalize_reward=True, normalize_observation=True)


class PulledPlugError(RuntimeError):
    pass


def pulled(snapshot: Snapshot) -> None:
    if snapshot.update == 5:
        raise PulledPlugError


@pytest.mark.parametrize("resumed", ["snapshot", "rebuild"])
@pytest.mark.parametrize("kind", ["gru", "lstm", "transformer"])
def test_a_run_that_stopped_goes_on_with_what_it_remembered(kind: str, resumed: str, tmp_path: Path) -> None:
    changes = {
        "policy": remembering(kind),
        "environment": replace(HIDDEN, resume=resumed),  # type: ignore[arg-type]
        "rollout": RolloutConfig(steps=32, row_steps=16),
    }
    train(tiny(tmp_path / "straight", **changes))
    with pytest.raises(PulledPlugError):
        train(tiny(tmp_path / "stopped", **changes), callbacks=[pulled])
    resume(tmp_path / "stopped" / "run")
    assert remains(tmp_path / "stopped" / "run") == remains(tmp_path / "straight" / "run")


def test_micro_batches_change_nothing_and_the_first_ratio_is_one(tmp_path: Path) -> None:
    policies = []
    for parts in (1, 2):
        run = tiny(tmp_path / str(parts), policy=remembering("lstm"), environment=HIDDEN, steps=128)
        run = replace(
            run,
            rollout=RolloutConfig(steps=32, row_steps=8),
            optimizer=replace(run.optimizer, micro_batches=parts),
            checkpoint=CheckpointConfig(times=1),
        )
        policies.append(train(run).policy.state_dict())
        errors = [
            line["mismatch"] for line in read_metrics(run.directory / "run" / "metrics.jsonl") if "mismatch" in line
        ]
        assert errors
        assert max(errors) < 1e-5
    for name, tensor in policies[0].items():
        torch.testing.assert_close(policies[1][name], tensor, rtol=1e-3, atol=1e-4)


def make(config: ActorCriticConfig) -> ActorCritic:
    return ActorCritic(Box((2,), -1.0, 1.0), Discrete(2), config, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["gru", "lstm", "transformer"])
def test_a_policy_with_a_memory_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    run = tiny(tmp_path, policy=remembering(kind, layers=2, shared=True), environment=HIDDEN, steps=128)
    policy = train(run).policy
    again = load(tmp_path / "run" / "policy")
    observation = np.array([[0.1, -0.2], [0.3, 0.0]], np.float32)
    ours, theirs = policy.start(), again.start()
    for _ in range(3):
        for one, memory in ((policy, ours), (again, theirs)):
            one.act(observation, memory=memory)
    assert isinstance(ours.arrays, dict)
    assert isinstance(theirs.arrays, dict)
    assert all(np.array_equal(array, theirs.arrays[name]) for name, array in ours.arrays.items())


@pytest.mark.parametrize("kind", ["gru", "lstm", "transformer"])
def test_the_fisher_matrix_is_symmetric_and_positive(kind: str) -> None:
    """Through a second backward pass of the memory."""
    policy = make(
        ActorCriticConfig(hidden=(), critic=False, memory=MemoryConfig(kind=kind, size=4, heads=2), policy_gain=1.0)
    )  # type: ignore[arg-type]
    policy = policy.double()
    generator = torch.Generator().manual_seed(1)
    observation = torch.randn(3, 5, 2, dtype=torch.float64, generator=generator)
    action = torch.zeros(3, 5, dtype=torch.long)
    old = torch.stack([policy.log_prob(observation, action + k) for k in range(2)], -1).detach()

    def divergence() -> torch.Tensor:
        new = torch.stack([policy.log_prob(observation, action + k) for k in range(2)], -1)
        return (old.exp() * (old - new)).sum(-1).mean()

    parameters = list(policy.parameters())
    product = fisher_vector_product(divergence, parameters)
    size = sum(parameter.numel() for parameter in parameters)
    u, v = torch.randn(2, size, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(u @ product(v), v @ product(u))
    assert float(v @ product(v)) > 0.0


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"kind": "rnn"}, "one of gru, lstm, transformer"),
        ({"size": 0}, "memory.size must be at least 1"),
        ({"kind": "transformer", "size": 6}, "multiple of memory.heads=4"),
    ],
    ids=["kind", "size", "heads"],
)
def test_settings_without_meaning_are_refused(settings: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        MemoryConfig(**settings)  # type: ignore[arg-type]


def test_rows_divide_a_rollout() -> None:
    with pytest.raises(ValueError, match=r"multiple of rollout\.row_steps=7"):
        RolloutConfig(steps=32, row_steps=7)


def test_a_saved_memory_larger_than_its_tensors_is_refused() -> None:
    tree = make(ActorCriticConfig(memory=MemoryConfig(size=4))).config_tree()["config"]
    assert config_from_tree(tree, 100_000).memory == MemoryConfig(size=4)
    with pytest.raises(ValueError, match="hold 3 numbers"):
        config_from_tree({**tree, "hidden": ()}, 3)

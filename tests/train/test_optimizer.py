"""The flat optimiser against plain `torch.optim` over separate parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from upslope.train.checkpoint import load_checkpoint, save_checkpoint
from upslope.train.config import OptimizerConfig
from upslope.train.optimizer import FlatOptimizer, NonFiniteGradientError

KINDS = [
    pytest.param(OptimizerConfig(kind="adam"), lambda p: torch.optim.Adam(p, eps=1e-5), id="adam"),
    pytest.param(
        OptimizerConfig(kind="adam", betas=(0.8, 0.95), epsilon=1e-8),
        lambda p: torch.optim.Adam(p, betas=(0.8, 0.95), eps=1e-8),
        id="adam_other",
    ),
    pytest.param(OptimizerConfig(kind="rmsprop"), lambda p: torch.optim.RMSprop(p, alpha=0.99, eps=1e-5), id="rmsprop"),
    pytest.param(OptimizerConfig(kind="sgd"), lambda p: torch.optim.SGD(p), id="sgd"),
    pytest.param(OptimizerConfig(kind="sgd", momentum=0.9), lambda p: torch.optim.SGD(p, momentum=0.9), id="momentum"),
]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def loss_of(module: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(module.parameters()).dtype
    inputs = torch.randn(4, 3, generator=generator, dtype=dtype)
    return (module(inputs) * (step + 1)).square().sum()


def descend(module: nn.Module, optimizer: FlatOptimizer, steps: range) -> list[float]:
    norms = []
    for step in steps:
        optimizer.zero_gradient()
        loss_of(module, step).backward()
        norms.append(optimizer.step(1e-2 / (step + 1)))
    return norms


def test_parameters_and_gradients_are_views_of_one_buffer() -> None:
    module = network()
    before = torch.cat([p.detach().flatten() for p in module.parameters()])
    optimizer = FlatOptimizer(module, OptimizerConfig())
    assert torch.equal(optimizer.flat.detach(), before)
    loss_of(module, 0).backward()
    gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    assert torch.equal(optimizer.gradient, torch.cat(gradients))
    assert float(optimizer.gradient.abs().sum()) > 0.0
    with torch.no_grad():
        optimizer.flat.fill_(2.0)
    assert all(bool((p == 2.0).all()) for p in module.parameters())
    optimizer.zero_gradient()
    assert all(bool((p.grad == 0.0).all()) for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("limit", [None, 0.5, 1e9])
@pytest.mark.parametrize(("config", "make"), KINDS)
def test_the_same_steps_as_torch_takes(
    config: OptimizerConfig, make: Callable[[Any], torch.optim.Optimizer], limit: float | None
) -> None:
    ours, theirs = network(), network()
    optimizer = FlatOptimizer(ours, replace(config, max_gradient_norm=limit))
    plain = make(theirs.parameters())
    norms = descend(ours, optimizer, range(6))
    for step in range(6):
        plain.zero_grad()
        loss_of(theirs, step).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), limit or float("inf"))
        assert norms[step] == pytest.approx(float(norm), rel=1e-12)
        for group in plain.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        plain.step()
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_frozen_parameters_stay_out() -> None:
    module = network()
    frozen = next(module.parameters())
    frozen.requires_grad_(False)
    before = frozen.clone()
    optimizer = FlatOptimizer(module, OptimizerConfig())
    assert optimizer.flat.numel() == sum(p.numel() for p in module.parameters()) - frozen.numel()
    descend(module, optimizer, range(2))
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_is_skipped(fault: float) -> None:
    module = network()
    optimizer = FlatOptimizer(module, OptimizerConfig())
    descend(module, optimizer, range(2))
    before, state = optimizer.flat.detach().clone(), optimizer.state()
    optimizer.gradient.fill_(1.0)
    optimizer.gradient[3] = fault
    norm = optimizer.step(1.0)
    assert not norm < float("inf")
    assert torch.equal(optimizer.flat.detach(), before)
    assert optimizer.skipped == 1
    for name, value in optimizer.state()["moments"].items():
        assert torch.equal(value, state["moments"][name]), name
    descend(module, optimizer, range(2, 3))
    assert optimizer.skipped == 0


def test_too_many_in_a_row_end_the_run() -> None:
    module = network()
    optimizer = FlatOptimizer(module, OptimizerConfig(max_skipped=3))
    before = optimizer.flat.detach().clone()
    optimizer.gradient.fill_(float("nan"))
    optimizer.step(1.0)
    optimizer.step(1.0)
    with pytest.raises(NonFiniteGradientError, match=r"in 3 optimiser steps in a row .*lower the learning rate"):
        optimizer.step(1.0)
    assert torch.equal(optimizer.flat.detach(), before)


def test_moves_that_were_not_taken_are_counted_apart_from_the_critics_steps() -> None:
    """A natural step whose gradient is never finite ends the run, however well the critic's steps go between."""
    module = network()
    optimizer = FlatOptimizer(module, OptimizerConfig(max_skipped=3))

    def refuse() -> None:
        raise AssertionError("moved by a gradient that is not finite")

    for _ in range(2):
        optimizer.gradient.fill_(float("nan"))
        optimizer.step_by(refuse)
        descend(module, optimizer, range(2))
    assert optimizer.unmoved == 2
    optimizer.gradient.fill_(float("nan"))
    with pytest.raises(NonFiniteGradientError, match=r"in 3 optimiser steps in a row"):
        optimizer.step_by(refuse)


@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize(("config", "make"), KINDS)
def test_the_state_survives_a_checkpoint_to_the_last_bit(
    config: OptimizerConfig, make: object, taken: int, tmp_path: Path
) -> None:
    straight = network(torch.float32)
    optimizer = FlatOptimizer(straight, config)
    descend(straight, optimizer, range(taken))
    optimizer.skipped, optimizer.unmoved = 2, 1
    saved = save_checkpoint(
        tmp_path, taken, {"weights": dict(straight.state_dict()), "optimizer": optimizer.state()}, keep=None
    )
    optimizer.skipped = 0
    descend(straight, optimizer, range(taken, taken + 3))

    resumed = network(torch.float32)
    continued = FlatOptimizer(resumed, config)
    descend(resumed, continued, range(5, 6))
    tree = load_checkpoint(saved).state
    resumed.load_state_dict(tree["weights"])
    continued.load_state(tree["optimizer"])
    assert (continued.skipped, continued.unmoved) == (2, 1)
    descend(resumed, continued, range(taken, taken + 3))
    assert torch.equal(continued.flat, optimizer.flat)


def test_saved_moments_are_not_touched_by_later_steps() -> None:
    module = network()
    optimizer = FlatOptimizer(module, OptimizerConfig())
    descend(module, optimizer, range(1))
    saved = optimizer.state()
    copies = {name: value.clone() for name, value in saved["moments"].items()}
    descend(module, optimizer, range(1, 3))
    assert all(torch.equal(saved["moments"][name], value) for name, value in copies.items())


def test_nothing_to_train_or_a_mixture_of_types_is_refused() -> None:
    frozen = network()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        FlatOptimizer(frozen, OptimizerConfig())
    mixed = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1).double()])
    with pytest.raises(ValueError, match="one type"):
        FlatOptimizer(mixed, OptimizerConfig())


@pytest.mark.parametrize(
    "setting",
    [{"micro_batches": 0}, {"max_skipped": 0}, {"learning_rate": -1.0}, {"max_gradient_norm": 0.0}, {"epsilon": -1.0}],
    ids=lambda setting: next(iter(setting)),
)
def test_numbers_without_meaning_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        OptimizerConfig(**setting)

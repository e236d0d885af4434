"""Whole rows of environments with action masks: what stands at hidden positions, an empty mask too, is no matter."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from upslope import GRPO, KTO, NPG, RLOO, SFT, ActorCritic, ActorCriticConfig, MemoryConfig, Preference, Reinforce
from upslope.algorithms import Now
from upslope.auditing.source import Recorder
from upslope.spaces import ACTION_MASK, OBSERVATION, ActionMask, Box, Composite, MultiDiscrete
from upslope.train.natural import NaturalUpdate
from upslope.train.step import learn
from upslope.trajectory import Batch, Trajectory

SIZES, LENGTHS, STEPS = (3, 2), (4, 2, 3, 1), 4
SEEN = Composite(((OBSERVATION, Box((2,), -1.0, 1.0)), (ACTION_MASK, ActionMask(SIZES))))
ALGORITHMS = [
    SFT(reduction="trajectory_sum"),
    Preference(),
    KTO(),
    GRPO(ratio="sequence"),
    RLOO(ratio="sequence_sum"),
    Reinforce(psi="reward_to_go", gamma=0.9),
    NPG(psi="group", gamma=1.0),
]
FILLINGS = {"nothing is valid": 0.0, "everything is valid": 1.0, "what was taken is not": 0.5}


def policy_of(memory: MemoryConfig | None) -> ActorCritic:
    config = ActorCriticConfig(hidden=(4,), critic=False, memory=memory, policy_gain=1.0)
    return ActorCritic(SEEN, MultiDiscrete(SIZES, (0, 0)), config, generator=torch.Generator().manual_seed(0)).double()


def rows(filling: float) -> Trajectory:
    """Pairs of rows padded to four steps; behind their ends the masks hold `filling`, 0.5 for all but action (0, 0)."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.arange(STEPS) < torch.tensor(LENGTHS).unsqueeze(-1)
    action = torch.stack([torch.randint(size, chosen.shape, generator=generator) for size in SIZES], -1)
    action = action.masked_fill(~chosen.unsqueeze(-1), 0)
    valid = torch.rand(*chosen.shape, sum(SIZES), generator=generator) < 0.5
    for begin, each in zip((0, 3), action.unbind(-1), strict=True):
        valid.scatter_(-1, begin + each.unsqueeze(-1), True)
    behind = torch.full((sum(SIZES),), filling > 0.0)
    if filling == 0.5:
        behind[[0, 3]] = False
    last = torch.arange(STEPS) == torch.tensor(LENGTHS).unsqueeze(-1) - 1
    return Trajectory(
        observation={
            OBSERVATION: torch.rand(*chosen.shape, 2, generator=generator).double(),
            ACTION_MASK: torch.where(chosen.unsqueeze(-1), valid, behind),
        },
        action=action,
        reward=torch.where(last, torch.tensor([1.0, -1.0, 1.0, -1.0]).unsqueeze(-1), 0.0).double(),
        terminated=last,
        truncated=torch.zeros_like(last),
        mask=chosen,
        behaviour_log_prob=torch.where(chosen, -1.0, 0.0).double(),
        time=torch.arange(STEPS).expand_as(chosen) * chosen,
        final_observation={OBSERVATION: torch.zeros(0, 2).double(), ACTION_MASK: torch.zeros(0, 5, dtype=torch.bool)},
        final_index=torch.zeros(0, dtype=torch.long),
        group=torch.tensor([0, 0, 1, 1]),
    )


def ascent(algorithm: Any, policy: ActorCritic, trajectory: Trajectory) -> tuple[Tensor, dict[str, float]]:
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        reference.actor.tensors()[0].mul_(0.5)
    parameters = list(policy.parameters())
    recorder = Recorder(parameters)
    learned = learn(
        policy,
        algorithm,
        recorder,
        trajectory,
        now=Now(state=algorithm.initial_state()),
        learning_rate=0.0,
        generator=np.random.default_rng(0),
        reference=reference,
    )
    return recorder.ascents[0], learned.metrics


@pytest.mark.parametrize("memory", [None, MemoryConfig(size=4)], ids=["steps", "memory"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: type(algorithm).__name__)
def test_masks_of_hidden_steps_count_for_nothing(algorithm: Any, memory: MemoryConfig | None) -> None:
    policy = policy_of(memory)
    found = {name: ascent(algorithm, policy, rows(filling)) for name, filling in FILLINGS.items()}
    wanted, metrics = found["everything is valid"]
    assert wanted.isfinite().all()
    assert wanted.any()
    for gradient, figures in found.values():
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)
        assert figures == pytest.approx(metrics, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("memory", [None, MemoryConfig(size=4)], ids=["closed form", "two backward passes"])
def test_the_fisher_matrix_knows_no_invalid_action_and_no_hidden_step(memory: MemoryConfig | None) -> None:
    """F v is that of the scores of the valid actions, at the chosen steps alone."""
    policy, found = policy_of(memory), list[Tensor]()
    parameters = list(policy.parameters())
    vector = torch.linspace(-1.0, 1.0, sum(parameter.numel() for parameter in parameters)).double()
    for filling in FILLINGS.values():
        update = NaturalUpdate(policy, NPG(), parameters, [batch(rows(filling))], Now())
        found.append(update.fisher()(vector))
    expected = torch.zeros_like(vector)
    trajectory = rows(1.0)
    logits = policy.evaluate(trajectory).distribution.parameters
    for row, step in trajectory.mask.nonzero().tolist():
        for log_prob in (part.log_softmax(-1) for part in logits[row, step].split(SIZES)):
            for choice in log_prob.isfinite().nonzero().flatten().tolist():
                score = torch.cat(
                    [g.flatten() for g in torch.autograd.grad(log_prob[choice], parameters, retain_graph=True)]
                )
                expected += log_prob[choice].exp().detach() * score * (score @ vector) / int(trajectory.mask.sum())
    for product in found:
        torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-12)


def batch(trajectory: Trajectory) -> Batch:
    zero = torch.zeros_like(trajectory.reward)
    return Batch(
        observation=trajectory.observation,
        action=trajectory.action,
        mask=trajectory.mask,
        behaviour_log_prob=trajectory.behaviour_log_prob,
        advantage=zero,
        value_target=None,
        behaviour_value=None,
        behaviour_distribution=None,
        weight=zero,
        time=trajectory.time,
    )

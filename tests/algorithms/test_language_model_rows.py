"""What must not matter to a language model's updates: micro-batches, minibatches, padding, the order of rows.

A transformer of transformers' in float64, through `LanguagePolicy` and the training step.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
import torch
from sequence_rows import ALGORITHMS, KL, rows_for
from torch import Tensor
from torch.nn.functional import pad

from upslope.algorithms import PPO, Algorithm, Now, Reinforce
from upslope.auditing.language import language_policy
from upslope.auditing.source import Recorder
from upslope.auditing.tokens import TokenSetting
from upslope.exact import token_problem
from upslope.policies.language.policy import LanguagePolicy
from upslope.train.step import learn
from upslope.trajectory import Trajectory

EVERY: dict[str, Algorithm] = {
    **ALGORITHMS,
    "reinforce": Reinforce(gamma=1.0, psi="advantage", gae_lambda=0.9, reference_kl=replace(KL, place="reward")),
    "reinforce++": Reinforce(gamma=1.0, normalize_advantage=True),
    "ppo": PPO(gamma=1.0, epochs=1, minibatches=1, entropy_coefficient=0.01, value_clip=0.2, dual_clip=3.0),
    "ppo, penalty": PPO(gamma=1.0, epochs=1, minibatches=1, clip=None, kl_coefficient=0.5, reference_kl=KL),
}
EACH = pytest.mark.parametrize("name", list(EVERY))


@cache
def setting() -> TokenSetting:
    """Drawn by a table over prefixes, learnt by a language model with a critic."""
    whole = TokenSetting.build("tokens-longer", size=3, stale=True)
    policy, reference = (language_policy(token_problem("tokens-longer"), seed, width=16) for seed in (0, 1))
    return replace(whole, policy=policy, reference=reference.requires_grad_(False))


def learned(
    algorithm: Algorithm, trajectory: Trajectory, *, micro_batches: int = 1, seed: int = 0
) -> tuple[Tensor, dict[str, float]]:
    """[steps, P] the ascent of each optimiser step, and the metrics."""
    where = setting()
    assert isinstance(where.policy, LanguagePolicy)
    recorder = Recorder(tuple(where.policy.parameters()), micro_batches=micro_batches)
    found = learn(
        where.policy,
        algorithm,
        recorder,
        trajectory,
        now=Now(state=algorithm.initial_state()),
        learning_rate=0.0,
        generator=np.random.Generator(np.random.Philox(seed)),
        reference=where.reference,
    )
    return torch.stack(recorder.ascents), found.metrics


def same(left: tuple[Tensor, dict[str, float]], right: tuple[Tensor, dict[str, float]]) -> None:
    """Gradient, loss and every other figure, to 1e-9 of their size."""
    assert float((left[0] - right[0]).norm() / right[0].norm()) < 1e-9
    assert left[1].keys() == right[1].keys()
    for name, number in left[1].items():
        assert right[1][name] == pytest.approx(number, rel=1e-9, abs=1e-12), name


def rows_of(name: str) -> Trajectory:
    """12 completions of prompts of different lengths: ended ones and cut ones."""
    trajectory = rows_for(EVERY[name], setting())
    assert 0 < int(trajectory.truncated.any(-1).sum()) < 12
    assert len(set(trajectory.mask.sum(-1).tolist())) > 2
    return trajectory


@EACH
def test_neither_splits_nor_padding_nor_order_matter(name: str) -> None:
    algorithm, trajectory = EVERY[name], rows_of(name)
    whole = learned(algorithm, trajectory)
    assert float(whole[0].norm()) > 1e-3
    for parts in (2, 3, 5):
        same(learned(algorithm, trajectory, micro_batches=parts), whole)
    same(learned(algorithm, padded(trajectory)), whole)
    same(learned(algorithm, moved(algorithm, trajectory)), whole)
    same(learned(algorithm, padded(moved(algorithm, trajectory)), micro_batches=5), whole)


@pytest.mark.parametrize("name", ["grpo", "gspo", "rloo, ratio of sequences", "ppo", "dpo", "kto"])
def test_minibatches_are_cut_the_same_whatever_the_micro_batches(name: str) -> None:
    algorithm, trajectory = replace(EVERY[name], epochs=2, minibatches=3), rows_of(name)  # pyright: ignore
    whole = learned(algorithm, trajectory)
    assert len(whole[0]) == 6
    for parts in (2, 3):
        same(learned(algorithm, trajectory, micro_batches=parts), whole)


def padded(trajectory: Trajectory) -> Trajectory:
    """Three more positions in every row that hold other tokens, and rubbish wherever nothing was chosen."""
    steps = trajectory.shape[1]
    assert isinstance(trajectory.observation, Tensor)

    def longer(value: Tensor, filling: float) -> Tensor:
        return pad(value, (0, 3), value=filling)

    def rubbish(value: Tensor) -> Tensor:
        return longer(value.masked_fill(~trajectory.mask, torch.nan), torch.nan)

    return replace(
        trajectory,
        observation=longer(trajectory.observation, 3),
        action=longer(trajectory.action, 2),
        reward=rubbish(trajectory.reward),
        terminated=longer(trajectory.terminated, False),
        truncated=longer(trajectory.truncated, False),
        mask=longer(trajectory.mask, False),
        behaviour_log_prob=rubbish(trajectory.behaviour_log_prob),
        time=longer(trajectory.time, 0),
        final_index=trajectory.final_index // steps * (steps + 3) + trajectory.final_index % steps,
    )


def moved(algorithm: Algorithm, trajectory: Trajectory) -> Trajectory:
    """The same rows in another order: groups stay together, and so do pairs."""
    order = torch.tensor([2, 3, 0, 1]).unsqueeze(-1) * 3 + torch.tensor([1, 2, 0])
    if algorithm.passes.together == 2:
        order = torch.tensor([5, 2, 0, 1, 4, 3]).unsqueeze(-1) * 2 + torch.arange(2)
    index, steps = order.flatten(), trajectory.shape[1]
    found = {part.name: getattr(trajectory, part.name) for part in fields(Trajectory)}
    for name, value in found.items():
        if isinstance(value, Tensor) and "final" not in name:
            found[name] = value[index]
    at = found["truncated"].flatten().nonzero().squeeze(-1)
    found.update(final_index=at, final_observation=found["action"].flatten()[at])
    assert len(at) == len(trajectory.final_index)
    assert steps == found["mask"].shape[1]
    return Trajectory(**found)

"""Steps the policy did not choose: skipped by returns, and no part of a gradient or metric, whatever they hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from upslope.algorithms import A2C, PPO, Now, OneStepActorCritic, Reinforce
from upslope.auditing.source import Recorder
from upslope.exact import PrefixTable, TokenMDP, enumerate_completions, token_problem
from upslope.train.step import learn
from upslope.trajectory import Trajectory

ALGORITHMS = [
    *[Reinforce(gamma=0.5, psi=psi) for psi in ("total_reward", "reward_to_go", "baselined", "action_value")],
    *[Reinforce(gamma=0.5, psi=psi) for psi in ("advantage", "td_residual")],
    OneStepActorCritic(gamma=0.5),
    A2C(gamma=0.5, gae_lambda=0.9),
    PPO(gamma=0.5, epochs=1, minibatches=1),
]


def with_a_hidden_step() -> Trajectory:
    """Three steps; the second was not chosen, and everything about it is rubbish."""
    terminated = torch.tensor([[False, False, True]])
    return Trajectory(
        observation=torch.zeros(1, 3, dtype=torch.long),
        action=torch.zeros(1, 3, dtype=torch.long),
        reward=torch.tensor([[1.0, torch.nan, 2.0]]),
        terminated=terminated,
        truncated=torch.zeros_like(terminated),
        mask=torch.tensor([[True, False, True]]),
        behaviour_log_prob=torch.tensor([[-1.0, torch.nan, -1.0]]),
        time=torch.tensor([[0, 1, 1]]),
        final_observation=torch.zeros(0, dtype=torch.long),
        final_index=torch.zeros(0, dtype=torch.long),
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{type(a).__name__}-{getattr(a, 'psi', '')}")
def test_a_hidden_step_is_skipped_and_not_decayed_through(algorithm):
    """As if the two chosen steps followed one another: r = (1, 2), V = (4, 6)."""
    hidden = with_a_hidden_step()
    value, next_value = torch.tensor([[4.0, 99.0, 6.0]]), torch.tensor([[99.0, 6.0, 0.0]])
    found = algorithm.advantage(hidden, value, next_value, Now())
    keep = [0, 2]
    plain = replace(
        hidden,
        observation=hidden.observation[:, keep],
        action=hidden.action[:, keep],
        reward=hidden.reward[:, keep],
        terminated=hidden.terminated[:, keep],
        truncated=hidden.truncated[:, keep],
        mask=hidden.mask[:, keep],
        behaviour_log_prob=hidden.behaviour_log_prob[:, keep],
        time=hidden.time[:, keep],
    )
    wanted = algorithm.advantage(plain, value[:, keep], torch.tensor([[6.0, 0.0]]), Now())
    torch.testing.assert_close(found.advantage[:, keep], wanted.advantage)
    if wanted.value_target is not None:
        torch.testing.assert_close(found.value_target[:, keep], wanted.value_target)


def updated(algorithm, policy: PrefixTable, trajectory: Trajectory, micro_batches: int):
    parameters = [policy.theta, policy.value]
    recorder = Recorder(parameters, micro_batches=micro_batches)
    learned = learn(
        policy,
        algorithm,
        recorder,
        trajectory,
        now=Now(state=algorithm.initial_state()),
        learning_rate=0.0,
        generator=np.random.default_rng(0),
    )
    return recorder.ascents[0], learned.metrics


def completions() -> tuple[TokenMDP, PrefixTable, Trajectory]:
    problem = token_problem("tokens")
    policy = PrefixTable(problem)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        policy.theta.copy_(torch.randn(policy.theta.shape, generator=generator, dtype=torch.float64))
        policy.value.copy_(torch.randn(policy.value.shape, generator=generator, dtype=torch.float64))
    rows = enumerate_completions(problem, policy)
    return problem, policy, rows.select(list(range(0, len(rows), 4)))


@pytest.mark.parametrize("algorithm", [replace(a, gamma=1.0) for a in ALGORITHMS], ids=lambda a: type(a).__name__)
def test_rubbish_at_hidden_positions_of_whole_rows_changes_nothing(algorithm):
    _, policy, trajectory = completions()
    clean, metrics = updated(algorithm, policy, trajectory, 1)
    rubbish = replace(
        trajectory,
        reward=trajectory.reward.masked_fill(~trajectory.mask, torch.nan),
        behaviour_log_prob=trajectory.behaviour_log_prob.masked_fill(~trajectory.mask, torch.nan),
    )
    again, same = updated(algorithm, policy, rubbish, 1)
    torch.testing.assert_close(again, clean, rtol=1e-12, atol=1e-12)
    assert same == pytest.approx(metrics, nan_ok=True)


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("algorithm", [replace(a, gamma=1.0) for a in ALGORITHMS], ids=lambda a: type(a).__name__)
def test_micro_batches_of_ragged_rows_have_the_gradient_and_the_metrics_of_the_whole(algorithm, parts):
    _, policy, trajectory = completions()
    whole, metrics = updated(algorithm, policy, trajectory, 1)
    split, same = updated(algorithm, policy, trajectory, parts)
    torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-12)
    assert same == pytest.approx(metrics, rel=1e-6, nan_ok=True)

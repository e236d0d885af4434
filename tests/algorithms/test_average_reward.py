"""Average rewards: by hand, in runs of tasks without end, and settings that have no meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from upslope import (
    A2C,
    PPO,
    ActorCriticConfig,
    CheckpointConfig,
    EnvironmentConfig,
    EvaluationConfig,
    LogConfig,
    OneStepActorCritic,
    ReferenceKL,
    RolloutConfig,
    Run,
    train,
)
from upslope.algorithms import AverageReward, Now
from upslope.collect import make_environments
from upslope.errors import UsageError
from upslope.exact import policy_iteration, problem
from upslope.train import evaluate_run, resume
from upslope.trajectory import Trajectory


def endless(directory: Path, **changes: Any) -> Run:
    settings: dict[str, Any] = {
        "environment": EnvironmentConfig(id="problem/ring", count=4),
        "policy": ActorCriticConfig(hidden=()),
        "algorithm": AverageReward(method=PPO(gamma=1.0, epochs=2, minibatches=2)),
        "rollout": RolloutConfig(steps=16),
        "evaluation": EvaluationConfig(times=1, episodes=2, final_episodes=2, environments=2, horizon=30),
        "checkpoint": CheckpointConfig(times=2),
        "log": LogConfig(every_steps=64, tensorboard=False, progress=False),
        "steps": 512,
        "name": "run",
        "directory": directory,
    }
    return Run(**{**settings, **changes})


def two_steps(*, terminated: bool = False) -> Trajectory:
    truth = torch.tensor([[False, terminated]])
    return Trajectory(
        observation=torch.tensor([[0, 1]]),
        action=torch.tensor([[0, 0]]),
        reward=torch.tensor([[3.0, 1.0]]),
        terminated=truth,
        truncated=torch.zeros_like(truth),
        mask=torch.ones_like(truth),
        behaviour_log_prob=torch.zeros(1, 2),
        time=torch.tensor([[0, 1]]),
        final_observation=torch.tensor([0]),
        final_index=torch.tensor([1]),
    )


def test_two_steps_by_hand() -> None:
    """r = 3, 1; V = 1, 2; V' = 2, 1; r_bar = 1.5, lambda 0.5: delta = 2.5, -1.5; A = 1.75, -1.5; targets 2.75, 0.5."""
    algorithm = AverageReward(method=A2C(gamma=1.0, gae_lambda=0.5), average_reward_rate=0.2, value_centring=0.0)
    value, following = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]])
    signal = algorithm.advantage(two_steps(), value, following, Now(state={"average_reward": 1.5}))
    assert signal.advantage.tolist() == [[1.75, -1.5]]
    assert signal.value_target is not None
    assert signal.value_target.tolist() == [[2.75, 0.5]]
    assert float(signal.metrics["average_reward"]) == pytest.approx(1.6)
    first = algorithm.advantage(two_steps(), value, following, Now(state=algorithm.initial_state()))
    assert float(first.metrics["average_reward"]) == 2.0


def test_what_the_method_carries_is_carried_too() -> None:
    algorithm = AverageReward(method=PPO(gamma=1.0, clip=None, kl_coefficient=1.0, kl_target=0.01))
    assert algorithm.initial_state() == {"kl_coefficient": 1.0}
    after = algorithm.adapt({"kl_coefficient": 1.0, "average_reward": 0.5}, {"kl_after": 1.0, "average_reward": 0.7})
    assert after == {"kl_coefficient": 2.0, "average_reward": 0.7}


def test_steps_that_end_are_refused() -> None:
    value = torch.zeros(1, 2)
    with pytest.raises(UsageError, match="without end"):
        AverageReward().advantage(two_steps(terminated=True), value, value, Now())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": PPO()}, "set gamma of PPO to 1"),
        ({"method": OneStepActorCritic(gamma=1.0, discounted_states=True)}, "discounted_states False"),
        (
            {"method": PPO(gamma=1.0, reference_kl=ReferenceKL(coefficient=0.1, place="reward"))},
            'set place of reference_kl of PPO to "loss"',
        ),
        ({"average_reward_rate": 1.5}, "average_reward_rate is a share"),
        ({"value_centring": -0.1}, "value_centring is a share"),
    ],
)
def test_settings_that_have_no_meaning(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AverageReward(**settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout": RolloutConfig(steps=None, episodes=4)}, "set rollout.steps"),
        ({"policy": ActorCriticConfig(normalize_reward=True)}, "normalize_reward"),
        ({"policy": ActorCriticConfig(critic=False)}, "needs a critic"),
        (
            {
                "algorithm": PPO(),
                "environment": EnvironmentConfig(id="Pendulum-v1", continuing=True),
                "rollout": RolloutConfig(steps=None, episodes=4),
            },
            "asks for whole episodes",
        ),
    ],
    ids=["episodes", "scaled_rewards", "no_critic", "no_limit"],
)
def test_runs_that_have_no_meaning(changes: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        endless(tmp_path, **changes)


def test_a_time_limit_and_none_at_all() -> None:
    with pytest.raises(ValueError, match="leave one of them out"):
        EnvironmentConfig(id="Pendulum-v1", continuing=True, time_limit=100)


def test_pendulum_goes_on_past_its_own_limit() -> None:
    """Gymnasium cuts Pendulum after 200 steps."""
    ends = {}
    for continuing in (False, True):
        config = EnvironmentConfig(id="Pendulum-v1", continuing=continuing, vectorization="sync")
        environments = make_environments(config)
        environments.reset([1])
        ends[continuing] = sum(environments.step(np.zeros((1, 1), np.float32)).finished is not None for _ in range(401))
        environments.close()
    assert ends == {False: 2, True: 0}


class Walk(gymnasium.Env[Any, Any]):
    """Stands still for ever, with a reward of 2 a step."""

    observation_space = gymnasium.spaces.Discrete(2)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return 0, {}

    def step(self, action: Any) -> Any:
        return 0, 2.0, False, False, {}


def test_an_endless_environment_of_ones_own_is_judged_over_the_horizon(tmp_path: Path) -> None:
    run = endless(tmp_path, environment=EnvironmentConfig(count=2, continuing=True))
    result = train(run, environments=Walk)
    assert result.evaluation is not None
    assert result.evaluation.deterministic_lengths.tolist() == [30, 30]
    record = result.evaluation.record()
    assert record["deterministic_average_reward"] == record["stochastic_average_reward"] == 2.0


def test_a_run_without_end_is_judged_and_resumed(tmp_path: Path) -> None:
    """The average reward is carried from where the run was interrupted."""
    seen: list[dict[str, float]] = []

    def watch(snapshot: Any) -> None:
        seen.append(snapshot.metrics)

    straight = train(endless(tmp_path / "straight"), callbacks=[watch])
    assert straight.evaluation is not None
    assert set(straight.evaluation.average_rewards) == {"deterministic_average_reward", "stochastic_average_reward"}
    assert all("state/average_reward" in metrics for metrics in seen)
    train(endless(tmp_path / "broken"), callbacks=[lambda snapshot: snapshot.update == 5])
    again = resume(tmp_path / "broken" / "run")
    for ours, theirs in zip(again.policy.parameters(), straight.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    judged = evaluate_run(tmp_path / "straight" / "run", episodes=3)
    assert judged.deterministic_lengths.tolist() == [30, 30, 30]


def test_tasks_with_ends_report_no_average_reward(tmp_path: Path) -> None:
    run = endless(tmp_path, environment=EnvironmentConfig(id="problem/loops", count=4), algorithm=PPO(minibatches=2))
    result = train(run)
    assert result.evaluation is not None
    assert "deterministic_average_reward" not in result.evaluation.record()


def test_access_control_is_the_books() -> None:
    """The best policy accepts priority 8 and 4 with any free server, 2 from 4 on, 1 never; its average is 2.7476."""
    named = problem("access-control")
    best = policy_iteration(named.mdp).best
    assert best.objective == pytest.approx(2.7476419506)
    accepted = best.actions.view(11, 4)
    assert accepted[1:, 2:].all()
    assert accepted[:, 0].sum() == 0
    assert accepted[:, 1].tolist() == [0] * 4 + [1] * 7
    transition = named.mdp.transition
    assert transition[4 * 10, 0, 40:].tolist() == [0.25] * 4
    assert float(transition[4, 1, :4].sum()) == pytest.approx(0.94**10)
    assert float(named.mdp.reward[7, 1].max()) == 8.0
    assert named.mdp.reward[3].abs().sum() == 0.0

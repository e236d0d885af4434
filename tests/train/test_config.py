"""Configurations refuse what has no meaning before anything is made."""

from typing import Any

import pytest

from upslope.algorithms import PPO, AverageReward, Reinforce
from upslope.algorithms.reference_kl import ReferenceKL
from upslope.collect import EnvironmentConfig
from upslope.policies import ActorCriticConfig
from upslope.train import OptimizerConfig, RolloutConfig, Run

UNKNOWN: Any = "adagrad"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"algorithm": Reinforce(psi=UNKNOWN)}, r"Reinforce\.psi must be one of 'total_reward', .*, got 'adagrad'"),
        ({"algorithm": PPO(kl_stop=UNKNOWN)}, r"PPO\.kl_stop must be one of 'before_step', 'after_epoch'"),
        ({"optimizer": OptimizerConfig(kind=UNKNOWN)}, r"OptimizerConfig\.kind must be one of 'adam'"),
        ({"optimizer": OptimizerConfig(schedule=UNKNOWN)}, r"OptimizerConfig\.schedule must be one of"),
        ({"policy": ActorCriticConfig(activation=UNKNOWN)}, r"ActorCriticConfig\.activation must be one of 'tanh'"),
        ({"environment": EnvironmentConfig(vectorization=UNKNOWN)}, r"EnvironmentConfig\.vectorization must be one of"),
        (
            {"algorithm": PPO(reference_kl=ReferenceKL(coefficient=0.1, estimator=UNKNOWN))},
            r"ReferenceKL\.estimator must be one of 'k1', 'k2', 'k3', 'exact', None, got 'adagrad'",
        ),
        (
            {"algorithm": AverageReward(method=PPO(gamma=1.0, clip_schedule=UNKNOWN)), "rollout": RolloutConfig()},
            r"PPO\.clip_schedule must be one of",
        ),
    ],
)
def test_a_word_that_no_setting_knows_is_refused(parts: dict[str, Any], message: str) -> None:
    rollout = RolloutConfig(steps=None, episodes=2)
    with pytest.raises(ValueError, match=message):
        Run(**{"environment": EnvironmentConfig(), "rollout": rollout, **parts})


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_gamma_is_a_discount_factor(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma is a discount factor from 0 to 1"):
        Run(environment=EnvironmentConfig(), algorithm=PPO(gamma=gamma))


def test_a_task_without_end_has_a_discount_or_an_average_reward() -> None:
    endless = EnvironmentConfig(id="Pendulum-v1", continuing=True)
    with pytest.raises(ValueError, match=r"return is not finite at gamma=1: give PPO a gamma below 1, or take Average"):
        Run(environment=endless, algorithm=PPO(gamma=1.0))
    Run(environment=endless, algorithm=PPO(gamma=0.99))
    Run(environment=endless, algorithm=AverageReward(method=PPO(gamma=1.0)))


def test_decay_rates_of_the_optimiser() -> None:
    wrongs: tuple[dict[str, Any], ...] = (
        {"betas": (2.0, 0.9)},
        {"betas": (0.9, 1.0)},
        {"decay": -0.1},
        {"decay": float("nan")},
    )
    for wrong in wrongs:
        with pytest.raises(ValueError, match="betas and decay are at least 0 and below 1"):
            OptimizerConfig(**wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "environment.count must be at least 1, got 0"),
        ({"time_limit": -1}, "environment.time_limit must be at least 1"),
        ({"processes": 0}, "environment.processes must be at least 1"),
        ({"deadline": 0.0}, "environment.deadline is a positive number of seconds"),
        ({"deadline": float("nan")}, "environment.deadline is a positive number of seconds"),
    ],
)
def test_numbers_of_the_environment(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnvironmentConfig(**settings)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"threads": 0}, "threads must be at least 1"),
        ({"threads": 1_000_000}, "threads must be at most 1024"),
        ({"algorithm": PPO(gae_lambda=1.5)}, "gae_lambda lies between 0 and 1, got 1.5"),
        ({"algorithm": AverageReward(method=PPO(gamma=1.0, gae_lambda=1.5))}, "gae_lambda lies between 0 and 1"),
        ({"algorithm": PPO(entropy_coefficient=float("nan"))}, r"PPO\.entropy_coefficient must be a finite number"),
        (
            {"optimizer": OptimizerConfig(learning_rate=float("inf"))},
            r"OptimizerConfig\.learning_rate must be a finite",
        ),
    ],
)
def test_numbers_of_a_run(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(**{"environment": EnvironmentConfig(), **parts})

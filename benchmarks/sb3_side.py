"""One measured run of Stable-Baselines3 or sb3-contrib: `python sb3_side.py CASE SEED`; needs an interpreter that has
them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from sb3_contrib import TRPO, RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from cases import (
    BACKTRACK,
    CASES,
    CLIP,
    CONJUGATE_GRADIENT_ITERATIONS,
    DAMPING,
    EPSILON,
    GAE_LAMBDA,
    GAMMA,
    LINE_SEARCH_ATTEMPTS,
    MAX_NORM,
    TRUST_REGION,
    Meter,
)


class Watch(BaseCallback):
    """Marks the end of every update and keeps finished returns."""

    def __init__(self, meter: Meter, returns: list[float]) -> None:
        super().__init__()
        self.meter, self.returns = meter, returns

    def _on_step(self) -> bool:
        self.returns.extend(float(info["episode"]["r"]) for info in self.locals["infos"] if "episode" in info)
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:
            self.meter.mark(self.num_timesteps)

    def _on_training_end(self) -> None:
        self.meter.mark(self.num_timesteps)


def build(settings: dict[str, Any], environment: Any, architecture: dict[str, Any], seed: int) -> Any:
    """The model of a case."""
    batch = settings["count"] * settings["steps"] // settings["minibatches"]
    shared: dict[str, Any] = {
        "learning_rate": settings["learning_rate"],
        "n_steps": settings["steps"],
        "gamma": GAMMA,
        "seed": seed,
        "device": "cpu",
    }
    bonuses = {"ent_coef": settings["entropy"], "vf_coef": 0.5, "max_grad_norm": MAX_NORM}
    adam = {**architecture, "optimizer_kwargs": {"eps": EPSILON}}
    proximal = {"batch_size": batch, "n_epochs": settings["epochs"], "clip_range": CLIP, "gae_lambda": GAE_LAMBDA}
    if settings["algorithm"] == "ppo":
        return PPO("MlpPolicy", environment, policy_kwargs=adam, **proximal, **bonuses, **shared)
    if settings["algorithm"] == "a2c":
        return A2C("MlpPolicy", environment, gae_lambda=1.0, policy_kwargs=architecture, **bonuses, **shared)
    if settings["algorithm"] == "recurrent ppo":
        memory = {"lstm_hidden_size": settings["units"], "n_lstm_layers": 1, "enable_critic_lstm": True}
        kwargs = {**adam, **memory}
        return RecurrentPPO("MlpLstmPolicy", environment, policy_kwargs=kwargs, **proximal, **bonuses, **shared)
    return TRPO(
        "MlpPolicy",
        environment,
        batch_size=batch,
        n_critic_updates=settings["epochs"],
        gae_lambda=GAE_LAMBDA,
        target_kl=TRUST_REGION,
        cg_damping=DAMPING,
        cg_max_steps=CONJUGATE_GRADIENT_ITERATIONS,
        line_search_shrinking_factor=BACKTRACK,
        line_search_max_iter=LINE_SEARCH_ATTEMPTS,
        policy_kwargs=adam,
        **shared,
    )


def main(case: str, seed: int) -> None:
    torch.set_num_threads(1)
    settings = CASES[case]
    environment = make_vec_env(settings["environment"], n_envs=settings["count"], seed=seed, vec_env_cls=DummyVecEnv)
    if settings["environment"] == "HalfCheetah-v5":
        environment = VecNormalize(environment, gamma=GAMMA)
    architecture = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": torch.nn.Tanh}
    model = build(settings, environment, architecture, seed)
    meter, returns = Meter(), []
    model.learn(settings["total"], callback=Watch(meter, returns))
    meter.report("sb3", case, seed, returns)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

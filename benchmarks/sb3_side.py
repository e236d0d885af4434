"""One measured run of Stable-Baselines3: `python sb3_side.py CASE SEED`; needs an interpreter that has it."""

from __future__ import annotations

import sys

import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from cases import CASES, CLIP, EPSILON, GAE_LAMBDA, GAMMA, MAX_NORM, Meter


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


def main(case: str, seed: int) -> None:
    torch.set_num_threads(1)
    settings = CASES[case]
    environment = make_vec_env(settings["environment"], n_envs=settings["count"], seed=seed, vec_env_cls=DummyVecEnv)
    if settings["environment"] == "HalfCheetah-v5":
        environment = VecNormalize(environment, gamma=GAMMA)
    architecture = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": torch.nn.Tanh}
    shared = {
        "learning_rate": settings["learning_rate"],
        "n_steps": settings["steps"],
        "gamma": GAMMA,
        "ent_coef": settings["entropy"],
        "vf_coef": 0.5,
        "max_grad_norm": MAX_NORM,
        "seed": seed,
        "device": "cpu",
    }
    if settings["algorithm"] == "ppo":
        batch = settings["count"] * settings["steps"] // settings["minibatches"]
        model = PPO(
            "MlpPolicy",
            environment,
            batch_size=batch,
            n_epochs=settings["epochs"],
            clip_range=CLIP,
            gae_lambda=GAE_LAMBDA,
            policy_kwargs={**architecture, "optimizer_kwargs": {"eps": EPSILON}},
            **shared,
        )
    else:
        model = A2C("MlpPolicy", environment, gae_lambda=1.0, policy_kwargs=architecture, **shared)
    meter, returns = Meter(), []
    model.learn(settings["total"], callback=Watch(meter, returns))
    meter.report("sb3", case, seed, returns)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

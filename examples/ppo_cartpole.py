"""PPO on CartPole-v1, read from top to bottom: the loop is written out, only the mathematics and the networks are ours.

    python examples/ppo_cartpole.py --steps 100000

Uses `upslope.estimators` and `upslope.policies` and nothing else of the library. Left out: normalisers, checkpoints,
evaluation, resuming; `upslope train cartpole-ppo` has them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode

from upslope import estimators
from upslope.policies import ActorCritic, ActorCriticConfig
from upslope.spaces import Box, Discrete


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 100_000
    """Environment steps, over all environments."""
    seed: int = 1
    """Decides every random number."""
    environments: int = 4
    length: int = 128
    """Steps of each environment per update."""
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 2.5e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.01
    max_gradient_norm: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What a policy is asked about: observations and the actions taken."""

    observation: torch.Tensor
    action: torch.Tensor


def main(settings: Settings) -> float:
    torch.set_num_threads(1)
    count, length = settings.environments, settings.length
    noise_generator = np.random.default_rng(settings.seed)
    environments = gymnasium.make_vec(
        "CartPole-v1",
        num_envs=count,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
    )
    generator = torch.Generator().manual_seed(settings.seed)
    policy = ActorCritic(Box((4,), -np.inf, np.inf), Discrete(2), ActorCriticConfig(), generator=generator)
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate, eps=1e-5)
    sampler = policy.sampler()

    observations = np.zeros((count, length, 4), dtype=np.float32)
    following = np.zeros_like(observations)
    actions = np.zeros((count, length), dtype=np.int64)
    rewards = np.zeros((count, length), dtype=np.float32)
    terminated = np.zeros((count, length), dtype=bool)
    truncated = np.zeros_like(terminated)

    returns: deque[float] = deque([0.0], maxlen=50)
    running = np.zeros(count)
    observation, _ = environments.reset(seed=settings.seed)
    updates = max(settings.steps // (count * length), 1)
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1.0 - update / updates)

        # Collect. `following` is what really came after each step: the last observation of an episode, not the next
        # episode's first one.
        noise = sampler.noise(noise_generator, length, count)
        for t in range(length):
            observations[:, t] = observation
            actions[:, t] = sampler.sample(observation, noise[t])
            observation, rewards[:, t], terminated[:, t], truncated[:, t], info = environments.step(actions[:, t])
            following[:, t] = observation
            running += rewards[:, t]
            for i in np.flatnonzero(terminated[:, t] | truncated[:, t]):
                following[i, t] = info["final_obs"][i]
                returns.append(running[i])
                running[i] = 0.0

        # Estimate.
        steps = Steps(observation=torch.tensor(observations), action=torch.tensor(actions))
        discount = settings.gamma * (~torch.tensor(terminated)).float()
        cut = torch.tensor(terminated | truncated)
        with torch.no_grad():
            before = policy.evaluate(steps)
            next_value = policy.evaluate(Steps(observation=torch.tensor(following), action=steps.action)).value
        assert before.value is not None
        assert next_value is not None
        cut[:, -1] = True
        advantage = estimators.gae(
            torch.tensor(rewards), discount, before.value, next_value, cut, gae_lambda=settings.gae_lambda
        )
        target = advantage + before.value

        # Improve.
        flat = {
            "observation": steps.observation.flatten(0, 1),
            "action": steps.action.flatten(),
            "behaviour_log_prob": before.log_prob.flatten(),
            "advantage": advantage.flatten(),
            "target": target.flatten(),
        }
        for _ in range(settings.epochs):
            order = torch.from_numpy(noise_generator.permutation(count * length))
            for index in order.chunk(settings.minibatches):
                batch = {name: values[index] for name, values in flat.items()}
                now = policy.evaluate(Steps(observation=batch["observation"], action=batch["action"]))
                assert now.value is not None
                objective = estimators.clipped(
                    now.log_prob,
                    batch["behaviour_log_prob"],
                    estimators.standardise(batch["advantage"]),
                    low=settings.clip,
                    high=settings.clip,
                )
                error = estimators.squared_value_error(now.value, batch["target"])
                value = settings.value_coefficient * error - objective - settings.entropy_coefficient * now.entropy
                loss = estimators.weighted_sum(value, estimators.step_mean(torch.ones(len(index), dtype=torch.bool)))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_gradient_norm)
                optimizer.step()

        if update % 20 == 0 or update == updates - 1:
            print(f"{(update + 1) * count * length:7} steps   return {np.mean(returns):6.1f}")
    environments.close()
    return float(np.mean(returns))


if __name__ == "__main__":
    main(tyro.cli(Settings))

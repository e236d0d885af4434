"""How many invalid actions masked PPO takes: it learns where they would pay best, and an environment counts them.

The environment draws new masks at every step, a fifth of them with one valid value alone, and rewards the largest
numbers whether they are valid or not, so that the policy comes to prefer what it often may not do. It counts invalid
actions by its own copy of the masks, and so does a check of every trajectory, its actions against its masks. One
rollout in eight is learnt from, and there the chance that the learner gives to invalid actions is counted, too.

    python benchmarks/masked_actions.py --actions 10_000_000
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from upslope import PPO, ActorCriticConfig, EnvironmentConfig, OptimizerConfig
from upslope.algorithms import Now
from upslope.collect import EnvironmentCollector, make_environments
from upslope.policies import ActorCritic
from upslope.spaces import ACTION_MASK
from upslope.train.optimizer import FlatOptimizer
from upslope.train.step import learn
from upslope.trajectory import Trajectory

LENGTH = 50
SINGLE = 0.2
"""How often a choice has one valid value alone."""
LEARNT = 8
"""One rollout of so many is learnt from."""


class TemptingMasks(VectorEnv[Any, Any, Any]):
    """Sees 4 random numbers; the reward is the mean of the chosen numbers over their range, valid or not.

    Args:
        num_envs: N.
        sizes: the choices of each action; one for a Discrete.
        seed: of masks and observations.

    Attributes:
        taken, invalid: action components so far, and how many of them were invalid.
    """

    def __init__(self, num_envs: int, sizes: tuple[int, ...], seed: int) -> None:
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.num_envs, self.sizes = num_envs, sizes
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        one = gymnasium.spaces.Discrete(sizes[0])
        self.single_action_space = one if len(sizes) == 1 else gymnasium.spaces.MultiDiscrete(list(sizes))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generator = np.random.default_rng(seed)
        self._count = 0
        self.taken = self.invalid = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin everywhere."""
        self._count = 0
        return self._see()

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Count, and draw new masks."""
        columns = np.asarray(actions).reshape(self.num_envs, -1)
        reward = np.zeros(self.num_envs)
        for column, mask, size in zip(columns.T, self._masks, self.sizes, strict=True):
            self.invalid += int((mask[np.arange(self.num_envs), column] == 0).sum())
            self.taken += self.num_envs
            reward += column / (size * len(self.sizes))
        self._count += 1
        observation, info = self._see()
        over = np.full(self.num_envs, self._count % LENGTH == 0)
        if over.any():
            info = {**info, "final_obs": observation.copy()}
        return observation, reward, np.zeros_like(over), over, info

    def _see(self) -> tuple[np.ndarray, dict[str, Any]]:
        generator, rows = self._generator, np.arange(self.num_envs)
        self._masks: list[np.ndarray] = []
        for size in self.sizes:
            mask = generator.random((self.num_envs, size)) < generator.random((self.num_envs, 1))
            single = (generator.random(self.num_envs) < SINGLE) | ~mask.any(axis=1)
            mask[single] = False
            mask[rows[single], generator.integers(size, size=int(single.sum()))] = True
            self._masks.append(mask.astype(np.int8))
        observation = generator.standard_normal((self.num_envs, 4)).astype(np.float32)
        return observation, {"action_mask": np.concatenate(self._masks, axis=1)}


def forbidden(trajectory: Trajectory, sizes: tuple[int, ...]) -> int:
    """Actions of a trajectory that its own masks forbid."""
    observation: Any = trajectory.observation
    mask, action = observation[ACTION_MASK], trajectory.action.reshape(*trajectory.shape, -1)
    parts = enumerate(mask.split(sizes, -1))
    return sum(int((~part.gather(-1, action[..., column : column + 1])).sum()) for column, part in parts)


def possible(trajectory: Trajectory, policy: ActorCritic, sizes: tuple[int, ...]) -> int:
    """Invalid actions to which the learner gives a chance."""
    observation: Any = trajectory.observation
    with torch.no_grad():
        logits = policy.evaluate(trajectory).distribution.parameters
    parts = zip(logits.split(sizes, -1), observation[ACTION_MASK].split(sizes, -1), strict=True)
    return sum(int((part.softmax(-1)[~valid] != 0.0).sum()) for part, valid in parts)


def main(sizes: tuple[int, ...], actions: int, seed: int, count: int = 256, steps: int = 128) -> dict[str, Any]:
    """Train until so many steps were taken; what was counted."""
    world = TemptingMasks(count, sizes, seed)
    environments = make_environments(world, EnvironmentConfig(action_mask="info", resume="rebuild"))
    generator = torch.Generator().manual_seed(seed)
    settings = ActorCriticConfig(normalize_observation=True)
    policy = ActorCritic(environments.observation_space, environments.action_space, settings, generator=generator)
    algorithm, config = PPO(epochs=2, minibatches=8), OptimizerConfig(learning_rate=3e-3)
    optimizer, state = FlatOptimizer(policy, config), algorithm.initial_state()
    collector = EnvironmentCollector(environments, steps=steps, seed=seed)
    updates, begin, cpu, wrong, returns = -(-actions // (count * steps)), time.time(), time.process_time(), 0, 0.0
    for update in range(updates):
        trajectory = collector.collect(policy, update)
        wrong += forbidden(trajectory, sizes)
        returns = float(trajectory.reward.mean())
        if update % LEARNT:
            continue
        now, shuffling = Now(progress=update / updates, state=state), np.random.default_rng((seed, update))
        learned = learn(
            policy, algorithm, optimizer, trajectory, now=now, learning_rate=config.learning_rate, generator=shuffling
        )
        policy.observe(trajectory)
        wrong, state = wrong + possible(trajectory, policy, sizes), learned.state
    return {
        "sizes": list(sizes),
        "steps": updates * count * steps,
        "actions": world.taken,
        "invalid": world.invalid,
        "wrong_in_trajectories": wrong,
        "last_mean_reward": round(returns, 3),
        "seconds": round(time.time() - begin, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actions", type=int, default=10_000_000, help="steps per case")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for sizes in ((20,), (5, 3, 2)):
        print(json.dumps(main(sizes, arguments.actions, arguments.seed)), flush=True)

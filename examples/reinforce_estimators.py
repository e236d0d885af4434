"""REINFORCE on CartPole-v1 with a choice among six Psi, and how noisy the gradient is with each of them.

    python examples/reinforce_estimators.py --psi baselined --updates 15

A policy learns from whole episodes, padded to one [episodes, time] batch with a mask. Then all six Psi are computed on
one and the same batch of that policy, and the gradients they give are compared by their signal-to-noise ratio: the norm
of the mean over episodes, divided by the standard error of that mean. Noise alone gives about 1, and much is not always
right: the TD residual's large ratio is that of a critic that is still wrong.

Uses `upslope.estimators` and `upslope.policies` and nothing else of the library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import gymnasium
import numpy as np
import torch
import tyro

from upslope import estimators
from upslope.policies import ActorCritic, ActorCriticConfig
from upslope.spaces import Box, Discrete

Psi = Literal["total_reward", "reward_to_go", "baselined", "action_value", "advantage", "td_residual"]
GAMMA, GAE_LAMBDA = 0.99, 0.95


@dataclass(frozen=True, kw_only=True)
class Settings:
    psi: Psi = "baselined"
    """What the score is multiplied by while learning."""
    updates: int = 15
    episodes: int = 16
    """Whole episodes per update."""
    longest: int = 500
    """Episodes are cut after this many steps."""
    learning_rate: float = 5e-3
    seed: int = 1


@dataclass(frozen=True)
class Episodes:
    """Padded episodes, [episodes, time]; `mask` is False on the padding."""

    observation: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor
    discount: torch.Tensor
    cut: torch.Tensor
    mask: torch.Tensor


def play(
    environment: gymnasium.Env, policy: ActorCritic, settings: Settings, generator: np.random.Generator
) -> Episodes:
    shape = (settings.episodes, settings.longest)
    observation = np.zeros((*shape, 4), dtype=np.float32)
    action, reward = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    mask, terminated, cut = (np.zeros(shape, dtype=bool) for _ in range(3))
    sampler = policy.sampler()
    for i in range(settings.episodes):
        seen, _ = environment.reset(seed=int(generator.integers(2**31)))
        noise = sampler.noise(generator, settings.longest, 1)
        for t in range(settings.longest):
            observation[i, t], mask[i, t] = seen, True
            action[i, t] = sampler.sample(seen[None], noise[t])[0]
            seen, reward[i, t], terminated[i, t], truncated, _ = environment.step(int(action[i, t]))
            if terminated[i, t] or truncated:
                break
        cut[i, t:] = True
    discount = np.where(terminated, 0.0, GAMMA).astype(np.float32)
    keep = int(mask.any(0).sum())
    return Episodes(
        *(torch.from_numpy(array[:, :keep]) for array in (observation, action, reward, discount, cut, mask))
    )


def choose(psi: Psi, episodes: Episodes, value: torch.Tensor) -> torch.Tensor:
    """Psi_t by its name. A time limit counts as the end here: what would follow is 0."""
    reward, discount, cut = episodes.reward, episodes.discount, episodes.cut
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], dim=1).masked_fill(cut, 0.0)
    if psi == "total_reward":
        return estimators.total_reward(reward, discount, cut)
    if psi == "reward_to_go":
        return estimators.reward_to_go(reward, discount, cut)
    if psi == "baselined":
        return estimators.baselined(estimators.reward_to_go(reward, discount, cut), value)
    if psi == "action_value":
        return estimators.lambda_return(reward, discount, following, cut, trace_decay=GAE_LAMBDA)
    if psi == "advantage":
        return estimators.gae(reward, discount, value, following, cut, gae_lambda=GAE_LAMBDA)
    return estimators.td_residual(reward, discount, value, following)


def signal_to_noise(per_episode: torch.Tensor, policy: ActorCritic) -> float:
    """|mean| / standard error of the mean, over the gradients of single episodes."""
    actor = list(policy.actor.parameters())
    gradients = torch.stack(
        [estimators.flatten(torch.autograd.grad(one, actor, retain_graph=True)) for one in per_episode]
    )
    error = gradients.var(0).sum().div(len(gradients)).sqrt()
    return float(gradients.mean(0).norm() / error)


def learn(settings: Settings, environment: gymnasium.Env, policy: ActorCritic, generator: np.random.Generator) -> None:
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate)
    for update in range(settings.updates):
        episodes = play(environment, policy, settings, generator)
        evaluation = policy.evaluate(episodes)
        assert evaluation.value is not None
        psi = choose(settings.psi, episodes, evaluation.value.detach())
        psi = estimators.standardise(psi, episodes.mask)
        objective = estimators.score_function(evaluation.log_prob, psi)
        target = estimators.reward_to_go(episodes.reward, episodes.discount, episodes.cut)
        error = estimators.squared_value_error(evaluation.value, target)
        actor_loss = -estimators.weighted_sum(objective, estimators.trajectory_sum(episodes.mask))
        critic_loss = estimators.weighted_sum(error, estimators.step_mean(episodes.mask))
        optimizer.zero_grad()
        (actor_loss + critic_loss).backward()
        optimizer.step()
        if update % 5 == 4:
            print(f"update {update + 1:3}   return {float(episodes.reward.sum(1).mean()):6.1f}")


def main(settings: Settings) -> dict[str, float]:
    torch.set_num_threads(1)
    environment = gymnasium.make("CartPole-v1", max_episode_steps=settings.longest)
    generator, initial = np.random.default_rng(settings.seed), torch.Generator().manual_seed(settings.seed)
    policy = ActorCritic(Box((4,), -np.inf, np.inf), Discrete(2), ActorCriticConfig(), generator=initial)
    learn(settings, environment, policy, generator)
    episodes = play(environment, policy, replace(settings, episodes=4 * settings.episodes), generator)
    evaluation = policy.evaluate(episodes)
    assert evaluation.value is not None
    ratios: dict[str, float] = {}
    for psi in get_args(Psi):
        objective = estimators.score_function(evaluation.log_prob, choose(psi, episodes, evaluation.value.detach()))
        ratios[psi] = signal_to_noise((objective * episodes.mask).sum(1), policy)
        print(f"{psi:14} signal to noise {ratios[psi]:6.2f}")
    environment.close()
    return ratios


if __name__ == "__main__":
    main(tyro.cli(Settings))

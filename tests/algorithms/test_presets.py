"""The presets against one whole update written a second time, in plain PyTorch and from the published formulas.

The twin knows nothing of this package: `nn.Sequential`, `torch.distributions`, `torch.optim.Adam`, loops for GAE. It
is given the same initial parameters, the same experience and the same shuffles, and must end at the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from upslope.algorithms import PPO, Now, scheduled
from upslope.policies import ActorCritic
from upslope.recipes import ppo_cleanrl, ppo_paper, ppo_sb3
from upslope.spaces import Box, Discrete
from upslope.train.config import Run
from upslope.train.optimizer import FlatOptimizer
from upslope.train.step import learn
from upslope.trajectory import Trajectory

PROGRESS = 0.3


@dataclass(frozen=True, kw_only=True)
class Published:
    """The numbers of another implementation, in its own terms."""

    rows: int
    steps: int
    epochs: int
    minibatch_size: int
    learning_rate: float
    adam_epsilon: float
    vf_coef: float
    """Multiplies what `value_loss` returns."""
    value_loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Of new values, old values, returns."""
    ent_coef: float
    normalize: bool
    max_grad_norm: float | None
    target_kl: float | None = None
    stop: str = ""


def half_clipped_mse(new: Tensor, old: Tensor, returns: Tensor) -> Tensor:
    """CleanRL: 0.5 * mean of max(unclipped, clipped) squared errors, clip_coef 0.2."""
    clipped = old + torch.clamp(new - old, -0.2, 0.2)
    return 0.5 * torch.max((new - returns) ** 2, (clipped - returns) ** 2).mean()


def mse(new: Tensor, old: Tensor, returns: Tensor) -> Tensor:
    """SB3 without clip_range_vf: F.mse_loss."""
    return nn.functional.mse_loss(returns, new)


def clipped_mse(new: Tensor, old: Tensor, returns: Tensor) -> Tensor:
    """SB3 with clip_range_vf=0.2: the clipped prediction alone."""
    return nn.functional.mse_loss(returns, old + torch.clamp(new - old, -0.2, 0.2))


def half_mse(new: Tensor, old: Tensor, returns: Tensor) -> Tensor:
    """The paper's squared error in this package's scale; actor and critic share nothing there."""
    return 0.5 * ((new - returns) ** 2).mean()


CLEANRL = Published(
    rows=4,
    steps=128,
    epochs=4,
    minibatch_size=128,
    learning_rate=2.5e-4 * (1.0 - PROGRESS),
    adam_epsilon=1e-5,
    vf_coef=0.5,
    value_loss=half_clipped_mse,
    ent_coef=0.01,
    normalize=True,
    max_grad_norm=0.5,
)
SB3 = Published(
    rows=1,
    steps=2048,
    epochs=10,
    minibatch_size=64,
    learning_rate=3e-4,
    adam_epsilon=1e-5,
    vf_coef=0.5,
    value_loss=mse,
    ent_coef=0.0,
    normalize=True,
    max_grad_norm=0.5,
)
PAPER = Published(
    rows=1,
    steps=2048,
    epochs=10,
    minibatch_size=64,
    learning_rate=3e-4,
    adam_epsilon=1e-8,
    vf_coef=1.0,
    value_loss=half_mse,
    ent_coef=0.0,
    normalize=False,
    max_grad_norm=None,
)


class Twin:
    """Two perceptrons of 64-64 tanh and an Adam over all their parameters."""

    def __init__(self, policy: ActorCritic, learning_rate: float, epsilon: float) -> None:
        self.actor, self.log_std = _sequential(policy.actor)
        assert policy.critic is not None
        self.critic, _ = _sequential(policy.critic)
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        if self.log_std is not None:
            self.parameters.append(self.log_std)
        self.adam = torch.optim.Adam(self.parameters, lr=learning_rate, eps=epsilon)

    def distribution(self, observation: Tensor) -> Categorical | Independent:
        if self.log_std is None:
            return Categorical(logits=self.actor(observation))
        return Independent(Normal(self.actor(observation), self.log_std.exp()), 1)

    def value(self, observation: Tensor) -> Tensor:
        return self.critic(observation).squeeze(-1)


def _sequential(network: nn.Module) -> tuple[nn.Sequential, nn.Parameter | None]:
    modules: list[nn.Module] = []
    log_std = None
    for name, parameter in network.named_parameters():
        values = parameter.detach().clone()
        if name.endswith("weight"):
            modules += [nn.Tanh(), nn.Linear(values.shape[1], values.shape[0], dtype=values.dtype)]
            modules[-1].weight = nn.Parameter(values)
        elif name.endswith("bias"):
            modules[-1].bias = nn.Parameter(values)
        else:
            log_std = nn.Parameter(values)
    return nn.Sequential(*modules[1:]), log_std


def generalised_advantages(twin: Twin, experience: Trajectory) -> tuple[Tensor, Tensor]:
    """Loops backwards over time, gamma 0.99, lambda 0.95; every open end bootstraps from what was seen there."""
    with torch.no_grad():
        values = twin.value(experience.observation)
        final_values = dict(
            zip(experience.final_index.tolist(), twin.value(experience.final_observation).tolist(), strict=True)
        )
    rows, steps = experience.shape
    advantages = torch.zeros_like(values)
    for row in range(rows):
        running = 0.0
        for t in reversed(range(steps)):
            place = row * steps + t
            if bool(experience.terminated[row, t]):
                following, running = 0.0, 0.0
            elif place in final_values:
                following, running = final_values[place], 0.0
            else:
                following = float(values[row, t + 1])
            delta = float(experience.reward[row, t]) + 0.99 * following - float(values[row, t])
            running = delta + 0.99 * 0.95 * running
            advantages[row, t] = running
    return values, advantages


def twin_update(twin: Twin, published: Published, experience: Trajectory, generator: np.random.Generator) -> int:
    """One whole update; returns how many optimiser steps were taken."""
    values, advantages = generalised_advantages(twin, experience)
    returns = (advantages + values).flatten()
    observation, action = experience.observation.flatten(0, 1), experience.action.flatten(0, 1)
    values, advantages = values.flatten(), advantages.flatten()
    with torch.no_grad():
        old_log_prob = twin.distribution(observation).log_prob(action)
    taken = 0
    for _ in range(published.epochs):
        order = torch.from_numpy(generator.permutation(len(values)))
        approx_kl = torch.zeros(())
        for start in range(0, len(values), published.minibatch_size):
            at = order[start : start + published.minibatch_size]
            distribution = twin.distribution(observation[at])
            log_ratio = distribution.log_prob(action[at]) - old_log_prob[at]
            ratio = log_ratio.exp()
            with torch.no_grad():
                approx_kl = ((ratio - 1) - log_ratio).mean()
            advantage = advantages[at]
            if published.normalize:
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            policy_loss = torch.max(-advantage * ratio, -advantage * torch.clamp(ratio, 0.8, 1.2)).mean()
            value_loss = published.value_loss(twin.value(observation[at]), values[at], returns[at])
            entropy = distribution.entropy().mean()
            loss = policy_loss - published.ent_coef * entropy + published.vf_coef * value_loss
            if published.stop == "sb3" and published.target_kl and approx_kl > 1.5 * published.target_kl:
                return taken
            twin.adam.zero_grad()
            loss.backward()
            if published.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(twin.parameters, published.max_grad_norm)
            twin.adam.step()
            taken += 1
        if published.stop == "cleanrl" and published.target_kl and approx_kl > published.target_kl:
            return taken
    return taken


def experience_of(policy: ActorCritic, published: Published, seed: int) -> Trajectory:
    """Random observations and rewards, with terminations, time limits and open ends."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(policy.parameters()).dtype
    shape = (published.rows, published.steps)
    space, actions = policy.observation_space, policy.action_space
    assert isinstance(space, Box)
    observation = torch.randn(*shape, *space.shape, generator=generator, dtype=dtype)
    if isinstance(actions, Discrete):
        action = torch.randint(actions.n, shape, generator=generator)
    else:
        assert isinstance(actions, Box)
        action = torch.randn(*shape, *actions.shape, generator=generator, dtype=dtype)
    ended = torch.rand(shape, generator=generator)
    terminated, truncated = ended < 0.02, (ended >= 0.02) & (ended < 0.04)
    opened = truncated.clone()
    opened[:, -1] |= ~terminated[:, -1]
    index = opened.flatten().nonzero().squeeze(-1)
    with torch.no_grad():
        log_prob = policy.log_prob(observation, action)
    return Trajectory(
        observation=observation,
        action=action,
        reward=torch.randn(shape, generator=generator, dtype=dtype) + 0.5,
        terminated=terminated,
        truncated=truncated,
        mask=torch.ones(shape, dtype=torch.bool),
        behaviour_log_prob=log_prob,
        time=torch.zeros(shape, dtype=torch.long),
        final_observation=torch.randn(len(index), *space.shape, generator=generator, dtype=dtype),
        final_index=index,
    )


def both_updates(
    run: Run, published: Published, dtype: torch.dtype, *, continuous: bool, updates: int = 1
) -> tuple[float, float, int, int]:
    """Whole updates of both: the largest distance between the parameters, how far they moved, and the steps taken."""
    actions = Box(low=-1.0, high=1.0, shape=(3,), dtype="float32") if continuous else Discrete(n=3, start=0)
    space = Box(low=float("-inf"), high=float("inf"), shape=(6,), dtype="float32")
    policy = ActorCritic(space, actions, run.policy, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        for parameter in policy.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=noise, dtype=dtype)
    twin = Twin(policy, published.learning_rate, published.adam_epsilon)
    optimizer = FlatOptimizer(policy, run.optimizer)
    before = optimizer.flat.detach().clone()
    taken = expected = 0
    for update in range(updates):
        experience = experience_of(policy, published, seed=10 + update)
        learned = learn(
            policy,
            run.algorithm,
            optimizer,
            experience,
            now=Now(progress=PROGRESS, state=run.algorithm.initial_state()),
            learning_rate=scheduled(run.optimizer.schedule, run.optimizer.learning_rate, PROGRESS),
            generator=np.random.default_rng(update),
        )
        taken += int(learned.metrics["optimizer_steps"])
        expected += twin_update(twin, published, experience, np.random.default_rng(update))
    ours = [*policy.actor.named_parameters(), *policy.critic.named_parameters()] if policy.critic else []
    weights = [p.detach() for name, p in ours if name != "constant"] + [p.detach() for n, p in ours if n == "constant"]
    theirs = [p.detach() for p in twin.parameters]
    distance = max(float((one - two).abs().max()) for one, two in zip(weights, theirs, strict=True))
    moved = float((optimizer.flat.detach() - before).abs().max())
    return distance, moved, taken, expected


PAIRS = [
    pytest.param(ppo_cleanrl, CLEANRL, False, id="cleanrl"),
    pytest.param(ppo_sb3, SB3, False, id="sb3"),
    pytest.param(ppo_paper, PAPER, True, id="paper"),
]


@pytest.mark.parametrize(("recipe", "published", "continuous"), PAIRS)
def test_a_whole_update_ends_at_the_same_parameters(
    recipe: Callable[[], Run], published: Published, continuous: bool
) -> None:
    run = recipe()
    assert run.environment.count == published.rows
    assert run.rollout.steps == published.steps
    distance, moved, taken, expected = both_updates(run, published, torch.float64, continuous=continuous)
    assert taken == expected == published.epochs * published.rows * published.steps // published.minibatch_size
    assert moved > 2e-3
    assert distance < 1e-11


def test_the_next_update_goes_on_with_the_same_moments() -> None:
    distance, _, _, _ = both_updates(ppo_cleanrl(), CLEANRL, torch.float64, continuous=False, updates=3)
    assert distance < 1e-11


def test_a_whole_update_in_single_precision() -> None:
    distance, moved, _, _ = both_updates(ppo_cleanrl(), CLEANRL, torch.float32, continuous=False)
    assert moved > 2e-3
    assert distance < 1e-6


@pytest.mark.parametrize(
    ("recipe", "published", "rule", "target"),
    [
        pytest.param(ppo_cleanrl, CLEANRL, "cleanrl", 0.001, id="cleanrl"),
        pytest.param(ppo_sb3, SB3, "sb3", 0.01, id="sb3"),
    ],
)
def test_each_stops_by_its_own_rule(recipe: Callable[[], Run], published: Published, rule: str, target: float) -> None:
    run = recipe()
    assert isinstance(run.algorithm, PPO)
    run = replace(run, algorithm=replace(run.algorithm, target_kl=target))
    stopping = replace(published, stop=rule, target_kl=target)
    distance, _, taken, expected = both_updates(run, stopping, torch.float64, continuous=False)
    everything = published.epochs * published.rows * published.steps // published.minibatch_size
    assert 0 < taken == expected < everything
    assert distance < 1e-11


def test_the_clipped_value_loss_of_sb3() -> None:
    run = ppo_sb3()
    assert isinstance(run.algorithm, PPO)
    run = replace(run, algorithm=replace(run.algorithm, value_clip=0.2))
    distance, _, _, _ = both_updates(run, replace(SB3, value_loss=clipped_mse), torch.float64, continuous=False)
    assert distance < 1e-11


@pytest.mark.parametrize(
    "difference",
    [
        {"vf_coef": 1.0},
        {"adam_epsilon": 1e-8},
        {"ent_coef": 0.0},
        {"normalize": False},
        {"max_grad_norm": None},
        {"value_loss": clipped_mse, "vf_coef": 0.25},
        {"learning_rate": 2.5e-4},
    ],
    ids=lambda difference: next(iter(difference)),
)
def test_a_twin_with_one_setting_changed_ends_elsewhere(difference: dict[str, object]) -> None:
    """The comparison sees each of the differences that matter."""
    distance, _, _, _ = both_updates(ppo_cleanrl(), replace(CLEANRL, **difference), torch.float64, continuous=False)
    assert distance > 1e-6

"""A tabular policy in float64 and an episodic MDP small enough to enumerate every trajectory of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upslope.algorithms import Algorithm, Now
from upslope.trajectory import AskedTwice, Batch, Evaluation, Steps, Trajectory

STATES, ACTIONS, GAMMA = 4, 2, 0.8
END = STATES


class Choice:
    """A categorical distribution that says only what is needed."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.log_softmax(-1)

    @property
    def parameters(self) -> Tensor:
        return self.logits

    def select(self, index: Tensor | slice) -> Choice:
        return Choice(self.logits[index])

    def detach(self) -> Choice:
        return Choice(self.logits.detach())

    def kl(self, other: Any) -> Tensor:
        return (self.logits.exp() * (self.logits - other.logits)).sum(-1)


class TabularPolicy(AskedTwice, nn.Module):
    """One row of logits and one value per state; observations are state numbers."""

    def __init__(self, seed: int = 0, states: int = STATES, actions: int = ACTIONS) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(states, actions, generator=generator, dtype=torch.float64))
        self.value = nn.Parameter(torch.randn(states, generator=generator, dtype=torch.float64))
        self.critic_calls = 0

    @property
    def sequential(self) -> bool:
        return False

    def sampler(self) -> Any:
        raise NotImplementedError

    def log_prob(self, observation: Any, action: Tensor) -> Tensor:
        return self.logits.log_softmax(-1)[observation, action]

    def evaluate(self, steps: Steps) -> Evaluation:
        observation = steps.observation
        choice = Choice(self.logits[observation])
        return Evaluation(
            log_prob=self.log_prob(observation, steps.action),
            entropy=-(choice.logits.exp() * choice.logits).sum(-1),
            distribution=choice,
            value=self.value[observation],
        )

    def values(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        self.critic_calls += 1
        with torch.no_grad():
            value = self.value[trajectory.observation]
            return value, trajectory.next_value(value, self.value[trajectory.final_observation])


@dataclass(frozen=True)
class Path:
    """One trajectory of the MDP: its steps, and the probability that the environment plays along."""

    states: tuple[int, ...]
    actions: tuple[int, ...]
    rewards: tuple[float, ...]
    luck: float


class TinyWorld:
    """Four states in layers: from 0 to 1 or 2, from those to 3 or the end, from 3 to the end. At most 3 steps."""

    def __init__(self, seed: int = 7) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.following = torch.zeros(STATES, ACTIONS, STATES + 1, dtype=torch.float64)
        for state, targets in ((0, (1, 2)), (1, (3, END)), (2, (3, END)), (3, (END,))):
            chance = torch.rand(ACTIONS, len(targets), generator=generator, dtype=torch.float64) + 0.1
            self.following[state][:, list(targets)] = chance / chance.sum(-1, keepdim=True)
        self.reward = torch.randn(STATES, ACTIONS, STATES + 1, generator=generator, dtype=torch.float64)

    def action_values(self, logits: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        """q [S, A] and v [S + 1], differentiable in the logits."""
        probability = logits.softmax(-1)
        value = [torch.zeros((), dtype=torch.float64)] * (STATES + 1)
        action_value = [torch.zeros(ACTIONS, dtype=torch.float64)] * STATES
        for state in reversed(range(STATES)):
            after = self.reward[state] + gamma * torch.stack(value)
            action_value[state] = (self.following[state] * after).sum(-1)
            value[state] = (probability[state] * action_value[state]).sum()
        return torch.stack(action_value), torch.stack(value)

    def visits(self, logits: Tensor, gamma: float) -> Tensor:
        """eta_gamma(s) = sum_t gamma^t Pr(s_t = s), [S]."""
        at = torch.zeros(STATES + 1, dtype=torch.float64)
        at[0] = 1.0
        total = torch.zeros(STATES, dtype=torch.float64)
        move = (logits.softmax(-1).unsqueeze(-1) * self.following).sum(1).detach()
        for step in range(3):
            total += gamma**step * at[:STATES]
            at = at[:STATES] @ move
        return total

    def gradient_of_return(self, logits: Tensor, gamma: float) -> Tensor:
        """grad J_gamma, by differentiating the exact value of the start."""
        free = logits.detach().clone().requires_grad_()
        _, value = self.action_values(free, gamma)
        return torch.autograd.grad(value[0], free)[0]

    def gradient_without_discounted_states(self, logits: Tensor, gamma: float) -> Tensor:
        """sum_s eta_1(s) sum_a grad pi(a|s) q_gamma(s, a)."""
        free = logits.detach().clone().requires_grad_()
        action_value, _ = self.action_values(logits.detach(), gamma)
        weight = self.visits(logits.detach(), 1.0).unsqueeze(-1) * action_value
        return torch.autograd.grad((weight * free.softmax(-1)).sum(), free)[0]

    def paths(self) -> Iterator[Path]:
        """Every trajectory that can happen."""
        open_paths: list[tuple[int, Path]] = [(0, Path((), (), (), 1.0))]
        while open_paths:
            state, path = open_paths.pop()
            for action, target in itertools.product(range(ACTIONS), range(STATES + 1)):
                chance = float(self.following[state, action, target])
                if chance == 0.0:
                    continue
                longer = Path(
                    (*path.states, state),
                    (*path.actions, action),
                    (*path.rewards, float(self.reward[state, action, target])),
                    path.luck * chance,
                )
                if target == END:
                    yield longer
                else:
                    open_paths.append((target, longer))


def sealed(policy: TabularPolicy, path: Path) -> Trajectory:
    """One whole terminated episode as one row."""
    length = len(path.states)
    observation, action = torch.tensor([path.states]), torch.tensor([path.actions])
    terminated = torch.zeros(1, length, dtype=torch.bool)
    terminated[0, -1] = True
    return Trajectory(
        observation=observation,
        action=action,
        reward=torch.tensor([path.rewards], dtype=torch.float64),
        terminated=terminated,
        truncated=torch.zeros_like(terminated),
        mask=torch.ones_like(terminated),
        behaviour_log_prob=policy.log_prob(observation, action).detach(),
        time=torch.arange(length).unsqueeze(0),
        final_observation=torch.zeros(0, dtype=torch.long),
        final_index=torch.zeros(0, dtype=torch.long),
    )


def whole_batch(policy: TabularPolicy, algorithm: Algorithm, trajectory: Trajectory) -> Batch:
    """All steps of a trajectory as one prepared batch, rows kept."""
    value, next_value = policy.values(trajectory) if algorithm.passes.critic else (None, None)
    signal = algorithm.advantage(trajectory, value, next_value, Now())
    distribution = policy.evaluate(trajectory).distribution.detach()
    return algorithm.prepare(
        Batch(
            observation=trajectory.observation,
            action=trajectory.action,
            mask=trajectory.mask,
            behaviour_log_prob=trajectory.behaviour_log_prob,
            advantage=signal.advantage,
            value_target=signal.value_target,
            behaviour_value=value,
            behaviour_distribution=distribution,
            weight=trajectory.behaviour_log_prob,
        )
    )


def gradients(
    policy: TabularPolicy, algorithm: Algorithm, batch: Batch, now: Now | None = None
) -> tuple[Tensor, Tensor]:
    """The gradient of the loss for logits and values; 0 where a parameter plays no part."""
    now = now or Now(state=algorithm.initial_state())
    policy.zero_grad()
    algorithm.loss(batch, policy.evaluate(batch), now).value.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in (policy.logits, policy.value)]
    return found[0], found[1]


def expected_ascent(
    world: TinyWorld,
    policy: TabularPolicy,
    algorithm: Algorithm,
    scale: Callable[[Path], float] = lambda path: 1.0,
) -> tuple[Tensor, Tensor]:
    """Minus the expected gradient of the loss over one episode, summed over every trajectory there is.

    Args:
        scale: what each trajectory's gradient is multiplied with; its length turns a mean over steps into a sum.
    """
    actor, critic = torch.zeros_like(policy.logits), torch.zeros_like(policy.value)
    for path in world.paths():
        trajectory = sealed(policy, path)
        probability = path.luck * float(trajectory.behaviour_log_prob.sum().exp())
        ascent = gradients(policy, algorithm, whole_batch(policy, algorithm, trajectory))
        actor -= probability * scale(path) * ascent[0]
        critic -= probability * scale(path) * ascent[1]
    return actor.detach(), critic.detach()

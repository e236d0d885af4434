"""Where an estimator is audited: a problem, the policy differentiated, its critic, who acted, and what a batch is."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from upslope.algorithms import Target
from upslope.collect import EnvironmentCollector
from upslope.collect.finite import FiniteVectorEnvironment
from upslope.exact import (
    FiniteMDP,
    NamedProblem,
    StatePolicy,
    enumerate_episodes,
    enumerate_fragments,
    observed_value,
    policy_gradient,
    solve,
    state_time_occupancy,
)
from upslope.trajectory import Policy, Trajectory, map_observation

Unit: TypeAlias = Literal["episodes", "fragments"]
"""What a row of a batch is: a whole episode, or a fixed number of steps of an environment that resets itself."""

Critic: TypeAlias = Literal["exact", "perturbed"]
"""V = v_pi, or that plus an error in every state."""

Behaviour: TypeAlias = Literal["on_policy", "stale"]
"""Who acted: the policy differentiated, or one with other parameters."""


class Audited(Policy, Protocol):
    """A policy with parameters to differentiate by, such as any `nn.Module` that is a `Policy`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them, the critic's included."""
        ...


_Audited = TypeVar("_Audited", bound=Audited)
_Own = TypeVar("_Own", bound=Audited)

_AT_ONCE = 16
"""Batches of whole episodes that are collected at once: an environment goes on to its next episode."""

_ALIKE = 1e-9
"""Values closer than this, relative to the largest, are the same."""


class Setting(Protocol):
    """A problem with a policy on it: what every batch is, how to draw one, and the exact gradients."""

    @property
    def name(self) -> str:
        """Of the problem, and what is unusual about the setting."""
        ...

    @property
    def policy(self) -> Policy:
        """The policy differentiated."""
        ...

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The actor's."""
        ...

    @property
    def rows(self) -> int:
        """In a drawn batch (groups, where rows come in groups)."""
        ...

    @property
    def trajectories_per_row(self) -> float:
        """Mean trajectories in a row (in a group)."""
        ...

    @property
    def steps_per_row(self) -> float:
        """Mean steps in a row (in a group)."""
        ...

    def every(self) -> Iterator[tuple[float, Trajectory]]:
        """Each batch of one row there is (one group, where rows come in groups), with its probability."""
        ...

    def drawn(self, batches: int, seed: int) -> Iterator[Trajectory]:
        """Batches as training gets them."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class FiniteSetting(Generic[_Audited]):
    """A finite MDP with a policy whose steps stand on their own.

    Attributes:
        problem: its name.
        mdp: its tables, with the discount the estimator uses.
        policy: differentiated, its critic set where that is a table.
        behaviour: who acts; the same object as `policy` where data is on-policy.
        unit: what a row is.
        rows: per drawn batch.
        row_steps: T of a fragment.
        limit: time limit of the environment, in steps; None for none.
    """

    problem: str
    mdp: FiniteMDP
    policy: _Audited
    behaviour: _Audited
    unit: Unit
    rows: int
    row_steps: int
    limit: int | None

    @staticmethod
    def build(
        problem: NamedProblem,
        *,
        gamma: float,
        unit: Unit,
        critic: Critic = "exact",
        behaviour: Behaviour = "on_policy",
        limit: int | None = None,
        rows: int = 32,
        row_steps: int = 4,
        seed: int = 0,
    ) -> FiniteSetting[StatePolicy]:
        """A setting on a named problem, with its own policy.

        Args:
            problem: the problem and the kind of policy it is looked at with.
            gamma: the discount the estimator uses.
            unit: what a row is.
            critic: what the critic knows.
            behaviour: who acted.
            limit: time limit in place of the problem's own; None keeps that.
            rows: per drawn batch.
            row_steps: T of a fragment.
            seed: of the policy's parameters.
        """
        return FiniteSetting.of(
            problem,
            problem.policy(seed),
            gamma=gamma,
            unit=unit,
            critic=critic,
            behaviour=behaviour,
            limit=limit,
            rows=rows,
            row_steps=row_steps,
        )

    @staticmethod
    def of(
        problem: NamedProblem,
        policy: _Own,
        *,
        gamma: float,
        unit: Unit,
        critic: Critic = "exact",
        behaviour: Behaviour = "on_policy",
        limit: int | None = None,
        rows: int = 32,
        row_steps: int = 4,
    ) -> FiniteSetting[_Own]:
        """A setting on a named problem, with a policy of one's own.

        Args:
            problem: the problem.
            policy: any whose steps stand on their own. Where its critic is a table, that is set; any other critic stays
                what it is.
            gamma, unit, critic, behaviour, limit, rows, row_steps: as in `build`.
        """
        mdp = replace(problem.mdp, gamma=gamma)
        if isinstance(policy, StatePolicy):
            set_critic(mdp, policy, critic)
        return FiniteSetting(
            problem=problem.name,
            mdp=mdp,
            policy=policy,
            behaviour=policy if behaviour == "on_policy" else _moved(mdp, policy),
            unit=unit,
            rows=rows,
            row_steps=row_steps,
            limit=problem.limit if limit is None else limit,
        )

    @property
    def name(self) -> str:
        """The problem's name."""
        return self.problem

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Those that log pi depends on."""
        return actor_parameters(self.mdp, self.policy)

    @property
    def aliased(self) -> bool:
        """Whether states that are visited look alike and differ in value, so that no critic of observations is v."""
        with torch.no_grad():
            solution = solve(self.mdp, self.policy)
        visited = ((solution.on_policy > 0) & ~self.mdp.terminal).nonzero().squeeze(-1)
        seen, value = self.mdp.observation[visited], solution.value[visited]
        _, looks = torch.unique(seen, dim=0, return_inverse=True)
        low = torch.full((len(visited),), torch.inf, dtype=torch.float64).scatter_reduce(0, looks, value, "amin")
        return bool((value - low[looks] > _ALIKE * value.abs().max()).any())

    @property
    def mean_length(self) -> float:
        """Mean steps of an episode of the acting policy, as the environment cuts it."""
        if self.mdp.kind == "continuing":
            return math.inf
        return float(state_time_occupancy(self.mdp, self.behaviour, limit=self.limit).sum())

    @property
    def steps_per_row(self) -> float:
        """Mean steps in a row."""
        return self.row_steps if self.unit == "fragments" else self.mean_length

    @property
    def trajectories_per_row(self) -> float:
        """Mean trajectories in a row."""
        return 1.0 if self.mdp.kind == "continuing" else self.steps_per_row / self.mean_length

    def every(self) -> Iterator[tuple[float, Trajectory]]:
        """Each batch of one row there is, with its probability."""
        if self.unit == "episodes":
            rows = enumerate_episodes(self.mdp, self.behaviour, limit=self.limit)
        else:
            rows = enumerate_fragments(self.mdp, self.behaviour, steps=self.row_steps, limit=self.limit)
        for row, probability in enumerate(rows.behaviour_probability.tolist()):
            yield probability, rows.select([row])

    def drawn(self, batches: int, seed: int) -> Iterator[Trajectory]:
        """Batches from the collector that training uses; of fragments, the first tenth is not shown."""
        environments = FiniteVectorEnvironment(self.mdp, self.rows, time_limit=self.limit)
        if self.unit == "episodes":
            collector = EnvironmentCollector(environments, episodes=_AT_ONCE * self.rows, seed=seed)
            updates = (collector.collect(self.behaviour, update) for update in range(math.ceil(batches / _AT_ONCE)))
            pieces = (_piece(trajectory, part, self.rows) for trajectory in updates for part in range(_AT_ONCE))
            shown = islice(pieces, batches)
        else:
            collector = EnvironmentCollector(environments, steps=self.row_steps, seed=seed)
            before = batches // 10
            updates = (collector.collect(self.behaviour, update) for update in range(before + batches))
            shown = islice(updates, before, None)
        for trajectory in shown:
            yield replace(
                trajectory,
                observation=map_observation(_doubled, trajectory.observation),
                final_observation=map_observation(_doubled, trajectory.final_observation),
                reward=trajectory.reward.to(torch.float64),
            )

    def exact_gradient(self, target: Target) -> Tensor:
        """[P] what a declared target is here.

        Raises:
            ValueError: if the algorithm learns from given data, or predicts, and follows no return.
        """
        if target.gradient == "given_data" or target.gradient == "prediction":
            raise ValueError("the algorithm learns from given data, or predicts, and follows no gradient of a return")
        gradient = policy_gradient(
            self.mdp, self.policy, gradient=target.gradient, limit=self.limit, parameters=self.parameters
        )
        scale = target.factor if target.per == "trajectory" else target.factor / self.mean_length
        return gradient * scale


def _piece(trajectory: Trajectory, part: int, rows: int) -> Trajectory:
    """Some of the rows of whole episodes."""
    steps = trajectory.reward.shape[1]
    here = slice(part * rows, (part + 1) * rows)
    last = (trajectory.final_index >= here.start * steps) & (trajectory.final_index < here.stop * steps)
    assert isinstance(trajectory.observation, Tensor)
    assert isinstance(trajectory.final_observation, Tensor)
    return replace(
        trajectory,
        observation=trajectory.observation[here],
        action=trajectory.action[here],
        reward=trajectory.reward[here],
        terminated=trajectory.terminated[here],
        truncated=trajectory.truncated[here],
        mask=trajectory.mask[here],
        behaviour_log_prob=trajectory.behaviour_log_prob[here],
        time=trajectory.time[here],
        final_observation=trajectory.final_observation[last],
        final_index=trajectory.final_index[last] - here.start * steps,
    )


def set_critic(mdp: FiniteMDP, policy: StatePolicy, critic: Critic) -> None:
    """Put v_pi, or that plus an error, into the critic's table."""
    with torch.no_grad():
        policy.value.copy_(observed_value(mdp, solve(mdp, policy)))
        if critic == "perturbed":
            size = 0.5 * (policy.value.std() + 0.1)
            policy.value.add_(size * torch.cos(1.0 + 3.0 * torch.arange(len(policy.value), dtype=torch.float64)))


def _moved(mdp: FiniteMDP, policy: _Audited) -> _Audited:
    """One that acts differently."""
    other = copy.deepcopy(policy)
    moved = actor_parameters(mdp, other)
    with torch.no_grad():
        for parameter in moved:
            wave = torch.sin(1.0 + torch.arange(parameter.numel(), dtype=torch.float64))
            parameter.add_(0.5 * wave.view(parameter.shape))
    return other


def _doubled(observation: Tensor) -> Tensor:
    return observation.to(torch.float64) if observation.is_floating_point() else observation


def actor_parameters(mdp: FiniteMDP, policy: Audited) -> tuple[nn.Parameter, ...]:
    """The trainable parameters that log pi(a|s) depends on."""
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    total = policy.log_prob(mdp.observation, torch.zeros(mdp.states, dtype=torch.long)).sum()
    found = torch.autograd.grad(total, trainable, allow_unused=True)
    return tuple(parameter for parameter, gradient in zip(trainable, found, strict=True) if gradient is not None)

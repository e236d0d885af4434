"""What flows through the house, and the protocols of those who make and read it.

Shapes: `B` rows, `T` positions with time last, `K` open ends, `N` environments, `M` chosen steps. A row is a time
fragment of one environment, or one sequence. A position is one decision of the policy, unless `mask` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

Observation: TypeAlias = Tensor | dict[str, Tensor]
"""One tensor, or named tensors that share their leading shape."""

ObservationArrays: TypeAlias = np.ndarray | dict[str, np.ndarray]
"""The same before it is sealed: NumPy arrays with leading dimension `N`."""

Tree: TypeAlias = Any
"""Nested dicts, lists and tuples of numbers, strings, None, tensors and arrays: what a checkpoint can hold."""


def map_observation(function: Callable[[Any], Any], observation: Any) -> Any:
    """Apply a function to the one tensor (array) of an observation or to each of its named tensors (arrays)."""
    if isinstance(observation, dict):
        entries = cast("dict[str, Any]", observation)
        return {name: function(entry) for name, entry in entries.items()}
    return function(observation)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """Sealed experience: nobody writes on it. What is computed from it is a new tensor with its own name.

    | symbol | field | shape | meaning |
    |---|---|---|---|
    | s_t | `observation` | [B, T, ...] | what the policy saw |
    | a_t | `action` | [B, T] or [B, T, A] | what it chose, before clipping, squashing or offsets at the door |
    | r_t | `reward` | [B, T] | reward received because of a_t, as the environment gave it |
    | | `terminated` | [B, T] bool | the step ended in a terminal state: nothing follows |
    | | `truncated` | [B, T] bool | the environment stopped here though the state was not terminal (a time limit) |
    | m_t | `mask` | [B, T] bool | the policy chose this action and it counts |
    | b_t | `behaviour_log_prob` | [B, T] | log-prob under the distribution that sampled a_t |
    | t | `time` | [B, T] int64 | decisions since the trajectory's start |
    | | `final_observation` | [K, ...] | what followed each position that is cut and not terminated |
    | | `final_index` | [K] int64 | where: `b * T + t`, ascending |
    | | `group` | [B] int64 or None | rows that share a start |
    | | `policy_version` | int | the update that produced the acting policy |
    | f_t | `reference_log_prob` | [B, T] or None | log-prob under the frozen reference; added by the learner |
    | p_t | `proximal_log_prob` | [B, T] or None | log-prob under the learner before the update; added by it |
    | | `memory` | [B, ...] or None | what a recurrent policy carried into each row's first position |
    """

    observation: Observation
    action: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    mask: Tensor
    behaviour_log_prob: Tensor
    time: Tensor
    final_observation: Observation
    final_index: Tensor
    group: Tensor | None = None
    policy_version: int = 0
    reference_log_prob: Tensor | None = None
    proximal_log_prob: Tensor | None = None
    memory: Observation | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(B, T)`."""
        rows, positions = self.reward.shape
        return rows, positions

    @property
    def cut(self) -> Tensor:
        """c_t [B, T]: nothing of this row follows the step (terminated, truncated, or the row's data ends)."""
        cut = self.terminated | self.truncated
        cut[:, -1] = True
        return cut

    @property
    def partial_mask(self) -> Tensor | None:
        """The mask where it hides something, None where every step was chosen: what estimators take as `mask`."""
        return None if bool(self.mask.all()) else self.mask

    def discount(self, gamma: float) -> Tensor:
        """g_t [B, T]: gamma, or 0 where the step truly terminated."""
        return (~self.terminated).to(self.reward.dtype) * gamma

    def next_value(self, value: Tensor, final_value: Tensor) -> Tensor:
        """V'_t [B, T]: the critic at the state that really followed each step.

        Within a row that is the next position's value; where the row is cut without termination it is the value of
        the final observation, never of the reset one; after termination it is 0 (and multiplied by a discount of 0).

        Args:
            value: [B, T] critic at `observation`.
            final_value: [K] critic at `final_observation`.
        """
        following = torch.zeros_like(value)
        following[:, :-1] = value[:, 1:]
        following.masked_fill_(self.terminated, 0.0)
        following.view(-1).index_copy_(0, self.final_index, final_value)
        return following


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What a policy says about steps, differentiable. Shapes follow the steps that were asked about.

    Attributes:
        log_prob: l_t.
        entropy: of the distribution at each step; exact where the distribution allows, else a sample estimate.
        distribution: the distributions themselves, for exact divergences.
        value: V_t, or None where the policy has no critic.
    """

    log_prob: Tensor
    entropy: Tensor
    distribution: Distribution
    value: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Signal:
    """What an algorithm makes of a trajectory, detached.

    Attributes:
        advantage: [B, T], Psi_t.
        value_target: [B, T], what the critic is to come to, or None.
        metrics: [] each, worth seeing; an update reports them, and `Algorithm.adapt` may go by them.
    """

    advantage: Tensor
    value_target: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The steps of one optimiser step, all detached: whole rows [B, T] or `M` chosen steps [M]; a loss sees the latter.

    Attributes:
        observation, action, mask, behaviour_log_prob, reference_log_prob: as in `Trajectory`.
        advantage: Psi_t.
        value_target: the critic's target, or None.
        behaviour_value: V_t when the data was collected, or None.
        behaviour_distribution: the distributions that acted, or None unless the algorithm asked for them.
        reference_distribution: those of the frozen reference, or None unless the algorithm asked for them.
        proximal_log_prob: p_t, of the learner before the update's first step, or None unless the algorithm asked for
            it (`Passes.proximal`); for its loss alone where there are several steps, as in the only one it is the
            log-prob itself.
        weight: w_t of the reduction, fixed for the whole optimiser step.
        reference_point: z, the same at every step, where a loss measures gains from a point that `prepare` fixed.
        share: the part of the optimiser step's chosen steps that is in this batch: less than 1 in a micro-batch.
        time, memory: as in `Trajectory`; memory where rows are whole, else None.
    """

    observation: Observation
    action: Tensor
    mask: Tensor
    behaviour_log_prob: Tensor
    advantage: Tensor
    value_target: Tensor | None
    behaviour_value: Tensor | None
    behaviour_distribution: Distribution | None
    weight: Tensor
    reference_log_prob: Tensor | None = None
    reference_distribution: Distribution | None = None
    proximal_log_prob: Tensor | None = None
    reference_point: Tensor | None = None
    share: float = 1.0
    time: Tensor | None = None
    memory: Observation | None = None


class Distribution(Protocol):
    """Distributions over actions, one per step."""

    @property
    def parameters(self) -> Tensor:
        """[..., P] what the network put out."""
        ...

    def select(self, index: Tensor | slice) -> Distribution:
        """The distributions of some steps (first dimension)."""
        ...

    def detach(self) -> Distribution:
        """The same without gradient."""
        ...

    def kl(self, other: Distribution) -> Tensor:
        """KL(self || other) per step, summed over action dimensions; exact where the family allows."""
        ...


class Steps(Protocol):
    """Anything that carries observations, the actions taken and which of them count: a `Trajectory` or a `Batch`."""

    @property
    def observation(self) -> Observation:
        """What the policy saw."""
        ...

    @property
    def action(self) -> Tensor:
        """What it chose."""
        ...

    @property
    def mask(self) -> Tensor:
        """Where it chose."""
        ...

    @property
    def time(self) -> Tensor | None:
        """Decisions since the trajectory's start: 0 where one begins, and memory with it."""
        ...

    @property
    def memory(self) -> Observation | None:
        """What a recurrent policy carried into each row's first position; None for nothing."""
        ...


class Sampler(Protocol):
    """A policy made lean for a rollout: NumPy in, NumPy out, parameters read where they lie.

    One with a memory is told when it begins, moves its memory on with every action, and is told which episodes ended.
    One without is a `Memoryless` and hears of nothing.
    """

    def begin(self, memory: ObservationArrays | None, environments: int) -> None:
        """Take up what was remembered, [N, ...], or begin with nothing; before the first action."""
        ...

    def restart(self, environments: np.ndarray) -> None:
        """Forget what belongs to the episodes of some environments, by index: the next action begins new ones."""
        ...

    @property
    def memory(self) -> ObservationArrays | None:
        """A copy of what is remembered, [N, ...]; None for nothing."""
        ...

    def noise(self, generator: np.random.Generator, steps: int, environments: int) -> np.ndarray:
        """All the randomness of a rollout, [steps, environments, ...], drawn at once."""
        ...

    def sample(self, observation: ObservationArrays, noise: np.ndarray) -> np.ndarray:
        """One action per environment, [N] or [N, A], from that step's slice of the noise."""
        ...

    def mode(self, observation: ObservationArrays) -> np.ndarray:
        """The most likely action per environment."""
        ...

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """The action as the environment takes it: clipped, squashed, scaled, offset."""
        ...


class Memoryless:
    """What a sampler that remembers nothing has to say about its memory."""

    def begin(self, memory: ObservationArrays | None, environments: int) -> None:
        """Nothing to take up."""

    def restart(self, environments: np.ndarray) -> None:
        """Nothing to forget."""

    @property
    def memory(self) -> ObservationArrays | None:
        """Nothing."""
        return None


class Policy(Protocol):
    """Observation -> distribution over actions, and where there is a critic, value."""

    @property
    def sequential(self) -> bool:
        """Whether a step's distribution depends on earlier positions of its row, so that rows must stay whole."""
        ...

    def sampler(self) -> Sampler:
        """A lean view for rollouts; valid while the parameters stay where they are."""
        ...

    def log_prob(self, observation: Observation, action: Tensor) -> Tensor:
        """log pi(a|s), any leading shape."""
        ...

    def evaluate(self, steps: Steps) -> Evaluation:
        """log-prob, entropy, distribution and value at once, differentiable.

        A sequential policy may leave 0 where `steps.mask` is False, and need not look at what follows the last chosen
        position of a row.
        """
        ...

    def values(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """V_t and V'_t, both [B, T], in one batched critic call."""
        ...

    def evaluate_with_next_value(self, trajectory: Trajectory) -> tuple[Evaluation, Tensor]:
        """`evaluate` of all steps, row after row [B * T], whose values are V_t, and V'_t [B, T] without gradient.

        Asked of policies with a critic that are not sequential. `AskedTwice` does it for those that inherit it.
        """
        ...


class AskedTwice:
    """`Policy.evaluate_with_next_value` of a policy that has no shorter way."""

    def evaluate_with_next_value(self: Policy, trajectory: Trajectory) -> tuple[Evaluation, Tensor]:
        """`evaluate` of all steps, row after row [B * T], and V'_t [B, T] without gradient: one look for each."""
        with torch.no_grad():
            _, next_value = self.values(trajectory)
        steps = replace(
            trajectory,
            observation=map_observation(lambda tensor: tensor.flatten(0, 1), trajectory.observation),
            action=trajectory.action.flatten(0, 1),
            mask=trajectory.mask.flatten(),
            time=trajectory.time.flatten(),
        )
        return self.evaluate(steps), next_value


class Collector(Protocol):
    """Whoever brings trajectories: environments or prompts."""

    def collect(self, policy: Policy, update: int) -> Trajectory:
        """Act with the policy and seal what happened."""
        ...

    def snapshot(self) -> Tree:
        """Everything needed to go on exactly here."""
        ...

    def restore(self, tree: Tree) -> None:
        """Go on exactly there."""
        ...

    def close(self) -> None:
        """Give back processes and windows."""
        ...

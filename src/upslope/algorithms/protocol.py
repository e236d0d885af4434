"""What the training loop asks of an algorithm. The loop knows no algorithm by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from upslope.trajectory import Batch, Evaluation, Signal, Trajectory

State: TypeAlias = Mapping[str, float]
"""Numbers an algorithm carries from update to update, such as an adaptive coefficient. Saved in checkpoints."""

ScheduleName: TypeAlias = Literal["constant", "linear", "cosine"]
"""How a coefficient moves over a run: not at all, to zero in a straight line, or to zero along half a cosine."""


GradientName: TypeAlias = Literal["discounted", "undiscounted_states", "average_reward", "given_data", "prediction"]
"""grad J_gamma; the same with gamma^t dropped, sum_s eta_1(s) sum_a grad pi(a|s) q_gamma(s,a); grad r_bar; or, of data
that nobody sampled, the gradient of the algorithm's own loss on it: there is no return; or none, as only the critic
learns."""

Condition: TypeAlias = Literal["exact_critic", "exact_critic_at_limit", "on_policy", "no_time_limit", "fixed_steps"]
"""What an estimator may need to be unbiased: V = v_pi; V = v_pi where a limit cuts a trajectory; data of the policy
being differentiated; no trajectory cut by a limit that is not part of the task; batches that all hold the same number
of steps, as a mean over steps is a ratio where they do not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Penalty:
    """A penalty on the distance from a frozen reference that is part of what an algorithm maximises.

    Attributes:
        coefficient: beta.
        of: "trajectories": beta KL(pi || ref) of whole trajectories is subtracted from J. "steps": the gradient of
            KL(pi || ref) at each visited state is followed, sum_s eta(s) grad KL(s), as though the policy did not
            change which states are visited.
        baselined: whether it is part of the reward before the group's baseline, and shrinks with it.
    """

    coefficient: float
    of: Literal["trajectories", "steps"]
    baselined: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What the mean of an algorithm's ascent direction is, and when: declared by the algorithm, checked by the audit.

    Attributes:
        gradient: which gradient the mean is proportional to.
        per: "trajectory": the gradient itself. "step": the gradient over the mean length of an episode, since the
            average is over steps (state weights mu instead of eta).
        factor: what else multiplies it, such as 1 / L.
        requires: the mean is exactly that only where all of these hold; where one does not, there is bias.
        biased_by: settings under which no condition makes it exact, in words; empty where there are none.
        batchwise: whether the rows of a batch change one another's gradient (advantages standardised over the batch),
            so that the mean over batches is not the mean over rows.
        group_mean: whether the mean of a group of G, the row itself among them, is its baseline, so that the factor is
            (G - 1) / G times as much.
        penalty: on the distance from the reference, or None.
    """

    gradient: GradientName
    per: Literal["trajectory", "step"]
    factor: float = 1.0
    requires: tuple[Condition, ...] = ()
    biased_by: tuple[str, ...] = ()
    batchwise: bool = False
    group_mean: bool = False
    penalty: Penalty | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NaturalStep:
    """One step in the metric of the policy's own distributions, and passes of the critic alone after it.

    x solves (F + damping) x = g, with g the gradient of minus the loss and F the mean Fisher matrix of a chosen step.

    Attributes:
        max_divergence: delta, the KL(old || new) per step that the step may reach; None with a step size.
        step_size: theta + step_size x; None for sqrt(2 delta / x'Fx) x.
        damping: added to the diagonal of F.
        iterations: of conjugate gradient.
        backtrack: each attempt's length over that of the one before.
        attempts: of the line search, which asks for a smaller loss and KL <= delta; 0 takes the step unseen.
        critic_epochs: passes of the critic over the batch.
        critic_minibatches: its optimiser steps per pass.
    """

    max_divergence: float | None
    step_size: float | None
    damping: float
    iterations: int
    backtrack: float
    attempts: int
    critic_epochs: int
    critic_minibatches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Traces:
    """How eligibility traces move the parameters, one update per step of each environment.

    Attributes:
        discount: gamma of the TD residual; 1 with an average reward.
        critic_decay: of the critic's trace per step, gamma lambda_w.
        actor_decay: of the actor's, gamma lambda_theta; None where the policy stays as it is.
        state_discount: gamma of I_t = gamma^t, which weights the score as it enters the trace; 1 for none.
        value_ratio: alpha_w over the learning rate.
        average_reward_ratio: alpha_r over the learning rate, in a task without end; None elsewhere. r_bar is the
            algorithm's carried number "average_reward", and a metric of that name says what the update made of it.
    """

    discount: float
    critic_decay: float
    actor_decay: float | None
    state_discount: float = 1.0
    value_ratio: float = 1.0
    average_reward_ratio: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """How the steps of one update are used.

    Attributes:
        epochs: passes over the data.
        minibatches: optimiser steps per pass; sizes differ by one step at most.
        critic: whether the algorithm needs a policy with a critic.
        whole_episodes: whether Psi needs trajectories from their start to their end.
        behaviour_distribution: whether the loss needs the distributions that acted; their KL to the new ones is
            measured after the update.
        recompute_advantage: compute Psi anew, with the current critic, before each pass after the first.
        target_kl: stop the update when the estimated KL(old || new) passes it; None never stops.
        reference: what of the frozen reference policy the algorithm needs: nothing, f_t, or its distributions.
        proximal: from where on p_t is needed, the log-probs of the learner itself before the update, as those of who
            acted may differ: in Psi (`Trajectory.proximal_log_prob`), in `prepare`, or in the loss alone, where an
            update's only step has none, as they are those of the policy as it is.
        together: consecutive rows that no minibatch and no micro-batch may part (2 for pairs).
        groups: whether Psi compares the rows of a group, so that each needs two rows at least.
        whole_rows: whether the loss looks at whole rows [B, T] (one ratio per sequence), for any policy.
        values_first: whether Psi needs the critic's values before the update, where there is a critic.
        kl_stop: "before_step" looks at each minibatch and stops before its step beyond 1.5 target_kl; "after_epoch"
            looks at the last minibatch of each pass and stops beyond target_kl.
        behaviour_log_prob: whether Psi, `prepare` or the loss reads b_t. Where it is False, b_t may be left out (NaN).
        rule: what moves the parameters: one natural step of the actor, with the critic fitted apart, or eligibility
            traces at every step; None for an optimiser's steps on the loss.
    """

    epochs: int = 1
    minibatches: int = 1
    critic: bool = True
    whole_episodes: bool = False
    behaviour_distribution: bool = False
    recompute_advantage: bool = False
    target_kl: float | None = None
    kl_stop: Literal["before_step", "after_epoch"] = "before_step"
    reference: Literal["none", "log_prob", "distribution"] = "none"
    proximal: Literal["none", "loss", "prepare", "advantage"] = "none"
    together: int = 1
    groups: bool = False
    whole_rows: bool = False
    values_first: bool = True
    behaviour_log_prob: bool = True
    rule: NaturalStep | Traces | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Now:
    """Where the run stands: `progress` from 0 to 1 by environment steps, and the algorithm's carried numbers."""

    progress: float = 0.0
    state: State = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A scalar to minimise, the sum of weight x value over steps, and detached scalars worth seeing.

    Both are added up over the micro-batches of an optimiser step, so each must be the part that the batch's own steps
    bring: of a mean over all chosen steps the mean over the batch's, times `batch.share` (0 where it has none).

    Attributes:
        value: the loss, [].
        metrics: [] each, by name; may be empty. An update reports the mean of each over its optimiser steps. Two names
            are used where they are there: "entropy" gives `entropy_share` in diagnostics, and "kl", a mean of KL(old ||
            new), is what `Passes.target_kl` is compared with; without it k3 of the log-probs is.
    """

    value: Tensor
    metrics: Mapping[str, Tensor]


class Algorithm(Protocol):
    """A frozen dataclass of hyperparameters with these formulas."""

    @property
    def gamma(self) -> float:
        """The discount factor; the reward normaliser uses the same."""
        ...

    @property
    def passes(self) -> Passes:
        """How the steps of one update are used."""
        ...

    @property
    def target(self) -> Target:
        """Which gradient the ascent direction of the actor follows on average, and under which conditions."""
        ...

    def initial_state(self) -> State:
        """The carried numbers before the first update."""
        ...

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """Psi_t and the critic's target, [B, T].

        Args:
            trajectory: what was collected.
            value: [B, T] V_t, or None without a critic.
            next_value: [B, T] V'_t, or None without a critic.
            now: where the run stands.
        """
        ...

    def prepare(self, batch: Batch) -> Batch:
        """Weights and advantage scaling, once per optimiser step, before any split into micro-batches."""
        ...

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """The scalar whose gradient the optimiser follows downhill."""
        ...

    def adapt(self, state: State, metrics: Mapping[str, float]) -> State:
        """The carried numbers after an update, from its mean metrics.

        With `passes.behaviour_distribution`, `metrics["kl_after"]` is the exact mean KL(old || new) after the update.
        """
        ...

    def describe(self) -> Mapping[str, str]:
        """The exact estimator in words: Psi, scale, ratio, clip, KL, value error, reduction."""
        ...


class Stateless:
    """An algorithm that carries no numbers from update to update."""

    __slots__ = ()

    def initial_state(self) -> State:
        """Nothing is carried."""
        return {}

    def adapt(self, state: State, metrics: Mapping[str, float]) -> State:
        """Nothing is carried."""
        return state


class Undiscounted:
    """An algorithm without discount."""

    __slots__ = ()

    @property
    def gamma(self) -> float:
        """No discount."""
        return 1.0


def scheduled(name: ScheduleName, initial: float, progress: float) -> float:
    """A coefficient at a point of the run.

    >>> [scheduled("linear", 2.0, p) for p in (0.0, 0.5, 1.0)]
    [2.0, 1.0, 0.0]
    >>> scheduled("constant", 2.0, 0.7), round(scheduled("cosine", 2.0, 0.5), 12)
    (2.0, 1.0)
    """
    remaining = 1.0 - min(max(progress, 0.0), 1.0)
    if name == "constant":
        return initial
    if name == "linear":
        return initial * remaining
    return initial * math.sin(0.5 * math.pi * remaining) ** 2


def scheduled_in_words(name: ScheduleName, initial: float) -> str:
    """A coefficient and how it moves, for `Algorithm.describe`.

    >>> scheduled_in_words("constant", 0.01), scheduled_in_words("linear", 0.01)
    ('0.01', '0.01 at the start of the run, 0 at its end (linear)')
    """
    if name == "constant" or initial == 0.0:
        return str(initial)
    return f"{initial} at the start of the run, 0 at its end ({name})"


def passes_in_words(epochs: int, minibatches: int) -> str:
    """How often an update goes through its batch, and in how many parts, for `Algorithm.describe`.

    >>> passes_in_words(4, 1), passes_in_words(1, 8)
    ('4 epochs x 1 minibatch', '1 epoch x 8 minibatches')
    """
    return f"{epochs} epoch{'' if epochs == 1 else 's'} x {minibatches} minibatch{'' if minibatches == 1 else 'es'}"


DISCOUNT_DROPPED = "gamma^t dropped (follows sum_s eta_1(s) sum_a grad pi q_gamma, not grad J_gamma)"
"""The weights of states of what follows "undiscounted_states", for `Algorithm.describe`."""


def entropy_bias(coefficient: float) -> tuple[str, ...]:
    """What an entropy bonus does to the direction, in words."""
    return ("the entropy bonus adds its own gradient",) if coefficient != 0.0 else ()


def check_passes(epochs: int, minibatches: int) -> None:
    """Refuse an update without any step.

    Raises:
        ValueError: if there are no epochs or no minibatches.
    """
    if epochs < 1 or minibatches < 1:
        raise ValueError(f"epochs and minibatches must be at least 1, got {epochs} and {minibatches}")

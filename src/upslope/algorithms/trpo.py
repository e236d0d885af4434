"""Trust region policy optimisation (Schulman et al. 2015): the natural direction, as far as it helps within a bound.

    maximise L(theta) = sum_t w_t [ e^{l_t - b_t} Psi_t + c_H H_t ]  subject to  mean_t KL(old || new) <= delta
    (F + damping) x = grad L                         by conjugate gradient, F = Hessian of the mean KL at theta_old
    theta = theta_old + c^j sqrt(2 delta / x'Fx) x   for the first j = 0, 1, ... that increases L within the bound

If no attempt qualifies the parameters stay as they were, bit for bit. The critic is fitted after the step, by
regression on its own parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from upslope.algorithms.protocol import Loss, NaturalStep, Now, Passes, ScheduleName, State, Target
from upslope.algorithms.surrogate import (
    SurrogatePsi,
    check_surrogate,
    describe_surrogate,
    prepared_surrogate,
    surrogate_loss,
    surrogate_signal,
    surrogate_target,
)
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class TRPO:
    """One step per batch within a trust region, found by conjugate gradient and a line search."""

    gamma: float = 0.99
    """Discount factor per step."""
    psi: SurrogatePsi = "gae"
    """What multiplies the ratio: "gae" with a critic; "reward_to_go" or "group" of whole episodes without one."""
    gae_lambda: float = 0.95
    """1 trusts the returns, 0 trusts the critic."""
    normalize_advantage: bool = True
    """Standardise Psi over the batch. Its spread does not change the step, its mean does."""
    max_divergence: float = 0.01
    """delta: the largest mean KL(old || new) per step of an update."""
    damping: float = 0.1
    """Added to the diagonal of the Fisher matrix in the equation for the direction, not in the step's length."""
    conjugate_gradient_iterations: int = 10
    """Fisher-vector products per update, at most."""
    backtrack: float = 0.8
    """Each attempt of the line search is this much as long as the one before."""
    line_search_attempts: int = 10
    """Attempts before the step is refused."""
    critic_epochs: int = 10
    """Passes of the critic over each batch."""
    critic_minibatches: int = 16
    """Optimiser steps of the critic per pass."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus in what is climbed."""
    entropy_schedule: ScheduleName = "constant"
    """How the entropy bonus moves over the run."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        critic = (self.critic_epochs, self.critic_minibatches)
        check_surrogate(self.psi, self.gamma, self.damping, self.conjugate_gradient_iterations, critic)
        if not self.max_divergence > 0.0:
            raise ValueError(f"max_divergence bounds a KL and is positive (0.01 is usual), got {self.max_divergence}")
        if not 0.0 < self.backtrack < 1.0:
            raise ValueError(f"backtrack lies strictly between 0 and 1 (0.8 is usual), got {self.backtrack}")
        if self.line_search_attempts < 1:
            raise ValueError(
                f"line_search_attempts must be at least 1, got {self.line_search_attempts}; a natural step without a "
                "line search is NPG"
            )

    @property
    def passes(self) -> Passes:
        """One natural step on the whole batch, found by a line search; then the critic's passes."""
        without_critic = self.psi != "gae"
        return Passes(
            critic=not without_critic,
            whole_episodes=without_critic,
            groups=self.psi == "group",
            natural=NaturalStep(
                max_divergence=self.max_divergence,
                step_size=None,
                damping=self.damping,
                iterations=self.conjugate_gradient_iterations,
                backtrack=self.backtrack,
                attempts=self.line_search_attempts,
                critic_epochs=self.critic_epochs,
                critic_minibatches=self.critic_minibatches,
            ),
        )

    @property
    def target(self) -> Target:
        """Of the surrogate's gradient g; the step then goes along (F + damping)^-1 g."""
        return surrogate_target(
            self.psi, normalised=self.normalize_advantage, entropy_coefficient=self.entropy_coefficient
        )

    def initial_state(self) -> State:
        """Nothing is carried."""
        return {}

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """Psi_t, and A_t + V_t for the critic."""
        return surrogate_signal(self.psi, trajectory, value, next_value, gamma=self.gamma, gae_lambda=self.gae_lambda)

    def prepare(self, batch: Batch) -> Batch:
        """The weights of the batch, and Psi standardised if asked for."""
        return prepared_surrogate(self.psi, batch, normalised=self.normalize_advantage)

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """-L."""
        return surrogate_loss(
            batch,
            evaluation,
            now,
            entropy_coefficient=self.entropy_coefficient,
            entropy_schedule=self.entropy_schedule,
        )

    def adapt(self, state: State, metrics: Mapping[str, float]) -> State:
        """Nothing is carried."""
        return state

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        return {
            **describe_surrogate(
                self.psi,
                gamma=self.gamma,
                gae_lambda=self.gae_lambda,
                normalised=self.normalize_advantage,
                entropy=(self.entropy_coefficient, self.entropy_schedule),
                critic=(self.critic_epochs, self.critic_minibatches),
            ),
            "direction": f"(F + {self.damping}) x = grad L, {self.conjugate_gradient_iterations} iterations of "
            "conjugate gradient",
            "step": f"sqrt(2 x {self.max_divergence} / x'Fx) x, times {self.backtrack}^j for the first of "
            f"{self.line_search_attempts} attempts with larger L and mean KL(old || new) <= {self.max_divergence}; "
            "else none",
            "passes": "1 natural step per batch",
        }

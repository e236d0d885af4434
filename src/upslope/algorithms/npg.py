"""The natural policy gradient (Kakade 2001): steepest ascent where distance is KL, without a line search.

    (F + damping) x = grad L,  L(theta) = sum_t w_t [ e^{l_t - b_t} Psi_t + c_H H_t ]
    theta = theta_old + sqrt(2 delta / x'Fx) x      so that the KL is delta, as far as it is quadratic
    theta = theta_old + alpha x                     with a fixed step size

However the policy is parametrised, the change of the policy is the same to first order. Nothing looks at where the step
leads: TRPO does. The critic is fitted after the step, by regression on its own parameters.
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
class NPG:
    """One natural step per batch, of a given KL or a given step size."""

    gamma: float = 0.99
    """Discount factor per step."""
    psi: SurrogatePsi = "gae"
    """What multiplies the ratio: "gae" with a critic; "reward_to_go" or "group" of whole episodes without one."""
    gae_lambda: float = 0.95
    """1 trusts the returns, 0 trusts the critic."""
    normalize_advantage: bool = True
    """Standardise Psi over the batch."""
    max_divergence: float | None = 0.01
    """delta: the quadratic KL(old || new) per step of each update; None with step_size."""
    step_size: float | None = None
    """alpha: multiplies x, which then is not scaled; None with max_divergence."""
    damping: float = 0.1
    """Added to the diagonal of the Fisher matrix in the equation for the direction, not in the step's length."""
    conjugate_gradient_iterations: int = 10
    """Fisher-vector products per update, at most."""
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
        if (self.max_divergence is None) == (self.step_size is None):
            raise ValueError(
                "a natural step is as long as max_divergence allows, or step_size times x: set one, the other None; "
                f"got max_divergence={self.max_divergence} and step_size={self.step_size}"
            )
        length = self.max_divergence if self.step_size is None else self.step_size
        if length is not None and not length > 0.0:
            raise ValueError(f"max_divergence and step_size are positive, got {length}")

    @property
    def passes(self) -> Passes:
        """One natural step on the whole batch; then the critic's passes."""
        without_critic = self.psi != "gae"
        return Passes(
            critic=not without_critic,
            whole_episodes=without_critic,
            groups=self.psi == "group",
            natural=NaturalStep(
                max_divergence=self.max_divergence,
                step_size=self.step_size,
                damping=self.damping,
                iterations=self.conjugate_gradient_iterations,
                backtrack=0.5,
                attempts=0,
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
        length = f"{self.step_size} x" if self.step_size is not None else f"sqrt(2 x {self.max_divergence} / x'Fx) x"
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
            "step": f"{length}, without a line search",
            "passes": "1 natural step per batch",
        }

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

from upslope.algorithms.protocol import NaturalStep, Passes
from upslope.algorithms.surrogate import NaturalAscent


@dataclass(frozen=True, kw_only=True, slots=True)
class NPG(NaturalAscent):
    """One natural step per batch, of a given KL or a given step size."""

    max_divergence: float | None = 0.01
    """delta: the quadratic KL(old || new) per step of each update; None with step_size."""
    step_size: float | None = None
    """alpha: multiplies x, which then is not scaled; None with max_divergence."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        NaturalAscent.__post_init__(self)
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
        return self._passes(
            NaturalStep(
                max_divergence=self.max_divergence,
                step_size=self.step_size,
                damping=self.damping,
                iterations=self.conjugate_gradient_iterations,
                backtrack=0.5,
                attempts=0,
                critic_epochs=self.critic_epochs,
                critic_minibatches=self.critic_minibatches,
            )
        )

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        length = f"{self.step_size} x" if self.step_size is not None else f"sqrt(2 x {self.max_divergence} / x'Fx) x"
        return self._words(f"{length}, without a line search")

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

from upslope.algorithms.protocol import NaturalStep, Passes
from upslope.algorithms.surrogate import NaturalAscent


@dataclass(frozen=True, kw_only=True, slots=True)
class TRPO(NaturalAscent):
    """One step per batch within a trust region, found by conjugate gradient and a line search."""

    max_divergence: float = 0.01
    """delta: the largest mean KL(old || new) per step of an update."""
    backtrack: float = 0.8
    """Each attempt of the line search is this much as long as the one before."""
    line_search_attempts: int = 10
    """Attempts before the step is refused."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        NaturalAscent.__post_init__(self)
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
        return self._passes(
            NaturalStep(
                max_divergence=self.max_divergence,
                step_size=None,
                damping=self.damping,
                iterations=self.conjugate_gradient_iterations,
                backtrack=self.backtrack,
                attempts=self.line_search_attempts,
                critic_epochs=self.critic_epochs,
                critic_minibatches=self.critic_minibatches,
            )
        )

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        return self._words(
            f"sqrt(2 x {self.max_divergence} / x'Fx) x, times {self.backtrack}^j for the first of "
            f"{self.line_search_attempts} attempts with larger L and mean KL(old || new) <= {self.max_divergence}; "
            "else none"
        )

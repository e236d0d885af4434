"""V-trace actor-critic (IMPALA, Espeholt et al. 2018): learns from steps that an older policy, or another one, chose.

    rho_t = min(rho_bar, e^{l_t - b_t}), k_t = lambda min(c_bar, e^{l_t - b_t})      l of the learner before the update
    v_t = V_t + rho_t delta_t + g_t k_t (v_{t+1} - V_{t+1}), the last term 0 where cut
    Psi_t = rho_t (r_t + g_t v_{t+1} - V_t), target = v_t
    loss = sum_t w_t [ -l_t Psi_t + c_V * 0.5 (V_t - v_t)^2 - c_H H_t ],  w_t = m_t / sum(m)

On-policy v_t is the lambda-return. rho_bar decides whose value is learnt, c_bar and lambda only how fast. The version
without correction is `A2C` on the same data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from upslope.algorithms.actor_critic import score_and_value_loss
from upslope.algorithms.critic_advantage import unweighted_advantage, vtrace_of
from upslope.algorithms.protocol import (
    Loss,
    Now,
    Passes,
    ScheduleName,
    Stateless,
    Target,
    entropy_bias,
    scheduled,
    scheduled_in_words,
)
from upslope.estimators import standardise, step_mean
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class VTraceActorCritic(Stateless):
    """V-trace actor-critic: one step per short fragment, corrected for who acted."""

    gamma: float = 0.99
    """Discount factor per step."""
    gae_lambda: float = 1.0
    """lambda of the traces; 1 sums all corrections up to the fragment's end."""
    rho_bar: float = 1.0
    """Largest weight of a step's own correction: with 1, the value learnt is that of a policy between the two."""
    c_bar: float = 1.0
    """Largest weight by which a correction is carried back to the step before."""
    normalize_advantage: bool = False
    """Standardise advantages over the batch, before they are weighted by rho: a mean subtracted afterwards would push
    the policy away from the one that acted, or towards it."""
    value_coefficient: float = 1.0
    """Multiplier of 0.5 (V - v)^2."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus at the start of the run."""
    entropy_schedule: ScheduleName = "constant"
    """How that weight moves over the run."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        for name, bound in (("rho_bar", self.rho_bar), ("c_bar", self.c_bar)):
            if not bound > 0.0:
                raise ValueError(f"{name} is the largest weight a ratio may have, above 0 (1 is usual); got {bound}")

    @property
    def passes(self) -> Passes:
        """One step on each fragment, with the learner's own log-probs of what was done."""
        return Passes(proximal="advantage")

    @property
    def target(self) -> Target:
        """The mean over steps where the policy itself acted; else states are those of who acted, and weights truncated.

        The audit also holds it, with whole weights, against what it follows off-policy: sum_s eta_b(s) sum_a
        grad pi(a|s) A_pi(s,a) over the mean length.
        """
        biases = ("the batch's standard deviation divides the advantage",) if self.normalize_advantage else ()
        biases += entropy_bias(self.entropy_coefficient)
        return Target(
            gradient="undiscounted_states",
            per="step",
            requires=("on_policy", "exact_critic", "fixed_steps"),
            biased_by=biases,
            batchwise=self.normalize_advantage,
        )

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """Psi_t and v_t, and the mean of rho_t: 1 where the policy itself acted."""
        found = vtrace_of(
            trajectory,
            value,
            next_value,
            gamma=self.gamma,
            trace_decay=self.gae_lambda,
            rho_clip=self.rho_bar,
            trace_clip=self.c_bar,
        )
        metrics = {"importance_weight": found.rho[trajectory.mask].mean()}
        advantage = found.advantage
        if self.normalize_advantage:
            advantage = found.rho * standardise(unweighted_advantage(found), trajectory.mask)
        return Signal(advantage=advantage, value_target=found.value_target, metrics=metrics)

    def prepare(self, batch: Batch) -> Batch:
        """Every step counts the same."""
        return replace(batch, weight=step_mean(batch.mask, dtype=batch.advantage.dtype))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """Score function, value error, entropy bonus."""
        entropy = scheduled(self.entropy_schedule, self.entropy_coefficient, now.progress)
        return score_and_value_loss(batch, evaluation, self.value_coefficient, entropy)

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        return {
            "Psi": f"V-trace(gamma={self.gamma}, lambda={self.gae_lambda})",
            "state weights": "gamma^t dropped; states as who acted visits them",
            "advantage scale": "standardised over the batch, then weighted" if self.normalize_advantage else "none",
            "ratio": f"per step, exp(l - behaviour), truncated at rho_bar={self.rho_bar} and c_bar={self.c_bar}; "
            "l: the learner before the update",
            "value error": f"{self.value_coefficient} x 0.5 (V - v)^2; target = v of V-trace",
            "entropy bonus": scheduled_in_words(self.entropy_schedule, self.entropy_coefficient),
            "reduction": "step_mean over the batch",
            "passes": "1 step per batch",
        }

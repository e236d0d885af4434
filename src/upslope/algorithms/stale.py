"""What a surrogate method does about batches that older policies collected: the decoupled objective.

    ratio_t = e^{l_t - p_t}, clipped around the learner before the update       anchor "proximal"
    objective_t = min(cap, e^{p_t - b_t}) min(ratio_t A_t, clip(ratio_t) A_t)    b: of who acted
    A_t = r_t + g_t v_{t+1} - V_t with v of V-trace                             advantage "vtrace"

A clip around the policy that acted would hold the learner back to where it was then; around the learner itself it says
how far one update may go, and the weight e^{p-b} alone corrects for who acted (Hilton, Cobbe & Schulman 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from upslope.algorithms.critic_advantage import unweighted_advantage, vtrace_of
from upslope.algorithms.ratios import importance_weight, step_average
from upslope.trajectory import Batch, Signal, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class StaleData:
    """How PPO reads data of older policies; as it comes, as though all were its own."""

    anchor: Literal["behaviour", "proximal"] = "behaviour"
    """What the ratio is taken to and clipped around: the policy that acted, or the learner before the update."""
    importance_cap: float | None = None
    """Weight each step by the ratio of the learner before the update to who acted, at most this; None for no weights.
    For anchor "proximal", whose ratio leaves that out."""
    advantage: Literal["gae", "vtrace"] = "gae"
    """Advantages and targets of the critic: as though the policy itself had acted, or corrected by V-trace."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        for name, value, choices in (
            ("anchor", self.anchor, ("behaviour", "proximal")),
            ("advantage", self.advantage, ("gae", "vtrace")),
        ):
            if value not in choices:
                raise ValueError(f"stale.{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if self.importance_cap is None:
            return
        if not self.importance_cap > 0.0:
            raise ValueError(f"importance_cap is the largest weight, above 0, or None; got {self.importance_cap}")
        if self.anchor == "behaviour":
            raise ValueError(
                "importance_cap weighs by e^{p-b}, which the ratio to the policy that acted already has: set anchor to "
                '"proximal", or importance_cap to None'
            )

    @property
    def corrects_advantage(self) -> bool:
        """Whether Psi needs the learner's own log-probs."""
        return self.advantage == "vtrace"

    @property
    def needs(self) -> Literal["none", "loss", "advantage"]:
        """Where the learner's own log-probs before the update are needed."""
        if self.corrects_advantage:
            return "advantage"
        return "loss" if self.anchor == "proximal" else "none"

    def old_log_prob(self, batch: Batch, log_prob: Tensor) -> Tensor:
        """What the ratio is taken to: b, or p, which in an update's only step is l itself."""
        if self.anchor == "behaviour":
            return batch.behaviour_log_prob
        old = log_prob.detach() if batch.proximal_log_prob is None else batch.proximal_log_prob
        return torch.where(batch.mask, old, 0.0)

    def weighted(self, advantage: Tensor, old: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The advantage times min(cap, e^{p-b}), and with it the surrogate; that weight's mean, as a metric.

        Args:
            advantage: per step.
            old: of `old_log_prob`.
            batch: of the loss.
        """
        if self.importance_cap is None:
            return advantage, {}
        weight = importance_weight(
            old,
            batch.behaviour_log_prob,
            batch.mask,
            cap=self.importance_cap,
            level="step",
            correction="truncate",
        )
        return advantage * weight, {"importance_weight": step_average(weight, batch)}

    def signal(
        self,
        trajectory: Trajectory,
        value: Tensor | None,
        next_value: Tensor | None,
        *,
        gamma: float,
        trace_decay: float,
    ) -> Signal:
        """A_t and v_t of V-trace with both truncations at 1; A_t without its weight rho_t, which the ratio brings.

        Args:
            trajectory: with p_t.
            value: [B, T] V.
            next_value: [B, T] V'.
            gamma: discount factor.
            trace_decay: lambda.
        """
        found = vtrace_of(
            trajectory, value, next_value, gamma=gamma, trace_decay=trace_decay, rho_clip=1.0, trace_clip=1.0
        )
        return Signal(advantage=unweighted_advantage(found), value_target=found.value_target)

    def ratio_in_words(self) -> str:
        """The ratio and its correction."""
        if self.anchor == "behaviour":
            return "per step, exp(log_prob - behaviour_log_prob)"
        weight = "" if self.importance_cap is None else f", weighted by min({self.importance_cap}, exp(p - behaviour))"
        return f"per step, exp(log_prob - p), p: the learner before the update{weight}"

    def advantage_in_words(self, gamma: float, gae_lambda: float) -> str:
        """The advantage."""
        name = "V-trace" if self.corrects_advantage else "GAE"
        return f"{name}(gamma={gamma}, lambda={gae_lambda})"

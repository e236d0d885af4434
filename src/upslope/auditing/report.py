"""What an audit found: bias, spread and their ratio, against the exact gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from upslope.auditing.moments import Moments

Verdict: TypeAlias = Literal["unbiased", "biased", "undecided"]
"""Undecided: sampled, and neither bias nor its absence shows yet."""

EXACT_TOLERANCE = 1e-9
"""Relative bias below this is rounding, where every batch was weighted."""

VISIBLE_BIAS = 1e-4
"""Relative bias above this shows, where every batch was weighted."""

_P_UNBIASED, _P_BIASED, _ROUNDING = 1e-3, 1e-6, 1e-5
_SMALLEST = 1e-300


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """One estimator on one problem, against one exact gradient.

    Attributes:
        subject: what was audited.
        problem: on what.
        target_name: the exact gradient it was held against, in words.
        target: [P] that gradient.
        moments: of the ascent direction of one batch.
        trajectories: per batch (mean episodes per batch, where episodes go on through batches).
        steps: per batch.
        batches: how many batches were weighted or drawn.
        declared: what the estimator declares in this setting, or None where it declares nothing.
        reason: what biases it here, if it is declared biased.
    """

    subject: str
    problem: str
    target_name: str
    target: Tensor
    moments: Moments
    trajectories: float = 1.0
    steps: float = 1.0
    batches: int = 1
    declared: Literal["unbiased", "biased"] | None = None
    reason: str = ""

    @property
    def bias(self) -> Tensor:
        """[P] mean minus target."""
        return self.moments.mean - self.target

    @property
    def relative_bias(self) -> float:
        """|bias| / |target|."""
        return float(self.bias.norm()) / math.sqrt(self._squared_length)

    @property
    def _squared_length(self) -> float:
        """|target|^2; not 0, so that a target of 0 has a bias without end."""
        return max(float(self.target @ self.target), torch.finfo(torch.float64).tiny)

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the relative bias: a point where it is exact."""
        if self.moments.exact:
            return self.relative_bias, self.relative_bias
        margin = 1.96 * math.sqrt(self.moments.variance_of_mean) / math.sqrt(self._squared_length)
        return max(self.relative_bias - margin, 0.0), self.relative_bias + margin

    @property
    def p_value(self) -> float | None:
        """Chance of a bias at least this large if there were none; None where it is exact. See `Moments.p_value`."""
        return None if self.moments.exact else self.moments.p_value(self.bias)

    @property
    def undrawn(self) -> float:
        """The share of |target| by which the mean is off in directions that no draw went: of those nothing is known."""
        if self.moments.exact:
            return 0.0
        return self.moments.undrawn(self.bias) / math.sqrt(self._squared_length)

    @property
    def z(self) -> float | None:
        """The two-sided z-score with the same p-value; None where it is exact."""
        if self.p_value is None:
            return None
        p = torch.tensor(max(self.p_value, _SMALLEST), dtype=torch.float64)
        return float(-torch.special.ndtri(p / 2))

    @property
    def cosine(self) -> float:
        """Between mean and target."""
        return float(torch.nn.functional.cosine_similarity(self.moments.mean, self.target, dim=0))

    @property
    def variance_per_trajectory(self) -> float:
        """Variance of one trajectory's worth of data, relative to |target|^2."""
        return self.moments.variance * self.trajectories / self._squared_length

    @property
    def variance_per_step(self) -> float:
        """Variance of one step's worth of data, relative to |target|^2."""
        return self.moments.variance * self.steps / self._squared_length

    @property
    def mean_squared_error_per_trajectory(self) -> float:
        """Of one trajectory's worth of data: variance plus squared bias, relative to |target|^2."""
        return self.variance_per_trajectory + self.relative_bias**2

    @property
    def mean_squared_error_per_step(self) -> float:
        """Of one step's worth of data, relative to |target|^2."""
        return self.variance_per_step + self.relative_bias**2

    @property
    def mean_squared_error(self) -> float:
        """Of one batch, relative to |target|^2."""
        return self.moments.variance / self._squared_length + self.relative_bias**2

    @property
    def signal_to_noise(self) -> float:
        """|mean|^2 / variance of one trajectory."""
        noise = self.moments.variance * self.trajectories
        return float(self.moments.mean @ self.moments.mean) / noise if noise > 0.0 else math.inf

    def trajectories_needed(self, accuracy: float = 0.1) -> float:
        """How many trajectories bring the standard error down to `accuracy` |target|; bias stays whatever they are."""
        return self.variance_per_trajectory / accuracy**2

    @property
    def verdict(self) -> Verdict:
        """What the figures say."""
        p = self.p_value
        if p is None:
            if self.relative_bias < EXACT_TOLERANCE:
                return "unbiased"
            return "biased" if self.relative_bias > VISIBLE_BIAS else "undecided"
        if p < _P_BIASED:
            return "biased"
        return "unbiased" if p > _P_UNBIASED and self.undrawn < _ROUNDING else "undecided"

    @property
    def as_declared(self) -> bool:
        """Whether the verdict is the declared one (true where nothing is declared)."""
        return self.declared is None or self.declared == self.verdict

    def tree(self) -> dict[str, float | str | bool | list[float] | None]:
        """All figures, for JSON."""
        low, high = self.interval
        return {
            "subject": self.subject,
            "problem": self.problem,
            "target": self.target_name,
            "declared": self.declared,
            "reason": self.reason,
            "verdict": self.verdict,
            "as_declared": self.as_declared,
            "exact": self.moments.exact,
            "batches": self.batches,
            "relative_bias": self.relative_bias,
            "relative_bias_low": low,
            "relative_bias_high": high,
            "z": self.z,
            "p_value": self.p_value,
            "cosine": self.cosine,
            "variance_per_trajectory": self.variance_per_trajectory,
            "variance_per_step": self.variance_per_step,
            "mean_squared_error": self.mean_squared_error,
            "mean_squared_error_per_trajectory": self.mean_squared_error_per_trajectory,
            "mean_squared_error_per_step": self.mean_squared_error_per_step,
            "undrawn": self.undrawn,
            "signal_to_noise": self.signal_to_noise if math.isfinite(self.signal_to_noise) else None,
            "trajectories_needed": self.trajectories_needed(),
            "gradient": self.target.tolist(),
            "mean": self.moments.mean.tolist(),
        }

    def __str__(self) -> str:
        """Plain text, one fact per line."""
        return self.text()

    def text(self, *, accuracy: float = 0.1) -> str:
        """Plain text, one fact per line.

        Args:
            accuracy: the standard error, relative to |target|, for which to say how many trajectories it needs.
        """
        method = "every batch weighted" if self.moments.exact else f"{self.batches:,} batches drawn"
        declared = "" if self.declared is None else f", declared {self.declared}"
        lines = [
            f"{self.subject} on {self.problem}: {self.verdict}{declared}" + (f": {self.reason}" if self.reason else ""),
            f"  target               {self.target_name}",
            f"  method               {method}",
            f"  bias                 {self.relative_bias:.3g} of the gradient's length{self._doubt()}",
            f"  cosine               {self.cosine:.6f}",
            f"  variance             {self.variance_per_trajectory:.4g} per trajectory, {self.variance_per_step:.4g} "
            "per step (of the squared length)",
            f"  mean squared error   {self.mean_squared_error_per_trajectory:.4g} per trajectory, "
            f"{self.mean_squared_error_per_step:.4g} per step, {self.mean_squared_error:.4g} per batch",
            f"  signal to noise      {self.signal_to_noise:.4g} per trajectory",
            f"  trajectories needed  {math.ceil(self.trajectories_needed(accuracy)):,} for a standard error of "
            f"{accuracy:.3g} of the gradient's length",
        ]
        if self.undrawn > _ROUNDING:
            lines.append(
                f"  never drawn          a part of the gradient, {self.undrawn:.2g} of its length: what is rare "
                "is missing; draw more"
            )
        return "\n".join(lines)

    def _doubt(self) -> str:
        """The interval and what speaks against chance; nothing where every batch was weighted."""
        p, z = self.p_value, self.z
        if p is None or z is None:
            return ""
        low, high = self.interval
        score = f"z = {z:.2f}, p = {p:.3g}" if p > _SMALLEST else "z > 37"
        return f" (95%: {low:.2%} to {high:.2%}; {score})"

"""A penalty on the distance from a frozen reference policy: where it acts, by which estimate, and what it follows.

With d_t = l_t - f_t, k1 = d, k2 = d^2 / 2, k3 = e^{-d} - 1 + d:

    place="reward"      r_t <- r_t - beta k(b_t - f_t), a number, before any baseline
    place="loss"        loss <- loss + beta sum_t w_t k(l_t - f_t), differentiated through l

| place | estimate | what is followed on average |
|---|---|---|
| reward | k1 | grad KL(pi, ref) of whole trajectories: right |
| reward | k2, k3 | another penalty: wrong |
| loss | k2, exact | grad KL(pi, ref) at each visited state, visits held fixed |
| loss | k1 | nothing: its mean gradient is 0 |
| loss | k3 | grad KL(ref, pi), the forward KL, at each visited state |

For a single step the two right ones agree. For longer trajectories a term of the loss does not see that an early step
changes where later ones take place; the reward does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from upslope.algorithms.protocol import Loss, Penalty
from upslope.estimators import k1, k2, k3, weighted_sum
from upslope.trajectory import Batch, Evaluation, Trajectory

KLEstimator: TypeAlias = Literal["k1", "k2", "k3", "exact"]
"""How KL(pi || ref) is estimated."""

_ESTIMATES = {"k1": k1, "k2": k2, "k3": k3}
_IN_LOSS = {
    "k1": "mean gradient 0: it does nothing but add noise",
    "k2": "mean gradient: that of KL(pi || ref) at each visited step, visits held fixed",
    "k3": "mean gradient: that of the forward KL(ref || pi) at each visited step",
    "exact": "gradient: that of KL(pi || ref) at each visited step, visits held fixed, without sampling noise",
}
_IN_REWARD = {
    "k1": "mean gradient: that of KL(pi || ref) of whole trajectories",
    "k2": "mean gradient: not that of any KL",
    "k3": "mean gradient: not that of any KL, and next to nothing of the right one near the reference",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceKL:
    """The penalty beta KL(pi || ref); off by default. Any combination can be had, and says what it follows."""

    coefficient: float = 0.0
    """beta; 0 for no penalty and no reference."""
    place: Literal["loss", "reward"] = "loss"
    """As a term of the loss, or of the reward."""
    estimator: Literal["k1", "k2", "k3", "exact"] | None = None
    """None for the right one of the place: k2 in the loss, k1 in the reward. "exact" sums over all actions (loss)."""
    baselined: bool = True
    """In the reward: whether it counts before a group's baseline; False adds it, from each step on, to Psi."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if not self.coefficient >= 0.0:
            raise ValueError(f"reference_kl.coefficient must be at least 0, got {self.coefficient}")
        if self.place not in ("loss", "reward"):
            raise ValueError(f'reference_kl.place must be "loss" or "reward", got {self.place!r}')
        if self.place == "reward" and self.estimator == "exact":
            raise ValueError(
                'reference_kl.estimator="exact" is a term of the loss: in the reward take k1, whose mean is the KL, or '
                'set reference_kl.place to "loss"'
            )
        if self.place == "loss" and not self.baselined:
            raise ValueError(
                'reference_kl.baselined=False speaks of place="reward": a term of the loss has no baseline'
            )

    @property
    def on(self) -> bool:
        """Whether there is a penalty."""
        return self.coefficient > 0.0

    @property
    def estimate(self) -> KLEstimator:
        """The estimate in use."""
        if self.estimator is not None:
            return self.estimator
        return "k2" if self.place == "loss" else "k1"

    @property
    def needs(self) -> Literal["none", "log_prob", "distribution"]:
        """What is asked of the reference."""
        if not self.on:
            return "none"
        return "distribution" if self.estimate == "exact" else "log_prob"

    @property
    def penalty(self) -> Penalty | None:
        """What the mean gradient is to have in it; `biased_by` says where it has not."""
        if not self.on:
            return None
        of = "trajectories" if self.place == "reward" else "steps"
        return Penalty(coefficient=self.coefficient, of=of, baselined=self.place == "reward" and self.baselined)

    @property
    def biased_by(self) -> tuple[str, ...]:
        """What keeps the mean gradient from that of a KL(pi || ref), in words; empty where nothing does."""
        if not self.on:
            return ()
        if self.place == "reward":
            return () if self.estimate == "k1" else (f"{self.estimate} of the reference in the reward is no KL",)
        if self.estimate == "k1":
            return ("k1 of the reference in the loss has mean gradient 0",)
        return ("k3 of the reference in the loss follows the forward KL(ref || pi)",) if self.estimate == "k3" else ()

    def of_reward(self, trajectory: Trajectory) -> Tensor:
        """[B, T] beta k(b_t - f_t), detached; 0 where nothing was chosen, and everywhere without a penalty in it."""
        if not self.on or self.place == "loss":
            return torch.zeros_like(trajectory.behaviour_log_prob)
        assert trajectory.reference_log_prob is not None
        mask = trajectory.mask
        log_prob = torch.where(mask, trajectory.behaviour_log_prob, 0.0)
        estimate = _ESTIMATES[self.estimate](log_prob, torch.where(mask, trajectory.reference_log_prob, 0.0))
        return self.coefficient * estimate

    def rewarded(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory with r_t - beta k(b_t - f_t) for its reward, where that is the place and it has a baseline."""
        if not self.on or self.place == "loss" or not self.baselined:
            return trajectory
        return replace(trajectory, reward=trajectory.reward - self.of_reward(trajectory))

    def of_loss(self, batch: Batch, evaluation: Evaluation, log_prob: Tensor) -> Tensor | None:
        """Per step beta k(l_t - f_t), with gradient; None without a penalty in the loss.

        Args:
            batch: with what the reference says.
            evaluation: of the policy.
            log_prob: l, 0 where nothing was chosen.
        """
        if not self.on or self.place == "reward":
            return None
        if self.estimate == "exact":
            assert batch.reference_distribution is not None
            return self.coefficient * evaluation.distribution.kl(batch.reference_distribution)
        assert batch.reference_log_prob is not None
        reference = torch.where(batch.mask, batch.reference_log_prob, 0.0)
        return self.coefficient * _ESTIMATES[self.estimate](log_prob, reference)

    @torch.no_grad()
    def watched(self, batch: Batch, log_prob: Tensor, penalty: Tensor | None) -> Tensor | None:
        """Per step KL(pi || ref): exact where that is at hand, else k3, whose mean it is on-policy; None if off."""
        if not self.on:
            return None
        if self.estimate == "exact":
            assert penalty is not None
            return penalty.detach() / self.coefficient
        assert batch.reference_log_prob is not None
        return k3(log_prob.detach(), torch.where(batch.mask, batch.reference_log_prob, 0.0))

    def added(self, loss: Loss, batch: Batch, evaluation: Evaluation) -> Loss:
        """The loss with the penalty, where that is its place, and with the distance among its metrics; off, as it is.

        Args:
            loss: without it.
            batch: with what the reference says and the weights of the reduction.
            evaluation: of the policy.
        """
        if not self.on:
            return loss
        log_prob = torch.where(batch.mask, evaluation.log_prob, 0.0)
        penalty = self.of_loss(batch, evaluation, log_prob)
        distance = self.watched(batch, log_prob, penalty)
        assert distance is not None
        metrics = {**loss.metrics, "reference_kl": weighted_sum(distance, batch.weight)}
        value = loss.value if penalty is None else loss.value + weighted_sum(penalty, batch.weight)
        return replace(loss, value=value, metrics=metrics)

    def describe(self) -> str:
        """The penalty in words."""
        if not self.on:
            return "none"
        follows = (_IN_LOSS if self.place == "loss" else _IN_REWARD)[self.estimate]
        before = "" if self.place == "loss" or self.baselined else ", added to the advantage after the baseline"
        return f"{self.coefficient} x {self.estimate} to the reference in the {self.place}{before}; {follows}"


NO_PENALTY = ReferenceKL()
"""Of algorithms that know no reference."""

"""Direct preference optimisation (Rafailov et al. 2023) and its relatives, on pairs of a chosen and a rejected answer.

    d = sum_t (l_t - f_t) of an answer,  D = beta (d_w - d_l)
    sigmoid  -log s(D); with label_smoothing e (cDPO) (1 - e)(-log s(D)) + e (-log s(-D))
    robust   [(1 - e)(-log s(D)) - e (-log s(-D))] / (1 - 2 e)
    ipo      (d_w - d_l - 1 / (2 beta))^2, sums, or means over tokens if ipo_length_normalised
    hinge    max(0, 1 - D)
    simpo    -log s(beta (mean l_w - mean l_l) - margin), no reference
    orpo     -mean l_w - beta log s(log odds_w - log odds_l), no reference

    loss = mean over pairs of that + c_nll (-l_w)

Nobody sampled these answers: the behaviour log-prob is never read. The pair accuracy can rise while both answers become
less likely: watch `chosen_log_prob` itself, and give `nll_coefficient`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from upslope.algorithms.pairs import pair_signal, pair_weight, told_right
from upslope.algorithms.protocol import (
    Loss,
    Now,
    Passes,
    Stateless,
    Target,
    Undiscounted,
    check_passes,
    passes_in_words,
)
from upslope.algorithms.ratios import chosen_log_prob, step_average
from upslope.estimators import (
    dpo_sigmoid,
    hinge,
    ipo,
    negative_log_likelihood,
    orpo,
    robust_dpo,
    sequence_log_prob,
    sequence_log_ratio,
    simpo,
    trajectory_mean,
)
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory

_WITHOUT_REFERENCE = ("simpo", "orpo")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference(Undiscounted, Stateless):
    """Rows in adjacent pairs: the chosen one (reward +1), then the rejected one (reward -1)."""

    kind: Literal["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo"] = "sigmoid"
    """Which loss of the pair."""
    beta: float = 0.1
    """Strength; 2.0 to 2.5 is usual for simpo, 0.1 for the others."""
    label_smoothing: float = 0.0
    """The assumed rate of swapped labels, below 0.5, for sigmoid (then it is cDPO) and robust."""
    ipo_length_normalised: bool = False
    """IPO of log-ratios per token; the paper's are sums."""
    simpo_margin: float = 0.0
    """The target margin of SimPO, in units of beta times log-prob."""
    nll_coefficient: float = 0.0
    """Weight of the negative log-likelihood of the chosen answer."""
    nll_reduction: Literal["token_mean", "sum"] = "token_mean"
    """That of each chosen answer: the mean over its tokens, or their sum."""
    epochs: int = 1
    """Passes over each batch."""
    minibatches: int = 1
    """Optimiser steps per pass."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if not self.beta > 0.0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing != 0.0 and self.kind not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing does nothing for {self.kind}: it is for sigmoid and robust")
        if self.ipo_length_normalised and self.kind != "ipo":
            raise ValueError(f"ipo_length_normalised does nothing for {self.kind}")
        if self.simpo_margin != 0.0 and self.kind != "simpo":
            raise ValueError(f"simpo_margin does nothing for {self.kind}")
        if self.nll_coefficient < 0.0:
            raise ValueError(f"nll_coefficient must be at least 0, got {self.nll_coefficient}")
        check_passes(self.epochs, self.minibatches)

    @property
    def passes(self) -> Passes:
        """Whole rows, two by two."""
        return Passes(
            epochs=self.epochs,
            minibatches=self.minibatches,
            critic=False,
            whole_episodes=True,
            reference="none" if self.kind in _WITHOUT_REFERENCE else "log_prob",
            together=2,
            whole_rows=True,
        )

    @property
    def target(self) -> Target:
        """No policy gradient: there is no return."""
        return Target(gradient="given_data", per="trajectory")

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """+1 at the steps of chosen rows, -1 of rejected ones."""
        return pair_signal(trajectory)

    def prepare(self, batch: Batch) -> Batch:
        """Each pair counts the same."""
        return replace(batch, weight=trajectory_mean(batch.mask, dtype=batch.advantage.dtype))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """The mean over pairs of the chosen loss."""
        log_prob, weight = chosen_log_prob(batch, evaluation), pair_weight(batch)
        normalised = self.kind in _WITHOUT_REFERENCE
        total = sequence_log_prob(log_prob, batch.mask)
        mean = total / batch.mask.sum(-1)
        score = mean if normalised else self._log_ratio(log_prob, batch)
        chosen, rejected = score[0::2], score[1::2]
        each = self._each(chosen, rejected, batch.mask.sum(-1))
        if self.nll_coefficient != 0.0:
            likely = total if self.nll_reduction == "sum" else mean
            each = each + self.nll_coefficient * negative_log_likelihood(likely[0::2])
        value = (each * weight).sum()
        with torch.no_grad():
            margin = self.beta * (chosen - rejected)
            watched = {
                "pair_accuracy": told_right(chosen, rejected),
                "margin": margin,
                "chosen_log_prob": total[0::2],
                "rejected_log_prob": total[1::2],
                "chosen_token_log_prob": mean[0::2],
            }
            if not normalised:
                watched["chosen_log_ratio"] = chosen
            metrics = {name: (each_pair.detach() * weight).sum() for name, each_pair in watched.items()}
        metrics |= {"loss": value.detach(), "entropy": step_average(evaluation.entropy.detach(), batch)}
        return Loss(value=value, metrics=metrics)

    def _log_ratio(self, log_prob: Tensor, batch: Batch) -> Tensor:
        assert batch.reference_log_prob is not None
        return sequence_log_ratio(log_prob, batch.reference_log_prob, batch.mask, length_normalised=False)

    def _each(self, chosen: Tensor, rejected: Tensor, length: Tensor) -> Tensor:
        """[pairs] of log-ratios, or of mean log-probs where there is no reference."""
        beta = self.beta
        if self.kind == "sigmoid":
            return dpo_sigmoid(chosen, rejected, beta=beta, label_smoothing=self.label_smoothing)
        if self.kind == "robust":
            return robust_dpo(chosen, rejected, beta=beta, label_smoothing=self.label_smoothing)
        if self.kind == "hinge":
            return hinge(chosen, rejected, beta=beta)
        if self.kind == "simpo":
            return simpo(chosen, rejected, beta=beta, margin=self.simpo_margin)
        if self.kind == "orpo":
            return orpo(chosen, rejected, beta=beta)
        normalised = self.ipo_length_normalised
        return ipo(
            chosen,
            rejected,
            beta=beta,
            length_normalised=normalised,
            chosen_length=length[0::2] if normalised else None,
            rejected_length=length[1::2] if normalised else None,
        )

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        ipo_form = "mean over tokens" if self.ipo_length_normalised else "sum over tokens"
        losses = {
            "sigmoid": "-log s(D)"
            if self.label_smoothing == 0.0
            else f"cDPO, labels swapped at {self.label_smoothing}",
            "robust": f"robust DPO, labels swapped at {self.label_smoothing}",
            "ipo": f"(d_w - d_l - 1 / (2 beta))^2, d the {ipo_form}",
            "hinge": "max(0, 1 - D)",
            "simpo": f"-log s(beta (mean l_w - mean l_l) - {self.simpo_margin})",
            "orpo": "-mean l_w - beta log s(log odds_w - log odds_l)",
        }
        nll = f"{self.nll_coefficient} x -l of the chosen answer, {self.nll_reduction}"
        return {
            "loss": f"{self.kind}: {losses[self.kind]}",
            "beta": str(self.beta),
            "reference": "none" if self.kind in _WITHOUT_REFERENCE else "frozen; d = sum over tokens of l - f",
            "NLL": "none" if self.nll_coefficient == 0.0 else nll,
            "ratio": "none: nobody sampled these",
            "reduction": "mean over pairs",
            "passes": f"{passes_in_words(self.epochs, self.minibatches)} of whole pairs",
        }

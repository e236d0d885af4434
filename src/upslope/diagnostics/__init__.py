"""Live diagnostics: what training's own quantities say about its gradient, and a verdict in plain words."""

from upslope.diagnostics.meter import Meter, untouched
from upslope.diagnostics.noise import (
    MinibatchNoise,
    NoiseEstimate,
    SmoothedNoise,
    SuccessiveNoise,
    noise_of_minibatches,
    noise_of_pair,
)
from upslope.diagnostics.signal import explained_variance, psi_variances, zero_advantage_groups
from upslope.diagnostics.steps import ChosenSteps, gradient_shares
from upslope.diagnostics.verdicts import RULES, Rule, Verdict, Watch, verdict_line, verdicts
from upslope.estimators import effective_sample_size

__all__ = [
    "RULES",
    "ChosenSteps",
    "Meter",
    "MinibatchNoise",
    "NoiseEstimate",
    "Rule",
    "SmoothedNoise",
    "SuccessiveNoise",
    "Verdict",
    "Watch",
    "effective_sample_size",
    "explained_variance",
    "gradient_shares",
    "noise_of_minibatches",
    "noise_of_pair",
    "psi_variances",
    "untouched",
    "verdict_line",
    "verdicts",
    "zero_advantage_groups",
]

"""GRPO as other libraries set it by default, each in our terms, on think-or-blurt: the same word, five estimators.

Given one group of 8 with rewards 1, 0, ..., 0, the success 10 tokens long and the failures 40, they make of it:

| recipe | advantage of the success / a failure | weight times advantage per token | what else is on |
|---|---|---|---|
| `grpo-trl` | +2.474 / -0.354 | +0.00853 / -0.00122 | nothing here; with its vLLM a mask of sequences at 3 |
| `grpo-verl` | +2.475 / -0.354 | +0.00853 / -0.00122 | dual clip at 3 |
| `grpo-openrlhf` | +2.475 / -0.354 | +0.00853 / -0.00122 | k1 in the reward (0.01), after the baseline; A within 10 |
| `grpo-nemo-rl` | +1.000 / -0.378 | +0.00345 / -0.00130 | k3 in the loss (0.01) |
| `grpo-prime-rl` | +0.875 / -0.125 | +0.00302 / -0.00043 | no clip but DPPO's mask, 0.001 (l - p)^2 |

What is theirs is the estimator: advantage, ratio, clip, KL, reduction. Task, model, batch and optimiser are those of
`arithmetic-grpo`, its two optimiser steps per batch included, so that runs differ by the estimator alone: the learning
rates of those libraries (1e-6) are for models thousands of times larger, and with a single step per batch, as TRL has
it, no clip would be felt. In all of them here, a group whose rewards are all equal has advantage exactly
0, a completion on which a reward failed leaves its group, and learner and sampler have the same temperature; not all of
that is so there.

Source: the libraries' configuration and loss files, as of the dates in the docstrings.
"""

from __future__ import annotations

from dataclasses import replace

from upslope.algorithms import GRPO, ReferenceKL
from upslope.recipes.arithmetic import arithmetic_grpo
from upslope.train.language import LanguageRun


def grpo_trl() -> LanguageRun:
    """TRL's GRPOTrainer by default: loss_type "dapo" with scale_rewards "group" and beta 0 (1.10, July 2026).

    Its own: A over the group's standard deviation + 1e-4, clip 0.2 both ways, no KL, the mean over all tokens of the
    batch. Not expressed: with vLLM (off by default) its log-probs are corrected by masking sequences whose ratio of
    trainer to engine exceeds 3; here the sampler is the learner, so that ratio is 1 (`importance_cap=3`,
    `importance_level="sequence_sum"`, `importance_correction="mask"` adds it). Its loss counts truncated completions
    alike. Its mean is over the batch that was generated, also where several optimiser steps share that; here it is over
    each optimiser step's own.
    """
    return _with("grpo-trl", GRPO(scale="group", scale_epsilon=1e-4, reduction="step_mean"))


def grpo_verl() -> LanguageRun:
    """verl's adv_estimator=grpo with everything else at its default (August 2026): a dual clip that is always on.

    Its own: A over the group's standard deviation + 1e-6, clip 0.2 both ways, the objective of negative advantages kept
    above 3 A, the mean over all tokens. Not expressed: it clamps log-ratios to +-20, beyond which there is no gradient,
    and takes the raw reward for the advantage of a group of one, which is refused here.
    """
    return _with("grpo-verl", GRPO(scale="group", scale_epsilon=1e-6, dual_clip=3.0, reduction="step_mean"))


def grpo_openrlhf() -> LanguageRun:
    """OpenRLHF's group_norm with its default KL of 0.01 in the reward (August 2026).

    Its own: A over the group's standard deviation + 1e-9, kept within 10, then -0.01 k1 of each step and all that
    follow it added, which no baseline sees; clip 0.2 both ways, the mean over all tokens. Not expressed: that 1e-9
    blows rounding up where the rewards of a group are equal floats; here such a group has advantage exactly 0.
    """
    algorithm = GRPO(
        scale="group",
        scale_epsilon=1e-9,
        advantage_clip=10.0,
        reduction="step_mean",
        reference_kl=ReferenceKL(coefficient=0.01, place="reward", estimator="k1", baselined=False),
    )
    return _with("grpo-openrlhf", algorithm)


def grpo_nemo_rl() -> LanguageRun:
    """NeMo-RL's GRPO of its math example (August 2026): leave-one-out baseline and leave-one-out standard deviation.

    Its own: a lone success among equal failures is not scaled at all, since the standard deviation of the others is 0;
    clip 0.2 both ways, 0.01 k3 to the reference in the loss, the mean over all tokens. Not expressed: it takes that
    standard deviation from E[x^2] - E[x]^2 in float32, so that rounding is divided by it; here it is two-pass in
    float64, and 0 exactly where the others are equal.
    """
    algorithm = GRPO(
        baseline="leave_one_out",
        scale="leave_one_out",
        scale_epsilon=1e-6,
        reduction="step_mean",
        reference_kl=ReferenceKL(coefficient=0.01, place="loss", estimator="k3"),
    )
    return _with("grpo-nemo-rl", algorithm)


def grpo_prime_rl() -> LanguageRun:
    """prime-rl's default loss (August 2026): mean-centred, no ratio clip, DPPO's mask at 0.2 and 0.001 (l - p)^2.

    Its own: A is the reward less the group's mean, undivided; a step is dropped where its probability has moved by more
    than 0.2 in the direction of A; the mean over all tokens. Its default group has one member, whose advantage would be
    0: here it has 8. Not expressed: it runs asynchronously up to 8 policies behind; here the policy that learns is the
    one that samples, so that mask and penalty are felt from the second optimiser step of a batch on.
    """
    algorithm = GRPO(
        scale="none",
        clip_low=None,
        clip_high=None,
        probability_low=0.2,
        probability_high=0.2,
        squared_log_ratio=1e-3,
        reduction="step_mean",
    )
    return _with("grpo-prime-rl", algorithm)


def _with(name: str, algorithm: GRPO) -> LanguageRun:
    """The flagship run with another estimator; held to the policy it starts from where that has a KL."""
    run = arithmetic_grpo()
    algorithm = replace(algorithm, epochs=run.algorithm.passes.epochs, minibatches=run.algorithm.passes.minibatches)
    return replace(run, recipe=name, algorithm=algorithm, reference="start" if algorithm.reference_kl.on else None)

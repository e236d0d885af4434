"""Complete, vetted configurations for countdown: reach a target with all the given numbers, on two CPU cores."""

from __future__ import annotations

from upslope.algorithms import GRPO, SFT
from upslope.collect.experience import CompletionConfig, DemonstrationConfig
from upslope.collect.tasks.countdown import Countdown
from upslope.policies.language.config import LanguageModelConfig, ModelShape
from upslope.train import CheckpointConfig, OptimizerConfig
from upslope.train.language import LanguageEvaluationConfig, LanguageLogConfig, LanguageRun

_LIMIT = 24
"""Tokens: the longest expression with its end takes 9."""
_COUNTDOWN = Countdown(held_out=512)
_EVALUATION = LanguageEvaluationConfig(times=4, prompts=512, samples=4, pass_at=(4,), limit=_LIMIT)


def countdown_sft() -> LanguageRun:
    """Expressions of three numbers up to 20 with + - *, learnt from demonstrations: the start of `countdown-grpo`.

    Ended early: the longer it imitates, the less rewards add to its likeliest answers (what is drawn they always mend).
    """
    return LanguageRun(
        recipe="countdown-sft",
        model=LanguageModelConfig(
            shape=ModelShape(architecture="gpt2", width=64, layers=2, heads=4, inner=256, positions=64)
        ),
        task=_COUNTDOWN,
        experience=DemonstrationConfig(rows=64),
        algorithm=SFT(),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, schedule="cosine", max_gradient_norm=1.0, epsilon=1e-8, betas=(0.9, 0.99)
        ),
        evaluation=_EVALUATION,
        log=LanguageLogConfig(every_steps=10, diagnose_every=0),
        checkpoint=CheckpointConfig(times=3),
        steps=250,
        threads=1,
    )


def countdown_grpo() -> LanguageRun:
    """Right expressions are worth 1, others of exactly the given numbers 0.1; GRPO in its unbiased form."""
    return LanguageRun(
        recipe="countdown-grpo",
        start_from="countdown-sft",
        task=_COUNTDOWN,
        experience=CompletionConfig(prompts=32, group=16, limit=_LIMIT),
        algorithm=GRPO(scale="none", reduction="trajectory_sum", minibatches=2),
        optimizer=OptimizerConfig(learning_rate=4e-4, schedule="linear", max_gradient_norm=1.0, epsilon=1e-8),
        evaluation=_EVALUATION,
        log=LanguageLogConfig(every_steps=1, diagnose_every=5),
        checkpoint=CheckpointConfig(times=5),
        steps=240,
        threads=1,
    )

"""Complete, vetted configurations for countdown: reach a target with all the given numbers, on two CPU cores."""

from __future__ import annotations

from upslope.collect.tasks.countdown import Countdown
from upslope.recipes.small_models import imitation, rewarded
from upslope.train.language import LanguageEvaluationConfig, LanguageRun

_LIMIT = 24
"""Tokens: the longest expression with its end takes 9."""
_COUNTDOWN = Countdown(held_out=512)
_EVALUATION = LanguageEvaluationConfig(times=4, prompts=512, samples=4, pass_at=(4,), limit=_LIMIT)


def countdown_sft() -> LanguageRun:
    """Expressions of three numbers up to 20 with + - *, learnt from demonstrations: the start of `countdown-grpo`.

    Ended early: the longer it imitates, the less rewards add to its likeliest answers (what is drawn they always mend).
    """
    return imitation("countdown-sft", _COUNTDOWN, steps=250, evaluation=_EVALUATION)


def countdown_grpo() -> LanguageRun:
    """Right expressions are worth 1, others of exactly the given numbers 0.1; GRPO in its unbiased form."""
    return rewarded(
        "countdown-grpo", _COUNTDOWN, start="countdown-sft", limit=_LIMIT, steps=240, group=16, evaluation=_EVALUATION
    )

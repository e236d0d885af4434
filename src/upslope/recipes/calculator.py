"""Complete, vetted configurations for a calculator in several turns: guess a product, or call the tool and copy it."""

from __future__ import annotations

from upslope.collect.tasks.calculator import Calculator
from upslope.recipes.small_models import imitation, rewarded
from upslope.train.language import LanguageEvaluationConfig, LanguageRun

_LIMIT = 32
"""Tokens of a conversation behind its prompt: call, reply and answer with its end take 17 at most."""
_CALCULATOR = Calculator(digits=2, held_out=256)
_EVALUATION = LanguageEvaluationConfig(times=4, prompts=256, samples=4, pass_at=(4,), limit=_LIMIT)


def calculator_sft() -> LanguageRun:
    """Products of two-digit numbers, 30 % of them by calling the calculator: the start of `calculator-grpo`."""
    return imitation("calculator-sft", _CALCULATOR, steps=500, evaluation=_EVALUATION)


def calculator_grpo() -> LanguageRun:
    """From a call in three to a call in nearly every answer; what the calculator says is read and never learnt."""
    return rewarded(
        "calculator-grpo", _CALCULATOR, start="calculator-sft", limit=_LIMIT, steps=100, evaluation=_EVALUATION
    )

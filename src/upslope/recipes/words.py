"""Complete, vetted configurations for words spelt backward, a task of reasoning-gym, on two CPU cores."""

from __future__ import annotations

from upslope.collect.tasks.gym import ReasoningGym
from upslope.recipes.small_models import imitation, rewarded
from upslope.train.language import LanguageEvaluationConfig, LanguageRun

_LIMIT = 16
"""Tokens: the longest word with its end takes 11."""
_SPELL_BACKWARD = ReasoningGym(
    name="spell_backward",
    settings={"min_word_len": 7, "max_word_len": 10},
    prompt_pattern=r": (\w+)$",
    template="{prompt}>",
    reward="correct",
    held_out=1024,
    alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789>",
)
_EVALUATION = LanguageEvaluationConfig(times=4, prompts=512, samples=4, pass_at=(4,), limit=_LIMIT)


def spell_backward_sft() -> LanguageRun:
    """Words of 7 to 10 letters spelt backward (reasoning-gym), learnt from few demonstrations."""
    return imitation("spell-backward-sft", _SPELL_BACKWARD, steps=150, evaluation=_EVALUATION)


def spell_backward_grpo() -> LanguageRun:
    """From half-learnt spelling to right words by reasoning-gym's own verdict; GRPO in its unbiased form."""
    return rewarded(
        "spell-backward-grpo",
        _SPELL_BACKWARD,
        start="spell-backward-sft",
        limit=_LIMIT,
        steps=100,
        evaluation=_EVALUATION,
    )

"""Complete, vetted configurations for words spelt backward, a task of reasoning-gym, on two CPU cores."""

from __future__ import annotations

from upslope.algorithms import GRPO, SFT
from upslope.collect.experience import CompletionConfig, DemonstrationConfig
from upslope.collect.tasks.gym import ReasoningGym
from upslope.policies.language.config import LanguageModelConfig, ModelShape
from upslope.train import CheckpointConfig, OptimizerConfig
from upslope.train.language import LanguageEvaluationConfig, LanguageLogConfig, LanguageRun

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
    return LanguageRun(
        recipe="spell-backward-sft",
        model=LanguageModelConfig(
            shape=ModelShape(architecture="gpt2", width=64, layers=2, heads=4, inner=256, positions=64)
        ),
        task=_SPELL_BACKWARD,
        experience=DemonstrationConfig(rows=64),
        algorithm=SFT(),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, schedule="cosine", max_gradient_norm=1.0, epsilon=1e-8, betas=(0.9, 0.99)
        ),
        evaluation=_EVALUATION,
        log=LanguageLogConfig(every_steps=10, diagnose_every=0),
        checkpoint=CheckpointConfig(times=3),
        steps=150,
        threads=1,
    )


def spell_backward_grpo() -> LanguageRun:
    """From half-learnt spelling to right words by reasoning-gym's own verdict; GRPO in its unbiased form."""
    return LanguageRun(
        recipe="spell-backward-grpo",
        start_from="spell-backward-sft",
        task=_SPELL_BACKWARD,
        experience=CompletionConfig(prompts=32, group=8, limit=_LIMIT),
        algorithm=GRPO(scale="none", reduction="trajectory_sum", minibatches=2),
        optimizer=OptimizerConfig(learning_rate=4e-4, schedule="linear", max_gradient_norm=1.0, epsilon=1e-8),
        evaluation=_EVALUATION,
        log=LanguageLogConfig(every_steps=1, diagnose_every=5),
        checkpoint=CheckpointConfig(times=5),
        steps=100,
        threads=1,
    )

"""Complete, vetted configurations for a calculator in several turns: guess a product, or call the tool and copy it."""

from __future__ import annotations

from upslope.algorithms import GRPO, SFT
from upslope.collect.experience import CompletionConfig, DemonstrationConfig
from upslope.collect.tasks.calculator import Calculator
from upslope.policies.language.config import LanguageModelConfig, ModelShape
from upslope.train import CheckpointConfig, OptimizerConfig
from upslope.train.language import LanguageEvaluationConfig, LanguageLogConfig, LanguageRun

_LIMIT = 32
"""Tokens of a conversation behind its prompt: call, reply and answer with its end take 17 at most."""
_CALCULATOR = Calculator(digits=2, held_out=256)
_EVALUATION = LanguageEvaluationConfig(times=4, prompts=256, samples=4, pass_at=(4,), limit=_LIMIT)


def calculator_sft() -> LanguageRun:
    """Products of two-digit numbers, 30 % of them by calling the calculator: the start of `calculator-grpo`."""
    return LanguageRun(
        recipe="calculator-sft",
        model=LanguageModelConfig(
            shape=ModelShape(architecture="gpt2", width=64, layers=2, heads=4, inner=256, positions=64)
        ),
        task=_CALCULATOR,
        experience=DemonstrationConfig(rows=64),
        algorithm=SFT(),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, schedule="cosine", max_gradient_norm=1.0, epsilon=1e-8, betas=(0.9, 0.99)
        ),
        evaluation=_EVALUATION,
        log=LanguageLogConfig(every_steps=10, diagnose_every=0),
        checkpoint=CheckpointConfig(times=3),
        steps=500,
        threads=1,
    )


def calculator_grpo() -> LanguageRun:
    """From a call in three to a call in nearly every answer; what the calculator says is read and never learnt."""
    return LanguageRun(
        recipe="calculator-grpo",
        start_from="calculator-sft",
        task=_CALCULATOR,
        experience=CompletionConfig(prompts=32, group=8, limit=_LIMIT),
        algorithm=GRPO(scale="none", reduction="trajectory_sum", minibatches=2),
        optimizer=OptimizerConfig(learning_rate=4e-4, schedule="linear", max_gradient_norm=1.0, epsilon=1e-8),
        evaluation=_EVALUATION,
        log=LanguageLogConfig(every_steps=1, diagnose_every=5),
        checkpoint=CheckpointConfig(times=5),
        steps=100,
        threads=1,
    )

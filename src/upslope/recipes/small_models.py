"""What the recipes of small language models share: one shape, demonstrations first, then rewards."""

from __future__ import annotations

from upslope.algorithms import GRPO, SFT
from upslope.collect.experience import CompletionConfig, DemonstrationConfig
from upslope.policies.language.config import LanguageModelConfig, ModelShape
from upslope.train import CheckpointConfig, OptimizerConfig
from upslope.train.language import LanguageEvaluationConfig, LanguageLogConfig, LanguageRun
from upslope.train.language.config import TaskSettings


def imitation(name: str, task: TaskSettings, *, steps: int, evaluation: LanguageEvaluationConfig) -> LanguageRun:
    """A small transformer built here that learns demonstrations.

    Learnt positions (GPT-2) copy the digits of a prompt of fixed length sooner than turned ones (Llama, Qwen3).

    Args:
        name: of the recipe.
        task: with demonstrations.
        steps: updates of 64 sequences.
        evaluation: how it is judged.
    """
    return LanguageRun(
        recipe=name,
        model=LanguageModelConfig(
            shape=ModelShape(architecture="gpt2", width=64, layers=2, heads=4, inner=256, positions=64)
        ),
        task=task,
        experience=DemonstrationConfig(rows=64),
        algorithm=SFT(),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, schedule="cosine", max_gradient_norm=1.0, epsilon=1e-8, betas=(0.9, 0.99)
        ),
        evaluation=evaluation,
        log=LanguageLogConfig(every_steps=10, diagnose_every=0),
        checkpoint=CheckpointConfig(times=3),
        steps=steps,
        threads=1,
    )


def rewarded(
    name: str,
    task: TaskSettings,
    *,
    start: str,
    limit: int,
    steps: int,
    evaluation: LanguageEvaluationConfig,
    group: int = 8,
) -> LanguageRun:
    """GRPO that divides neither by the group's standard deviation nor by lengths; two clipped steps per batch.

    Args:
        name: of the recipe.
        task: with rewards.
        start: the recipe whose result it begins with.
        limit: most tokens of a completion.
        steps: updates of 32 prompts.
        evaluation: how it is judged.
        group: completions per prompt.
    """
    return LanguageRun(
        recipe=name,
        start_from=start,
        task=task,
        experience=CompletionConfig(prompts=32, group=group, limit=limit),
        algorithm=GRPO(scale="none", reduction="trajectory_sum", minibatches=2),
        optimizer=OptimizerConfig(learning_rate=4e-4, schedule="linear", max_gradient_norm=1.0, epsilon=1e-8),
        evaluation=evaluation,
        log=LanguageLogConfig(every_steps=1, diagnose_every=5),
        checkpoint=CheckpointConfig(times=5),
        steps=steps,
        threads=1,
    )

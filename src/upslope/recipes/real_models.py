"""Language models of Qwen's size on mathematics in the format of GSM8K: one GPU, weights from the hub.

The data are two files of JSON lines, `gsm8k/train.jsonl` and `gsm8k/test.jsonl`, with the columns `question` and
`answer`, whose right answer follows `####`. Weights and data are not part of this library: a run ends with what is
missing and what to do before anything is trained. These have not been trained here; their settings are those that
published runs of the same size agree on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from upslope.algorithms import GRPO, SFT, Preference
from upslope.collect.experience import CompletionConfig, DemonstrationConfig, PairConfig
from upslope.collect.tasks.files import Files
from upslope.collect.tasks.rows import RowFormat
from upslope.policies.language.config import LanguageModelConfig, LoraConfig
from upslope.train import CheckpointConfig, OptimizerConfig
from upslope.train.language import LanguageEvaluationConfig, LanguageLogConfig, LanguageRun

_LIMIT = 512
"""Tokens of a solution; few of GSM8K take more than 300."""
_SYSTEM = "Reason step by step, and end with the final answer after ####."
_GSM8K = Files(
    training=Path("gsm8k/train.jsonl"),
    held_out=Path("gsm8k/test.jsonl"),
    format=RowFormat(
        prompt="question",
        completion="answer",
        answer="answer",
        answer_mark="####",
        chat=True,
        system=_SYSTEM,
    ),
    rewards=("last_number",),
)
_LOG = LanguageLogConfig(every_steps=1, diagnose_every=0)


def gsm8k_qwen_0_5b_sft() -> LanguageRun:
    """Qwen2.5 0.5B learns the worked solutions of GSM8K."""
    return LanguageRun(
        recipe="gsm8k-qwen-0-5b-sft",
        model=LanguageModelConfig(source="Qwen/Qwen2.5-0.5B", precision="bfloat16", end_token="<|im_end|>"),
        task=_GSM8K,
        experience=DemonstrationConfig(rows=64),
        algorithm=SFT(),
        optimizer=OptimizerConfig(
            kind="adamw", learning_rate=1e-5, schedule="cosine", max_gradient_norm=1.0, epsilon=1e-8, betas=(0.9, 0.95)
        ),
        evaluation=LanguageEvaluationConfig(times=4, prompts=512, samples=4, pass_at=(4,), limit=_LIMIT),
        log=_LOG,
        checkpoint=CheckpointConfig(times=4),
        steps=350,
        device="cuda",
    )


def gsm8k_qwen_0_5b_grpo() -> LanguageRun:
    """Qwen2.5 0.5B Instruct learns from right answers alone, all of its weights, by GRPO in its unbiased form."""
    return LanguageRun(
        recipe="gsm8k-qwen-0-5b-grpo",
        model=LanguageModelConfig(source="Qwen/Qwen2.5-0.5B-Instruct", precision="bfloat16"),
        task=_GSM8K,
        experience=CompletionConfig(prompts=64, group=8, limit=_LIMIT, slots=512),
        algorithm=GRPO(
            baseline="leave_one_out", scale="none", reduction="fixed_length", fixed_length=_LIMIT, minibatches=2
        ),
        optimizer=OptimizerConfig(
            kind="adamw", learning_rate=1e-6, max_gradient_norm=1.0, epsilon=1e-8, micro_batches=8
        ),
        evaluation=LanguageEvaluationConfig(times=8, prompts=512, samples=4, pass_at=(4,), limit=_LIMIT),
        log=_LOG,
        checkpoint=CheckpointConfig(times=8),
        steps=230,
        device="cuda",
    )


def gsm8k_qwen_0_5b_grpo_lora() -> LanguageRun:
    """Qwen2.5 0.5B Instruct learns from right answers alone through adapters of rank 32."""
    return _adapted(gsm8k_qwen_0_5b_grpo(), "gsm8k-qwen-0-5b-grpo-lora", "Qwen/Qwen2.5-0.5B-Instruct", 32)


def gsm8k_qwen_1_5b_grpo() -> LanguageRun:
    """Qwen2.5 1.5B Instruct learns from right answers alone, all of its weights."""
    run = gsm8k_qwen_0_5b_grpo()
    return replace(
        run,
        recipe="gsm8k-qwen-1-5b-grpo",
        model=replace(run.model, source="Qwen/Qwen2.5-1.5B-Instruct", checkpoint_activations=True),
    )


def gsm8k_qwen_1_5b_grpo_lora() -> LanguageRun:
    """Qwen2.5 1.5B Instruct learns from right answers alone through adapters of rank 32."""
    return _adapted(gsm8k_qwen_1_5b_grpo(), "gsm8k-qwen-1-5b-grpo-lora", "Qwen/Qwen2.5-1.5B-Instruct", 32)


def gsm8k_qwen_7b_grpo_lora() -> LanguageRun:
    """Qwen2.5 7B Instruct learns from right answers alone through adapters of rank 64: one GPU of 80 GB."""
    run = _adapted(gsm8k_qwen_1_5b_grpo(), "gsm8k-qwen-7b-grpo-lora", "Qwen/Qwen2.5-7B-Instruct", 64)
    return replace(run, optimizer=replace(run.optimizer, micro_batches=32))


def gsm8k_qwen_0_5b_dpo() -> LanguageRun:
    """Qwen2.5 0.5B Instruct learns from a right and a wrong solution of its own per problem, held to the right ones."""
    run = gsm8k_qwen_0_5b_grpo()
    return replace(
        run,
        recipe="gsm8k-qwen-0-5b-dpo",
        experience=PairConfig(pairs=64, drawn=4000, group=8, limit=_LIMIT),
        algorithm=Preference(beta=0.1, nll_coefficient=1.0),
        reference="start",
        optimizer=replace(run.optimizer, learning_rate=5e-7, schedule="linear"),
        steps=120,
    )


def _adapted(run: LanguageRun, name: str, source: str, rank: int) -> LanguageRun:
    """The same with adapters, whose learning rate is 20 times larger."""
    model = replace(run.model, source=source, lora=LoraConfig(rank=rank, alpha=float(rank)))
    return replace(run, recipe=name, model=model, optimizer=replace(run.optimizer, learning_rate=2e-5))

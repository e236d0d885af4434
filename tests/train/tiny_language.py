"""Small runs of language models of every kind, and how to compare what two of them left behind."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tiny_runs import TIMES, bits

from upslope.algorithms import GRPO, KTO, PPO, SFT, Preference, ReferenceKL, RewardModel
from upslope.collect.experience import CompletionConfig, DemonstrationConfig, PairConfig
from upslope.collect.rewards.protocol import Reward
from upslope.collect.tasks.arithmetic import Addition
from upslope.collect.tasks.protocol import Example, Task
from upslope.policies.language.config import LanguageModelConfig, LoraConfig, ModelShape
from upslope.train import CheckpointConfig, OptimizerConfig, resume, train
from upslope.train.checkpoint import latest_checkpoint
from upslope.train.language import LanguageEvaluationConfig, LanguageLogConfig, LanguageRun
from upslope.train.log import read_metrics

LANGUAGE_TIMES = (*TIMES, "generate_seconds", "reward_seconds", "tokens_per_second")
SHAPE = ModelShape(width=16, layers=1, heads=2, inner=32, positions=32)
MODEL = LanguageModelConfig(shape=SHAPE)
WITH_VALUE_HEAD = LanguageModelConfig(shape=SHAPE, value_head=True)
WITH_LORA = LanguageModelConfig(shape=SHAPE, lora=LoraConfig(rank=2))
COMPLETIONS = CompletionConfig(prompts=3, group=4, limit=6)


def digits(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The share of digits: something that random completions differ in."""
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in completions]


def some_task() -> Task:
    """Sums whose reward any policy can tell apart; answers, and pairs of a right and a wrong one."""
    examples = tuple(
        Example(
            prompt=f"{number}+{number}=",
            completion=str(2 * number),
            rejected=str(2 * number + 1),
            columns={"label": number % 2 == 0},
        )
        for number in range(24)
    )
    return Task(
        name="doubles",
        training=examples[:16],
        held_out=examples[16:],
        rewards=(Reward(name="digits", function=digits, inline=True),),
        correct="digits",
        alphabet="0123456789+=",
    )


def tiny_language(directory: Path, **changes: Any) -> LanguageRun:
    """Supervised fine-tuning of a tiny model: 8 updates, evaluations and four checkpoints."""
    settings: dict[str, Any] = {
        "recipe": "tiny",
        "task": Addition(digits=2, held_out=8),
        "algorithm": SFT(),
        "experience": DemonstrationConfig(rows=6),
        "model": MODEL,
        "optimizer": OptimizerConfig(kind="adamw", learning_rate=1e-2, weight_decay=0.01, schedule="linear"),
        "evaluation": LanguageEvaluationConfig(
            times=2, updates_between=1, prompts=4, samples=3, pass_at=(1, 3), limit=6
        ),
        "checkpoint": CheckpointConfig(times=4, keep=3),
        "log": LanguageLogConfig(tensorboard=False, progress=False, diagnose_every=3, completions=2),
        "steps": 8,
        "threads": 1,
        "name": "run",
        "directory": directory,
    }
    return LanguageRun(**{**settings, **changes})


def language_cases(directory: Path) -> dict[str, LanguageRun]:
    """One run for every kind of experience."""
    anchored = ReferenceKL(coefficient=0.05)
    return {
        "sft": tiny_language(directory),
        "grpo": tiny_language(
            directory,
            algorithm=GRPO(reference_kl=anchored, epochs=2, minibatches=2),
            experience=COMPLETIONS,
            reference="start",
        ),
        "grpo_lora": tiny_language(directory, algorithm=GRPO(), experience=COMPLETIONS, model=WITH_LORA),
        "ppo": tiny_language(directory, algorithm=PPO(minibatches=2), experience=COMPLETIONS, model=WITH_VALUE_HEAD),
        "dpo": tiny_language(directory, algorithm=Preference(), experience=PairConfig(pairs=4), reference="start"),
        "drawn": tiny_language(
            directory,
            algorithm=Preference(nll_coefficient=0.1),
            experience=PairConfig(pairs=4, drawn=6, group=4, limit=6),
            reference="start",
        ),
        "kto": tiny_language(directory, algorithm=KTO(), reference="start"),
        "reward_model": tiny_language(
            directory, algorithm=RewardModel(), experience=PairConfig(pairs=4), model=WITH_VALUE_HEAD
        ),
    }


def start_language(case: str, directory: Path) -> None:
    """Train; for a process of its own."""
    train(language_cases(directory)[case], task=some_task())


def resume_language_run(directory: Path) -> None:
    """Resume; for a process of its own."""
    resume(directory / "run", task=some_task())


def language_remains(path: Path) -> dict[str, Any]:
    """Everything a run leaves behind that must not depend on how often it was interrupted, as comparable values."""
    damaged: list[str] = []
    checkpoint = latest_checkpoint(path / "checkpoints", on_damaged=lambda place, _: damaged.append(place.name))
    assert checkpoint is not None
    assert not damaged
    records = [
        {name: repr(value) for name, value in record.items() if name not in LANGUAGE_TIMES}
        for record in read_metrics(path / "metrics.jsonl")
    ]
    completions = path / "completions.jsonl"
    return {
        "step": checkpoint.step,
        "session": bits(checkpoint.state["session"]),
        "best": checkpoint.state["best"],
        "metrics": records,
        "completions": completions.read_text() if completions.exists() else None,
        "samples": json.loads((path / "samples.json").read_text()) if (path / "samples.json").exists() else None,
        "policy": folder_hashes(path / "policy"),
        "best policy": folder_hashes(path / "best"),
        "start": folder_hashes(path / "start"),
    }


def folder_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {entry.name: hashlib.sha256(entry.read_bytes()).hexdigest() for entry in sorted(folder.iterdir())}

"""The configuration of a language model's run: what is refused, and that files bring back exactly what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_language import COMPLETIONS, MODEL, WITH_VALUE_HEAD, language_cases, tiny_language

from upslope.algorithms import GRPO, PPO, RLOO, SFT, Preference, ReferenceKL, RewardModel
from upslope.collect.experience import CompletionConfig, DemonstrationConfig, PairConfig
from upslope.policies.language.config import LanguageModelConfig
from upslope.policies.language.sampling import Sampling
from upslope.train import OptimizerConfig
from upslope.train.config_file import config_to_tree, run_from_tree
from upslope.train.describe import describe_run
from upslope.train.language import LanguageEvaluationConfig, RewardConfig


@pytest.mark.parametrize("case", ["sft", "grpo", "grpo_lora", "ppo", "dpo", "drawn", "kto", "reward_model"])
def test_a_configuration_comes_back_from_json(case: str, tmp_path: Path) -> None:
    run = language_cases(tmp_path)[case]
    assert run_from_tree(json.loads(json.dumps(config_to_tree(run)))) == run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": GRPO(), "experience": CompletionConfig(group=1)}, r"GRPO compares the completions of a prompt"),
        ({"algorithm": RLOO(), "experience": CompletionConfig(group=1)}, r"RLOO compares the completions of a prompt"),
        ({"algorithm": SFT(), "experience": COMPLETIONS}, r"SFT learns from other experience: set experience to Demo"),
        ({"algorithm": GRPO(), "experience": DemonstrationConfig()}, r"set experience to CompletionConfig, got Demon"),
        ({"algorithm": Preference(), "reference": "start"}, r"set experience to PairConfig, got Demonstration"),
        ({"algorithm": PPO(), "experience": COMPLETIONS}, r"PPO needs a critic: set model.value_head to True"),
        ({"algorithm": RewardModel(), "experience": PairConfig()}, r"RewardModel needs a critic"),
        ({"algorithm": SFT(), "model": WITH_VALUE_HEAD}, r"SFT as configured has no critic"),
        (
            {"algorithm": GRPO(reference_kl=ReferenceKL(coefficient=0.1)), "experience": COMPLETIONS},
            r"GRPO measures how far the policy is from a frozen reference: set reference to 'start'",
        ),
        ({"algorithm": Preference(), "experience": PairConfig()}, r"Preference measures how far the policy is from"),
        ({"reference": "start"}, r"SFT as configured has no reference: set reference to None"),
        ({"start_from": "a", "model": LanguageModelConfig(source="b")}, r"start_from='a' or model.source='b', not bo"),
        ({"algorithm": SFT(minibatches=7)}, r"6 rows \(or pairs\) cannot be cut into 7 minibatches"),
        ({"optimizer": OptimizerConfig(learning_rate=float("inf"))}, r"OptimizerConfig.learning_rate must be a finite"),
        ({"device": "tpu"}, r"LanguageRun.device must be one of 'cpu', 'cuda', got 'tpu'"),
        ({"steps": 0}, r"steps must be at least 1"),
        ({"threads": 0}, r"threads must be at least 1"),
    ],
)
def test_what_means_nothing_together_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_language(tmp_path, **changes)


def test_numbers_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match=r"each k of pass_at lies between 1 and samples, got \(5,\)"):
        LanguageEvaluationConfig(samples=4, pass_at=(5,))
    with pytest.raises(ValueError, match="deadline"):
        RewardConfig(deadline=0.0)
    with pytest.raises(ValueError, match="weight_decay is adamw's"):
        OptimizerConfig(kind="adam", weight_decay=0.1)


def test_the_estimator_in_words_names_all_that_changes_it(tmp_path: Path) -> None:
    run = tiny_language(
        tmp_path,
        algorithm=GRPO(reference_kl=ReferenceKL(coefficient=0.1)),
        reference="start",
        experience=CompletionConfig(
            prompts=8, group=4, limit=9, refill=2, mask_truncated=True, sampling=Sampling(temperature=0.7, top_k=5)
        ),
        model=MODEL,
    )
    rows = describe_run(run)
    assert rows["reference"] == "the policy the run starts from, frozen"
    assert rows["experience"] == "8 prompts per update, 4 completions each, a group, of at most 9 tokens"
    assert rows["sampling"] == "temperature 0.7, top-k 5; the learner's log-probs are of the same distribution"
    assert "up to 2 more rounds" in rows["dead groups"]
    assert "not learnt from" in rows["truncated completions"]
    assert "norm of 0.5" in rows["gradient clipping"]
    assert {"Psi", "KL", "reduction"} <= set(rows)

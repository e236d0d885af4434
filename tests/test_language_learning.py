"""Language models learn here: a tiny one learns to call its calculator, by every family of algorithms, in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from upslope.algorithms import GRPO, PPO, RLOO, SFT, Preference
from upslope.collect.experience import CompletionConfig, DemonstrationConfig, OverlongPenalty, PairConfig
from upslope.collect.tasks.calculator import Calculator
from upslope.policies.language.config import LanguageModelConfig, ModelShape
from upslope.train import CheckpointConfig, OptimizerConfig, Result, train
from upslope.train.language import LanguageEvaluationConfig, LanguageLogConfig, LanguageRun

_LIMIT = 24
_OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="linear", max_gradient_norm=1.0, epsilon=1e-8)
_COMPLETIONS = CompletionConfig(prompts=16, group=8, limit=_LIMIT)


def figures(result: Result) -> dict[str, float]:
    assert result.evaluation is not None
    return result.evaluation.record()


@pytest.fixture(scope="module")
def imitator(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageRun, dict[str, float]]:
    """What imitates demonstrations: 30 % call the calculator, the others guess what such a model cannot know."""
    run = LanguageRun(
        name="imitator",
        directory=tmp_path_factory.mktemp("runs"),
        model=LanguageModelConfig(
            shape=ModelShape(architecture="gpt2", width=32, layers=2, heads=4, inner=64, positions=40)
        ),
        task=Calculator(digits=2, held_out=128),
        experience=DemonstrationConfig(rows=32),
        algorithm=SFT(),
        optimizer=replace(_OPTIMIZER, learning_rate=6e-3, schedule="cosine", betas=(0.9, 0.99)),
        evaluation=LanguageEvaluationConfig(times=1, prompts=128, samples=4, pass_at=(4,), limit=_LIMIT),
        checkpoint=CheckpointConfig(times=0),
        log=LanguageLogConfig(progress=False, tensorboard=False, diagnose_every=0, completions=0),
        steps=200,
        threads=1,
    )
    return run, figures(train(run))


def test_imitation_guesses_as_often_as_its_demonstrations(imitator: tuple[LanguageRun, dict[str, float]]) -> None:
    _, found = imitator
    assert 0.15 < found["sampled/calls"] < 0.45
    assert found["sampled_accuracy"] < 0.3


@pytest.mark.parametrize(
    ("algorithm", "experience", "change"),
    [
        pytest.param(RLOO(), _COMPLETIONS, {}, id="rloo"),
        pytest.param(GRPO(scale="none", reduction="trajectory_sum", minibatches=2), _COMPLETIONS, {}, id="grpo"),
        pytest.param(
            PPO(gamma=1.0, gae_lambda=1.0, epochs=1, minibatches=2),
            replace(_COMPLETIONS, prompts=128, group=1, overlong=OverlongPenalty(buffer=4)),
            {"model": LanguageModelConfig(value_head=True)},
            id="ppo",
        ),
        pytest.param(
            Preference(beta=0.1, nll_coefficient=1.0),
            PairConfig(pairs=16, drawn=128, group=8, limit=_LIMIT),
            {"reference": "start"},
            id="dpo",
        ),
    ],
)
def test_rewards_for_right_answers_teach_it_to_call_the_tool(
    algorithm: RLOO | GRPO | PPO | Preference,
    experience: CompletionConfig | PairConfig,
    change: dict[str, object],
    imitator: tuple[LanguageRun, dict[str, float]],
    tmp_path: Path,
) -> None:
    """Nobody rewards calls: they are what right answers have in common."""
    imitation, before = imitator
    run = replace(
        imitation,
        name="learner",
        start_from=str(imitation.directory / "imitator"),
        directory=tmp_path,
        algorithm=algorithm,
        experience=experience,
        optimizer=_OPTIMIZER,
        steps=30,
        **({"model": LanguageModelConfig()} | change),
    )
    after = figures(train(run))
    assert after["sampled/calls"] > 0.8
    assert after["sampled_accuracy"] > before["sampled_accuracy"] + 0.2
    assert after["greedy_accuracy"] > before["greedy_accuracy"] + 0.1

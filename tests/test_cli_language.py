"""The command line for language models, from the user's side: what is asked, what is said, and the exit code."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from upslope.algorithms import GRPO, SFT
from upslope.cli import main
from upslope.collect.experience import CompletionConfig, DemonstrationConfig, OverlongPenalty
from upslope.collect.tasks.arithmetic import Addition
from upslope.options import configure
from upslope.policies.language.config import LanguageModelConfig, LoraConfig, ModelShape
from upslope.recipes import load_recipe
from upslope.recipes.registry import RECIPES
from upslope.train.language import LanguageEvaluationConfig, LanguageLogConfig, LanguageRun

COMPLETIONS = CompletionConfig(prompts=3, group=4, limit=6)


def small_sft() -> LanguageRun:
    return LanguageRun(
        recipe="small-sft",
        model=LanguageModelConfig(shape=ModelShape(width=16, layers=1, heads=2, inner=32, positions=32)),
        task=Addition(digits=2, held_out=8),
        experience=DemonstrationConfig(rows=6),
        algorithm=SFT(),
        evaluation=LanguageEvaluationConfig(times=1, prompts=4, samples=2, pass_at=(1,), limit=6),
        log=LanguageLogConfig(tensorboard=False, progress=False, diagnose_every=2),
        steps=2,
        threads=1,
    )


def small_grpo() -> LanguageRun:
    run = replace(small_sft(), recipe="small-grpo", start_from="small-sft", model=LanguageModelConfig())
    return replace(run, experience=COMPLETIONS, algorithm=GRPO(scale="none"))


def in_a_circle() -> LanguageRun:
    return replace(small_grpo(), recipe="in-a-circle", start_from="in-a-circle")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, small recipes, and a terminal wide enough."""
    for name, recipe in (("small-sft", small_sft), ("small-grpo", small_grpo), ("in-a-circle", in_a_circle)):
        monkeypatch.setitem(RECIPES, name, recipe)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Standard output, and standard error with its lines joined."""
    captured = capsys.readouterr()
    return captured.out, " ".join(captured.err.split())


def test_a_run_from_its_start_to_comparison(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small-grpo"]) == 0
    out, error = said(capsys)
    assert "small-grpo starts from small-sft, which is trained first" in error
    assert out.index("small-sft has taken 2 updates on Addition") < out.index("small-grpo has taken 2 updates")
    assert re.search(r"accuracy, likeliest completion +0\.\d{3} +0\.\d{3} +[+-]0\.\d{3}", out)
    assert "prompt" in out
    for line in (
        'AutoModelForCausalLM.from_pretrained("runs/small-grpo-seed1/policy")',
        "upslope evaluate runs/small-grpo-seed1 --prompts 1024",
        "upslope resume runs/small-grpo-seed1 --steps 4",
        "upslope train small-grpo --seed 2",
        "upslope sample runs/small-grpo-seed1 --prompt ",
    ):
        assert line in out

    run = "runs/small-grpo-seed1"
    assert main(["evaluate", run, "--prompts", "4", "--samples", "2"]) == 0
    first, _ = said(capsys)
    assert "on 4 held-out examples" in first
    assert "pass@2" in first
    assert main(["evaluate", run, "--prompts", "4", "--samples", "2"]) == 0
    assert said(capsys)[0] == first
    assert main(["evaluate", run, "--episodes", "3"]) == 2
    assert "--episodes judges the policy of an agent" in said(capsys)[1]

    assert main(["sample", run, "--prompt", "12+34=", "-n", "3", "--limit", "5"]) == 0
    out, _ = said(capsys)
    assert len(re.findall(r"^12\+34=.* [1-5] tokens", out, re.MULTILINE)) == 3
    assert main(["sample", run, "--prompt", "12+ab="]) == 2
    assert "no token for 'a', 'b'" in said(capsys)[1]

    assert main(["diagnose", run]) == 0
    assert re.search(r"^live_groups +", said(capsys)[0], re.MULTILINE)
    assert main(["describe", run, "--against", "small-sft"]) == 0
    assert re.search(r"^experience +3 prompts per update.* 6 demonstrations", said(capsys)[0], re.MULTILINE)
    assert main(["resume", run, "--steps", "3"]) == 0
    assert "small-grpo has taken 3 updates" in said(capsys)[0]
    assert main(["compare", run, "runs/small-sft-seed1", "--out", "both.svg", "--json", "both.json"]) == 0
    out, _ = said(capsys)
    assert "accuracy on held-out prompts" in out
    assert len(json.loads((here / "both.json").read_text())["groups"]) == 2
    assert main(["compare", run, "--out", "one.svg"]) == 0
    assert "mean tokens" in (here / "one.svg").read_text()


def test_what_a_recipe_made_is_taken_once_it_is_finished_and_finished_if_it_is_not(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "small-sft", "--steps", "1"]) == 0
    said(capsys)
    assert main(["train", "small-grpo"]) == 0
    assert (
        "starts from runs/small-sft-seed1/policy (made with other settings than the recipe's: steps=1)"
        in (said(capsys)[1])
    )
    config = here / "runs" / "small-sft-seed1" / "config.json"
    config.write_text(config.read_text().replace('"steps": 1,', '"steps": 2,'))
    assert main(["train", "small-grpo"]) == 0
    out, error = said(capsys)
    assert "runs/small-sft-seed1 has not come to its end and goes on first" in error
    assert "small-sft has taken 2 updates" in out
    assert main(["train", "small-grpo", "--seed", "2"]) == 0
    assert "small-sft, which is trained first" in said(capsys)[1]
    assert main(["train", "small-grpo", "--start_from", "runs/small-sft-seed2", "--name", "mine"]) == 0
    assert said(capsys)[1] == ""


def test_both_worlds_end_in_one_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = ["--steps", "2", "--seed", "3", "--log.no_progress", "--log.no_tensorboard"]
    assert main(["train", "short-corridor-reinforce", "small-grpo", *quiet]) == 0
    table = said(capsys)[0].split("one library")[1]
    assert re.search(r"short-corridor-reinforce +Reinforce +Psi: ", table)
    assert re.search(r"Addition +small-sft +SFT ", table)
    assert re.search(r"Addition +small-grpo +GRPO +Psi: ", table)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "arithmetic-grp"], ["no recipe called 'arithmetic-grp'", "arithmetic-grpo"]),
        (["train", "small-sft", "small-grp"], ["no recipe called 'small-grp'"]),
        (["train", "small-grpo", "--start_from", "nowhere"], ["start_from='nowhere' is neither a folder nor a recipe"]),
        (["train", "small-grpo", "--start_from", "cartpole-ppo"], ["trains an agent"]),
        (["train", "small-grpo", "--start_from", "empty"], ["start_from='empty' is a folder without a policy"]),
        (["train", "in-a-circle"], ["which starts from itself"]),
        (["train", "small-grpo", "--experience.group", "1"], ["experience.group=1 makes no groups"]),
        (["sample", "nowhere", "--prompt", "1"], ["no directory nowhere"]),
        (["sample", "empty", "--prompt", "1"], ["empty"]),
        (["describe", "grpo", "--against"], ["upslope describe A --against B"]),
        (["evaluate", "empty"], ["config.json"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named_with_a_remedy(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    (here / "empty").mkdir()
    assert main(arguments) == 2
    error = said(capsys)[1]
    for part in parts:
        assert part in error
    assert not (here / "runs").exists()


def test_missing_packages_are_named_before_anything_is_trained(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", "small-grpo"]) == 2
    assert "pip install 'upslope[language]'" in said(capsys)[1]
    assert not (here / "runs").exists()


def test_parts_that_may_be_left_out_are_put_in_by_their_settings() -> None:
    run = load_recipe("arithmetic-grpo")
    words = "--model.lora.rank 4 --experience.overlong.buffer 8 --task.direct 0.5 --steps 1e1"
    changed = configure(run, words.split(), program="upslope")
    assert isinstance(changed, LanguageRun)
    assert isinstance(changed.experience, CompletionConfig)
    assert changed.model.lora == LoraConfig(rank=4)
    assert changed.experience.overlong == OverlongPenalty(buffer=8)
    assert changed.steps == 10
    again = configure(changed, ["--model.lora", "None", "--experience.overlong", "None"], program="upslope")
    assert isinstance(again, LanguageRun)
    assert (again.model.lora, again.experience) == (None, run.experience)
    assert again.task == changed.task != run.task


def test_estimators_are_held_against_each_other(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "grpo-trl", "--against", "grpo-verl"]) == 0
    out, _ = said(capsys)
    assert re.search(r"grpo-trl +grpo-verl", out)
    assert re.search(r"^advantage scale +.*0\.0001 +.*1e-06", out, re.MULTILINE)
    assert "dual clip 3.0" in out
    assert "baseline" not in out
    for short, name in (("trl", "grpo-trl"), ("nemo_rl", "grpo-nemo-rl"), ("prime-rl", "grpo-prime-rl")):
        assert main(["describe", name, "--against", short]) == 0
        assert "have the same estimator" in said(capsys)[0]
    assert main(["describe", "grpo", "--scale", "none", "--against", "GRPO", "--scale", "none"]) == 0
    assert "have the same estimator" in said(capsys)[0]

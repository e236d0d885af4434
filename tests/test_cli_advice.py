"""What the command line advises can be done, and what it refuses leaves nothing behind."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from upslope.cli import main
from upslope.errors import UsageError
from upslope.recipes import access_control_ppo
from upslope.train import Run
from upslope.train.prepare import new_directory

QUIET = ["--log.no_progress", "--log.no_tensorboard", "--environment.vectorization", "sync"]
SMALL = ["--rollout.steps", "64", "--environment.count", "2", "--evaluation.final_episodes", "2", *QUIET]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def test_the_total_advised_to_train_on_is_one_that_is_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One update takes more than twice the steps that were asked for."""
    assert main(["train", "cartpole-ppo", *SMALL, "--steps", "50"]) == 0
    said = capsys.readouterr().out
    assert "has taken 128 steps" in said
    advised = next(line for line in said.splitlines() if line.strip().startswith("train on"))
    assert main(shlex.split(advised.split("upslope", 1)[1])) == 0
    assert "has taken 256 steps" in capsys.readouterr().out


@pytest.mark.parametrize("named", [[], ["--name", "mine"]], ids=["numbered", "named"])
def test_a_run_that_its_first_update_refuses_leaves_no_directory(here: Path, named: list[str]) -> None:
    settings = ["--environment.id", "CartPole-v1", "--environment.count", "2", *QUIET, *named]
    assert main(["train", "access-control-ppo", *settings]) == 2
    assert list((here / "runs").iterdir()) == []


def refused(run: Run, *, after: str) -> None:
    with new_directory(run) as directory:
        directory.metrics_path.write_text(after)
        raise UsageError("refused")


def test_what_was_there_before_or_was_made_by_training_stays(here: Path) -> None:
    run = replace(access_control_ppo(), directory=here, name="mine")
    with pytest.raises(UsageError):
        refused(run, after="{}")
    assert (here / "mine" / "metrics.jsonl").is_file()
    (here / "theirs").mkdir()
    with pytest.raises(UsageError):
        refused(replace(run, name="theirs"), after="")
    assert (here / "theirs").is_dir()


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [("trpo", "ppo", "6 other rows are equal"), ("a2c", "ppo", "5 other rows are equal"), ("sft", "trpo", "")],
)
def test_what_neither_has_and_what_both_mean_is_no_difference(
    one: str, other: str, equal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["describe", one, "--against", other]) == 0
    said = capsys.readouterr().out
    assert equal in said
    rows = [line.split("  ")[0] for line in said.splitlines()]
    assert not {"reference KL", "KL", "KL stop"} & set(rows)
    assert ("state weights" in rows) == (one == "sft")


def test_one_is_not_several(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--epochs", "1", "--minibatches", "1"]
    assert main(["describe", "preference", "--against", "trpo"]) == 0
    assert main(["describe", "ppo", *settings, "--against", "sft", "--epochs", "2", "--minibatches", "3"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 other row is equal" in said
    assert "1 epoch x 1 minibatch 2 epochs x 3 minibatches of" in said

"""What the command line advises can be done."""

import shlex
from pathlib import Path

import pytest

from upslope.cli import main

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

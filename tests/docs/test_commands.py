"""Every `upslope` command in the documentation is one that the real command line takes."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path
from typing import Any, NoReturn

import pytest
from pages import PAGES, ROOT, shell_commands

from upslope import cli
from upslope.recipes import load_recipe
from upslope.train.config_file import config_to_tree

COMMANDS = sorted(
    {
        (page.name, command)
        for page in PAGES
        for command in map(" ".join, map(str.split, shell_commands(page)))
        if shlex.split(command, comments=True)[:1] == ["upslope"]
    }
)


def arrive(*_: Any, **__: Any) -> NoReturn:
    """In place of the work itself: everything was understood."""
    raise SystemExit(0)


@pytest.fixture
def understood_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands end where their work begins; the one run directory they look into is there."""
    for module, name in (
        ("upslope.train", "train"),
        ("upslope.train", "resume"),
        ("upslope.train", "evaluate_run"),
        ("upslope.report", "compare"),
        ("upslope.report.diagnose", "diagnose"),
        ("upslope.collect", "check_environment"),
        ("upslope.auditing", "audit"),
        ("upslope.auditing", "audit_loss"),
        ("upslope.auditing.table", "measure"),
    ):
        monkeypatch.setattr(importlib.import_module(module), name, arrive)
    configurations = importlib.import_module("upslope.train.config_file")
    monkeypatch.setattr(configurations, "read_run", lambda directory: load_recipe("cartpole-ppo"))
    own = load_recipe(f"{ROOT}/examples/own_recipe.py:short_pole")
    run = tmp_path / "runs" / "short-pole-seed1"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"run": config_to_tree(own), "estimator": {}}))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "my_file.py").write_text("def my_loss(log_prob, reward):\n    return -(log_prob * reward).mean()\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("understood_is_enough")
@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda text: text)
def test_command_is_understood(page: str, command: str) -> None:
    assert cli.main(shlex.split(command, comments=True)[1:]) == 0


def test_there_are_commands_of_every_kind() -> None:
    used = {shlex.split(command)[1] for _, command in COMMANDS}
    assert {"train", "recipes", "describe", "resume", "evaluate", "compare", "check-env", "audit", "diagnose"} <= used


@pytest.mark.usefixtures("understood_is_enough")
@pytest.mark.parametrize(
    "wrong", ["train cartpole-ppo --algorithm.clipp 0.1", "train cartpole-pop", "resum runs/x", "audit ppo --clipp 0.1"]
)
def test_a_command_that_is_wrong_is_refused(wrong: str) -> None:
    assert cli.main(shlex.split(wrong)) == 2

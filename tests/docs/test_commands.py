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
from upslope.recipes import RECIPES, load_recipe
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
    """Commands end where their work begins; the run directories they look into are there."""
    for module, name in (
        ("upslope.train", "train"),
        ("upslope.train", "resume"),
        ("upslope.train", "evaluate_run"),
        ("upslope.train.record", "record_run"),
        ("upslope.train.language.judge", "evaluate_language_run"),
        ("upslope.policies.language.folder", "load_language_policy"),
        ("upslope.report", "compare"),
        ("upslope.report.diagnose", "diagnose"),
        ("upslope.report.optimum", "solve_problem"),
        ("upslope.train.many", "Pool"),
        ("upslope.commands.study", "Study"),
        ("upslope.collect", "check_environment"),
        ("upslope.auditing", "audit"),
        ("upslope.auditing", "audit_loss"),
        ("upslope.auditing.table", "measure"),
    ):
        monkeypatch.setattr(importlib.import_module(module), name, arrive)
    configurations = importlib.import_module("upslope.train.config_file")
    monkeypatch.setattr(configurations, "read_run", lambda directory: load_recipe("cartpole-ppo"))
    recipes = {name: name for name in RECIPES} | {"short-pole": f"{ROOT}/examples/own_recipe.py:short_pole"}
    for place in {word for _, command in COMMANDS for word in shlex.split(command) if word.startswith("runs/")}:
        name = Path(place).name.rpartition("-seed")[0]
        if name in recipes:
            (tmp_path / place / "policy").mkdir(parents=True)
            record = json.dumps({"run": config_to_tree(load_recipe(recipes[name])), "estimator": {}}, default=str)
            (tmp_path / place / "config.json").write_text(record)
            (tmp_path / place / "metrics.jsonl").touch()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "my_file.py").write_text("def my_loss(log_prob, reward):\n    return -(log_prob * reward).mean()\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("understood_is_enough")
@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda text: text)
def test_command_is_understood(page: str, command: str) -> None:
    assert cli.main(shlex.split(command, comments=True)[1:]) == 0


def test_there_are_commands_of_every_kind() -> None:
    used = {shlex.split(command)[1] for _, command in COMMANDS}
    assert {
        "train",
        "recipes",
        "describe",
        "resume",
        "evaluate",
        "compare",
        "check-env",
        "audit",
        "diagnose",
        "sample",
    } <= used


@pytest.mark.usefixtures("understood_is_enough")
@pytest.mark.parametrize(
    "wrong", ["train cartpole-ppo --algorithm.clipp 0.1", "train cartpole-pop", "resum runs/x", "audit ppo --clipp 0.1"]
)
def test_a_command_that_is_wrong_is_refused(wrong: str) -> None:
    assert cli.main(shlex.split(wrong)) == 2

"""`upslope audit` from the user's side."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from upslope import Reinforce, cli
from upslope.auditing import AuditReport
from upslope.auditing.cases.case import Case
from upslope.commands.audit import _named
from upslope.recipes import load_recipe

EXACT = ["audit", "reinforce", "--problem", "two-state"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is measured fails."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(importlib.import_module("upslope.auditing"), "audit", work)
    monkeypatch.setattr(importlib.import_module("upslope.auditing"), "audit_loss", work)
    monkeypatch.setattr(importlib.import_module("upslope.auditing.table"), "measure", work)


@pytest.mark.usefixtures("here", "no_work")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--all ppo", "leave out the name of a subject"),
        ("--all --seed 3", "leave out --seed"),
        ("--all --json here.json", "leave out --json"),
        ("--all --group-size 3", "leave out --group-size"),
        ("ppo --write table.md", "--write goes with --all"),
        ("ppo --pictures images", "--pictures goes with --all"),
        ("ppo --samples 0", "--samples must be at least 1, got 0"),
        ("ppo --limit 0", "--limit must be at least 1, got 0"),
        ("ppo --seed -1", "--seed must be at least 0, got -1"),
        ("ppo --gamma 1.2", "--gamma is a discount from 0 to 1, got 1.2"),
        ("ppo --accuracy 0", "--accuracy must be above 0"),
        ("ppo --json .", "no file that can be written"),
        ("ppo --json file/figures.json", "there can be no directory file"),
        ("--all --write file/table.md", "there can be no directory file"),
        ("--all --pictures file", "there can be no directory file"),
        ("ppo --group-size 3", "--group-size is for functions"),
        ("pppo", "did you mean ppo"),
        ("loss.py:loss --critic perturbed", "critic, behaviour, limit and network are for algorithms"),
        ("loss.py:loss --network language", "limit and network are for algorithms"),
        ("loss.py:loss --accuracy 0.01", "--accuracy is for algorithms"),
        ("", "name an algorithm"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_work(arguments, words, capsys):
    Path("file").touch()
    assert cli.main(["audit", *arguments.split()]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("arguments", ["--samples 20", "--clip 2.0", "--problem nowhere", "--problem ring"])
def test_what_the_audit_refuses_has_no_traceback(arguments, capsys):
    assert cli.main(["audit", "ppo", *arguments.split()]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_algorithm_in_any_spelling(capsys):
    for name in ("Reinforce", "REINFORCE", "reinforce"):
        assert cli.main(["audit", name, "--problem", "two-state"]) == 0
        assert "Reinforce on two-state: unbiased, declared unbiased" in capsys.readouterr().out
    named = [
        type(_named(name, gamma=0.9)[0]).__name__ for name in ("OneStepActorCritic", "one-step-actor-critic", "A2C")
    ]
    assert named == ["OneStepActorCritic", "OneStepActorCritic", "A2C"]


def test_discount_and_accuracy_are_those_asked_for(capsys, here):
    assert cli.main([*EXACT, "--gamma", "0.5", "--accuracy", "0.01", "--json", "new/figures.json"]) == 0
    half = json.loads((here / "new" / "figures.json").read_text())["gradient"]
    assert "for a standard error of 0.01" in capsys.readouterr().out
    assert cli.main([*EXACT, "--json", "own.json"]) == 0
    assert json.loads((here / "own.json").read_text())["gradient"] != half
    assert "for a standard error of 0.1" in capsys.readouterr().out


def test_a_drawn_audit_shows_how_far_it_is_and_leaves_no_bar(capsys):
    assert cli.main([*EXACT, "--samples", "1000"]) == 0
    out = capsys.readouterr().out
    assert "batches drawn" in out
    assert "drawing batches" not in out


def test_a_function_gets_group_size_and_discount(monkeypatch, here):
    (here / "mine.py").write_text("def mine(log_prob, reward):\n    return -(log_prob * reward).sum()\n")
    seen = {}

    class Found:
        def tree(self) -> dict[str, object]:
            return {}

    def audit_loss(function: object, problem: str, **settings: object) -> Found:
        seen.update(settings, problem=problem)
        return Found()

    monkeypatch.setattr(importlib.import_module("upslope.auditing"), "audit_loss", audit_loss)
    assert cli.main(["audit", "mine.py:mine", "--group-size", "3"]) == 0
    assert seen == {"problem": "tokens", "samples": None, "size": 3, "gamma": None, "seed": 0}
    assert cli.main(["audit", "mine.py:mine", "--problem", "six-state", "--gamma", "0.7"]) == 0
    assert (seen["problem"], seen["gamma"], seen["size"]) == ("six-state", 0.7, 2)


@pytest.mark.parametrize(("name", "unit"), [("cartpole-reinforce", "episodes"), ("cartpole-ppo", None), ("ppo", None)])
def test_a_recipe_is_audited_on_what_it_trains_on(name, unit):
    algorithm, found = _named(name, gamma=0.9)
    assert found == unit
    if name != "ppo":
        assert algorithm == load_recipe(name).algorithm


@pytest.mark.parametrize(
    ("declared", "verdict", "code"),
    [
        ("unbiased", "unbiased", 0),
        ("unbiased", "biased", 1),
        ("unbiased", "undecided", 0),
        ("biased", "unbiased", 0),
        ("biased", "biased", 0),
    ],
)
def test_only_bias_where_none_is_declared_fails(declared, verdict, code, monkeypatch):
    found = importlib.import_module("upslope.auditing").audit(Reinforce(gamma=0.9), "two-state")
    monkeypatch.setattr(AuditReport, "verdict", property(lambda _: verdict))
    package = importlib.import_module("upslope.auditing")
    monkeypatch.setattr(package, "audit", lambda *_, **__: replace(found, declared=declared))
    assert cli.main(EXACT) == code


def test_the_whole_table_fails_with_one_row(monkeypatch, here, capsys):
    right = importlib.import_module("upslope.auditing").audit(Reinforce(gamma=0.9), "two-state")
    wrong = replace(right, declared="biased")
    table = importlib.import_module("upslope.auditing.table")

    def cases(*reports: AuditReport) -> list[Case]:
        return [Case(subject="one", setting=str(i), run=lambda r=r: r) for i, r in enumerate(reports)]

    monkeypatch.setattr(table, "all_cases", lambda: cases(right, right))
    assert cli.main(["audit", "--all", "--write", "page/table.md"]) == 0
    assert "2 rows of 1 estimators and algorithms" in capsys.readouterr().out
    assert (here / "page" / "table.md").read_text().count("| ✓ ") == 2
    monkeypatch.setattr(table, "all_cases", lambda: cases(right, wrong))
    assert cli.main(["audit", "--all"]) == 1
    assert "1 as declared, 1 not" in capsys.readouterr().out

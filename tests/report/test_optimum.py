"""The optimum beside a learner: the same measure, and refused where it would be another problem's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from upslope.cli import main
from upslope.exact import problem
from upslope.report.optimum import best_return, evaluation_limit, looks_alike, optimum, solve_problem


def settings(name: str, **changes: Any) -> dict[str, Any]:
    environment = {"class": "EnvironmentConfig", "id": f"problem/{name}", **changes}
    return {"class": "Run", "recipe": "r", "seed": 1, "environment": environment, "evaluation": {"horizon": 50}}


def test_the_best_return_is_what_an_evaluation_measures() -> None:
    """Undiscounted, cut where the evaluation cuts: stay once, then out or back, v0 = 1 + v1, v1 = 2 + v0 / 2."""
    assert best_return([settings("two-state-continuing")], "stochastic_mean") == pytest.approx(49.0)
    assert best_return([settings("two-state-continuing", time_limit=11)], "deterministic_mean") == pytest.approx(10.0)
    assert best_return([settings("two-state")], "stochastic_mean") == pytest.approx(6.0, abs=1e-6)
    corridor = problem("short-corridor").published["value of the best policy"]
    far = {**settings("short-corridor"), "evaluation": {"horizon": 5000}}
    assert best_return([far], "stochastic_mean") == pytest.approx(corridor, abs=1e-6)


def test_there_is_no_one_best_return_of_other_figures_or_different_problems() -> None:
    assert best_return([settings("two-state")], "length_mean") is None
    assert best_return([settings("two-state"), settings("six-state")], "stochastic_mean") is None
    assert best_return([settings("ring"), settings("ring", time_limit=5)], "stochastic_mean") is None
    assert best_return([{**settings("x"), "environment": {"id": "CartPole-v1"}}], "stochastic_mean") is None


def test_states_that_look_alike_make_the_optimum_a_local_search() -> None:
    assert looks_alike(problem("short-corridor").mdp)
    assert not looks_alike(problem("six-state").mdp)
    assert optimum("six-state").search is None
    search = optimum("short-corridor", restarts=2).search
    assert search is not None
    assert len(search.ascents) == 2


def test_the_time_limit_of_a_problem_cuts_its_evaluations() -> None:
    assert evaluation_limit(problem("time-limit")) == 4
    assert evaluation_limit(problem("loops")) == 1000


def test_fixed_steps_are_taken_where_they_are_asked_for() -> None:
    solved = solve_problem("bandit", iterations=5, step_size=0.25, seed=0, restarts=1)
    assert solved.plain.step_size.tolist() == [0.25] * 5


def a_run(root: Path, name: str, seed: int) -> Path:
    directory = root / f"{name}-seed{seed}"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"run": {**settings(name), "seed": seed}}))
    records = [{"kind": "evaluation", "step": step, "stochastic_mean": 0.01 * step + seed} for step in (100, 200)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def test_solve_prints_the_way_and_draws_learners_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(a_run(tmp_path, "two-state", seed)) for seed in (1, 2)]
    picture, figures = tmp_path / "p.png", tmp_path / "f.json"
    words = [
        "solve",
        "two-state",
        "--iterations",
        "5",
        "--against",
        *runs,
        "--plot",
        str(picture),
        "--json",
        str(figures),
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "4.705882353" in said
    assert "none: optimal" in said
    assert "proven" in said
    assert "learners" in said
    tree = json.loads(figures.read_text())
    assert tree["optimum"]["objective"] == pytest.approx((1 + 0.9 * 2) / (1 - 0.9 * 0.45))
    assert [one["changed"] for one in tree["policy_iteration"]][-1] == 0
    assert len(tree["plain_ascent"]["objective"]) == 6
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["six_state"], "there is no problem"),
        (["six-state", "--against", "RUN", "--plot", "p.png"], "not on problem/six-state"),
        (["two-state", "--against", "RUN"], "say where"),
        (["two-state", "--plot", "p.jpg"], "a picture ends in"),
        (["two-state", "--iterations", "0"], "at least 1 iteration"),
    ],
    ids=["problem", "other-problem", "no-picture", "format", "iterations"],
)
def test_what_cannot_be_solved_or_drawn_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(a_run(tmp_path, "two-state", 1))
    assert main(["solve", *(run if word == "RUN" else word for word in words)]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_picture_of_another_kind_is_refused_before_anything_is_solved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("upslope.report.optimum.solve_problem", lambda *_, **__: pytest.fail("it solved"))
    assert main(["solve", "two-state", "--plot", "s.xyz"]) == 2
    assert "a picture ends in .png, .svg, .pdf, got 's.xyz'" in capsys.readouterr().err

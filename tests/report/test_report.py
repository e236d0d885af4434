"""Runs are grouped by what they learnt with; means and intervals are those worked out by hand."""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from upslope.report import bootstrap_interval, compare, draw, interquartile_mean, learning_curve, read_curve
from upslope.train.config_file import ConfigError


def make_run(
    root: Path,
    *,
    seed: int,
    finals: list[float],
    clip: float = 0.2,
    recipe: str = "cartpole-ppo",
    every: int = 100,
    **changes: object,
) -> Path:
    directory = root / f"{recipe}-{clip}-seed{seed}"
    directory.mkdir(parents=True)
    settings = {
        "class": "Run",
        "recipe": recipe,
        "seed": seed,
        "name": f"mine-{seed}",
        "directory": str(root),
        "algorithm": {"class": "PPO", "clip": clip},
        "log": {"class": "LogConfig", "progress": seed == 1},
        **changes,
    }
    (directory / "config.json").write_text(json.dumps({"run": settings, "versions": {}}))
    lines: list[dict] = []
    for index, value in enumerate(finals):
        step = every * (index + 1)
        lines.append({"kind": "train", "step": step, "update": index, "episode_return": value - 1, "kl": None})
        lines.append({"kind": "evaluation", "step": step, "update": index, "deterministic_mean": value, "final": False})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], 5.0),
        ([1.0, 3.0], 2.0),
        ([0.0, 10.0, 1000.0], (0.25 * 0 + 1 * 10 + 0.25 * 1000) / 1.5),
        ([100.0, 2.0, 0.0, 4.0], 3.0),
        ([0.0, 1.0, 2.0, 3.0, 400.0], (0.75 * 1 + 1 * 2 + 0.75 * 3) / 2.5),
    ],
)
def test_interquartile_mean_by_hand(values: list[float], expected: float) -> None:
    assert float(interquartile_mean(np.array(values))) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12), st.floats(-10, 10), st.floats(0.1, 10))
def test_interquartile_mean_moves_and_scales_with_the_values(values: list[float], shift: float, scale: float) -> None:
    array = np.array(values)
    moved = interquartile_mean(array * scale + shift)
    assert float(moved) == pytest.approx(float(interquartile_mean(array)) * scale + shift, abs=1e-8)
    assert array.min() - 1e-9 <= float(interquartile_mean(array)) <= array.max() + 1e-9


def test_the_interval_is_repeatable_holds_the_mean_and_needs_two_seeds() -> None:
    values = np.random.default_rng(0).normal(size=(8, 3))
    low, high = bootstrap_interval(values)
    assert (low < interquartile_mean(values)).all()
    assert (interquartile_mean(values) < high).all()
    np.testing.assert_array_equal(bootstrap_interval(values), (low, high))
    assert np.isnan(bootstrap_interval(values[:1])).all()
    np.testing.assert_array_equal(bootstrap_interval(np.full((4, 1), 7.0)), np.full((2, 1), 7.0))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    columns = generator.normal(size=(20, 400))
    low, high = bootstrap_interval(columns, samples=500)
    assert 0.86 < ((low < 0) & (high > 0)).mean() < 0.98


def test_runs_that_differ_by_seed_alone_are_one_group(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, seed=1, finals=[10, 20]),
        make_run(tmp_path, seed=1, finals=[5, 7], clip=0.1),
        make_run(tmp_path, seed=2, finals=[20, 40]),
        make_run(tmp_path, seed=3, finals=[1, 2], recipe="acrobot-ppo"),
    ]
    comparison = compare(runs)
    assert [group.label for group in comparison.groups] == [
        "cartpole-ppo (algorithm.clip=0.2)",
        "cartpole-ppo (algorithm.clip=0.1)",
        "acrobot-ppo",
    ]
    first = comparison.groups[0]
    assert [run.seed for run in first.runs] == [1, 2]
    np.testing.assert_array_equal(first.steps, [100, 200])
    np.testing.assert_array_equal(first.mean, [15, 30])
    assert (first.final_mean, first.final_low, first.final_high) == (30, 20, 40)
    assert math.isnan(comparison.groups[1].final_low)


def test_runs_measured_at_different_steps_are_compared_where_both_have_values(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, seed=1, finals=[100, 200, 300, 400], every=100),
        make_run(tmp_path, seed=2, finals=[150, 300, 450], every=150),
    ]
    (group,) = compare(runs).groups
    assert group.steps[0] == 150
    assert group.steps[-1] == 400
    np.testing.assert_allclose(group.mean, group.steps)
    np.testing.assert_array_equal(group.final, [400, 450])


def test_training_metrics_can_be_compared_too(tmp_path: Path) -> None:
    curve = read_curve(make_run(tmp_path, seed=1, finals=[10, 20]), metric="episode_return")
    np.testing.assert_array_equal(curve.values, [9, 19])


def test_the_table_names_groups_seeds_and_figures(tmp_path: Path) -> None:
    comparison = compare([make_run(tmp_path, seed=seed, finals=[0, 10.0 * seed]) for seed in (1, 2)])
    console = Console(file=io.StringIO(), width=140)
    console.print(comparison.table(width=140))
    assert isinstance(console.file, io.StringIO)
    row = next(line for line in console.file.getvalue().splitlines() if "cartpole-ppo" in line)
    assert re.split(r"\s{2,}", row.strip()) == [
        "cartpole-ppo", "2", "200", "15.0", "10.0 to 20.0", "10.0", "20.0",
    ]  # fmt: skip


def environment(**settings: object) -> dict[str, object]:
    plain = {"truncation": "bootstrap", "vectorization": "sync", "processes": None, "deadline": 60.0}
    return {"class": "EnvironmentConfig", **plain, **settings}


def test_what_does_not_change_learning_makes_no_group_of_its_own(tmp_path: Path) -> None:
    same = [
        {},
        {"environment": environment(vectorization="async", processes=2, deadline=5.0)},
        {"evaluation": {"class": "EvaluationConfig", "times": 3}},
        {"log": {"class": "LogConfig", "every_steps": 7}},
        {"checkpoint": {"class": "CheckpointConfig", "keep": 9}},
        {"threads": 2},
    ]
    other = [{"environment": environment(vectorization="native")}, {"environment": environment(truncation="other")}]
    runs = [
        make_run(tmp_path, seed=seed, finals=[1, 2], **{"environment": environment(), **changes})
        for seed, changes in enumerate(same + other)
    ]
    assert sorted(len(group.runs) for group in compare(runs).groups) == [1, 1, len(same)]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_word_of_the_table_is_broken(tmp_path: Path, width: int) -> None:
    runs = [
        make_run(
            tmp_path / truncation,
            seed=1,
            finals=[-1000, -1234.5],
            recipe="pendulum-ppo",
            every=100_000,
            environment=environment(truncation=truncation),
        )
        for truncation in ("bootstrap", "as_termination")
    ]
    console = Console(file=io.StringIO(), width=width)
    console.print(compare(runs).table(width=width))
    assert isinstance(console.file, io.StringIO)
    words = console.file.getvalue().split()
    for word in ("pendulum-ppo", "(environment.truncation=as_termination)", "-1,234.5", "200,000", "interval", "seeds"):
        assert word in words


def test_the_tree_is_strict_json(tmp_path: Path) -> None:
    tree = compare([make_run(tmp_path, seed=1, finals=[3, 4])]).tree()
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert tree["groups"][0]["final"] == {"interquartile_mean": 4.0, "low": None, "high": None}
    assert tree["groups"][0]["runs"][0]["seed"] == 1


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_drawn_with_the_groups_named(tmp_path: Path, ending: str) -> None:
    runs = [make_run(tmp_path, seed=seed, finals=[1, 2, 3.0 + seed]) for seed in (1, 2, 3)]
    runs.append(make_run(tmp_path, seed=1, finals=[1, 2], recipe="acrobot-ppo"))
    path = draw(compare(runs), tmp_path / "pictures" / f"curve.{ending}", title="Learning")
    content = path.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml"}[ending])
    again = draw(compare(runs), tmp_path / f"again.{ending}", title="Learning").read_bytes()
    assert again == content


def test_one_run_alone_is_drawn_too(tmp_path: Path) -> None:
    run = make_run(tmp_path, seed=1, finals=[1, 2, 3])
    assert learning_curve([run], tmp_path / "one.svg").stat().st_size > 1000


def test_bad_input_is_named_with_a_remedy(tmp_path: Path) -> None:
    run = make_run(tmp_path, seed=1, finals=[1, 2, 3])
    with pytest.raises(ValueError, match="name one run"):
        compare([])
    with pytest.raises(ValueError, match="more than once"):
        compare([run, run])
    with pytest.raises(ValueError, match=r"no run directory: it has no config\.json"):
        compare([tmp_path])
    with pytest.raises(ValueError, match="did you mean deterministic_mean"):
        compare([run], metric="determinstic_mean")
    with pytest.raises(ValueError, match=r"\.png, \.svg"):
        draw(compare([run]), tmp_path / "picture.bmp")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no metrics yet"):
        compare([run])
    for content, said in (
        ("[]", "no run configuration"),
        ("[" * 200_000, "cannot be read"),
        ('{"run": 1}', "settings"),
    ):
        (run / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=said):
            compare([run])


@pytest.mark.parametrize(
    ("starts", "groups"),
    [
        (("runs/first-seed1", "runs/first-seed2-3"), 1),
        (("runs/first-seed1", "runs/first-seed1"), 1),
        (("runs/first-seed1", "runs/other-seed2"), 2),
        (("runs/first-seed12", "runs/first-seed2"), 2),
    ],
    ids=["own", "one-for-all", "other", "longer-number"],
)
def test_runs_that_start_from_the_folder_of_their_own_seed_are_one_group(
    tmp_path: Path, starts: tuple[str, str], groups: int
) -> None:
    runs = [make_run(tmp_path, seed=seed, finals=[1.0], start_from=start) for seed, start in enumerate(starts, start=1)]
    assert len(compare(runs).groups) == groups

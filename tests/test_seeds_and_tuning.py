"""Several seeds, and a search for settings, from the user's side."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import optuna
import pytest

from upslope.cli import main
from upslope.commands.seeds import taken_out
from upslope.commands.study import JOURNAL, PLACE, RESUMES, Plan, Study
from upslope.errors import UsageError
from upslope.recipes import load_recipe
from upslope.report import interquartile_mean
from upslope.train import resume
from upslope.train.log import read_metrics
from upslope.train.many import Job, Pool, Stop, Watched, heed, side_by_side
from upslope.train.search_space import searched

OWN = """
from upslope import PPO, ActorCriticConfig, EnvironmentConfig, EvaluationConfig, LogConfig, RolloutConfig, Run

def small() -> Run:
    return Run(
        environment=EnvironmentConfig(id="problem/two-state", count=4),
        policy=ActorCriticConfig(hidden=(4,)),
        algorithm=PPO(epochs=1, minibatches=1),
        rollout=RolloutConfig(steps=8),
        evaluation=EvaluationConfig(times=2, episodes=4, final_episodes=8, environments=4),
        log=LogConfig(every_steps=32, tensorboard=False, progress=False, diagnose_every=0),
        steps=128,
    )
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a recipe of the user's own."""
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def test_seeds_train_side_by_side_and_one_that_fails_takes_no_other_with_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--seed", "3", "--seeds", "3", "--jobs", "2", "--environment.id", "problem/two-state"]
    (here / "mine.py").write_text(
        OWN + "\nimport sys\nif '4' in sys.argv[-4:]:\n    raise RuntimeError('seed 4 is cursed')\n"
    )
    assert main(["train", "mine.py:small", *settings]) == 1
    summary = json.loads((here / "runs/mine-small-seeds.json").read_text())
    assert [(one["seed"], one["state"]) for one in summary["seeds"]] == [
        (3, "finished"),
        (4, "failed"),
        (5, "finished"),
    ]
    assert "seed 4 is cursed" in summary["seeds"][1]["said"]
    finals = [one["final"] for one in summary["seeds"] if one["state"] == "finished"]
    for one in summary["seeds"][::2]:
        assert read_metrics(here / one["directory"] / "metrics.jsonl")[-1]["deterministic_mean"] == one["final"]
    (group,) = summary["groups"]
    assert group["final"]["interquartile_mean"] == pytest.approx(float(interquartile_mean(np.array(finals))))
    said = capsys.readouterr().out
    assert "upslope compare runs/mine-small-seed3 runs/mine-small-seed5" in said
    assert "seed 4 is cursed" in said


def test_a_job_that_is_stopped_can_be_resumed(here: Path) -> None:
    place = here / "runs/long"
    place.mkdir(parents=True)
    job = Job(name="1", arguments=("train", "mine.py:small", "--steps", "1e7", "--name", "long"), directory=place)
    watched, stop = Watched(place / "metrics.jsonl"), Stop()
    with Pool(1) as pool:
        pool.start(job)
        assert not pool.free
        while watched.step < 128:
            heed(pool, stop)
            watched.new()
        stop.asked = True
        while not (ended := pool.ended()):
            heed(pool, stop)
    assert (ended[0].code, ended[0].asked, ended[0].finished) == (75, True, False)
    reached = read_metrics(place / "metrics.jsonl")[-1]["step"]
    assert isinstance(reached, int)
    assert resume(place, steps=reached + 64).steps == reached + 64


def test_a_run_ends_with_the_process_that_started_it(here: Path) -> None:
    """The parent of the run is killed, as by kill -9."""
    place = here / "runs/orphan"
    place.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        words = ("train", "mine.py:small", "--steps", "1e8", "--name", "orphan")
        Pool(1).start(Job(name="1", arguments=words, directory=place))
        time.sleep(600)
    until = time.monotonic() + 120
    while not (place / "metrics.jsonl").is_file() and time.monotonic() < until:
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while "everything is saved" not in (place / "output.log").read_text() and time.monotonic() < until:
        time.sleep(0.1)
    assert "everything is saved" in (place / "output.log").read_text()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (["--seeds", "5", "--steps", "10"], ((5, None), ["--steps", "10"])),
        (["--steps", "10", "--jobs=2", "--seeds=3"], ((3, 2), ["--steps", "10"])),
        (["--seed", "3"], ((None, None), ["--seed", "3"])),
    ],
)
def test_seeds_and_jobs_are_no_settings_of_a_recipe(
    settings: list[str], wanted: tuple[tuple[int | None, int | None], list[str]]
) -> None:
    seeds, left = taken_out(settings)
    assert ((seeds.count, seeds.jobs), left) == wanted


@pytest.mark.parametrize("settings", [["--seeds"], ["--seeds", "0"], ["--seeds", "many"], ["--jobs", "2"]])
def test_seeds_that_are_no_number_are_refused(settings: list[str]) -> None:
    with pytest.raises(UsageError, match="--seeds"):
        taken_out(settings)


def test_there_is_room_for_one_process_at_least() -> None:
    assert side_by_side(10_000) == 1
    assert side_by_side(1) >= 1


def test_a_search_finds_settings_and_outlives_a_trial_that_fails(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = ["--search", "environment.id=problem/two-state,problem/nowhere", "--search", "algorithm.clip=0.1..0.3"]
    words = ["tune", "mine.py:small", *search, "--name", "it", "--steps", "64", "--study_seed", "3"]
    assert main([*words, "--trials", "4"]) == 0
    place = here / "runs/tune-it"
    result = json.loads((place / "result.json").read_text())
    states = [one["state"] for one in result["trials"]]
    assert len(states) == 4
    assert set(states) == {"complete", "fail"}
    for one in result["trials"]:
        assert (one["state"] == "fail") == (one["settings"]["environment.id"] == "problem/nowhere")
        assert one["error"] is None or "there is no problem 'nowhere'" in one["error"]
    best = max((one for one in result["trials"] if one["value"] is not None), key=lambda one: one["value"])
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(place)
        run = load_recipe("best.py:best")
    assert run.algorithm.clip == float(best["settings"]["algorithm.clip"])  # type: ignore[union-attr]
    assert run.steps == 128, "the length of the trials is not that of the recipe"
    assert (place / "importances.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "4 trials:" in said
    clip = best["settings"]["algorithm.clip"]
    assert f"upslope train mine.py:small --environment.id problem/two-state --algorithm.clip {clip}" in said
    assert main([*words, "--trials", "4"]) == 0
    assert len(json.loads((place / "result.json").read_text())["trials"]) == 4, "there were enough"
    capsys.readouterr()
    assert main([*words, "--seeds", "2"]) == 2, "another study"
    assert "begun with other settings: seeds 1 then, 1 2 now. Give the command" in capsys.readouterr().err


def test_the_settings_that_differ_are_named_with_both_values(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def asked(*words: str) -> str:
        assert main(["tune", "mine.py:small", "--name", "it", "--trials", "1", *words]) == 2
        return " ".join(capsys.readouterr().err.split())

    begun = {
        "recipe": "mine.py:small",
        "settings": ["--steps", "64", "--policy.hidden", "8", "8"],
        "space": ["algorithm.clip=0.1..0.3"],
        "seeds": [1],
        "metric": None,
    }
    place = here / "runs/tune-it"
    place.mkdir(parents=True)
    (place / "study.json").write_text(json.dumps(begun))
    search = ["--search", "algorithm.clip=0.1..0.4"]
    said = asked(*search, "--steps", "64", "--policy.hidden", "8", "4")
    assert "other settings: --policy.hidden 8 8 then, 8 4 now; --search algorithm.clip 0.1..0.3 then, 0.1..0.4" in said
    said = asked("--search", "algorithm.gamma=0.9..0.99", "--policy.hidden=4", "--seeds", "2")
    assert "seeds 1 then, 1 2 now; --steps 64 then, not given now; --policy.hidden 8 8 then, 4 now; and 2 more." in said
    same = ["--search", "algorithm.clip=0.1..0.3", "--policy.hidden", "8", "8", "--steps", "64"]
    assert "the same in another order" in asked(*same)


def plan() -> Plan:
    return Plan(
        recipe="six-state-ppo",
        run=load_recipe("six-state-ppo"),
        settings=(),
        space=(searched("algorithm.clip=0.1..0.3"),),
        seeds=(1,),
        trials=3,
        jobs=1,
        prune=True,
        metric=None,
        seed=0,
    )


def test_a_study_that_was_killed_goes_on(tmp_path: Path) -> None:
    study = Study(tmp_path, plan(), print)
    trial = study.study.ask()
    value = study.plan.space[0].suggest(trial)
    trial.set_user_attr(PLACE, "trial-0")
    done = study.study.ask()
    study.study.tell(done, 1.5)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"torn')
    (tmp_path / f"{JOURNAL}.lock").symlink_to("nowhere")
    again = Study(tmp_path, plan(), print)
    assert [one.number for one in again.ended()] == [done.number]
    taken_up = again.study.ask()
    assert taken_up.user_attrs == {PLACE: "trial-0", RESUMES: trial.number}
    assert again.plan.space[0].suggest(taken_up) == value
    assert [one.value for one in again.complete()] == [1.5]
    for line in (tmp_path / JOURNAL).read_bytes().splitlines():
        json.loads(line)
    assert isinstance(again.study, optuna.Study)


def test_one_trial_is_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", "mine.py:small", "--steps", "32", "--search", "algorithm.clip=0.1..0.3", "--trials", "1"]
    assert main(words) == 0
    assert "1 trial: 1 finished" in capsys.readouterr().out

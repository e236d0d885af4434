"""Runs that learn from groups, demonstrations and pairs of segments: what they refuse, and that going on is exact."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import remains, tiny
from torch import Tensor

from upslope import (
    GRPO,
    KTO,
    PPO,
    RLOO,
    SFT,
    ActorCriticConfig,
    EnvironmentConfig,
    ImportanceSampled,
    OptimizerConfig,
    Preference,
    RolloutConfig,
    Run,
    VTraceActorCritic,
)
from upslope.cli import main
from upslope.collect.given_data import RecordedConfig, SegmentPairsConfig
from upslope.collect.trajectory_file import read_recording, write_recording
from upslope.errors import OffPolicyError, UsageError
from upslope.policies import MemoryConfig
from upslope.train import Snapshot, load, resume, train
from upslope.train.log import read_metrics
from upslope.train.record import record_run
from upslope.train.session import ResumeError

ACTOR = ActorCriticConfig(hidden=(16,), critic=False)
CRITIC = ActorCriticConfig(hidden=(16,))
SGD = OptimizerConfig(learning_rate=3e-3)


def environment(count: int, name: str = "CartPole-v1") -> EnvironmentConfig:
    return EnvironmentConfig(id=name, count=count, vectorization="sync", time_limit=40)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of CartPole and one of Pendulum, and episodes of both."""
    place = tmp_path_factory.mktemp("made")
    for name, world in (("cartpole", "CartPole-v1"), ("pendulum", "Pendulum-v1")):
        run = tiny(place / name, environment=environment(2, world), steps=128, policy=ActorCriticConfig(hidden=(16,)))
        train(run)
        record_run(place / name / "run", place / f"{name}.safetensors", episodes=6, seed=1)
    return place


def runs(directory: Path, made: Path) -> dict[str, Run]:
    """One of each kind."""
    grouped = {"policy": ACTOR, "environment": environment(4), "steps": 1200}
    in_groups = RolloutConfig(steps=None, episodes=8, group_size=4)
    copied = replace(in_groups, group_start="snapshot")
    given = {"policy": ACTOR, "environment": environment(2), "steps": 600, "optimizer": SGD}
    pendulum = {**given, "environment": environment(2, "Pendulum-v1")}
    pairs = SegmentPairsConfig(file=made / "cartpole.safetensors", drawn=50, length=5, pairs=6)
    played = replace(pairs, file=None, episodes=6)
    started = {**given, "policy": ActorCriticConfig(hidden=(16,)), "start_from": str(made / "cartpole" / "run")}
    demonstrations = RecordedConfig(file=made / "cartpole.safetensors", rows=4, length=8)
    episodes = RecordedConfig(file=made / "cartpole.safetensors", rows=6)
    turns = RecordedConfig(file=made / "pendulum.safetensors", rows=2)
    return {
        "grpo": tiny(directory, GRPO(epochs=2, minibatches=2), rollout=in_groups, **grouped),
        "rloo": tiny(directory, RLOO(), rollout=copied, **grouped),
        "sft": tiny(directory, SFT(minibatches=2), rollout=demonstrations, **given),
        "sft continuous": tiny(directory, SFT(), rollout=turns, **pendulum),
        "dpo": tiny(directory, Preference(minibatches=3), rollout=pairs, **started),
        "dpo, played": tiny(directory, Preference(), rollout=played, **started),
        "simpo": tiny(directory, Preference(kind="simpo"), rollout=pairs, **given),
        "kto": tiny(directory, KTO(), rollout=pairs, **given),
        "weighted": tiny(directory, ImportanceSampled(fewest_effective=0.0), rollout=episodes, **given),
        "weighted pieces": tiny(directory, VTraceActorCritic(), rollout=demonstrations, **{**given, "policy": CRITIC}),
    }


KINDS = ["grpo", "rloo", "sft", "sft continuous", "dpo", "dpo, played", "simpo", "kto", "weighted", "weighted pieces"]


class PulledPlugError(RuntimeError):
    pass


def pull_plug_at(update: int) -> Callable[[Snapshot], None]:
    def callback(snapshot: Snapshot) -> None:
        if snapshot.update == update:
            raise PulledPlugError

    return callback


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_goes_on_the_same(kind: str, tmp_path: Path, made: Path) -> None:
    assert list(runs(tmp_path, made)) == KINDS
    straight, stopped = (runs(tmp_path / name, made)[kind] for name in ("straight", "stopped"))
    train(straight)
    with pytest.raises(PulledPlugError):
        train(stopped, callbacks=[pull_plug_at(3)])
    resume(stopped.directory / "run")
    assert remains(stopped.directory / "run") == remains(straight.directory / "run")
    last = list(read_metrics(straight.directory / "run" / "metrics.jsonl"))
    for record in last:
        assert all(number == number for number in record.values() if isinstance(number, float)), record


def test_steps_of_given_data_are_those_learnt_from(tmp_path: Path, made: Path) -> None:
    steps: list[tuple[int, int]] = []
    run = runs(tmp_path, made)["simpo"]
    train(run, callbacks=[lambda snapshot: steps.append((snapshot.update, snapshot.steps))])
    assert steps == [(update, 60 * update) for update in range(1, 11)]


def test_a_clone_comes_to_act_as_its_model(tmp_path: Path, made: Path) -> None:
    """The model pushes to where the pole falls; the episodes it is shown in are those of chance."""
    recording = read_recording(made / "cartpole.safetensors")
    trajectory = recording.trajectory
    assert isinstance(trajectory.observation, Tensor)
    pushed = (trajectory.observation[..., 2] + trajectory.observation[..., 3] > 0.0).to(trajectory.action.dtype)
    shown = tmp_path / "shown.safetensors"
    write_recording(replace(recording, trajectory=replace(trajectory, action=pushed)), shown)
    run = runs(tmp_path, made)["sft"]
    result = train(replace(run, rollout=RecordedConfig(file=shown, rows=8, length=8), steps=12000))
    losses = [record["nll"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "nll" in record]
    assert losses[-1] < 0.3 < 0.6 < losses[0]
    assert result.evaluation is not None
    assert result.evaluation.score == 40.0
    assert load(tmp_path / "run").critic is None


def test_recorded_episodes_are_weighted_by_who_acted(tmp_path: Path, made: Path) -> None:
    """Of the policy that was recorded every weight is 1; of another one it is the ratio to what the file says."""
    own = runs(tmp_path, made)["weighted"]
    own = replace(own, log=replace(own.log, every_steps=1))
    run = replace(own, policy=CRITIC, start_from=str(made / "cartpole" / "run"), name="own")
    for name, each in (("own", run), ("other", replace(own, name="other"))):
        train(each)
        first = next(r for r in read_metrics(tmp_path / name / "metrics.jsonl") if r["kind"] == "train")
        assert (first["update"], "staleness" in first, "first_ratio_error" in first) == (1, False, False)
        share = float(first["effective_sample_size"])
        assert share == pytest.approx(1.0, abs=1e-4) if name == "own" else share < 0.999
    with pytest.raises(OffPolicyError):
        train(replace(own, algorithm=ImportanceSampled(fewest_effective=1.0), name="refused"))


def test_what_cannot_be_weighted_is_refused(tmp_path: Path, made: Path) -> None:
    run, file = runs(tmp_path, made)["weighted"], tmp_path / "changed.safetensors"
    recording = read_recording(made / "cartpole.safetensors")
    unknown = replace(recording.trajectory, behaviour_log_prob=recording.trajectory.behaviour_log_prob * float("nan"))
    begun = replace(recording.trajectory, time=recording.trajectory.time + 1)
    for trajectory, words in ((unknown, "does not say how probable"), (begun, "6 of the rows .* are no whole")):
        write_recording(replace(recording, trajectory=trajectory), file)
        with pytest.raises(UsageError, match=words):
            train(replace(run, rollout=RecordedConfig(file=file)))
    cut = RecordedConfig(file=file, length=8)
    refused("ImportanceSampled needs whole episodes of another policy", algorithm=ImportanceSampled(), rollout=cut)
    with pytest.raises(ValueError, match="a policy with a memory needs whole episodes"):
        Run(
            environment=environment(2),
            policy=replace(CRITIC, memory=MemoryConfig()),
            algorithm=VTraceActorCritic(),
            rollout=cut,
        )


def refused(words: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=words):
        Run(environment=settings.pop("environment", environment(4)), policy=ACTOR, **settings)


def test_what_does_not_go_together_is_refused(made: Path) -> None:
    episodes = RolloutConfig(steps=None, episodes=8)
    file = made / "cartpole.safetensors"
    refused("compares episodes that begin alike: set rollout.group_size", algorithm=GRPO(), rollout=episodes)
    refused("compares episodes that begin alike", algorithm=RLOO(), rollout=RolloutConfig())
    grouped = replace(episodes, group_size=8)
    refused("environment.count to a multiple of rollout.group_size=8, got 4", algorithm=GRPO(), rollout=grouped)
    uneven = RolloutConfig(steps=None, episodes=6, group_size=2)
    refused("multiple of environment.count, got 6", algorithm=GRPO(), rollout=uneven)
    for wrong in ({"episodes": 6, "group_size": 4}, {"episodes": 4, "group_size": 1}):
        with pytest.raises(ValueError, match="a group is of 2 whole episodes at least"):
            RolloutConfig(steps=None, **wrong)
    with pytest.raises(ValueError, match="a group is of 2 whole episodes at least"):
        RolloutConfig(group_size=2)
    refused("SFT learns from given data: set rollout to a RecordedConfig", algorithm=SFT(), rollout=episodes)
    pairs = SegmentPairsConfig(file=file)
    refused("set rollout to a RecordedConfig", algorithm=SFT(), rollout=pairs)
    refused("set rollout to a SegmentPairsConfig", algorithm=Preference(), rollout=RecordedConfig(file=file))
    refused("GRPO learns from what the policy does itself", algorithm=GRPO(), rollout=pairs)
    refused("PPO learns from what the policy does itself", algorithm=PPO(), rollout=RecordedConfig(file=file))
    few = replace(pairs, pairs=3)
    refused("6 rows cannot be cut into 4 minibatches of 2", algorithm=Preference(minibatches=4), rollout=few)
    with pytest.raises(ValueError, match=r"set rollout.file to those"):
        SegmentPairsConfig(preferences=Path("labels.jsonl"))


def test_files_of_another_world_and_missing_ones_are_refused(tmp_path: Path, made: Path) -> None:
    run = runs(tmp_path, made)["sft"]
    with pytest.raises(UsageError, match="upslope record"):
        train(replace(run, rollout=RecordedConfig(file=tmp_path / "none.safetensors")))
    with pytest.raises(UsageError, match="is a folder: give a file that `upslope record` has written"):
        train(replace(run, rollout=RecordedConfig(file=tmp_path)))
    with pytest.raises(UsageError, match="take one of the same environment"):
        train(replace(run, rollout=RecordedConfig(file=made / "pendulum.safetensors")))
    assert not (tmp_path / "run").exists()


def test_other_pairs_are_no_way_to_go_on(tmp_path: Path, made: Path) -> None:
    run = runs(tmp_path, made)["simpo"]
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((made / "cartpole.safetensors").read_bytes())
    assert isinstance(run.rollout, SegmentPairsConfig)
    run = replace(run, rollout=replace(run.rollout, file=copy))
    with pytest.raises(PulledPlugError):
        train(run, callbacks=[pull_plug_at(4)])
    record_run(made / "cartpole" / "run", copy, episodes=6, seed=2)
    with pytest.raises((UsageError, ResumeError), match="not those the run was begun with"):
        resume(tmp_path / "run")


def test_the_command_records_what_the_library_does(tmp_path: Path, made: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.safetensors"
    place = made / "cartpole" / "run"
    assert main(["record", str(place), "--episodes", "6", "--seed", "1", "--out", str(out)]) == 0
    assert "6 episodes" in capsys.readouterr().out
    assert out.read_bytes() == (made / "cartpole.safetensors").read_bytes()
    assert main(["record", str(place / "policy"), "--out", str(out)]) == 2
    assert "does not know its environment" in capsys.readouterr().err
    named = ["--environment", "CartPole-v1", "--episodes", "3"]
    assert main(["record", str(place / "policy"), "--out", str(out), *named]) == 0
    assert read_recording(out).about["environment"] == "CartPole-v1"
    assert main(["record", str(place), "--out", str(out), "--environment", "Pendulum-v1"]) == 2
    assert "take one of the same environment" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_played(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules[record_run.__module__], "record_episodes", lambda *_, **__: pytest.fail("it played")
    )
    nowhere = tmp_path / "nowhere"
    with pytest.raises(UsageError, match=f"the folder {nowhere} does not exist; make it first"):
        record_run(made / "cartpole" / "run", nowhere / "out.safetensors")
    with pytest.raises(UsageError, match="is a folder: name the file to write"):
        record_run(made / "cartpole" / "run", tmp_path)

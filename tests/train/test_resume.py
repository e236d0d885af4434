"""A run that was killed and resumed ends where an undisturbed one ends, to the last bit."""

from __future__ import annotations

import logging
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import tiny_runs
from tiny_runs import bits, cases, remains, tiny

from upslope import A2C, PPO, CheckpointConfig, LogConfig, OptimizerConfig, Run
from upslope.train import Snapshot, resume, train
from upslope.train.checkpoint import latest_checkpoint
from upslope.train.log import read_metrics
from upslope.train.optimizer import FlatOptimizer
from upslope.train.session import ResumeError

CASES = ["reinforce", "baseline", "one_step", "a2c", "ppo", "ppo_kl", "pendulum", "hopper", "lunarlander", "traces"]


class PulledPlugError(RuntimeError):
    pass


def pull_plug_at(update: int) -> Callable[[Snapshot], None]:
    def callback(snapshot: Snapshot) -> None:
        if snapshot.update == update:
            raise PulledPlugError

    return callback


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that are forked from one which has imported everything, so that they begin at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["upslope"])
    return context


def test_every_case_is_tried(tmp_path: Path) -> None:
    assert list(cases(tmp_path)) == CASES


@pytest.mark.parametrize("case", CASES)
def test_kill_9_at_random_moments(case: str, tmp_path: Path, processes: Any) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    begin = time.monotonic()
    train(cases(straight)[case])
    duration = time.monotonic() - begin
    chance = random.SystemRandom()
    delays: list[float] = []
    for _ in range(2):
        metrics = killed / "run" / "metrics.jsonl"
        begun = metrics.exists()
        if begun:
            process = processes.Process(target=tiny_runs.go_on, args=(killed,))
        else:
            process = processes.Process(target=tiny_runs.start, args=(case, killed))
        process.start()
        while process.is_alive() and not metrics.exists():
            time.sleep(0.002)
        delays.append(chance.uniform(0.1, 0.9) * duration)
        process.join(delays[-1])
        finished = not process.is_alive()
        process.kill()
        process.join()
        if finished:
            assert process.exitcode == 0
            break
    else:
        resume(killed / "run")
    assert remains(killed / "run") == remains(straight / "run"), f"killed after {delays} seconds"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the tiny run leaves behind if nothing happens to it."""
    run = tiny(tmp_path_factory.mktemp("undisturbed"))
    train(run)
    return remains(run.directory / "run")


@pytest.mark.parametrize("update", range(1, 9))
def test_a_crash_after_any_update(update: int, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """Before the first checkpoint, too: then the run begins anew."""
    with pytest.raises(PulledPlugError):
        train(tiny(tmp_path), callbacks=[pull_plug_at(update)])
    resume(tmp_path / "run")
    assert remains(tmp_path / "run") == undisturbed


def test_crashes_after_every_update(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    with pytest.raises(PulledPlugError):
        train(tiny(tmp_path), callbacks=[pull_plug_at(2)])
    for update in range(3, 9):
        with pytest.raises(PulledPlugError):
            resume(tmp_path / "run", callbacks=[pull_plug_at(update)])
    resume(tmp_path / "run")
    assert remains(tmp_path / "run") == undisturbed


def test_two_undisturbed_runs_are_equal_and_another_seed_is_not(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    for name, seed in (("same", 1), ("other", 2)):
        train(tiny(tmp_path / name, seed=seed))
    assert remains(tmp_path / "same" / "run") == undisturbed
    assert remains(tmp_path / "other" / "run")["session"]["policy"] != undisturbed["session"]["policy"]


@pytest.fixture
def unfinished(tmp_path: Path) -> Run:
    """A run of 8 updates with checkpoints after 2, 4 and 6 that stopped after 7."""
    run = tiny(tmp_path / "unfinished")
    with pytest.raises(PulledPlugError):
        train(run, callbacks=[pull_plug_at(7)])
    checkpoints = sorted(path.name for path in (run.directory / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-000000128", "step-000000256", "step-000000384"]
    return run


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "MANIFEST.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    file: str, unfinished: Run, undisturbed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = unfinished.directory / "run"
    place = path / "checkpoints" / "step-000000384" / file
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 4
    place.write_bytes(content)
    seen: list[int] = []
    with caplog.at_level(logging.WARNING):
        resume(path, callbacks=[lambda snapshot: seen.append(snapshot.update)])
    assert seen == [5, 6, 7, 8]
    assert "damaged checkpoint skipped: step-000000384" in caplog.text
    assert file in caplog.text
    assert remains(path) == undisturbed


def test_after_a_damaged_checkpoint_as_many_whole_ones_are_kept_as_asked_for(unfinished: Run) -> None:
    """Of 256 and a damaged 384, resuming makes one more where the run is stopped: 256 is kept beside it."""
    checkpoints = unfinished.directory / "run" / "checkpoints"
    (checkpoints / "step-000000384" / "tensors.safetensors").write_bytes(b"")
    run = replace(unfinished, checkpoint=CheckpointConfig(times=0, keep=2))
    resume(unfinished.directory / "run", run=run, callbacks=[lambda snapshot: True])
    assert [path.name for path in sorted(checkpoints.iterdir())] == [
        "step-000000256", "step-000000320", "step-000000384",
    ]  # fmt: skip
    resume(unfinished.directory / "run", run=run)
    whole = [path for path in sorted(checkpoints.iterdir()) if (path / "tensors.safetensors").stat().st_size]
    assert [path.name for path in whole] == ["step-000000320", "step-000000512"]


def test_if_every_checkpoint_is_damaged_nothing_is_begun_anew(unfinished: Run) -> None:
    path = unfinished.directory / "run"
    for place in (path / "checkpoints").iterdir():
        (place / "tensors.safetensors").write_bytes(b"")
    before = (path / "metrics.jsonl").read_bytes()
    with pytest.raises(ResumeError, match=r"no checkpoint of .* is whole: .*step-000000128"):
        resume(path)
    assert (path / "metrics.jsonl").read_bytes() == before


def test_more_steps_than_first_wished(tmp_path: Path) -> None:
    """With a constant learning rate, N and then N more are the policy of 2 N at once."""
    constant = OptimizerConfig(learning_rate=3e-3)
    half, whole = (tiny(tmp_path / name, optimizer=constant, steps=n) for name, n in (("half", 256), ("whole", 512)))
    train(whole)
    train(half)
    result = resume(half.directory / "run", steps=512)
    assert result.steps == 512
    one, two = remains(half.directory / "run"), remains(whole.directory / "run")
    for name in ("policy", "optimizer", "collector", "update", "steps", "episodes"):
        assert one["session"][name] == two["session"][name], name


def test_resuming_a_finished_run_changes_nothing_it_learnt(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    first = train(run)
    before = remains(tmp_path / "run")
    second = resume(tmp_path / "run")
    assert second.steps == first.steps
    assert second.evaluation is not None
    assert first.evaluation is not None
    assert second.evaluation.record() == first.evaluation.record()
    assert remains(tmp_path / "run") == before


def test_what_may_change_and_what_may_not(unfinished: Run) -> None:
    path = unfinished.directory / "run"
    for changed, name in (
        (replace(unfinished, seed=2), "seed: 1 -> 2"),
        (replace(unfinished, algorithm=PPO(epochs=2, minibatches=2, clip=0.1)), "algorithm.clip: 0.2 -> 0.1"),
        (replace(unfinished, algorithm=A2C()), "algorithm.class: 'PPO' -> 'A2C'"),
    ):
        with pytest.raises(ResumeError, match=name):
            resume(path, run=changed)
    other = replace(
        unfinished, checkpoint=CheckpointConfig(times=1), log=LogConfig(progress=False, tensorboard=False), threads=2
    )
    assert resume(path, run=other).steps == 512


class ThreeActions(gymnasium.ActionWrapper[Any, Any, Any]):
    def __init__(self) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        self.action_space = gymnasium.spaces.Discrete(3)

    def action(self, action: int) -> int:
        return min(int(action), 1)


def test_a_changed_action_space_is_refused_and_nothing_is_touched(unfinished: Run) -> None:
    path = unfinished.directory / "run"
    before = {place: place.read_bytes() for place in path.rglob("*") if place.is_file() and place.name != ".lock"}
    with pytest.raises(ResumeError, match=r"the action space of the environment changed.*start a new run"):
        resume(path, environments=ThreeActions)
    after = {place: place.read_bytes() for place in path.rglob("*") if place.is_file() and place.name != ".lock"}
    assert after == before


def test_a_checkpoint_of_an_earlier_version_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = tiny(tmp_path), FlatOptimizer.state
    with monkeypatch.context() as earlier:
        earlier.setattr(FlatOptimizer, "state", lambda self: {k: v for k, v in state(self).items() if k != "unmoved"})
        with pytest.raises(PulledPlugError):
            train(run, callbacks=[pull_plug_at(7)])
    with pytest.raises(ResumeError, match=r"has no 'unmoved': it is of an earlier version.*start a new run"):
        resume(run.directory / "run")


def test_metrics_of_a_resumed_run_have_no_gap_and_no_repetition(unfinished: Run) -> None:
    path = unfinished.directory / "run"
    lines = (path / "metrics.jsonl").read_bytes()
    (path / "metrics.jsonl").write_bytes(lines + b'{"kind": "train", "upd')
    resume(path)
    updates = [record["update"] for record in read_metrics(path / "metrics.jsonl") if record["kind"] == "train"]
    assert updates == [2, 4, 6, 8]


def test_a_copied_run_directory_goes_on_the_same(unfinished: Run, tmp_path: Path) -> None:
    shutil.copytree(unfinished.directory / "run", tmp_path / "elsewhere" / "run")
    resume(unfinished.directory / "run")
    resume(tmp_path / "elsewhere" / "run")
    assert remains(unfinished.directory / "run") == remains(tmp_path / "elsewhere" / "run")


def test_the_comparison_sees_a_single_bit(unfinished: Run) -> None:
    found = latest_checkpoint(unfinished.directory / "run" / "checkpoints", on_damaged=lambda *_: None)
    assert found is not None
    policy = found.state["session"]["policy"]
    name = next(iter(policy))
    before = bits(policy)
    policy[name].flatten()[0].nextafter_(policy[name].flatten()[0] + 1)
    assert bits(policy) != before

"""Killed at any moment and gone on with, a run that trains a language model leaves what an unbroken one leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import language_cases, language_remains, some_task, tiny_language

from upslope.errors import UsageError
from upslope.train import LogConfig, resume, train
from upslope.train.loop import Snapshot
from upslope.train.session import ResumeError

HERE = Path(__file__).parent


class StoppedError(Exception):
    """Stands for a crash that leaves nothing in order."""


def stop_after(updates: int) -> Any:
    def callback(snapshot: Snapshot[Any, Any]) -> None:
        if snapshot.update == updates:
            raise StoppedError

    return callback


@pytest.mark.parametrize("case", ["sft", "grpo", "grpo_lora", "ppo", "dpo", "drawn", "kto", "reward_model"])
def test_an_interrupted_run_and_a_straight_one_are_the_same_bit_for_bit(case: str, tmp_path: Path) -> None:
    straight, broken = language_cases(tmp_path / "straight")[case], language_cases(tmp_path / "broken")[case]
    train(straight, task=some_task())
    with pytest.raises(StoppedError):
        train(broken, task=some_task(), callbacks=[stop_after(1)])
    with pytest.raises(StoppedError):
        resume(tmp_path / "broken/run", task=some_task(), callbacks=[stop_after(5)])
    resume(tmp_path / "broken/run", task=some_task())
    left, right = language_remains(tmp_path / "straight/run"), language_remains(tmp_path / "broken/run")
    for name, value in left.items():
        assert value == right[name], name


def test_resume_after_kill_9_is_exact(tmp_path: Path) -> None:
    train(language_cases(tmp_path / "straight")["grpo"], task=some_task())
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); from pathlib import Path; import tiny_language;"
        f"tiny_language.start_language('grpo', Path({str(tmp_path / 'killed')!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    checkpoints = tmp_path / "killed/run/checkpoints"
    while child.poll() is None and not (checkpoints.is_dir() and any(checkpoints.glob("step-*"))):
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    resume(tmp_path / "killed/run", task=some_task())
    left, right = language_remains(tmp_path / "straight/run"), language_remains(tmp_path / "killed/run")
    for name, value in left.items():
        assert value == right[name], name


def test_a_run_goes_on_although_the_policy_it_started_from_is_gone(tmp_path: Path) -> None:
    train(tiny_language(tmp_path, name="first", steps=2), task=some_task())
    run = replace(language_cases(tmp_path)["grpo"], start_from=str(tmp_path / "first"), name="second")
    with pytest.raises(StoppedError):
        train(run, task=some_task(), callbacks=[stop_after(4)])
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    result = resume(tmp_path / "second", task=some_task())
    assert result.steps == 8


def test_a_start_that_was_changed_is_refused(tmp_path: Path) -> None:
    run = language_cases(tmp_path)["grpo"]
    train(replace(run, steps=1), task=some_task())
    train(replace(run, seed=2, name="other", steps=1), task=some_task())
    (tmp_path / "run/start").rename(tmp_path / "run/before")
    (tmp_path / "other/start").rename(tmp_path / "run/start")
    with pytest.raises(ResumeError, match="reference and start in the run directory are not what the run began with"):
        resume(tmp_path / "run", task=some_task(), steps=2)


def test_a_task_that_was_passed_has_to_be_passed_again(tmp_path: Path) -> None:
    train(tiny_language(tmp_path, steps=1), task=some_task())
    with pytest.raises(UsageError, match=r"the task 'doubles' was passed as an object: pass it again"):
        resume(tmp_path / "run", steps=2)


def test_more_updates_follow_the_same_course(tmp_path: Path) -> None:
    constant = language_cases(tmp_path)["grpo"]
    constant = replace(constant, optimizer=replace(constant.optimizer, schedule="constant"))
    long = train(replace(constant, name="long"), task=some_task())
    train(replace(constant, name="short", steps=4), task=some_task())
    longer = resume(tmp_path / "short", steps=8, task=some_task())
    for one, other in zip(long.policy.parameters(), longer.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_agents_settings_are_refused(tmp_path: Path) -> None:
    run: Any = tiny_language(tmp_path)
    with pytest.raises(UsageError, match="a language model is trained on a task"):
        train(run, environments="CartPole-v1")
    assert isinstance(run.log, LogConfig)

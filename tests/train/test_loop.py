"""What a run makes, what ends it, and what happens when the world around it fails."""

from __future__ import annotations

import importlib.util
import json
import logging
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import tiny_runs
import torch
from tiny_runs import remains, tiny

import upslope
from upslope import EnvironmentConfig, EvaluationConfig, LogConfig, OptimizerConfig, RolloutConfig, Run
from upslope.collect import EndlessEpisodeError, EnvironmentFailureError, NonFiniteError, UnknownEnvironmentError
from upslope.errors import UsageError
from upslope.train import Snapshot, evaluate_run, load, resume, train
from upslope.train.checkpoint import CheckpointError, latest_checkpoint
from upslope.train.config_file import read_run
from upslope.train.given import environment_again
from upslope.train.log import read_metrics
from upslope.train.run_directory import RunDirectoryError
from upslope.train.session import ResumeError

CASES_WITH_SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the tiny run to which nothing happened."""
    run = tiny(tmp_path_factory.mktemp("undisturbed"))
    train(run)
    return run.directory / "run"


# --- what it makes ---------------------------------------------------------------------------------------------------


def test_the_run_directory(undisturbed: Path) -> None:
    names = {"config.json", "metrics.jsonl", "checkpoints", "policy", "best", ".lock"}
    assert {path.name for path in undisturbed.iterdir()} == names
    checkpoints = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert checkpoints == ["step-000000256", "step-000000384", "step-000000512"]
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["estimator"]["Psi"] == "GAE(gamma=0.99, lambda=0.95)"
    assert config["versions"].keys() == {"python", "upslope", "torch", "numpy", "gymnasium", "safetensors"}
    settled = read_run(undisturbed)
    assert settled.environment.resume == "snapshot"
    assert settled == tiny(settled.directory, environment=replace(tiny(Path()).environment, resume="snapshot"))


def test_tensorboard_on_request(tmp_path: Path) -> None:
    train(tiny(tmp_path, steps=64, log=LogConfig(progress=False)))
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


def test_the_records_of_training(undisturbed: Path) -> None:
    records = [record for record in read_metrics(undisturbed / "metrics.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in records] == [128, 256, 384, 512]
    assert [record["update"] for record in records] == [2, 4, 6, 8]
    for record in records:
        assert {"policy_loss", "value_loss", "entropy", "kl", "clip_fraction", "explained_variance"} < record.keys()
        assert {"gradient_norm", "optimizer_steps", "learning_rate", "steps_per_second", "episodes"} < record.keys()
        assert record["optimizer_steps"] == 4
    rates = [float(record["learning_rate"]) for record in records]
    expected = [3e-3 * (1 - (2 * pair + 0.5) / 8) for pair in range(4)]
    assert rates == pytest.approx(expected)


def test_the_records_of_evaluation(undisturbed: Path) -> None:
    """Halfway and at the end; the best policy is the one that did better."""
    records = [record for record in read_metrics(undisturbed / "metrics.jsonl") if record["kind"] == "evaluation"]
    assert [(record["step"], record["final"]) for record in records] == [(256, False), (512, True)]
    for record in records:
        assert record["episodes"] == 2
        assert record["length_mean"] == record["deterministic_mean"] >= 1.0
        assert float(record["stochastic_mean"]) >= 1.0
    found = latest_checkpoint(undisturbed / "checkpoints", on_damaged=lambda *_: None)
    assert found is not None
    assert found.state["best"] == max(record["deterministic_mean"] for record in records)


def test_the_saved_policy_is_the_one_returned_and_acts(tmp_path: Path) -> None:
    result = train(tiny(tmp_path))
    assert (result.directory, result.steps, result.interrupted) == (tmp_path / "run", 512, False)
    assert result.evaluation is not None
    loaded = load(tmp_path / "run")
    observation = np.array([0.01, 0.02, -0.03, 0.04], dtype=np.float32)
    assert loaded.act(observation) == result.policy.act(observation)
    for name, tensor in result.policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    again = evaluate_run(tmp_path / "run", episodes=3)
    assert len(again.deterministic_returns) == len(again.stochastic_returns) == 3


def test_names_of_their_own(tmp_path: Path) -> None:
    short = tiny(tmp_path, steps=64, name=None)
    assert [train(short).directory.name for _ in range(2)] == ["tiny-seed1", "tiny-seed1-2"]


def test_a_second_run_in_one_directory_is_refused(undisturbed: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    with pytest.raises(RunDirectoryError, match=r"already holds a run.*upslope resume"):
        train(tiny(undisturbed.parent))
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_a_run_that_is_being_trained_is_refused_to_others(tmp_path: Path) -> None:
    refused: list[str] = []

    def intrude(snapshot: Snapshot) -> None:
        for attempt in (lambda: resume(tmp_path / "run"), lambda: train(tiny(tmp_path))):
            with pytest.raises(RunDirectoryError) as error:
                attempt()
            refused.append(str(error.value))

    train(tiny(tmp_path, steps=64), callbacks=[intrude])
    assert len(refused) == 2
    assert all("is in use by process" in text for text in refused)


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny(tmp_path)
    with pytest.raises(UnknownEnvironmentError, match=r"CartPool-v1.*Did you mean CartPole"):
        train(replace(run, environment=EnvironmentConfig(id="CartPool-v1")))
    with pytest.raises(ValueError, match="episodes"):
        train(replace(run, algorithm=upslope.Reinforce(), rollout=RolloutConfig(steps=None, episodes=1)))
    with pytest.raises(ValueError, match="passed as an object"):
        train(replace(run, environment=EnvironmentConfig(count=1)), environments=gymnasium.make("CartPole-v1"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"upslope\[wandb\]"):
        train(replace(run, log=LogConfig(wandb=True)))
    assert list(tmp_path.iterdir()) == []


def test_threads_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    inside: list[int] = []
    run = tiny(tmp_path, steps=64, threads=before + 1)
    train(run, callbacks=[lambda snapshot: inside.append(torch.get_num_threads())])
    assert inside == [before + 1]
    assert torch.get_num_threads() == before


# --- callbacks and evaluation ----------------------------------------------------------------------------------------


def test_callbacks_see_every_update(tmp_path: Path) -> None:
    seen: list[Snapshot] = []
    train(tiny(tmp_path), callbacks=[seen.append])
    assert [(s.update, s.steps) for s in seen] == [(n, 64 * n) for n in range(1, 9)]
    assert [s.update for s in seen if s.evaluation is not None] == [4]
    assert all("entropy" in s.metrics for s in seen)


def test_a_callback_ends_the_run_as_at_its_end(tmp_path: Path) -> None:
    result = train(tiny(tmp_path), callbacks=[lambda snapshot: snapshot.update == 3, lambda snapshot: None])
    assert (result.steps, result.interrupted) == (192, False)
    assert result.evaluation is not None
    assert (tmp_path / "run" / "checkpoints" / "step-000000192").is_dir()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(r["kind"], r["update"]) for r in records] == [("train", 2), ("train", 3), ("evaluation", 3)]


@pytest.mark.parametrize("final_episodes", [0, 7])
@pytest.mark.parametrize("times", [0, 8])
def test_evaluation_does_not_disturb_training(
    times: int, final_episodes: int, tmp_path: Path, undisturbed: Path
) -> None:
    wanted = EvaluationConfig(times=times, episodes=3, final_episodes=final_episodes, environments=2)
    result = train(tiny(tmp_path, evaluation=wanted))
    assert (result.evaluation is None) == (final_episodes == 0)
    kinds = [record["kind"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert kinds.count("evaluation") == max(times - 1, 0) + bool(final_episodes)
    latest, expected = (
        latest_checkpoint(path / "checkpoints", on_damaged=lambda *_: None) for path in (tmp_path / "run", undisturbed)
    )
    assert latest is not None
    assert expected is not None
    assert tiny_runs.bits(latest.state["session"]) == tiny_runs.bits(expected.state["session"])


def test_neither_do_checkpoints_of_environments_that_can_be_snapshotted(tmp_path: Path, undisturbed: Path) -> None:
    train(tiny(tmp_path, checkpoint=upslope.CheckpointConfig(times=0)))
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    assert remains(tmp_path / "run")["session"] == remains(undisturbed)["session"]


def test_fewer_episodes_than_evaluation_environments(tmp_path: Path) -> None:
    result = train(tiny(tmp_path, evaluation=EvaluationConfig(times=2, episodes=3, final_episodes=1, environments=10)))
    assert result.evaluation is not None
    assert len(result.evaluation.deterministic_returns) == 1


class Cheap(gymnasium.Wrapper[Any, Any, Any, Any]):
    """CartPole with a reward of a hundredth, so that one can tell where an evaluation was."""

    def __init__(self) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))

    def step(self, action: Any) -> Any:
        observation, _, terminated, truncated, info = self.env.step(action)
        return observation, 0.01, terminated, truncated, info


def test_a_function_that_makes_environments_is_trained_and_evaluated_in(tmp_path: Path) -> None:
    result = train(tiny(tmp_path), environments=Cheap)
    assert result.evaluation is not None
    assert result.evaluation.deterministic_returns.mean() == pytest.approx(
        0.01 * result.evaluation.deterministic_lengths.mean()
    )
    with pytest.raises(UsageError, match="pass it again"):
        resume(tmp_path / "run")
    assert resume(tmp_path / "run", environments=Cheap, steps=640).steps == 640
    with pytest.raises(UsageError, match="pass it again"):
        evaluate_run(tmp_path / "run", episodes=2)
    report = evaluate_run(str(tmp_path / "run"), episodes=2, environments=Cheap)
    assert report.deterministic_returns == pytest.approx(0.01 * report.deterministic_lengths)


def test_an_environment_object_judges_a_run(tmp_path: Path) -> None:
    train(tiny(tmp_path, steps=64))
    report = evaluate_run(tmp_path / "run", episodes=2, environments=Cheap())
    assert report.deterministic_returns == pytest.approx(0.01 * report.deterministic_lengths)
    with pytest.raises(UsageError, match=r"made for observations in Box\(shape=\(4,\).*has Box\(shape=\(6,\)"):
        evaluate_run(tmp_path / "run", episodes=2, environments="Acrobot-v1")


def test_a_module_named_by_a_run_directory_alone_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may have written a run directory; who trusts it names the environment."""
    monkeypatch.syspath_prepend(str(tmp_path))
    imported = tmp_path / "imported"
    (tmp_path / "strange_module.py").write_text(f"import pathlib\npathlib.Path({str(imported)!r}).touch()\n")
    train(tiny(tmp_path, steps=64))
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"id": "CartPole-v1"', '"id": "strange_module:CartPole-v1"'))
    mine = read_run(tmp_path / "run")
    for attempt in (
        lambda: resume(tmp_path / "run", steps=128),
        lambda: resume(tmp_path / "run", steps=128, run=mine),
        lambda: evaluate_run(tmp_path / "run", episodes=2),
    ):
        with pytest.raises(UsageError, match=r"--environment strange_module:CartPole-v1"):
            attempt()
    with pytest.raises(ResumeError, match=r"environment.id: 'strange_module:CartPole-v1' -> 'CartPole-v1'"):
        resume(tmp_path / "run", steps=128, environments="CartPole-v1")
    evaluate_run(tmp_path / "run", episodes=2, environments="CartPole-v1")
    assert not imported.exists()
    evaluate_run(tmp_path / "run", episodes=2, environments="strange_module:CartPole-v1")
    assert imported.exists()
    resume(tmp_path / "run", steps=128, environments="strange_module:CartPole-v1")
    assert read_run(tmp_path / "run").environment == mine.environment


class Doubled(torch.nn.Module):
    """An encoder of a user's own."""

    features = 8

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return torch.cat([observation, 2.0 * observation], -1).float()


def test_a_policy_with_an_encoder_of_its_own_is_evaluated_with_a_fresh_one(tmp_path: Path) -> None:
    train(tiny(tmp_path), encoder=Doubled())
    with pytest.raises(ValueError, match="pass a new one as `encoder`"):
        evaluate_run(tmp_path / "run", episodes=2)
    assert len(evaluate_run(tmp_path / "run", episodes=2, encoder=Doubled()).deterministic_returns) == 2
    with pytest.raises(ValueError, match="at least one episode, got episodes=0"):
        evaluate_run(tmp_path / "run", episodes=0, encoder=Doubled())


@pytest.mark.parametrize("environments", ["Acrobot-v1", EnvironmentConfig(id="Acrobot-v1", count=2)])
def test_environments_may_be_an_id_or_a_config(environments: str | EnvironmentConfig, tmp_path: Path) -> None:
    evaluation = EvaluationConfig(times=0, final_episodes=0)
    train(tiny(tmp_path, steps=64, evaluation=evaluation), environments=environments)
    settled = read_run(tmp_path / "run").environment
    assert (settled.id, settled.count) == ("Acrobot-v1", 2)


def test_a_total_that_was_passed_long_ago_is_refused(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    with pytest.raises(ResumeError, match=r"has already taken 512 steps, which 100 in all does not reach"):
        resume(tmp_path / "run", steps=100)
    assert read_run(tmp_path / "run").steps == 512
    assert resume(tmp_path / "run", steps=512).steps == 512


# --- signals ---------------------------------------------------------------------------------------------------------


def train_by_command(directory: Path, steps: int) -> None:
    """Train through the command line; for a process of its own."""
    from upslope.cli import main

    options = ["--steps", str(steps), "--name", "run", "--directory", str(directory), "--log.no-progress"]
    raise SystemExit(main(["train", "cartpole-ppo", *options, "--log.no-tensorboard", "--log.every-steps", "512"]))


@pytest.mark.parametrize("number", CASES_WITH_SIGNALS)
def test_a_signal_finishes_the_update_saves_and_exits_75(number: signal.Signals, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["upslope"])
    process = context.Process(target=train_by_command, args=(tmp_path, 10_000_000))
    process.start()
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and b"\n" in metrics.read_bytes()):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 75
    found = latest_checkpoint(tmp_path / "run" / "checkpoints", on_damaged=lambda *_: None)
    assert found is not None
    records = read_metrics(metrics)
    assert records[-1]["kind"] == "train"
    assert records[-1]["step"] == found.step
    result = resume(tmp_path / "run", steps=found.step + 1000)
    assert not result.interrupted
    assert result.steps >= found.step + 1000


def signal_myself(directory: Path, number: int, times: int) -> None:
    """Train, and get signals in the third update; for a process of its own."""

    def callback(snapshot: Snapshot) -> None:
        if snapshot.update == 3:
            for _ in range(times):
                os.kill(os.getpid(), number)

    result = train(tiny(directory), callbacks=[callback])
    assert result.interrupted
    assert result.evaluation is None
    assert result.steps == 192


@pytest.mark.parametrize(("times", "code"), [(1, 0), (2, 128 + signal.SIGTERM)])
def test_one_signal_saves_and_a_second_ends_at_once(times: int, code: int, tmp_path: Path, undisturbed: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=signal_myself, args=(tmp_path, signal.SIGTERM, times))
    process.start()
    process.join(60)
    assert process.exitcode == code
    assert (tmp_path / "run" / "checkpoints" / "step-000000192").exists() == (times == 1)
    resume(tmp_path / "run")
    assert remains(tmp_path / "run")["session"] == remains(undisturbed)["session"]


def test_signal_handlers_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in CASES_WITH_SIGNALS]
    train(tiny(tmp_path, steps=64))
    assert [signal.getsignal(number) for number in CASES_WITH_SIGNALS] == before


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[Callable[[bool], None]]:
    """Lets no file grow beyond some bytes, by order of the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(on: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 if on else soft, hard))

    yield limit
    limit(False)


def test_training_goes_on_while_the_disk_is_full(
    tmp_path: Path, undisturbed: Path, small_files: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Full from the 3rd to the 5th update: the checkpoint of the 4th is missing, everything else is as without."""
    left: list[list[str]] = []

    def callback(snapshot: Snapshot) -> None:
        small_files(3 <= snapshot.update < 5)
        if snapshot.update == 5:
            left.append(sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()))

    with caplog.at_level(logging.WARNING):
        train(tiny(tmp_path), callbacks=[callback])
    assert left == [["step-000000128"]]
    assert "checkpoint not saved, training goes on" in caplog.text
    assert "metrics are kept back" in caplog.text
    found, expected = remains(tmp_path / "run"), remains(undisturbed)
    for what in ("session", "metrics", "policy"):
        assert found[what] == expected[what], what
    assert (tmp_path / "run" / "checkpoints" / "step-000000384").is_dir()


def test_a_disk_that_stays_full_ends_the_run_with_the_older_checkpoint_whole(
    tmp_path: Path, small_files: Callable[[bool], None]
) -> None:
    def callback(snapshot: Snapshot) -> None:
        small_files(snapshot.update >= 3)

    run = tiny(tmp_path, log=LogConfig(every_steps=10**9, tensorboard=False, progress=False))
    with pytest.raises((CheckpointError, OSError)):
        train(run, callbacks=[callback])
    small_files(False)
    found = latest_checkpoint(tmp_path / "run" / "checkpoints", on_damaged=lambda *_: None)
    assert found is not None
    assert found.step == 128
    assert resume(tmp_path / "run").steps == 512


# --- environments that fail ------------------------------------------------------------------------------------------


class Faulty(gymnasium.Wrapper[Any, Any, Any, Any]):
    """CartPole that does something wrong in its 100th step, as long as it is told to."""

    fault: str | None = None

    def __init__(self) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        self.taken = 0

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.taken += 1
        if Faulty.fault is not None and self.taken >= 100:
            if Faulty.fault == "observation":
                observation[2] = np.nan
            elif Faulty.fault == "reward":
                reward = np.inf
            else:
                raise RuntimeError("the cable came loose")
        return observation, reward, terminated, truncated, info


def make_cartpole() -> gymnasium.Env[Any, Any]:
    return gymnasium.make("CartPole-v1")


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("observation", NonFiniteError, r"environment 0, step \d+ of update 3: the .*observation is nan"),
        ("reward", NonFiniteError, r"environment 0, step \d+ of update 3: the reward is inf"),
        ("error", EnvironmentFailureError, r"environment 0 raised in step.*the cable came loose"),
    ],
)
def test_a_failing_environment_is_named_and_nothing_learnt_is_lost(
    fault: str, kind: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates 0 to 2 are 96 steps of each environment; checkpoints are rare, so only the rescue can have saved them."""
    monkeypatch.setattr(Faulty, "fault", fault)
    run = tiny(
        tmp_path,
        environment=EnvironmentConfig(count=2, vectorization="sync", resume="rebuild"),
        checkpoint=upslope.CheckpointConfig(times=0),
        evaluation=EvaluationConfig(times=0, episodes=2, final_episodes=2),
    )
    learnt: list[torch.Tensor] = []

    def remember(snapshot: Snapshot) -> None:
        learnt[:] = [parameter.detach().clone() for parameter in snapshot.policy.parameters()]

    with pytest.raises(kind, match=said) as error:
        train(run, environments=Faulty, callbacks=[remember])
    assert any("upslope resume" in note for note in error.value.__notes__)
    saved = load(tmp_path / "run")
    assert all(torch.equal(one, two) for one, two in zip(saved.parameters(), learnt, strict=True))
    assert (tmp_path / "run" / "checkpoints" / "step-000000192").is_dir()
    monkeypatch.setattr(Faulty, "fault", None)
    assert resume(tmp_path / "run", environments=Faulty).steps == 512


def test_an_environment_that_fails_in_evaluation_loses_nothing_either(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation after the 4th update fails; once mended, it is as if nothing had been."""
    monkeypatch.setattr(Faulty, "fault", "error")
    many = EvaluationConfig(times=2, episodes=20, final_episodes=2, environments=1)
    run = tiny(tmp_path, checkpoint=upslope.CheckpointConfig(times=0), evaluation=many)
    with pytest.raises(EnvironmentFailureError, match="the cable came loose"):
        train(run, environments=make_cartpole, evaluation_environments=Faulty)
    assert (tmp_path / "run" / "checkpoints" / "step-000000256").is_dir()
    monkeypatch.setattr(Faulty, "fault", None)
    resume(tmp_path / "run", environments=make_cartpole, evaluation_environments=Faulty)
    found, expected = remains(tmp_path / "run")["session"], remains(undisturbed)["session"]
    assert (found["policy"], found["optimizer"]) == (expected["policy"], expected["optimizer"])


class Endless(gymnasium.Env[Any, Any]):
    """CartPole's spaces, and nothing ever happens."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (4,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(4, dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(4, dtype=np.float32), 0.0, False, False, {}


def test_an_evaluation_that_does_not_end_loses_nothing_either(tmp_path: Path) -> None:
    run = tiny(tmp_path, checkpoint=upslope.CheckpointConfig(times=0))
    with pytest.raises(EndlessEpisodeError, match="has not ended after") as error:
        train(run, environments=make_cartpole, evaluation_environments=Endless)
    assert any("Everything learnt is saved" in note for note in error.value.__notes__)
    assert (tmp_path / "run" / "checkpoints" / "step-000000256").is_dir()
    assert resume(tmp_path / "run", environments=make_cartpole).steps == 512


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_policy_that_diverges_says_so(tmp_path: Path) -> None:
    """Steps too large for any network: skipped while the gradient is not finite, then an end with advice."""
    run: Run = tiny(tmp_path, optimizer=OptimizerConfig(kind="sgd", learning_rate=1e30, max_gradient_norm=None))
    with pytest.raises((RuntimeError, NonFiniteError), match="learning rate"):
        train(run)


def test_the_way_on_names_an_environment_that_a_run_directory_alone_may_not() -> None:
    assert environment_again(EnvironmentConfig(id="mine:Reach-v0")) == ["--environment", "mine:Reach-v0"]
    assert environment_again(EnvironmentConfig(id="CartPole-v1")) == []
    assert environment_again(EnvironmentConfig(id="given:Reach")) == []

"""`problem/NAME` stands wherever the id of an environment does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import remains, tiny

from upslope import (
    A2C,
    ActorCriticConfig,
    EnvironmentConfig,
    EvaluationConfig,
    Reinforce,
    RolloutConfig,
    Run,
    Snapshot,
)
from upslope.cli import main
from upslope.collect import FiniteEnvironment, FiniteFactory
from upslope.errors import UsageError
from upslope.exact import PROBLEMS, problem, solve
from upslope.train import resume, train
from upslope.train.config_file import recorded_run
from upslope.train.evaluate import evaluate_run
from upslope.train.problems import named_problem

EPISODES = {"rollout": RolloutConfig(steps=None, episodes=6), "steps": 600}
WITHOUT_CRITIC = ActorCriticConfig(hidden=(8,), critic=False)


def on(name: str, count: int = 3, **settings: Any) -> EnvironmentConfig:
    return EnvironmentConfig(id=f"problem/{name}", count=count, **settings)


class PulledPlugError(RuntimeError):
    pass


def pull_plug_at(update: int) -> Callable[[Snapshot], None]:
    def callback(snapshot: Snapshot) -> None:
        if snapshot.update == update:
            raise PulledPlugError

    return callback


CASES: dict[str, dict[str, Any]] = {
    "fragments": {"environment": on("six-state")},
    "episodes": {"environment": on("loops"), "algorithm": Reinforce(), "policy": WITHOUT_CRITIC, **EPISODES},
    "random rewards": {"environment": on("noisy-rewards"), "algorithm": A2C()},
    "a time limit of its own": {"environment": on("time-limit", count=20), "steps": 5120},
    "without an end": {
        "environment": on("ring"),
        "evaluation": EvaluationConfig(times=1, episodes=1, final_episodes=1),
    },
    "one by one": {"environment": on("loops", vectorization="sync", time_limit=5)},
    "made anew": {"environment": on("loops", resume="rebuild")},
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_same_to_the_last_bit(case: str, tmp_path: Path) -> None:
    straight, killed = (tiny(tmp_path / name, **CASES[case]) for name in ("straight", "killed"))
    train(straight)
    with pytest.raises(PulledPlugError):
        train(killed, callbacks=[pull_plug_at(3)])
    resume(killed.directory / "run")
    assert remains(killed.directory / "run") == remains(straight.directory / "run")


def test_tables_are_stepped_natively_and_a_seed_means_the_same_one_by_one(tmp_path: Path) -> None:
    runs = {way: tiny(tmp_path / way, environment=on("loops", vectorization=way)) for way in ("auto", "sync")}
    for run in runs.values():
        train(run)
    auto, sync = (run.directory / "run" for run in runs.values())
    assert recorded_run(auto)["environment"]["vectorization"] == "native"
    assert recorded_run(auto)["environment"]["resume"] == "snapshot"
    ours, theirs = remains(auto), remains(sync)
    assert ours["policy"] == theirs["policy"]
    assert ours["metrics"] == theirs["metrics"]


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_every_problem_trains_by_name(name: str, tmp_path: Path) -> None:
    """Evaluation, too, whose episodes are cut where they do not end."""
    evaluation = EvaluationConfig(times=0, episodes=1, final_episodes=1)
    run = tiny(tmp_path, environment=on(name), evaluation=evaluation, steps=96)
    result = train(run)
    assert result.evaluation is not None
    assert result.evaluation.deterministic_lengths.max() <= run.evaluation.horizon


def test_the_problem_itself_may_be_given_as_an_object(tmp_path: Path) -> None:
    factory = FiniteFactory(problem("six-state").mdp)
    results = [
        train(tiny(tmp_path / name, environment=EnvironmentConfig(count=3)), environments=given)
        for name, given in (
            ("factory", factory),
            ("function", lambda: FiniteEnvironment(factory.tables)),
            ("id", "problem/six-state"),
        )
    ]
    policies = [remains(result.directory)["policy"] for result in results]
    assert policies[0] == policies[1] == policies[2]
    assert recorded_run(results[0].directory)["environment"]["vectorization"] == "native"
    assert recorded_run(results[2].directory)["environment"]["id"] == "problem/six-state"


def test_a_trained_policy_is_judged_by_the_exact_solution_and_by_playing(tmp_path: Path) -> None:
    result = train(tiny(tmp_path, environment=on("six-state", count=2)))
    report = evaluate_run(result.directory, episodes=4000)
    undiscounted = replace(problem("six-state").mdp, gamma=1.0)
    exact = float(solve(undiscounted, result.policy).objective.detach())
    returns = report.stochastic_returns
    assert abs(returns.mean() - exact) < 4.0 * returns.std() / len(returns) ** 0.5
    elsewhere = evaluate_run(result.directory, episodes=20, environments="problem/six-state")
    assert elsewhere.stochastic_returns.shape == (20,)


def test_whole_episodes_of_a_problem_without_end_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    run = tiny(tmp_path, environment=on("ring"), algorithm=Reinforce(), policy=WITHOUT_CRITIC, **EPISODES)
    with pytest.raises(UsageError, match=r"problem/ring never end.*environment\.time_limit \(1000"):
        train(run)
    assert not (tmp_path / "run").exists()
    limited = replace(run, environment=on("ring", time_limit=20))
    assert train(limited).steps >= 600


def test_unknown_names_and_settings_that_tables_do_not_have(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no problem 'seven-state'; there are: .*six-state"):
        train(tiny(tmp_path, environment=on("seven-state")))
    with pytest.raises(UsageError, match=r"takes no environment\.kwargs"):
        train(tiny(tmp_path, environment=on("six-state", kwargs={"slippery": True})))
    assert named_problem(EnvironmentConfig(id="CartPole-v1")) is None


def test_the_time_limit_asked_for_takes_the_place_of_the_problems_own() -> None:
    own, asked = (named_problem(on("time-limit", time_limit=limit)) for limit in (None, 9))
    assert own is not None
    assert asked is not None
    assert (own.time_limit, asked.time_limit) == (4, 9)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        "--environment.id",
        "problem/six-state",
        "--steps",
        "600",
        "--directory",
        str(tmp_path),
        "--name",
        "run",
    ]
    quiet = ["--log.no-progress", "--log.no-tensorboard", "--rollout.steps", "32"]
    assert main(["describe", "cartpole-ppo", "--environment.id", "problem/six-state"]) == 0
    assert "problem/six-state" in capsys.readouterr().out
    assert main(["train", "cartpole-ppo", *settings, *quiet]) == 0
    assert main(["resume", str(tmp_path / "run"), "--steps", "1200"]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "5"]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "5", "--environment", "problem/six-state"]) == 0
    for picture in ("--render", "--video"):
        assert main(["evaluate", str(tmp_path / "run"), "--episodes", "2", picture]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "problem/six-state is made of tables, and there is no picture of a table" in error
    assert main(["check-env", "problem/two-state"]) == 0
    assert "problem/two-state: no problem found" in capsys.readouterr().out
    for arguments in (
        ["train", "cartpole-ppo", "--environment.id", "problem/none", *quiet, "--directory", str(tmp_path)],
        ["check-env", "problem/none"],
        ["evaluate", str(tmp_path / "run"), "--environment", "problem/none"],
    ):
        assert main(arguments) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "there is no problem 'none'; there are: bandit" in error


def test_a_policy_in_the_short_corridor_sees_one_thing(tmp_path: Path) -> None:
    run: Run = tiny(tmp_path, environment=on("short-corridor"), steps=96)
    policy = train(run).policy
    four = torch.arange(4).mul(0).view(1, 4)
    chance = policy.log_prob(four, torch.ones_like(four)).exp().detach()
    assert torch.equal(chance, chance[0, :1].expand(1, 4))

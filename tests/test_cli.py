"""The command line from the user's side: what is asked, what is said, and the exit code."""

import errno
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from upslope.algorithms import PPO, Reinforce
from upslope.cli import main
from upslope.options import as_recorded, configure, whole_number
from upslope.recipes import RECIPES, load_recipe
from upslope.train import Run
from upslope.train.config_file import config_to_tree
from upslope.train.control import ControlSession

OWN_RECIPE = '''
from dataclasses import dataclass

from upslope import PPO, EnvironmentConfig, LogConfig, RolloutConfig, Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Bold(PPO):
    """An algorithm of the user's own."""

    boldness: float = 1.0
    """How bold it is."""


def small() -> Run:
    """Bold on CartPole."""
    return Run(
        environment=EnvironmentConfig(id="CartPole-v1", count=2, vectorization="sync"),
        algorithm=Bold(),
        rollout=RolloutConfig(steps=64),
        log=LogConfig(every_steps=128, tensorboard=False, progress=False),
        steps=512,
    )


def broken() -> Run:
    """Fails in the user's own code."""
    raise ValueError("my own mistake")


def nothing() -> int:
    """Returns no Run."""
    return 3


def greedy(steps: int) -> Run:
    """Wants to be told something."""
    return small()
'''
QUIET = ["--log.no_progress", "--log.no_tensorboard", "--log.every_steps", "128", "--environment.vectorization", "sync"]
SMALL = ["--steps", "512", "--rollout.steps", "64", "--environment.count", "2", *QUIET]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a recipe of the user's own in it, and a terminal wide enough."""
    (tmp_path / "mine.py").write_text(OWN_RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Standard output, and standard error with its lines joined."""
    captured = capsys.readouterr()
    return captured.out, " ".join(captured.err.split())


def test_without_a_command_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    out, _ = said(capsys)
    for command in ("train", "recipes", "describe", "resume", "evaluate", "compare", "check-env"):
        assert re.search(rf"^  {command} ", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["no command 'trian'", "did you mean train"]),
        (["train"], ["name a recipe first", "upslope recipes"]),
        (["train", "cartpole-pp"], ["no recipe called 'cartpole-pp'", "cartpole-ppo"]),
        (["describe", "hoper-ppo"], ["no recipe called 'hoper-ppo'", "hopper-ppo"]),
        (["train", "cartpole-ppo", "--algorithm.clp", "0.1"], ["--algorithm.clp", "--algorithm.clip"]),
        (["train", "cartpole-ppo", "--algorithm.clip", "much"], ["--algorithm.clip"]),
        (["train", "cartpole-ppo", "--algorithm.clip", "3"], ["clip is a distance from 1"]),
        (["train", "cartpole-ppo", "--steps", "1.5"], ["'1.5' is not a whole number"]),
        (["train", "cartpole-reinforce", "--algorithm.clip", "0.1"], ["--algorithm.clip"]),
        (["train", "cartpole-ppo", "--environment.id", "CartPol-v1"], ["CartPol-v1", "CartPole-v1"]),
        (["train", "cartpole-ppo", *SMALL, "--policy.hidden", "0"], ["hidden"]),
        (
            ["train", "cartpole-ppo", *SMALL, "--environment.resume", "snapshot", "--environment.id", "LunarLander-v3"],
            ["resume='snapshot' is not possible"],
        ),
        (["train", "cartpole-ppo", "--name", "../up"], ["'../up' is no name for a run"]),
        (["train", "nowhere.py:small"], ["no file 'nowhere.py'"]),
        (["train", "mine.py:smal"], ["no function 'smal'"]),
        (["train", "mine.py:nothing"], ["returned a int"]),
        (["train", "mine.py:greedy"], ["needs arguments (steps)", "defaults"]),
        (["train", "mine.py:small", "--steps", "0"], ["steps must be at least 1"]),
        (["train", "cartpole-ppo", "--environment.count", "0"], ["count"]),
        (["resume", "runs/none"], ["runs/none", "run"]),
        (["evaluate", "runs/none"], ["runs/none", "config.json"]),
        (["evaluate"], ["RUN", "--help"]),
        (["compare", "."], ["no run directory"]),
        (["compare"], ["nothing to compare"]),
        (["describe", "."], ["no run directory"]),
        (["check-env", "CartPol-v1"], ["CartPole-v1"]),
        (["recipes", "more"], ["more"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named_with_a_remedy_and_no_traceback(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    assert main(arguments) == 2
    out, error = said(capsys)
    for part in parts:
        assert part in error
    assert "Traceback" not in error
    assert "Traceback" not in out
    assert not (here / "runs").exists()


def test_what_only_the_first_update_can_refuse_has_no_traceback_either(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "cartpole-ppo", *SMALL, "--algorithm.minibatches", "1000"]) == 2
    assert "128 steps cannot be cut into 1000 minibatches" in said(capsys)[1]


def test_a_mistake_in_the_users_code_keeps_its_traceback(here: Path) -> None:
    with pytest.raises(ValueError, match="my own mistake"):
        main(["train", "mine.py:broken"])


def test_what_python_or_a_library_below_raises_keeps_its_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(name: str) -> Run:
        raise error

    for error in (AssertionError("never"), RuntimeError("below"), KeyError("key"), ModuleNotFoundError(name="below")):
        monkeypatch.setattr("upslope.recipes.load_recipe", failing)
        with pytest.raises(type(error)):
            main(["train", "cartpole-ppo"])
    monkeypatch.setattr("upslope.recipes.load_recipe", load_recipe)
    monkeypatch.setattr(ControlSession, "advance", lambda session: float("no number"))
    with pytest.raises(ValueError, match="could not convert"):
        main(["train", "cartpole-ppo", *SMALL])


def test_a_full_disk_and_a_missing_package_are_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(name: str) -> Run:
        raise error

    monkeypatch.setattr("upslope.recipes.load_recipe", failing)
    for error in (OSError(errno.ENOSPC, "No space left on device", "x"), ModuleNotFoundError("pip install this")):
        assert main(["train", "cartpole-ppo"]) == 2
        assert str(error) in said(capsys)[1]


def test_recipes_are_listed_with_environment_algorithm_steps_and_a_line(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in ("80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["recipes"]) == 0
        out, _ = said(capsys)
        assert all(name in out for name in RECIPES)
        (line,) = [line for line in out.splitlines() if line.startswith("hopper-ppo ")]
        assert re.search(r"Hopper-v5.*PPO.*1,000,000", line)
        assert "MuJoCo's Hopper-v5 with CleanRL's continuous settings" in " ".join(out.split())


def test_help_of_a_recipe_shows_every_setting_with_its_docstring_and_value(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "ppo-cleanrl", "--help"]) == 0
    out = " ".join(said(capsys)[0].replace("│", " ").split())
    assert "--algorithm.clip {None}|FLOAT How far the ratio may leave 1 before its gradient stops" in out
    assert "--optimizer.learning_rate FLOAT At the start of the run. (default: 0.00025)" in out
    assert "--environment.count INT How many environments are stepped together. (default: 4)" in out
    assert "--steps INT" in out
    assert main(["train", "cartpole-reinforce", "--help"]) == 0
    out = said(capsys)[0]
    assert "--algorithm.psi" in out
    assert "--algorithm.clip" not in out
    for command in ("train", "resume", "evaluate", "describe", "compare", "check-env", "recipes"):
        assert main([command, "--help"]) == 0
        assert f"upslope {command}" in said(capsys)[0]


@pytest.mark.parametrize(
    ("text", "value"), [("128", 128), ("1e6", 10**6), ("2.5e5", 250_000), ("1_000", 1000), ("-3", -3)]
)
def test_whole_numbers_may_be_written_in_powers_of_ten(text: str, value: int) -> None:
    assert whole_number(text) == value


@pytest.mark.parametrize("text", ["1.5", "1e-3", "inf", "nan", "many", ""])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="whole number"):
        whole_number(text)


def test_settings_change_what_they_name_and_nothing_else() -> None:
    run = load_recipe("cartpole-ppo")
    assert configure(run, [], program="upslope") == run
    words = "--algorithm.clip 0.1 --seed 3 --steps 1e6 --policy.hidden 32 1e2 --algorithm.target_kl 0.02 --name me"
    changed = configure(run, words.split(), program="upslope")
    assert type(changed) is Run
    assert isinstance(changed.algorithm, PPO)
    assert (changed.algorithm.clip, changed.algorithm.target_kl) == (0.1, 0.02)
    assert (changed.seed, changed.steps, changed.name, changed.policy.hidden) == (3, 1_000_000, "me", (32, 100))
    assert (changed.environment, changed.optimizer, changed.rollout) == (run.environment, run.optimizer, run.rollout)
    hyphens = configure(run, ["--optimizer.learning-rate", "1e-3"], program="upslope")
    assert hyphens.optimizer.learning_rate == 1e-3


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_can_be_configured(name: str) -> None:
    run = load_recipe(name)
    assert configure(run, ["--seed", "7"], program="upslope").seed == 7


def test_a_recipe_takes_on_what_a_run_of_it_recorded() -> None:
    run = load_recipe("cartpole-ppo")
    words = "--policy.no_orthogonal --policy.log_std_bounds -5 2 --policy.hidden --name me --directory x --seed 7"
    kwargs = ["--environment.kwargs", "sutton_barto_reward", "True"]
    changed = configure(run, [*words.split(), *kwargs, "--optimizer.max_gradient_norm", "None"], program="upslope")
    tree = json.loads(json.dumps(config_to_tree(changed)))
    assert as_recorded(run, tree) == changed != run
    with pytest.raises(ValueError, match=r"run.algorithm is a Reinforce in the recipe and a PPO"):
        as_recorded(load_recipe("cartpole-reinforce"), tree)
    del tree["algorithm"]["clip"]
    with pytest.raises(ValueError, match=r"run.algorithm has other settings .*\(clip\)"):
        as_recorded(run, tree)


def test_a_setting_may_be_none() -> None:
    run = configure(load_recipe("cartpole-reinforce"), ["--optimizer.max_gradient_norm", "None"], program="upslope")
    assert run.optimizer.max_gradient_norm is None
    assert isinstance(run.algorithm, Reinforce)


def test_describe_shows_the_estimator_and_every_setting_with_what_was_changed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["describe", "ppo-cleanrl", "--algorithm.clip", "0.1"]) == 0
    out, _ = said(capsys)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["Psi"] == ["GAE(gamma=0.99,", "lambda=0.95)"]
    assert rows["algorithm.clip"] == ["0.1", "0.2"]
    assert rows["algorithm.gamma"] == ["0.99"]
    assert rows["algorithm"] == ["PPO"]
    assert rows["steps"] == ["500_000", "100_000"]
    assert rows["policy.hidden"] == ["64", "64"]


def test_describe_shows_what_changes_the_estimator_outside_the_algorithm(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = ["--environment.truncation", "as_termination", "--policy.normalize_reward", "--algorithm.gamma", "0.9"]
    plain = [
        "--environment.truncation",
        "bootstrap",
        "--policy.no_normalize_reward",
        "--policy.no_normalize_observation",
    ]
    rows: list[str] = []
    for settings in (plain, [*changed, "--policy.normalize_observation", "--policy.observation_clip", "5"]):
        assert main(["describe", "pendulum-ppo", *settings]) == 0
        rows.append(said(capsys)[0].split("settings")[0])
    assert not re.search(r"^(time limits|rewards|observations) ", rows[0], re.MULTILINE)
    assert re.search(r"^time limits +counted as terminations", rows[1], re.MULTILINE)
    assert re.search(r"^rewards +divided by .*gamma=0.9, then", rows[1], re.MULTILINE)
    assert re.search(r"^observations +shifted and scaled by .* clipped to", rows[1], re.MULTILINE)
    assert "[-5, 5]" in rows[1]
    assert main(["train", "cartpole-ppo", *SMALL, "--policy.normalize_reward"]) == 0
    said(capsys)
    assert main(["describe", "runs/cartpole-ppo-seed1"]) == 0
    assert re.search(r"^rewards +divided by", said(capsys)[0], re.MULTILINE)


def test_a_run_from_training_to_comparison(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "cartpole-ppo", *SMALL]) == 0
    out, _ = said(capsys)
    assert "cartpole-ppo has taken 512 steps on CartPole-v1" in out
    assert re.search(r"most likely actions +[\d.]+ ± [\d.]+", out)
    for command in (
        "upslope evaluate runs/cartpole-ppo-seed1 --episodes 100",
        "upslope resume runs/cartpole-ppo-seed1 --steps 1024",
        f"upslope train cartpole-ppo {' '.join(SMALL)} --seed 2",
        "upslope compare runs/cartpole-ppo-seed* --out curves.png",
    ):
        assert command in out

    assert main(["train", "cartpole-ppo", *SMALL, "--seed", "2"]) == 0
    assert main(["train", "cartpole-ppo", *SMALL, "--name", "cartpole-ppo-seed1"]) == 2
    assert "already holds a run" in said(capsys)[1]

    assert main(["evaluate", "runs/cartpole-ppo-seed1", "--episodes", "5"]) == 0
    first, _ = said(capsys)
    assert main(["evaluate", "runs/cartpole-ppo-seed1", "--episodes", "5"]) == 0
    assert said(capsys)[0] == first
    assert main(["evaluate", "runs/cartpole-ppo-seed1", "--episodes", "5", "--seed", "1", "--best"]) == 0
    assert said(capsys)[0] != first

    runs = ["runs/cartpole-ppo-seed1", "runs/cartpole-ppo-seed2"]
    assert main(["compare", *runs, "--out", "curves.svg", "--json", "figures.json"]) == 0
    out, _ = said(capsys)
    assert re.search(r"^cartpole-ppo +2 +512 ", out, re.MULTILINE)
    assert (here / "curves.svg").stat().st_size > 1000
    assert main(["compare", *runs]) == 0
    assert "picture: compare.png" in said(capsys)[0]
    assert (here / "compare.png").read_bytes().startswith(b"\x89PNG")
    (group,) = json.loads((here / "figures.json").read_text())["groups"]
    assert [run["seed"] for run in group["runs"]] == [1, 2]

    assert main(["describe", "runs/cartpole-ppo-seed2"]) == 0
    assert re.search(r"^seed +2 +1 *$", said(capsys)[0], re.MULTILINE)

    assert main(["resume", "runs/cartpole-ppo-seed1", "--steps", "768"]) == 0
    assert "has taken 768 steps" in said(capsys)[0]


def test_an_algorithm_of_the_users_own_is_trained_described_and_resumed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["describe", "mine.py:small", "--algorithm.boldness", "2"]) == 0
    assert re.search(r"^algorithm.boldness +2.0 +1.0 *$", said(capsys)[0], re.MULTILINE)
    own = "--seed 1 --algorithm.boldness 2 --policy.no_orthogonal --policy.hidden 8 --optimizer.max_gradient_norm None"
    assert main(["train", "mine.py:small", *own.split()]) == 0
    out, _ = said(capsys)
    assert "upslope resume runs/mine-small-seed1 --steps 1024 --recipe mine.py:small" in out
    assert main(["describe", "runs/mine-small-seed1"]) == 0
    assert re.search(r"^algorithm +Bold *$", said(capsys)[0], re.MULTILINE)
    assert main(["resume", "runs/mine-small-seed1", "--steps", "768", "--recipe", "mine.py:small"]) == 0
    assert "has taken 768 steps" in said(capsys)[0]
    assert main(["resume", "runs/mine-small-seed1", "--steps", "1024"]) == 2
    assert "--recipe" in said(capsys)[1]
    assert main(["resume", "runs/mine-small-seed1", "--steps", "1024", "--recipe", "cartpole-ppo"]) == 2
    assert "run.algorithm is a PPO in the recipe and a Bold in the run directory" in said(capsys)[1]


@pytest.mark.parametrize(("number", "resume"), [(signal.SIGINT, "snapshot"), (signal.SIGTERM, "rebuild")])
def test_a_signal_saves_and_names_the_command_that_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, resume: str
) -> None:
    arguments = ["train", "cartpole-ppo", *SMALL, "--steps", "1e7", "--log.every_steps", "1"]
    arguments += ["--environment.resume", resume]
    run = subprocess.Popen(
        [sys.executable, "-c", "import sys; from upslope.cli import main; sys.exit(main())", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = here / "runs" / "cartpole-ppo-seed1" / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    run.send_signal(number)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 75
    assert "everything is saved" in out
    assert ("differ from one that was not stopped" in out) == (resume == "rebuild")
    assert out.splitlines()[-1].strip() == "upslope resume runs/cartpole-ppo-seed1"
    (steps,) = re.findall(r"Stopped at step ([\d,]+) of 10,000,000", out)
    more = int(steps.replace(",", "")) + 1
    assert main(["resume", "runs/cartpole-ppo-seed1", "--steps", str(more)]) == 0


def test_an_episode_is_filmed_into_the_run_directory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("moviepy")
    assert main(["train", "cartpole-ppo", *SMALL]) == 0
    assert main(["evaluate", "runs/cartpole-ppo-seed1", "--episodes", "5", "--video"]) == 0
    video = here / "runs" / "cartpole-ppo-seed1" / "videos" / "policy-seed0.mp4"
    assert "policy-seed0.mp4" in said(capsys)[0]
    assert video.read_bytes()[4:8] == b"ftyp"


def test_an_environment_can_be_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-env", "CartPole-v1"]) == 0
    assert "no problem found" in said(capsys)[0]

"""The command line: read what was asked, build it, run it. Settings are those of the dataclasses, by tyro.

Exit codes: 0 done, 75 interrupted and saved, 2 for input that cannot be used. Whatever is slow to import is imported
by the command that needs it.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from upslope.errors import UsageError, checking_usage
from upslope.options import as_recorded, configure, parse

if TYPE_CHECKING:
    from upslope.train import Result, Run

DONE, BAD_INPUT, INTERRUPTED = 0, 2, 75
_KILLED = 130
_DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """Takes nothing more."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """What `train` was asked for."""

    recipe: str
    settings: tuple[str, ...]

    def another_seed(self, seed: int) -> str | None:
        """The same with another seed; None where the run's own name or seed is among the settings."""
        if any(word.startswith(("--seed", "--name")) for word in self.settings):
            return None
        return shlex.join(["upslope", "train", self.recipe, *self.settings, "--seed", str(seed)])


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on with a run from its newest whole checkpoint.

    After a crash or a kill -9 it is exactly as if the run had never stopped. So it is after Ctrl-C and SIGTERM, except
    where environments are made anew at checkpoints (environment.resume is rebuild): the checkpoint that the signal adds
    makes them anew once more.
    """

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Its directory."""
    steps: int | None = None
    """A new total of environment steps; `1e6` may be written."""
    recipe: str | None = None
    """The recipe that made it, path/to/file.py:function; needed only where that uses classes of your own."""
    environment: str | None = None
    """The id of its environment; needed only where that is module:Name-v0, since making it imports the module."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Play episodes with the policy a run saved: most likely actions, then sampled ones, on raw rewards."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Its directory."""
    episodes: int = 100
    """Episodes for each of the two ways to act."""
    seed: int = 0
    """Decides where episodes start and what is sampled."""
    best: bool = False
    """Take the policy that was best in evaluation during the run, not the last one."""
    environment: str | None = None
    """Another environment; needed only where the run's own is module:Name-v0, since making it imports the module."""
    render: bool = False
    """Watch an episode in a window."""
    video: bool = False
    """Record an episode into the run directory (needs `pip install 'upslope[video]'`)."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare runs: those that learn alike from other seeds are a group, with interquartile mean and interval."""

    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """Run directories."""
    metric: str | None = None
    """A name from metrics.jsonl; the mean evaluation return with the most likely actions if not given."""
    out: Path | None = None
    """Draw the learning curves here (.png, .svg or .pdf); compare.png in the working directory if not given."""
    json: Path | None = None
    """Write the figures here."""
    title: str | None = None
    """Above the picture."""


@dataclass(frozen=True, kw_only=True)
class CheckEnvironment:
    """Check that an environment keeps the promises that training relies on."""

    id: Annotated[Positional[str], tyro.conf.arg(metavar="ID")]
    """A Gymnasium id, or problem/NAME."""


def main(argv: Sequence[str] | None = None) -> int:
    """The `upslope` command.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _overview()
        return DONE
    name, *rest = arguments
    try:
        if name not in _COMMANDS:
            raise UsageError(f"there is no command {name!r}; {_close(name, _COMMANDS)}")
        return _COMMANDS[name].act(rest)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else BAD_INPUT
    except KeyboardInterrupt:
        _complain("interrupted")
        return _KILLED
    except Exception as error:
        if not _refused(error):
            raise
        _complain("\n".join([str(error), *getattr(error, "__notes__", [])]))
        return BAD_INPUT


def _train(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(_TRAIN_HELP)
        return DONE
    recipe, run = _configured(arguments, "train")
    from upslope.train import train

    start = time.monotonic()
    result = train(run)
    return _conclude(result, run, time.monotonic() - start, Train(recipe=recipe, settings=tuple(arguments[1:])))


def _recipes(arguments: list[str]) -> int:
    parse(Nothing, arguments, program="upslope recipes")
    from upslope.recipes import RECIPES
    from upslope.report.terminal import recipes_table

    console = Console()
    rows = [(name, function(), _first_line(function.__doc__)) for name, function in RECIPES.items()]
    console.print(recipes_table(rows, wide=console.width >= 150))
    return DONE


def _resume(arguments: list[str]) -> int:
    command = parse(Resume, arguments, program="upslope resume")
    from upslope.recipes import load_recipe
    from upslope.train import resume
    from upslope.train.config_file import read_run, recorded_run

    given = None if command.recipe is None else as_recorded(load_recipe(command.recipe), recorded_run(command.run))
    run = read_run(command.run) if given is None else given
    start = time.monotonic()
    result = resume(command.run, run=given, steps=command.steps, environments=command.environment)
    if command.steps is not None:
        run = dataclasses.replace(run, steps=command.steps)
    if command.environment is not None:
        run = dataclasses.replace(run, environment=dataclasses.replace(run.environment, id=command.environment))
    return _conclude(result, run, time.monotonic() - start, command)


def _evaluate(arguments: list[str]) -> int:
    command = parse(Evaluate, arguments, program="upslope evaluate")
    from upslope.report.terminal import evaluation_table
    from upslope.train import evaluate_run

    report = evaluate_run(
        command.run,
        episodes=command.episodes,
        seed=command.seed,
        best=command.best,
        environments=command.environment,
    )
    console = Console()
    console.print(evaluation_table(report))
    if command.render or command.video:
        from upslope.report.video import record_video, watch
        from upslope.train import load
        from upslope.train.config_file import read_evaluation

        policy = load(command.run / ("best" if command.best else "policy"))
        environment, _ = read_evaluation(command.run)
        if command.environment is not None:
            environment = dataclasses.replace(environment, id=command.environment)
        if command.render:
            _say(console, f"shown: an episode with a return of {watch(policy, environment, seed=command.seed):,.1f}")
        if command.video:
            path = command.run / "videos" / f"{'best' if command.best else 'policy'}-seed{command.seed}.mp4"
            total = record_video(policy, environment, path, seed=command.seed)
            _say(console, f"video: {path}, an episode with a return of {total:,.1f}")
    return DONE


def _describe(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(_DESCRIBE_HELP)
        return DONE
    from upslope.report.terminal import default_settings, estimator_table, settings_table
    from upslope.train.config_file import config_to_tree, recorded_estimator, recorded_run
    from upslope.train.describe import describe_run

    if arguments and Path(arguments[0]).is_dir():
        directory = Path(arguments[0])
        parse(Nothing, arguments[1:], program=f"upslope describe {arguments[0]}")
        tree, estimator = recorded_run(directory), recorded_estimator(directory)
        defaults = _recorded_defaults(directory)
    else:
        _, run = _configured(arguments, "describe")
        tree, estimator, defaults = config_to_tree(run), describe_run(run), default_settings(run)
    console = Console()
    console.print(Text(tree["recipe"], style="bold cyan"), "on", Text(tree["environment"]["id"]), highlight=False)
    console.print()
    console.print(estimator_table(estimator))
    console.print()
    console.print(settings_table(tree, defaults))
    return DONE


def _compare(arguments: list[str]) -> int:
    command = parse(Compare, arguments, program="upslope compare")
    from upslope.report import DEFAULT_METRIC, compare, draw

    comparison = compare(command.runs, metric=command.metric or DEFAULT_METRIC)
    console = Console()
    console.print(comparison.table(width=console.width))
    if command.json is not None:
        command.json.parent.mkdir(parents=True, exist_ok=True)
        command.json.write_text(json.dumps(comparison.tree(), indent=2) + "\n", "utf-8")
        _say(console, f"figures: {command.json}")
    try:
        _say(console, f"picture: {draw(comparison, command.out or Path('compare.png'), title=command.title)}")
    except ModuleNotFoundError as error:
        if command.out is not None:
            raise
        _say(console, f"no picture: {error}")
    return DONE


def _diagnose(arguments: list[str]) -> int:
    from upslope.commands.diagnose import act

    return act(arguments)


def _audit(arguments: list[str]) -> int:
    from upslope.commands.audit import act

    return act(arguments)


def _check_environment(arguments: list[str]) -> int:
    command = parse(CheckEnvironment, arguments, program="upslope check-env")
    from upslope.collect import EnvironmentConfig, check_environment
    from upslope.train.problems import named_problem

    tables = named_problem(EnvironmentConfig(id=command.id))
    report = check_environment(command.id if tables is None else tables)
    _say(Console(), str(report if tables is None else dataclasses.replace(report, name=command.id)))
    return DONE if report.ok else BAD_INPUT


def _configured(arguments: list[str], command: str) -> tuple[str, Run]:
    """A recipe's name and its configuration after the settings given behind it."""
    from upslope.recipes import load_recipe
    from upslope.report.terminal import default_settings

    if not arguments or arguments[0].startswith("-"):
        raise UsageError(
            f"name a recipe first, for example `upslope {command} cartpole-ppo`; `upslope recipes` lists them"
        )
    name, *settings = arguments
    run = load_recipe(name)
    if ":" in name and run.recipe == default_settings(run)["recipe"]:
        run = dataclasses.replace(run, recipe=name)
    with checking_usage():
        return name, configure(run, settings, program=f"upslope {command} {name}")


def _recorded_defaults(directory: Path) -> dict[str, Any]:
    """The defaults of a run's classes, where all of them are ours."""
    from upslope.report.terminal import default_settings
    from upslope.train.config_file import ConfigError, read_run

    try:
        return default_settings(read_run(directory))
    except ConfigError:
        return {}


def _conclude(result: Result, run: Run, seconds: float, asked: Train | Resume) -> int:
    """Say what was made, where, and what to do next."""
    from upslope.report.conclusion import finished, resume_command, stopped
    from upslope.train.config_file import read_evaluation

    own = None if type(run.algorithm).__module__.startswith("upslope.") else asked.recipe
    console = Console()
    if result.interrupted:
        total = asked.steps if isinstance(asked, Resume) else None
        rebuilt = read_evaluation(result.directory)[0].resume == "rebuild"
        command = resume_command(result, run, steps=total, recipe=own)
        console.print(stopped(result, run, command, rebuilt=rebuilt), soft_wrap=True)
        return INTERRUPTED
    longer = resume_command(result, run, steps=2 * run.steps, recipe=own)
    another = asked.another_seed(run.seed + 1) if isinstance(asked, Train) else None
    resumed = isinstance(asked, Resume)
    console.print(
        finished(result, run, seconds, longer=longer, another=another, resumed=resumed),
        soft_wrap=True,
    )
    return DONE


def _refused(error: Exception) -> bool:
    """Whether the library refuses what it was given, as against failing at it.

    It does with errors of its own types, and where a package is missing that it names; the disk may refuse too.
    Everything else keeps its traceback: it is a mistake of ours, or one in the user's own code, which the traceback
    leads to.
    """
    if type(error).__module__.startswith("upslope."):
        return True
    if isinstance(error, ModuleNotFoundError):
        return error.name is None
    if isinstance(error, OSError):
        return error.errno in _DISK_REFUSES
    return False


def _complain(text: str) -> None:
    _say(Console(stderr=True), Text.assemble(("upslope: ", "bold red"), text))


def _say(console: Console, text: str | Text, style: str = "") -> None:
    console.print(Text(text, style=style) if isinstance(text, str) else text, soft_wrap=True)


def _close(word: str, words: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, words, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"the commands are {', '.join(words)}"


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


def _overview() -> None:
    """What there is."""
    console = Console(highlight=False)
    console.print("[bold]upslope[/bold]: policy gradients from the theorem to practice\n")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for name, command in _COMMANDS.items():
        table.add_row(Text(f"  {name} {command.takes}", style="cyan"), command.purpose)
    console.print(table)
    console.print("\n`upslope COMMAND --help` says more; `upslope train RECIPE --help` shows every setting.")


@dataclass(frozen=True, kw_only=True)
class _Command:
    takes: str
    purpose: str
    act: Callable[[list[str]], int]


_COMMANDS = {
    "train": _Command(takes="RECIPE [--setting value ...]", purpose="train a recipe", act=_train),
    "recipes": _Command(takes="", purpose="list the built-in recipes", act=_recipes),
    "describe": _Command(takes="RECIPE|RUN", purpose="show the exact estimator and every setting", act=_describe),
    "resume": _Command(takes="RUN [--steps N]", purpose="go on with a run", act=_resume),
    "evaluate": _Command(takes="RUN [--episodes N]", purpose="judge the policy of a run", act=_evaluate),
    "compare": _Command(takes="RUN... [--out PICTURE]", purpose="compare runs over seeds", act=_compare),
    "diagnose": _Command(takes="RUN", purpose="say what is wrong with a run, if something is", act=_diagnose),
    "audit": _Command(
        takes="ALGORITHM|FILE.py:FUNCTION [--problem NAME]", purpose="hold a gradient against the exact one", act=_audit
    ),
    "check-env": _Command(takes="ID", purpose="check an environment", act=_check_environment),
}

_TRAIN_HELP = """usage: upslope train RECIPE [--setting value ...]

Train a recipe: a name from `upslope recipes`, or path/to/file.py:function for a function of yours that returns an
upslope.Run. Settings are the fields of the recipe's configuration:

  upslope train cartpole-ppo
  upslope train cartpole-ppo --algorithm.clip 0.1 --seed 3 --steps 1e6
  upslope train my_recipe.py:hopper --name first-try

`upslope train RECIPE --help` shows every setting of that recipe and what it is."""

_DESCRIBE_HELP = """usage: upslope describe RECIPE [--setting value ...]
       upslope describe RUN

Show the exact estimator and every resolved setting of a recipe or of a run directory; what differs from its default
is highlighted."""

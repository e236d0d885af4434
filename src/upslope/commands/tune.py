"""`upslope tune`: search for better settings of a recipe."""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, UseAppendAction

from upslope.commands.common import DONE, FAILED, INTERRUPTED, configured, say
from upslope.commands.seeds import default_jobs
from upslope.errors import UsageError
from upslope.options import parse_known

if TYPE_CHECKING:
    from upslope.commands.study import Plan, Study
    from upslope.train.search_space import Searched
    from upslope.train.session import AnyRun

_SHOWN = 5
_DIFFERENCES, _ABSENT = 3, "not given"
_BEST = '''"""What `upslope tune {recipe}` found best: {value} ({metric}, trial {number})."""

import dataclasses

from upslope.options import configure
from upslope.recipes import load_recipe

SETTINGS = {settings}


def best():
    """{recipe} with these settings."""
    run = configure(load_recipe({recipe!r}), SETTINGS, program="best.py")
    return dataclasses.replace(run, recipe=run.recipe + "-tuned")
'''


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Search for settings of a recipe with Optuna. Other options are the recipe's own, for every trial.

    Trials are short runs: give --steps. The study lies in DIRECTORY/tune-NAME and goes on if the same command is given
    again.
    """

    recipe: Annotated[Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """A name, or path/to/file.py:function."""
    search: UseAppendAction[tuple[str, ...]] = ()
    """A setting and its values: setting=low..high, setting=low..high:log or setting=a,b,c; may be given several times.
    If it is not, learning rate and the usual settings of the algorithm are searched."""
    trials: int = 30
    """How many are to have ended in all, those of earlier sessions included."""
    seeds: int = 1
    """Of every trial; its value is their mean."""
    jobs: int | None = None
    """Processes at a time; as many as the cores have room for if not given."""
    name: str | None = None
    """Of the study; the recipe's if not given."""
    metric: str | None = None
    """What trials are judged by: a figure of the evaluations in metrics.jsonl; if not given, what `upslope compare`
    compares by."""
    prune: bool = True
    """Give up trials that are worse half-way than the median of the others."""
    study_seed: int = 0
    """Decides what is tried."""
    plot: Path | None = None
    """Draw the trials and the importances of the settings here; importances.png in the study's directory if not
    given."""


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    command, settings = parse_known(Tune, arguments, program="upslope tune")
    if importlib.util.find_spec("optuna") is None:
        raise ModuleNotFoundError("tuning needs Optuna: pip install 'upslope[tune]'")
    if min(command.trials, command.seeds, 1 if command.jobs is None else command.jobs) < 1:
        raise UsageError("--trials, --seeds and --jobs are whole numbers of at least 1")
    _, run = configured([command.recipe, *settings], "tune")
    space = _space(command, run, settings)
    from upslope.commands.study import Plan, Study
    from upslope.train.many import stoppable
    from upslope.train.run_directory import RunDirectory, run_name

    name = command.name or run_name(run.recipe, 0).removesuffix("-seed0")
    plan = Plan(
        recipe=command.recipe,
        run=run,
        settings=tuple(settings),
        space=space,
        seeds=tuple(run.seed + index for index in range(command.seeds)),
        trials=command.trials,
        jobs=default_jobs(run) if command.jobs is None else command.jobs,
        prune=command.prune,
        metric=command.metric,
        seed=command.study_seed,
    )
    told = Console(stderr=True, quiet=not run.log.progress)
    with RunDirectory.create(run.directory, f"tune-{name}") as locked:
        directory = run.directory / locked.name
        _check_plan(directory, plan)
        say(told, f"{directory}: {', '.join(part.name for part in space)}; {plan.jobs} processes at a time")
        with stoppable() as stop:
            study = Study(directory, plan, lambda text: say(told, text))
            study.search(stop)
        return _conclude(study, command, stopped=stop.asked)


def _space(command: Tune, run: AnyRun, settings: Sequence[str]) -> tuple[Searched, ...]:
    """What is searched; a setting or a value that the recipe does not take is refused here and not in every trial."""
    from upslope.train.search_space import as_settings, searched, usual_space

    space = tuple(searched(text) for text in command.search) or usual_space(run)
    if not space:
        raise UsageError("there is nothing to search: name settings, as in --search optimizer.learning_rate=1e-4..1e-2")
    names = [part.name for part in space]
    twice = {name for name in names if names.count(name) > 1} | ({"seed", "name", "directory"} & set(names))
    if twice:
        raise UsageError(f"{', '.join(sorted(twice))}: a setting is searched once, and seed, name and directory never")
    if command.search:
        for part in space:
            for value in part.ends():
                configured([command.recipe, *settings, *as_settings([(part.name, value)])], "tune")
    return space


def _check_plan(directory: Path, plan: Plan) -> None:
    """Keep what is searched, or refuse to go on with something else.

    Raises:
        UsageError: the study in this directory searches something else.
    """
    from upslope.train.storage import write_file_atomically

    path = directory / "study.json"
    now = {
        "recipe": plan.recipe,
        "settings": list(plan.settings),
        "space": [part.written() for part in plan.space],
        "seeds": list(plan.seeds),
        "metric": plan.metric,
    }
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        if before != now:
            raise UsageError(
                f"the study in {directory} was begun with other settings: {_differences(before, now)}. Give the "
                "command it was begun with, or another --name"
            )
    write_file_atomically(path, (json.dumps(now, indent=2) + "\n").encode())


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first settings that differ between two studies, each with both values."""
    then, given = _named(before), _named(now)
    names = [name for name in (then | given) if then.get(name) != given.get(name)]
    told = [f"{name} {then.get(name, _ABSENT)} then, {given.get(name, _ABSENT)} now" for name in names[:_DIFFERENCES]]
    if len(names) > _DIFFERENCES:
        told.append(f"and {len(names) - _DIFFERENCES} more")
    return "; ".join(told) or "the same in another order"


def _named(plan: dict[str, Any]) -> dict[str, str]:
    """What a study was begun with, by the name of the option."""
    named = {"recipe": plan["recipe"], "seeds": " ".join(str(seed) for seed in plan["seeds"])}
    if plan["metric"] is not None:
        named["--metric"] = plan["metric"]
    option = ""
    for word in plan["settings"]:
        if word.startswith("--"):
            option, _, value = word.partition("=")
            named[option] = value or "given"
        else:
            named[option] = word if named[option] == "given" else f"{named[option]} {word}"
    for part in plan["space"]:
        name, _, values = part.partition("=")
        named[f"--search {name}"] = values
    return named


def _conclude(study: Study, command: Tune, *, stopped: bool) -> int:
    """Say what was found, write it down, and draw it."""
    console = Console()
    complete, ended = study.complete(), study.ended()
    failed = [one for one in ended if one.state.name == "FAIL"]
    given_up = len(ended) - len(complete) - len(failed)
    trials = "1 trial" if len(ended) == 1 else f"{len(ended)} trials"
    say(console, f"{trials}: {len(complete)} finished, {given_up} given up, {len(failed)} failed")
    if failed:
        say(console, f"trial {failed[-1].number} failed: {failed[-1].user_attrs.get('error', '')}", style="yellow")
    if complete:
        _report(study, command, console)
    if stopped:
        say(console, "stopped; the same command goes on")
        return INTERRUPTED
    return DONE if complete else FAILED


def _report(study: Study, command: Tune, console: Console) -> None:
    from upslope.commands.study import VALUES, importances, shares
    from upslope.report.compare import describe_metric
    from upslope.train.search_space import as_settings
    from upslope.train.storage import write_file_atomically

    complete = study.complete()
    best = complete[0]
    assert best.value is not None
    found = shares(importances(study), [part.name for part in study.plan.space])
    console.print(_table(study, found))
    kept = _for_training(study.plan.settings)
    settings = [*kept, *as_settings(list(best.user_attrs[VALUES].items()))]
    metric, value = study.metric or "", f"{study.sign * best.value:.6g}"
    recipe = study.directory / "best.py"
    text = _BEST.format(
        recipe=_from_anywhere(command.recipe), value=value, metric=metric, number=best.number, settings=settings
    )
    write_file_atomically(recipe, text.encode())
    write_file_atomically(study.directory / "result.json", (json.dumps(_tree(study, found), indent=2) + "\n").encode())
    say(console, "\nthe best settings, at the recipe's own length:")
    say(console, f"  {shlex.join(['upslope', 'train', command.recipe, *settings])}", style="bold")
    say(console, f"  upslope train {recipe}:best")
    say(console, f"figures: {study.directory / 'result.json'}")
    _draw(study, command, found, describe_metric(metric), console)


def _draw(study: Study, command: Tune, found: dict[str, float], metric: str, console: Console) -> None:
    from upslope.report.importance import draw_search

    picture = command.plot or study.directory / "importances.png"
    finished = [(one.number, study.sign * one.value) for one in study.complete() if one.value is not None]
    given_up = [
        (one.number, study.sign * one.intermediate_values[max(one.intermediate_values)])
        for one in study.ended()
        if one.state.name == "PRUNED" and one.intermediate_values
    ]
    try:
        draw_search(
            sorted(finished),
            given_up,
            found,
            picture,
            metric=metric,
            title=command.recipe,
            less_is_better=study.sign < 0.0,
        )
    except ModuleNotFoundError as error:
        if command.plot is not None:
            raise
        say(console, f"no picture: {error}")
    else:
        say(console, f"picture: {picture}")


def _from_anywhere(recipe: str) -> str:
    """The recipe's name; of one in a file, by its absolute path."""
    file, colon, function = recipe.rpartition(":")
    return f"{Path(file).resolve()}{colon}{function}" if colon else recipe


def _for_training(settings: Sequence[str]) -> list[str]:
    """The settings of trials without the length of a trial."""
    kept, skip = list[str](), False
    for word in settings:
        if skip:
            skip = False
        elif word == "--steps":
            skip = True
        elif not word.startswith("--steps="):
            kept.append(word)
    return kept


def _table(study: Study, found: dict[str, float]) -> Table:
    """The best trials, and how much each setting mattered."""
    from upslope.commands.study import VALUES

    names = [part.name for part in study.plan.space]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("trial", justify="right")
    table.add_column(study.metric or "", justify="right", style="bold")
    for name in names:
        table.add_column(name.rpartition(".")[2], justify="right")
    for one in study.complete()[:_SHOWN]:
        assert one.value is not None
        values = one.user_attrs[VALUES]
        table.add_row(str(one.number), f"{study.sign * one.value:,.4g}", *(values[name] for name in names))
    if found:
        table.add_row(
            "", "importance", *(f"{found[name]:.0%}" if name in found else "-" for name in names), style="dim"
        )
    return table


def _tree(study: Study, found: dict[str, float]) -> dict[str, Any]:
    from upslope.commands.study import ERROR, VALUES

    return {
        "metric": study.metric,
        "importances": found,
        "trials": [
            {
                "number": one.number,
                "state": one.state.name.lower(),
                "value": None if one.value is None else study.sign * one.value,
                "settings": one.user_attrs.get(VALUES),
                "evaluations": [study.sign * value for _, value in sorted(one.intermediate_values.items())],
                "error": one.user_attrs.get(ERROR),
            }
            for one in study.ended()
        ],
    }

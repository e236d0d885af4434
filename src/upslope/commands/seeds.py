"""`upslope train RECIPE --seeds 5`: the same recipe from several seeds at once, and what they come to together."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from upslope.commands.common import DONE, FAILED, INTERRUPTED, configured, say
from upslope.errors import UsageError

if TYPE_CHECKING:
    from upslope.report import Comparison
    from upslope.train.many import Ended
    from upslope.train.session import AnyRun

SEED = "{seed}"
"""Stands for the seed in a setting."""
_OPTIONS = ("--seeds", "--jobs")
_SPEAK_EVERY = 30.0
"""Seconds between two lines where nobody looks at a terminal."""
_FIGURES = ("deterministic_mean", "greedy_accuracy", "greedy_score", "pair_accuracy", "nll")


@dataclass(frozen=True, kw_only=True, slots=True)
class Seeds:
    """How many seeds are trained, and how many of them at a time.

    Attributes:
        count: of seeds, from the recipe's own upwards; None where `--seeds` was not given.
        jobs: processes side by side; None for as many as the cores have room for.
    """

    count: int | None
    jobs: int | None


@dataclass(slots=True)
class _Seed:
    """One of the runs."""

    seed: int
    directory: Path | None = None
    state: str = "waiting"
    seconds: float = 0.0
    words: str = ""


def taken_out(settings: Sequence[str]) -> tuple[Seeds, list[str]]:
    """`--seeds` and `--jobs` among the settings of a recipe, and the settings without them.

    Raises:
        UsageError: one of them is not followed by a whole number of at least 1, or jobs is given without seeds.
    """
    numbers: dict[str, int | None] = dict.fromkeys(_OPTIONS)
    left: list[str] = []
    words = iter(settings)
    for word in words:
        option, equals, value = word.partition("=")
        if option not in _OPTIONS:
            left.append(word)
            continue
        given = value if equals else next(words, "")
        if not given.isdecimal() or int(given) < 1:
            raise UsageError(f"{option} is a whole number of at least 1, as in {option} 5; got {given!r}")
        numbers[option] = int(given)
    seeds = Seeds(count=numbers["--seeds"], jobs=numbers["--jobs"])
    if seeds.count is None and seeds.jobs is not None:
        raise UsageError("--jobs says how many seeds train at a time: give --seeds, too (--seeds 5 --jobs 2)")
    return seeds, left


def for_seed(settings: Sequence[str], seed: int) -> list[str]:
    """Settings with the seed in place of `{seed}`."""
    return [word.replace(SEED, str(seed)) for word in settings]


def default_jobs(run: AnyRun) -> int:
    """As many processes as the cores have room for; one where they would share a GPU."""
    from upslope.train.language import LanguageRun
    from upslope.train.many import side_by_side

    return 1 if isinstance(run, LanguageRun) and run.device != "cpu" else side_by_side(run.threads)


def train_seeds(name: str, settings: Sequence[str], seeds: Seeds) -> int:
    """Train a recipe from several seeds, each in a process and a run directory of its own.

    Args:
        name: of the recipe.
        settings: of it, in which `{seed}` stands for the seed.
        seeds: how many, and how many at a time.

    Returns:
        The exit code: 0 if all finished, 1 if one failed, 75 if they were interrupted.
    """
    from upslope.train.many import Pool, heed, stoppable

    assert seeds.count is not None
    run = _first(name, settings)
    table = {str(run.seed + index): _Seed(run.seed + index) for index in range(seeds.count)}
    jobs = min(default_jobs(run) if seeds.jobs is None else seeds.jobs, seeds.count)
    view = _View(run, table, jobs)
    with stoppable() as stop, Pool(jobs) as pool, view:
        waiting = list(table)
        while pool.running or (waiting and not stop.asked):
            while waiting and pool.free and not stop.asked:
                one = table[waiting.pop(0)]
                pool.start(_job(name, settings, run, one))
                view.say(f"seed {one.seed} has begun: {one.directory}")
            heed(pool, stop)
            for ended in pool.ended():
                _note(table[ended.job.name], ended)
                view.say(_ending(table[ended.job.name]))
            view.look()
    return _conclude(name, settings, run, list(table.values()))


def _first(name: str, settings: Sequence[str]) -> AnyRun:
    """The configuration of the first seed; mistakes in the settings are said here, once."""
    _, guess = configured([name, *for_seed(settings, 1)], "train")
    _, run = configured([name, *for_seed(settings, guess.seed)], "train")
    return run


def _job(name: str, settings: Sequence[str], run: AnyRun, one: _Seed) -> Any:
    """The command of one seed, and a directory for it."""
    from upslope.train.many import Job
    from upslope.train.run_directory import RunDirectory, run_name

    wanted = run_name(run.recipe, one.seed) if run.name is None else f"{run.name}-seed{one.seed}"
    with RunDirectory.create_numbered(run.directory, wanted) as made:
        one.directory = run.directory / made.name
    one.state = "running"
    decided = ("--seed", str(one.seed), "--name", one.directory.name)
    return Job(
        name=str(one.seed),
        arguments=("train", name, *for_seed(settings, one.seed), *decided),
        directory=one.directory,
    )


def _note(one: _Seed, ended: Ended) -> None:
    one.seconds = ended.seconds
    if ended.finished:
        one.state = "finished"
    elif ended.asked or ended.code == INTERRUPTED:
        one.state = "stopped"
    else:
        one.state = "failed"
        signal = f"ended by signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
        one.words = ended.last_words() or signal


def _ending(one: _Seed) -> str:
    from upslope.report.conclusion import duration

    said = f": {one.words}" if one.words else ""
    return f"seed {one.seed} has {one.state} after {duration(one.seconds)}{said}"


class _View:
    """What can be seen of the seeds while they train: a table on a terminal, a line now and then elsewhere."""

    def __init__(self, run: AnyRun, table: Mapping[str, _Seed], jobs: int) -> None:
        self._run, self._table, self._jobs = run, table, jobs
        self._console = Console(stderr=True)
        self._watched: dict[Path, Any] = {}
        self._live: Live | None = None
        self._spoken = time.monotonic()

    def __enter__(self) -> _View:
        if self._run.log.progress:
            say(self._console, f"{self._run.recipe}: {len(self._table)} seeds, {self._jobs} at a time")
            if self._console.is_terminal:
                self._live = Live(console=self._console, get_renderable=self._render, auto_refresh=False)
                self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.stop()

    def say(self, text: str) -> None:
        """One line, where lines are printed."""
        if self._run.log.progress and self._live is None:
            say(self._console, text)

    def look(self) -> None:
        """Read what the runs have written, and show it."""
        for one in self._table.values():
            if one.directory is not None:
                self._of(one.directory).new()
        if self._live is not None:
            self._live.refresh()
        elif time.monotonic() - self._spoken >= _SPEAK_EVERY:
            self._spoken = time.monotonic()
            running = [one for one in self._table.values() if one.state == "running"]
            self.say("  ".join(f"seed {one.seed}: {self._share(one):.0%} {self._figure(one)}" for one in running))

    def _of(self, directory: Path) -> Any:
        from upslope.train.many import Watched

        return self._watched.setdefault(directory, Watched(directory / "metrics.jsonl"))

    def _share(self, one: _Seed) -> float:
        if one.state == "finished":
            return 1.0
        return 0.0 if one.directory is None else min(self._of(one.directory).step / self._run.steps, 1.0)

    def _figure(self, one: _Seed) -> str:
        """The newest evaluation, or what training measured last."""
        latest = {} if one.directory is None else self._of(one.directory).latest
        for name in (*_FIGURES, "episode_return", "accuracy", "loss"):
            if isinstance(value := latest.get(name), float | int) and not math.isnan(value):
                return f"{name.replace('_', ' ')} {value:,.3g}"
        return ""

    def _render(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        for one in self._table.values():
            share = self._share(one)
            bar = ProgressBar(total=1.0, completed=share, width=30, complete_style="cyan")
            style = {"failed": "red", "finished": "green"}.get(one.state, "")
            grid.add_row(f"seed {one.seed}", bar, f"{share:4.0%}", Text(one.state, style=style), self._figure(one))
        return grid


def _conclude(name: str, settings: Sequence[str], run: AnyRun, table: Sequence[_Seed]) -> int:
    """Say what the seeds came to together, keep it in a file, and say what is next."""
    console = Console()
    finished = [one for one in table if one.state == "finished"]
    comparison = _compared([one.directory for one in finished if one.directory is not None], console)
    console.print(_outcome(table, comparison))
    if comparison is not None:
        console.print()
        console.print(comparison.table(width=console.width))
    path = _write(name, settings, run, table, comparison)
    say(console, f"\nfigures: {path}")
    if len(finished) > 1:
        places = " ".join(shlex.quote(str(one.directory)) for one in finished)
        say(console, f"curves:  upslope compare {places} --out curves.png")
    stopped = [one for one in table if one.state == "stopped"]
    for one in stopped:
        begun = one.directory is not None and (one.directory / "config.json").is_file()
        command = f"upslope resume {one.directory}" if begun else _again(name, settings, one.seed)
        say(console, f"to go on with seed {one.seed}: {command}")
    if stopped or any(one.state == "waiting" for one in table):
        for one in table:
            if one.state == "waiting":
                say(console, f"never begun, seed {one.seed}: {_again(name, settings, one.seed)}")
        return INTERRUPTED
    return DONE if len(finished) == len(table) else FAILED


def _again(name: str, settings: Sequence[str], seed: int) -> str:
    return shlex.join(["upslope", "train", name, *for_seed(settings, seed), "--seed", str(seed)])


def _compared(directories: Sequence[Path], console: Console) -> Comparison | None:
    """Interquartile mean and interval of the runs that finished; None where there is nothing to take them of."""
    from upslope.report import compare

    if not directories:
        return None
    try:
        return compare(directories)
    except UsageError as error:
        say(console, f"no interquartile mean: {error}", style="yellow")
        return None


def _finals(comparison: Comparison | None) -> dict[int, float]:
    """Seed -> its last value."""
    if comparison is None:
        return {}
    return {
        run.seed: float(final)
        for group in comparison.groups
        for run, final in zip(group.runs, group.final, strict=True)
    }


def _outcome(table: Sequence[_Seed], comparison: Comparison | None) -> Table:
    from upslope.report.conclusion import as_seen_from_here, duration

    finals = _finals(comparison)
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("seed", "", "at the end", "time", "directory"):
        shown.add_column(heading, justify="right" if heading in ("seed", "at the end", "time") else "left")
    for one in table:
        final = f"{finals[one.seed]:,.4g}" if one.seed in finals else "-"
        place = "" if one.directory is None else str(as_seen_from_here(one.directory.resolve()))
        taken = duration(one.seconds) if one.seconds else "-"
        shown.add_row(str(one.seed), one.state, final, taken, Text(f"{place}  {one.words}".strip(), no_wrap=True))
    return shown


def _write(
    name: str, settings: Sequence[str], run: AnyRun, table: Sequence[_Seed], comparison: Comparison | None
) -> Path:
    """The summary as JSON, in the directory of the runs under the first name that is free."""
    from upslope.train.run_directory import run_name
    from upslope.train.storage import write_file_atomically

    finals = _finals(comparison)
    tree = {
        "recipe": name,
        "settings": list(settings),
        "seeds": [
            {
                "seed": one.seed,
                "state": one.state,
                "directory": None if one.directory is None else str(one.directory),
                "seconds": round(one.seconds, 3),
                "final": finals.get(one.seed),
                "said": one.words,
            }
            for one in table
        ],
        "interval": "95 % percentile bootstrap of the interquartile mean; seeds are drawn anew with replacement",
        **({"metric": None, "groups": []} if comparison is None else comparison.tree()),
    }
    stem = (run_name(run.recipe, run.seed).rpartition("-seed")[0] if run.name is None else run.name) + "-seeds"
    path, number = run.directory / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = run.directory / f"{stem}-{number}.json"
    run.directory.mkdir(parents=True, exist_ok=True)
    write_file_atomically(path, (json.dumps(tree, indent=2) + "\n").encode())
    return path

"""`upslope train`: train a recipe, or several one after the other."""

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from upslope.commands.common import DONE, INTERRUPTED, conclude, configured, say
from upslope.commands.seeds import Seeds, taken_out, train_seeds
from upslope.commands.starting import Made, find_start

if TYPE_CHECKING:
    from upslope.train import Result
    from upslope.train.session import AnyRun

_HELP = """usage: upslope train RECIPE [RECIPE ...] [--setting value ...]

Train a recipe: a name from `upslope recipes`, or path/to/file.py:function for a function of yours that returns an
upslope.Run or an upslope.LanguageRun. Settings are the fields of the recipe's configuration:

  upslope train cartpole-ppo
  upslope train cartpole-ppo --algorithm.clip 0.1 --seed 3 --steps 1e6
  upslope train arithmetic-grpo --steps 200 --experience.group 16
  upslope train my_recipe.py:hopper --name first-try

A recipe may start from what another recipe made (start_from): its newest finished result with the same seed is taken,
and where there is none that recipe is trained first; --start-from PATH takes a policy folder or a run directory.
Several recipes are trained one after the other, with the same settings, and end in one table.

Several seeds train side by side, each in a process of its own, and end in an interquartile mean with its interval:

  upslope train cartpole-ppo --seeds 5
  upslope train cartpole-ppo --seeds 5 --jobs 2 --start-from "runs/mine-seed{seed}"

`upslope train RECIPE --help` shows every setting of that recipe and what it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trained:
    """A run that has come to its end, or to a signal.

    Attributes:
        run: its configuration.
        result: of the training.
        seconds: it took, without what had to be trained before.
        code: for the shell.
    """

    run: AnyRun
    result: Result[Any, Any]
    seconds: float
    code: int


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(_HELP)
        return DONE
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    seeds, settings = taken_out(arguments[len(names) :])
    if seeds.count is not None and not {"-h", "--help"} & set(settings):
        return _seeds(names, settings, seeds)
    runs = [configured([name, *settings], "train") for name in names] or [configured(arguments, "train")]
    trained: list[_Trained] = []
    for name, run in runs:
        made: list[_Trained] = []
        one = _train(name, run, settings, made)
        trained += [*made, one]
        if one.code != DONE:
            return one.code
    if len(runs) > 1:
        from upslope.report.summary import RunInWords, summary

        rows = [RunInWords.of(one.run, one.result.directory, one.seconds) for one in trained]
        console = Console()
        console.print()
        console.print(summary(rows, wide=console.width >= 120))
    return DONE


def _seeds(names: Sequence[str], settings: Sequence[str], seeds: Seeds) -> int:
    """Several seeds of each recipe; a recipe of which a seed failed does not keep the next one from being trained."""
    if not names:
        configured(settings, "train")
    codes: list[int] = []
    for name in names:
        codes.append(train_seeds(name, settings, seeds))
        if codes[-1] == INTERRUPTED:
            break
    return max(codes)


def _train(name: str, run: AnyRun, settings: Sequence[str], made: list[_Trained]) -> _Trained:
    from upslope.train import train

    start = _start(run, made)
    begun = time.monotonic()
    result = train(run, start=start)
    seconds = time.monotonic() - begun
    another = _another_seed(name, settings, run.seed + 1)
    code = conclude(result, run, seconds, recipe=name, steps=None, resumed=False, another=another)
    return _Trained(run=run, result=result, seconds=seconds, code=code)


def _start(run: AnyRun, made: list[_Trained]) -> Path | None:
    """The folder a run begins with; what has to be trained before is concluded first."""
    from upslope.train.language import LanguageRun

    if isinstance(run, LanguageRun):
        from upslope.policies.language.library import require_language

        require_language()

    def concluded(first: Made) -> None:
        code = conclude(
            first.result, first.run, first.seconds, recipe=None, steps=None, resumed=first.resumed, another=None
        )
        if code == INTERRUPTED:
            raise SystemExit(code)
        Console().print()
        made.append(_Trained(run=first.run, result=first.result, seconds=first.seconds, code=code))

    console = Console(stderr=True)
    return find_start(run, tell=lambda text: say(console, text), conclude=concluded)


def _another_seed(recipe: str, settings: Sequence[str], seed: int) -> str | None:
    """The same with another seed; None where the run's own name or seed is among the settings."""
    if any(word.startswith(("--seed", "--name")) for word in settings):
        return None
    return shlex.join(["upslope", "train", recipe, *settings, "--seed", str(seed)])

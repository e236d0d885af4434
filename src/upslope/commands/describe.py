"""`upslope describe`: the exact estimator and every setting of a recipe, a run or an algorithm; or how two differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from upslope.commands.common import DONE, Nothing, configured, say
from upslope.commands.named import algorithm_named
from upslope.errors import UsageError, checking_usage
from upslope.options import parse, parse_over

_HELP = """usage: upslope describe RECIPE|ALGORITHM [--setting value ...]
       upslope describe RUN
       upslope describe A [--setting value ...] --against B [--setting value ...]

Show the exact estimator and every resolved setting of a recipe, of a run directory, or of an algorithm by its name;
what differs from its default is highlighted. With --against: only where the estimators of the two differ, side by side.

  upslope describe arithmetic-grpo
  upslope describe runs/arithmetic-grpo-seed1
  upslope describe grpo-trl --against grpo-verl
  upslope describe arithmetic-grpo --against trl    (likewise verl, openrlhf, nemo_rl, prime_rl)
  upslope describe grpo --scale none --against rloo"""

_AGAINST = "--against"
_ABSENT = ("none", "never")
"""What a row says of a part that an estimator does not have."""
_PEERS = ("trl", "verl", "openrlhf", "nemo-rl", "prime-rl")
"""Libraries whose GRPO the recipe `grpo-NAME` is: their names alone will do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Described:
    """What is shown.

    Attributes:
        name: as it was asked for.
        place: what it learns in, with the word before it; empty for an algorithm alone.
        estimator: in words.
        tree: all settings.
        defaults: of those that have one, by dotted name.
    """

    name: str
    place: str
    estimator: Mapping[str, str]
    tree: Mapping[str, Any]
    defaults: Mapping[str, Any]


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(_HELP)
        return DONE
    if _AGAINST in arguments:
        place = list(arguments).index(_AGAINST)
        return _differences(arguments[:place], arguments[place + 1 :])
    from upslope.report.terminal import estimator_table, settings_table

    found = _described(arguments)
    console = Console()
    console.print(Text.assemble((found.name, "bold cyan"), found.place))
    console.print()
    console.print(estimator_table(found.estimator))
    console.print()
    console.print(settings_table(found.tree, found.defaults))
    return DONE


def _differences(first: Sequence[str], second: Sequence[str]) -> int:
    from upslope.report.terminal import differences_table

    if not first or not second or _AGAINST in second:
        raise UsageError(f"two are held against each other: upslope describe A {_AGAINST} B")
    one, other = _described(first), _described(second)
    differing = {
        row: (one.estimator.get(row), other.estimator.get(row))
        for row in dict.fromkeys([*one.estimator, *other.estimator])
        if _in_effect(one.estimator.get(row)) != _in_effect(other.estimator.get(row))
    }
    console = Console()
    names = (one.name, other.name) if one.name != other.name else (" ".join(first), " ".join(second))
    if not differing:
        say(console, f"{names[0]} and {names[1]} have the same estimator: {len(one.estimator)} rows are equal")
        return DONE
    console.print(differences_table(differing, names))
    equal = len(set(one.estimator) | set(other.estimator)) - len(differing)
    say(console, f"{equal} other {'row is' if equal == 1 else 'rows are'} equal", style="dim")
    return DONE


def _in_effect(text: str | None) -> str | None:
    """A row of an estimator; None where it says that there is none of it, as where there is no such row."""
    return None if text in _ABSENT else text


def _described(arguments: Sequence[str]) -> _Described:
    """A run directory, an algorithm, a library's GRPO or a recipe, whichever has that name first."""
    if arguments and Path(arguments[0]).is_dir() and _peer(arguments[0]) == arguments[0]:
        return _of_run(Path(arguments[0]), arguments[1:])
    if arguments and algorithm_named(arguments[0]) is not None:
        return _of_algorithm(arguments[0], arguments[1:])
    from upslope.report.conclusion import world
    from upslope.report.terminal import default_settings
    from upslope.train.config_file import config_to_tree
    from upslope.train.describe import describe_run

    name, run = configured([*map(_peer, arguments[:1]), *arguments[1:]], "describe")
    return _Described(
        name=name if ":" in name else run.recipe,
        place=f" on {world(run)}",
        estimator=describe_run(run),
        tree=config_to_tree(run),
        defaults=default_settings(run),
    )


def _peer(name: str) -> str:
    """The recipe of a library's GRPO by the library's name; any other name as it is."""
    plain = name.lower().replace("_", "-")
    return f"grpo-{plain}" if plain in _PEERS else name


def _of_run(directory: Path, rest: Sequence[str]) -> _Described:
    from upslope.train.config_file import recorded_estimator, recorded_run

    parse(Nothing, rest, program=f"upslope describe {directory}")
    tree = recorded_run(directory)
    place = tree["environment"]["id"] if "environment" in tree else tree["task"]["class"]
    return _Described(
        name=tree["recipe"],
        place=f" on {place}, in {directory}",
        estimator=recorded_estimator(directory),
        tree=tree,
        defaults=_recorded_defaults(directory),
    )


def _of_algorithm(name: str, settings: Sequence[str]) -> _Described:
    from upslope.report.terminal import default_settings
    from upslope.train.config_file import config_to_tree

    kind = algorithm_named(name)
    assert kind is not None
    with checking_usage():
        algorithm = parse_over(
            kind(), settings, program=f"upslope describe {name}", description="Settings of the algorithm."
        )
    return _Described(
        name=type(algorithm).__name__,
        place="",
        estimator=algorithm.describe(),
        tree=config_to_tree(algorithm),
        defaults=default_settings(algorithm),
    )


def _recorded_defaults(directory: Path) -> dict[str, Any]:
    """The defaults of a run's classes, where all of them are ours."""
    from upslope.report.terminal import default_settings
    from upslope.train.config_file import ConfigError, read_run

    try:
        return default_settings(read_run(directory))
    except ConfigError:
        return {}

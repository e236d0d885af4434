"""Tables for a terminal: what a run is, and how its policy does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from upslope.train import EvaluationReport, Run
from upslope.train.language import LanguageRun
from upslope.train.session import AnyRun


def recipes_table(recipes: Sequence[tuple[str, AnyRun, str]], *, wide: bool) -> RenderableType:
    """Names, configurations and descriptions of recipes, agents first and language models below.

    Args:
        recipes: name, configuration and description of each.
        wide: descriptions stand beside the rest, not on lines of their own.
    """
    agents = [
        ((name, run.environment.id, type(run.algorithm).__name__, f"{run.steps:,}"), text)
        for name, run, text in recipes
        if isinstance(run, Run)
    ]
    models = [
        ((name, _begins(run), type(run.algorithm).__name__, f"{run.steps:,}"), text)
        for name, run, text in recipes
        if isinstance(run, LanguageRun)
    ]
    return Group(
        *_section("environments", ("recipe", "environment", "algorithm", "steps"), agents, wide=wide),
        Text(""),
        *_section("language", ("recipe", "task", "algorithm", "updates"), models, wide=wide),
    )


def _section(
    title: str, headings: tuple[str, ...], recipes: Sequence[tuple[tuple[str, ...], str]], *, wide: bool
) -> list[RenderableType]:
    lines: list[RenderableType] = [Text(title, style="bold")]
    if not wide:
        for (name, *rest), description in recipes:
            settings = ", ".join([*rest[:-1], f"{rest[-1]} {headings[-1]}"])
            lines.append(Text.assemble((name, "bold cyan"), "  ", settings))
            lines.append(Padding(Text(description, style="dim"), (0, 0, 0, 2)))
        return lines
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in headings:
        style = "cyan" if heading == "recipe" else ""
        table.add_column(heading, style=style, justify="right" if heading == headings[-1] else "left", no_wrap=True)
    table.add_column("what it is")
    for row, description in recipes:
        table.add_row(*map(Text, row), Text(description))
    return [*lines, table]


def _begins(run: LanguageRun) -> str:
    """The task, and the policy that a run begins with."""
    start = run.start_from or run.model.source
    return type(run.task).__name__ + ("" if start is None else f" from {start}")


def evaluation_table(report: EvaluationReport) -> Table:
    """Returns and lengths of an evaluation, one row per way to act; the mean with its standard error."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("acting by")
    averages = ("average reward",) if report.endless else ()
    for heading in ("mean return", "spread", "worst", "best", "mean length", "episodes", *averages):
        table.add_column(heading, justify="right")
    for way, returns, lengths in (
        ("most likely actions", report.deterministic_returns, report.deterministic_lengths),
        ("sampled actions", report.stochastic_returns, report.stochastic_lengths),
    ):
        table.add_row(
            way,
            Text(mean_and_error(returns), style="bold"),
            f"{returns.std():,.1f}",
            f"{returns.min():,.1f}",
            f"{returns.max():,.1f}",
            f"{lengths.mean():,.1f}",
            str(len(returns)),
            *(f"{returns.sum() / lengths.sum():,.4g}" for _ in averages),
        )
    return table


def mean_and_error(values: np.ndarray) -> str:
    """`483.2 ± 4.1`: the mean and its standard error; the mean alone of a single value."""
    if len(values) < 2:
        return f"{values.mean():,.1f}"
    return f"{values.mean():,.1f} ± {values.std(ddof=1) / math.sqrt(len(values)):,.1f}"


def estimator_table(estimator: Mapping[str, str]) -> Table:
    """What `describe()` of an algorithm says."""
    table = Table(box=None, pad_edge=False, show_header=False, title="estimator", title_justify="left")
    table.title_style = "bold"
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in estimator.items():
        table.add_row(name, Text(text))
    return table


def settings_table(tree: Mapping[str, Any], defaults: Mapping[str, Any]) -> Table:
    """Every setting of a configuration; what differs from its default is bold, the default beside it.

    Args:
        tree: as `config_to_tree` makes it and `config.json` keeps it.
        defaults: dotted names to default values, as `default_settings` gives them; names may be missing.
    """
    table = Table(box=None, pad_edge=False, header_style="dim", title="settings", title_justify="left")
    table.title_style = "bold"
    table.add_column("name", no_wrap=True)
    table.add_column("value")
    table.add_column("default", style="dim")
    for name, value in _rows(tree):
        changed = name in defaults and defaults[name] != value
        style = "bold yellow" if changed else ""
        default = written(defaults[name]) if changed else ""
        table.add_row(Text(name, style=style), Text(written(value), style=style), Text(default))
    return table


def default_settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """The defaults of the classes a configuration is made of, by dotted name and as they stand in its tree."""
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            defaults.update(default_settings(value, f"{prefix}{field.name}."))
        elif field.default is not dataclasses.MISSING:
            defaults[f"{prefix}{field.name}"] = _as_in_tree(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            defaults[f"{prefix}{field.name}"] = _as_in_tree(field.default_factory())
    return defaults


def written(value: Any) -> str:
    """A value as one would write it on the command line."""
    if value is None:
        return "None"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:_}"
    if isinstance(value, list):
        return " ".join(written(item) for item in value) or "()"
    if isinstance(value, Mapping):
        return " ".join(f"{name} {written(item)}" for name, item in value.items()) or "{}"
    return str(value)


def _rows(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Plain settings first, then the nested ones; of the classes only the algorithm's, which alone is a choice."""
    nested = {name: value for name, value in tree.items() if isinstance(value, Mapping) and "class" in value}
    for name, value in tree.items():
        if name not in nested and name != "class":
            yield f"{prefix}{name}", value
    for name, value in nested.items():
        if name == "algorithm":
            yield f"{prefix}{name}", value["class"]
        yield from _rows(value, f"{prefix}{name}.")


def _as_in_tree(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_as_in_tree(item) for item in value]
    return value if isinstance(value, bool | int | float | str | Mapping | None) else str(value)


def differences_table(differing: Mapping[str, tuple[str | None, str | None]], names: tuple[str, str]) -> Table:
    """The rows in which two estimators differ, side by side; "-" where one has no such row."""
    table = Table(box=None, pad_edge=False, header_style="bold cyan", padding=(0, 2, 1, 0))
    table.add_column("", style="dim", no_wrap=True)
    for name in names:
        table.add_column(Text(name), ratio=1)
    for row, texts in differing.items():
        table.add_row(row, *(Text("-" if text is None else text) for text in texts))
    return table

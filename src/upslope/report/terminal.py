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


def recipes_table(recipes: Sequence[tuple[str, Run, str]], *, wide: bool) -> RenderableType:
    """Names, configurations and descriptions of recipes; where it is not `wide`, descriptions on lines of their own."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("recipe", style="cyan", no_wrap=True)
    table.add_column("environment", no_wrap=True)
    table.add_column("algorithm", no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    rows = [(name, run.environment.id, type(run.algorithm).__name__, f"{run.steps:,}") for name, run, _ in recipes]
    if wide:
        table.add_column("what it is")
        for row, (_, _, description) in zip(rows, recipes, strict=True):
            table.add_row(*row, description)
        return table
    lines: list[RenderableType] = []
    for (name, *rest), (_, _, description) in zip(rows, recipes, strict=True):
        lines.append(Text.assemble((name, "bold cyan"), "  ", ", ".join([*rest[:-1], f"{rest[-1]} steps"])))
        lines.append(Padding(Text(description, style="dim"), (0, 0, 0, 2)))
    return Group(*lines)


def evaluation_table(report: EvaluationReport) -> Table:
    """Returns and lengths of an evaluation, one row per way to act; the mean with its standard error."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("acting by")
    for heading in ("mean return", "spread", "worst", "best", "mean length", "episodes"):
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

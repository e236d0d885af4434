"""Configurations as files: plain JSON in, the same frozen dataclasses out, and no code run on the way.

Only the dataclasses that a `Run` or a `LanguageRun` is made of can be named in a file. A run whose recipe uses classes
of the user's own is resumed with that recipe given again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upslope.collect import EnvironmentConfig
from upslope.train.config import EvaluationConfig, Run
from upslope.train.language.config import LanguageRun
from upslope.typed_tree import TreeError, UnknownClassError, read_value


class ConfigError(ValueError):
    """A configuration that cannot be read, with what to do."""


def config_to_tree(config: Any) -> dict[str, Any]:
    """A frozen dataclass as nested plain values; each dataclass carries its class name under "class"."""
    return {
        "class": type(config).__name__,
        **{field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)},
    }


def run_from_tree(tree: Any) -> Run | LanguageRun:
    """The inverse of `config_to_tree` for a run of either kind, which the class recorded in it tells.

    Raises:
        ConfigError: naming the field that is unknown, missing or of the wrong type.
    """
    speaks = isinstance(tree, Mapping) and tree.get("class") == LanguageRun.__name__
    return _read(LanguageRun if speaks else Run, tree, "run")


def read_run(directory: Path) -> Run | LanguageRun:
    """The configuration of a run directory.

    Raises:
        ConfigError: if there is no readable configuration, or it needs classes of the user's own.
    """
    return run_from_tree(recorded_run(directory))


def read_evaluation(directory: Path) -> tuple[EnvironmentConfig, EvaluationConfig]:
    """Where and how the policy of a run directory is judged; enough for that, whoever's algorithm trained it.

    Raises:
        ConfigError: if there is no readable configuration.
    """
    tree = recorded_run(directory)
    parts = tree.get("environment"), tree.get("evaluation")
    return _read(EnvironmentConfig, parts[0], "environment"), _read(EvaluationConfig, parts[1], "evaluation")


def recorded_run(directory: Path) -> dict[str, Any]:
    """The configuration of a run directory as plain nested values.

    Raises:
        ConfigError: if there is none that can be read.
    """
    return _record(directory)["run"]


def recorded_estimator(directory: Path) -> dict[str, str]:
    """The estimator of a run directory in words.

    Raises:
        ConfigError: if there is none that can be read.
    """
    record = _record(directory)
    return _read(dict[str, str], record.get("estimator"), "estimator")


def recorded_frozen(directory: Path) -> dict[str, str]:
    """The content hashes of the frozen policies of a language model's run, by name.

    Raises:
        ConfigError: if there is none that can be read.
    """
    record = _record(directory)
    return _read(dict[str, str], record.get("frozen"), "frozen")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configuration trees differ, by dotted name."""
    before, after = _flat(old), _flat(new)
    names = [*before, *(name for name in after if name not in before)]
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _record(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        tree = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{directory} is no run directory: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict) or "run" not in tree:
        raise ConfigError(f"{path} holds no run configuration")
    if not isinstance(tree["run"], dict):
        raise ConfigError(f"{path}: run must be the settings of a Run, got {tree['run']!r}")
    return tree


def _read(expected: Any, value: Any, where: str) -> Any:
    try:
        return read_value(expected, value, where)
    except UnknownClassError as error:
        raise ConfigError(
            f"{error}; give the recipe that made the run again: upslope resume RUN --recipe path/to/recipe.py:function"
        ) from error
    except TreeError as error:
        raise ConfigError(str(error)) from error


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_tree(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"a configuration holds plain values, got {type(value).__name__}: {value!r}")

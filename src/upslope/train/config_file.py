"""Configurations as files: plain JSON in, the same frozen dataclasses out, and no code run on the way.

Only the dataclasses that a `Run` is made of can be named in a file. A run whose recipe uses classes of the user's
own is resumed with that recipe given again.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from upslope.collect import EnvironmentConfig
from upslope.train.config import EvaluationConfig, Run


class ConfigError(ValueError):
    """A configuration that cannot be read, with what to do."""


def config_to_tree(config: Any) -> dict[str, Any]:
    """A frozen dataclass as nested plain values; each dataclass carries its class name under "class"."""
    return {
        "class": type(config).__name__,
        **{field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)},
    }


def run_from_tree(tree: Mapping[str, Any]) -> Run:
    """The inverse of `config_to_tree` for a `Run`.

    Raises:
        ConfigError: naming the field that is unknown, missing or of the wrong type.
    """
    return _value(Run, tree, "run")


def read_run(directory: Path) -> Run:
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
    return _value(EnvironmentConfig, parts[0], "environment"), _value(EvaluationConfig, parts[1], "evaluation")


def recorded_run(directory: Path) -> dict[str, Any]:
    """The configuration of a run directory as plain nested values.

    Raises:
        ConfigError: if there is none that can be read.
    """
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
    return tree["run"]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configuration trees differ, by dotted name."""
    before, after = _flat(old), _flat(new)
    names = [*before, *(name for name in after if name not in before)]
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


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


def _value(expected: Any, value: Any, where: str) -> Any:
    """Check a plain value against a type and give back what the dataclass wants."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, where)
    if dataclasses.is_dataclass(expected):
        return _dataclass(expected, value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(arguments) != len(value):
            raise ConfigError(f"{where} must have {len(arguments)} entries, got {len(value)}")
        pairs = zip(arguments, value, strict=True)
        return tuple(_value(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a mapping, got {value!r}")
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if expected is Any:
        return value
    if expected is Path and isinstance(value, str):
        return Path(value)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{where} is too large a number") from None
    if expected is type(None) and value is None:
        return None
    if type(value) is expected:
        return value
    raise ConfigError(f"{where} must be {getattr(expected, '__name__', expected)}, got {value!r}")


def _one_of(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if isinstance(value, dict) and "class" in value:
        for choice in choices:
            if isinstance(choice, type) and choice.__name__ == value["class"]:
                return _dataclass(choice, value, where)
        raise ConfigError(
            f"{where} is a {value['class']}, which is not one of upslope's own classes; give the recipe that made the "
            "run again: upslope resume RUN --recipe path/to/recipe.py:function"
        )
    reasons: list[str] = []
    for choice in choices:
        try:
            return _value(choice, value, where)
        except ConfigError as error:
            reasons.append(str(error))
    raise ConfigError(reasons[0])


def _dataclass(kind: Any, tree: Any, where: str) -> Any:
    if not isinstance(tree, dict) or tree.get("class") != kind.__name__:
        raise ConfigError(f"{where} must be the settings of a {kind.__name__}, got {tree!r}")
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    given = set(tree) - {"class"}
    if given != names:
        unknown, missing = sorted(given - names), sorted(names - given)
        raise ConfigError(
            f"{where}: unknown settings {unknown}, missing settings {missing}; was it made by another version?"
        )
    try:
        return kind(**{name: _value(hints[name], tree[name], f"{where}.{name}") for name in names})
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error

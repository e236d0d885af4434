"""Plain trees (what a JSON file holds) read as the types they are said to be: checked, named, and no code run.

A file may be damaged, edited or written by somebody else. What is read here has exactly the type that was asked for, or
there is a `TreeError` that names the place.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


class TreeError(ValueError):
    """A tree that is not what it should be; the text names the place."""


class UnknownClassError(TreeError):
    """A tree of a class that is none of those expected at its place."""


def read_value(expected: Any, value: Any, where: str) -> Any:
    """A plain value as the type `expected`.

    Args:
        expected: a plain type, `Any`, a `Literal`, a union, a tuple, a dict, a `Path` or a dataclass of these. Lists
            stand for tuples, integers for floats, and a dataclass is a mapping that carries its name under "class".
        value: a tree of None, booleans, numbers, texts, lists (or tuples) and dicts.
        where: its name, for the error.

    Raises:
        TreeError: naming the place that is unknown, missing or of the wrong type.
    """
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return _read_one_of(arguments, value, where)
    if dataclasses.is_dataclass(expected):
        return _read_dataclass(expected, value, where)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
        raise TreeError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise TreeError(f"{where} must be a mapping, got {value!r}")
        return {key: read_value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if expected is Any:
        return value
    if expected is Path and isinstance(value, str):
        return Path(value)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise TreeError(f"{where} is too large a number") from None
    if expected is type(None) and value is None:
        return None
    if type(value) is expected:
        return value
    raise TreeError(f"{where} must be {getattr(expected, '__name__', expected)}, got {value!r}")


def read_fields(kind: Any, tree: Mapping[str, Any], where: str) -> Any:
    """The dataclass `kind` from a mapping of all its fields, and of nothing else.

    Raises:
        TreeError: naming the field that is unknown, missing or of the wrong type, or what the dataclass itself says.
    """
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    given = set(tree)
    if given != names:
        unknown, missing = sorted(given - names, key=str), sorted(names - given)
        raise TreeError(
            f"{where}: unknown settings {unknown}, missing settings {missing}; was it made by another version?"
        )
    try:
        return kind(**{name: read_value(hints[name], tree[name], f"{where}.{name}") for name in names})
    except TreeError:
        raise
    except ValueError as error:
        raise TreeError(f"{where}: {error}") from error


def _read_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TreeError(f"{where} must be a list, got {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(read_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(arguments) != len(value):
        raise TreeError(f"{where} must have {len(arguments)} entries, got {len(value)}")
    pairs = zip(arguments, value, strict=True)
    return tuple(read_value(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))


def _read_one_of(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if isinstance(value, dict) and "class" in value:
        for choice in choices:
            if isinstance(choice, type) and choice.__name__ == value["class"]:
                return _read_dataclass(choice, value, where)
        raise UnknownClassError(f"{where} is a {value['class']}, which is not one of upslope's own classes")
    reasons: list[str] = []
    for choice in choices:
        try:
            return read_value(choice, value, where)
        except TreeError as error:
            reasons.append(str(error))
    raise TreeError(reasons[0])


def _read_dataclass(kind: Any, tree: Any, where: str) -> Any:
    if not isinstance(tree, dict) or tree.get("class") != kind.__name__:
        raise TreeError(f"{where} must be the settings of a {kind.__name__}, got {tree!r}")
    return read_fields(kind, {name: value for name, value in tree.items() if name != "class"}, where)

"""Plain trees as typed values: what fits comes back with its type, and what does not is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from upslope.typed_tree import TreeError, UnknownClassError, read_fields, read_value


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError("size must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner | None
    pair: tuple[float, float] | None
    many: tuple[int, ...]
    kind: Literal["a", "b"]
    place: Path
    extra: dict[str, int | str]


PLAIN: dict[str, Any] = {
    "name": "x",
    "inner": {"class": "Inner", "size": 2},
    "pair": [1, 2.5],
    "many": (3, 4),
    "kind": "b",
    "place": "runs/x",
    "extra": {"k": 1, "l": "m"},
}


def test_what_fits_is_read() -> None:
    outer = read_fields(Outer, PLAIN, "outer")
    assert outer == Outer(
        name="x",
        inner=Inner(size=2),
        pair=(1.0, 2.5),
        many=(3, 4),
        kind="b",
        place=Path("runs/x"),
        extra={"k": 1, "l": "m"},
    )
    assert type(outer.pair[0]) is float
    assert read_value(Outer, {"class": "Outer", **PLAIN}, "outer") == outer


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("name", 3, "outer.name must be str, got 3"),
        ("inner", {"class": "Inner", "size": True}, "outer.inner.size must be int, got True"),
        ("inner", {"class": "Inner", "size": 0}, "outer.inner: size must be at least 1"),
        ("pair", [1], "outer.pair must have 2 entries, got 1"),
        ("pair", [1, "2"], r"outer.pair\[1\] must be float, got '2'"),
        ("many", "abc", "outer.many must be a list, got 'abc'"),
        ("kind", "c", "outer.kind must be one of 'a', 'b', got 'c'"),
        ("kind", ["a"], "outer.kind must be one of 'a', 'b', got"),
        ("extra", [], "outer.extra must be a mapping"),
        (7, 1, r"unknown settings \[7\], missing settings \[\]"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: object, said: str) -> None:
    with pytest.raises(TreeError, match=said):
        read_fields(Outer, {**PLAIN, name: value}, "outer")


@pytest.mark.parametrize(("value", "choices"), [(1, Literal[True]), (True, Literal[1]), (1.0, Literal[1])])
def test_a_choice_has_the_type_it_is_said_to_have(value: object, choices: Any) -> None:
    with pytest.raises(TreeError, match="must be one of"):
        read_value(choices, value, "x")


def test_a_class_that_is_not_expected_has_an_error_of_its_own() -> None:
    with pytest.raises(UnknownClassError, match=r"outer.inner is a Other, which is not one of upslope's own classes"):
        read_fields(Outer, {**PLAIN, "inner": {"class": "Other"}}, "outer")

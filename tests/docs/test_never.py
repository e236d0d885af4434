"""The page of what must never happen names tests that exist, and each of its rows names one."""

from __future__ import annotations

import re

from pages import ROOT

PAGE = (ROOT / "docs" / "never.md").read_text("utf-8")


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text("utf-8"), f"{file}::{test}"


def test_every_failure_has_one() -> None:
    rows = [line for line in PAGE.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(line.split("|")[1]) for line in rows] == list(range(1, 16))
    assert all("::test_" in line for line in rows)

"""The list of identities names tests that exist, in the files it names, and leaves none out."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_the_list_of_identities_is_that_of_the_tests() -> None:
    written: set[tuple[str, str]] = set()
    for line in (HERE / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3:
            written |= {(name, cells[2]) for name in re.findall(r"`(test_\w+)`", cells[1])}
    found = {
        (name, path.stem.removeprefix("test_").removesuffix("_identities"))
        for path in HERE.glob("test_*_identities.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert written == found

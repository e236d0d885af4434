"""The documentation as data: pages, their fenced blocks, links and headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: its language, its lines, and the number of its first line in the page."""

    language: str
    lines: tuple[str, ...]
    first_line: int

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)

    @property
    def is_session(self) -> bool:
        """Whether this is an interpreter session with its answers."""
        return self.language == "python" and self.text.lstrip().startswith(">>>")


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    language: str | None = None
    lines: list[str] = []
    start = 0
    for number, line in enumerate(page.read_text("utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, lines, start = line.removeprefix("```").strip(), [], number + 1
        else:
            found.append(Block(language=language, lines=tuple(lines), first_line=start))
            language = None
    assert language is None, f"{page}: the block before line {start} is never closed"
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#{1,6} (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", "-") for heading in headings}


def shell_commands(page: Path) -> list[str]:
    """Commands in bash blocks, and those after a prompt in console blocks; continued lines are joined."""
    commands: list[str] = []
    for block in blocks(page):
        text = block.text.replace("\\\n", " ")
        if block.language == "bash":
            commands += [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
        elif block.language == "console":
            commands += [
                line.removeprefix("$ ").removesuffix(" &") for line in text.splitlines() if line.startswith("$ ")
            ]
    return commands

"""What the documentation shows works: code runs, answers are true, commands exist, links lead somewhere."""

from __future__ import annotations

import doctest
import re
import runpy
import shlex
from pathlib import Path

import pytest
from pages import PAGES, ROOT, anchors, blocks, links, shell_commands

CODE_PAGES = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


def name(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", CODE_PAGES, ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page share one namespace; interpreter sessions come after all plain blocks."""
    script = tmp_path / f"{page.stem}.py"
    lines: list[str] = []
    for block in blocks(page):
        if block.language == "python" and not block.is_session:
            lines += [""] * (block.first_line - 1 - len(lines)) + list(block.lines)
    script.write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    namespace = runpy.run_path(str(script), run_name=f"docs_{page.stem}")
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    for block in blocks(page):
        if block.is_session:
            session = parser.get_doctest(block.text, namespace, page.stem, str(page), block.first_line - 1)
            runner.run(session, clear_globs=False)
            namespace = session.globs
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {target.name} has no heading {anchor!r}"


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in links(index)}
    assert set((ROOT / "docs").glob("*.md")) - {index} <= linked


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_commands_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+)\s*[?:]=", makefile, flags=re.MULTILINE))
    for command in shell_commands(page):
        words = shlex.split(command, comments=True)
        if words[:1] == ["make"]:
            for word in words[1:]:
                variable, equals, _ = word.partition("=")
                assert (variable in variables) if equals else (word in targets), f"{page.name}: {command}"

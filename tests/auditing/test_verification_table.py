"""The verification table: every row as declared, and as it stands in the documentation.

`upslope audit --all --write docs/verification-table.md` writes it anew.
"""

import re
from pathlib import Path

import pytest

import upslope.estimators as estimators
from upslope.auditing.table import all_cases, cells, exported, markdown, measure

PAGE = Path(__file__).parents[2] / "docs" / "verification-table.md"
CASES = list(all_cases())


def documented() -> dict[tuple[str, str, str], list[str]]:
    """The cells of each row of the page, by subject, setting and problem."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    subject = ""
    for line in PAGE.read_text("utf-8").splitlines():
        if line.startswith("### "):
            subject = line.removeprefix("### `").removesuffix("`")
        elif line.startswith(("| ✓", "| ✗")):
            found = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows[subject, found[1], found[2]] = found
    return rows


DOCUMENTED = documented()


def alike(one: str, other: str) -> bool:
    """Equal, or numbers that differ in the last of their two digits at most."""
    if one == other:
        return True
    try:
        return float(one) == pytest.approx(float(other), rel=0.12, abs=1e-3)
    except ValueError:
        return False


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.subject}-{case.setting}")
def test_every_row_is_as_declared_and_as_documented(case):
    row = measure(case)
    assert row.report.declared is not None
    assert bool(row.report.reason) == (row.report.declared == "biased")
    assert row.report.as_declared, str(row.report)
    if case.subject in estimators.__all__:
        assert row.report.moments.exact
    found = cells(row)
    page = DOCUMENTED[case.subject, case.setting, row.report.problem]
    assert found[:6] == tuple(page[:6])
    if row.report.moments.exact:
        assert all(alike(one, other) for one, other in zip(found[6:], page[6:], strict=True)), (found, page)


def test_the_page_has_no_other_rows_and_none_twice():
    assert len({(case.subject, case.setting) for case in CASES}) <= len(DOCUMENTED) == len(CASES)


def test_every_exported_estimator_and_algorithm_has_a_row():
    assert {case.subject for case in CASES} >= exported()
    assert {"gae", "leave_one_out", "PPO", "Reinforce", "A2C", "OneStepActorCritic"} <= exported()


def test_every_exported_estimator_has_a_row_that_is_unbiased():
    unbiased = {subject for (subject, _, _), row in DOCUMENTED.items() if row[4] == "unbiased"}
    assert unbiased >= set(estimators.__all__)


def test_a_subject_without_a_row_would_be_noticed(monkeypatch):
    monkeypatch.setattr(estimators, "__all__", [*estimators.__all__, "a_new_one"])
    assert not {case.subject for case in CASES} >= exported()


def test_bars_in_a_cell_do_not_break_the_table():
    first = measure(CASES[0])
    line = markdown([first]).splitlines()[-1]
    assert len(re.split(r"(?<!\\)\|", line)) == 12

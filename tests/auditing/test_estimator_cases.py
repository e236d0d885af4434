"""Every row of the estimators is as declared, and every exported estimator has rows that could fail."""

from __future__ import annotations

from functools import cache

import pytest

import upslope.estimators as estimators
from upslope.auditing import AuditReport
from upslope.auditing.cases import advantages, curvature, divergences, objectives, preference, reductions, returns
from upslope.auditing.cases.case import Case

_ROOMS = (returns, advantages, objectives, divergences, reductions, preference, curvature)
_CASES = [case for room in _ROOMS for case in room.cases()]


@cache
def _measured(number: int) -> AuditReport:
    return _CASES[number].run()


def _name(case: Case) -> str:
    return f"{case.subject}: {case.setting}"


@pytest.mark.parametrize("number", range(len(_CASES)), ids=[_name(case) for case in _CASES])
def test_a_row_is_as_declared(number: int) -> None:
    report = _measured(number)
    assert report.subject == _CASES[number].subject
    assert report.declared is not None
    assert bool(report.reason) == (report.declared == "biased")
    assert report.problem
    assert report.target_name
    assert report.moments.exact
    assert report.as_declared, str(report)


def test_every_exported_estimator_has_a_row_that_is_unbiased() -> None:
    unbiased = {case.subject for number, case in enumerate(_CASES) if _measured(number).declared == "unbiased"}
    assert unbiased == set(estimators.__all__)


def test_no_two_rows_have_one_name() -> None:
    names = [_name(case) for case in _CASES]
    assert len(set(names)) == len(names)

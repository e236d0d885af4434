"""The verification table: every exported estimator and algorithm, what it declares, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import upslope.algorithms as algorithms
import upslope.estimators as estimators
from upslope.algorithms import Algorithm
from upslope.auditing.cases import (
    advantages,
    continuing,
    curvature,
    divergences,
    given_data,
    groups,
    language_models,
    masks,
    memory,
    natural_gradient,
    objectives,
    off_policy_algorithms,
    preference,
    reductions,
    returns,
    sequences,
    shaping,
    traces,
)
from upslope.auditing.cases import algorithms as algorithm_cases
from upslope.auditing.cases.case import Case
from upslope.auditing.report import EXACT_TOLERANCE, AuditReport

_TITLE = """# The verification table

Every exported estimator and algorithm, what it declares, and what was measured. `upslope audit --all --write
docs/verification-table.md` writes this page, and the tests measure every row anew. How to read it:
[How we know the gradient is right](verification.md).

Bias is relative to the length of what is followed; 0 is rounding. z is that of a sampled bias; exact rows weight all
there is by its probability. Variance is that of one trajectory (or draw), relative to the squared length.
"""

_HEADER = (
    "| | setting | problem | follows | declared | measured | bias | z | cosine | variance |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A case and what was found."""

    case: Case
    report: AuditReport


def all_cases() -> Iterator[Case]:
    """Every row, algorithms first."""
    for room in (
        algorithm_cases,
        traces,
        continuing,
        sequences,
        language_models,
        given_data,
        groups,
        returns,
        advantages,
        objectives,
        divergences,
        reductions,
        preference,
        memory,
        natural_gradient,
        curvature,
        off_policy_algorithms,
        shaping,
        masks,
    ):
        yield from room.cases()


def exported() -> set[str]:
    """The names that need a row: every estimator, and every algorithm."""
    return set(estimators.__all__) | {name for name in vars(algorithms) if _is_algorithm(getattr(algorithms, name))}


def _is_algorithm(thing: object) -> bool:
    return isinstance(thing, type) and thing is not Algorithm and callable(getattr(thing, "loss", None))


def measure(case: Case) -> Measured:
    """Run one case."""
    return Measured(case=case, report=case.run())


def markdown(rows: Sequence[Measured]) -> str:
    """The table as it stands in the documentation, one section per subject."""
    lines = [_TITLE]
    for subject in dict.fromkeys(row.case.subject for row in rows):
        lines.append(f"### `{subject}`\n\n{_HEADER}" + "\n".join(_lines(rows, subject)) + "\n")
    return "\n".join(lines)


def _lines(rows: Iterable[Measured], subject: str) -> Iterator[str]:
    for row in rows:
        if row.case.subject == subject:
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |"


def cells(row: Measured) -> tuple[str, ...]:
    """One row: mark, setting, problem and figures."""
    return (mark(row.report), row.case.setting, row.report.problem, *figures(row.report))


def mark(report: AuditReport) -> str:
    """Whether the row is as declared."""
    return "✓" if report.as_declared else "✗"


def figures(report: AuditReport) -> tuple[str, ...]:
    """Target, declaration, verdict, bias, z, cosine and variance, to as many digits as mean something."""
    declared = report.declared or "nothing"
    reason = f": {report.reason}" if report.reason else ""
    bias = "0" if report.moments.exact and report.relative_bias < EXACT_TOLERANCE else f"{report.relative_bias:.2g}"
    z = "exact" if report.z is None else f"{report.z:.1f}"
    variance = report.variance_per_trajectory
    return (
        report.target_name,
        declared + reason,
        report.verdict,
        bias,
        z,
        "" if math.isnan(report.cosine) else f"{report.cosine:.4f}",
        "" if variance < EXACT_TOLERANCE else f"{variance:.2g}",
    )

"""A batch that fails as a whole: smaller and smaller parts of it, until only the culprit fails."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

from upslope.collect.rewards.calling import CallError
from upslope.collect.rewards.protocol import Failed

_Answer = TypeVar("_Answer")

PARTS = 8
"""Into how many parts a failed batch is divided: one culprit among 256 is found by 3 failed calls more, not 8."""


def divide(rows: range) -> list[range]:
    """Up to `PARTS` contiguous parts of nearly equal size, none of them empty."""
    parts = min(PARTS, len(rows))
    bounds = [rows.start + len(rows) * part // parts for part in range(parts + 1)]
    return [range(first, last) for first, last in pairwise(bounds)]


def given_up(reason: str, rows: range, budget: float) -> Failed:
    """For completions of a failed part that was not divided any more."""
    return Failed(
        f"{reason} (with {len(rows)} completions at once; {budget:g} s for trying again in smaller parts were used up)"
    )


def score_in_parts(attempt: Callable[[range], list[_Answer]], count: int, *, budget: float) -> list[_Answer | Failed]:
    """Score rows in one call; what fails is tried again in smaller parts, the larger first.

    Args:
        attempt: scores these rows or raises `CallError`.
        count: how many rows there are.
        budget: seconds for trying again; parts that failed by then fail with all their rows.

    Returns:
        One outcome per row.
    """
    outcomes: dict[int, _Answer | Failed] = {}
    parts = deque([range(count)] if count else [])
    limit = None
    while parts:
        rows = parts.popleft()
        try:
            outcomes.update(zip(rows, attempt(rows), strict=True))
            continue
        except CallError as error:
            reason, divisible = str(error), error.divisible
        limit = time.monotonic() + budget if limit is None else limit
        if len(rows) == 1 or not divisible:
            outcomes.update((row, Failed(reason)) for row in rows)
        elif time.monotonic() < limit:
            parts.extend(divide(rows))
        else:
            outcomes.update((row, given_up(reason, rows, budget)) for row in rows)
    return [outcomes[row] for row in range(count)]

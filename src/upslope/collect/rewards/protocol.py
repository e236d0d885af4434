"""Reward functions and their outcomes: a score, "not applicable" or "failed"; what failed is never a number."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

RewardFunction: TypeAlias = Callable[..., "Sequence[float | None] | Awaitable[Sequence[float | None]]"]
"""`function(prompts, completions, **columns) -> list of float or None`, plain or async; None is "not applicable"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """One part of what a completion is worth.

    Attributes:
        name: under which it is shown.
        function: a function, `path/to/file.py:function`, or the address of an HTTP endpoint.
        weight: of its scores in the sum.
        inline: called in this process, without a deadline: for the library's own functions that cannot hang.
    """

    name: str
    function: RewardFunction | str
    weight: float = 1.0
    inline: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """No score, and why: the function raised, hung, was killed, or returned what is no score."""

    reason: str


class NotApplicable:
    """The function has nothing to say about this completion."""

    def __repr__(self) -> str:
        return "not applicable"


NOT_APPLICABLE: Final = NotApplicable()

Outcome: TypeAlias = float | NotApplicable | Failed
"""Of a reward function and a completion."""

Reply: TypeAlias = str | NotApplicable | Failed
"""Of what answers the policy's turns; "not applicable" says that the conversation is over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What some completions are worth.

    Attributes:
        total: per completion the weighted sum of the scores that apply; None where a part failed or none applies.
        parts: by the name of the reward, one outcome per completion.
    """

    total: tuple[float | None, ...]
    parts: Mapping[str, tuple[Outcome, ...]]


Columns: TypeAlias = Sequence[Mapping[str, Any]]


def are_shares(outcomes: Iterable[Outcome]) -> bool:
    """Whether all scores among them lie in [0, 1], so that their mean can be called an accuracy.

    >>> are_shares([0.0, 1.0, NOT_APPLICABLE]), are_shares([1.0, -1.0])
    (True, False)
    """
    return all(0.0 <= outcome <= 1.0 for outcome in outcomes if isinstance(outcome, int | float))

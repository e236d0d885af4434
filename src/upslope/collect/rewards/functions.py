"""Reward functions that come with the library. Standard library only, apart from `math_verify`."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from typing import Any, Final

from upslope.errors import UsageError

_DIGITS: Final = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER: Final = re.compile(rf"(?:(?<![\w.)])[-−])?\$?(?:{_DIGITS})")
_MARKER: Final = "####"


def exact_match(completions: Sequence[str], answer: Sequence[Any]) -> list[float | None]:
    """1 where the completion is the answer, but for white space around it, else 0; None where there is no answer.

    Args:
        completions: `[n]` texts.
        answer: `[n]`, the column `answer`.
    """
    return [
        None if expected is None else float(text.strip() == str(expected).strip())
        for text, expected in zip(completions, answer, strict=True)
    ]


def last_number(completions: Sequence[str], answer: Sequence[Any]) -> list[float | None]:
    """1 where the number that the completion ends on equals the answer's, else 0; None where there is no answer.

    Where a text has GSM8K's mark `####`, its number is the first one after the last mark, else the last one of all.
    Thousands may have commas and a number a dollar sign in front: `$1,234.50` is 1234.5. Compared exactly.

    Args:
        completions: `[n]` texts; one without a number scores 0.
        answer: `[n]`, the column `answer`: numbers, or texts that hold one.

    Raises:
        ValueError: if an answer holds no number.
    """
    return [
        None if expected is None else float(number_of(text) == _expected_number(expected))
        for text, expected in zip(completions, answer, strict=True)
    ]


def _expected_number(answer: Any) -> Decimal:
    number = Decimal(repr(answer)) if isinstance(answer, int | float) else number_of(str(answer))
    if number is None:
        raise ValueError(f"the answer {str(answer)[:80]!r} holds no number")
    return number


def number_of(text: str) -> Decimal | None:
    """The number that a text ends on, as `last_number` reads it; None if it has none."""
    _, mark, after = text.rpartition(_MARKER)
    found = _NUMBER.findall(after)
    if not found:
        return None
    return Decimal((found[0] if mark else found[-1]).replace(",", "").replace("$", "").replace("−", "-"))


def math_verify(completions: Sequence[str], answer: Sequence[Any]) -> list[float | None]:
    r"""1 where the completion's last mathematical expression equals the answer, else 0; None without an answer.

    Math-Verify's own time limits are alarm signals, which exist in the main thread alone and whose errors it turns
    into "not equal". They are off here: the pool's deadline ends what takes too long, and what Math-Verify cannot
    compare has failed and is not 0.

    Args:
        completions: `[n]` texts, with LaTeX or plain expressions; one without any scores 0.
        answer: `[n]`, the column `answer`: LaTeX with or without dollar signs, or GSM8K's text up to `#### 42`.

    Raises:
        ModuleNotFoundError: if the package math-verify is not installed.
        ValueError: if an answer holds no expression.
        Exception: what Math-Verify and SymPy raise on expressions that they cannot read or compare.
    """
    return [
        None if expected is None else _equal(_expected_expressions(str(expected)), _expressions(text))
        for text, expected in zip(completions, answer, strict=True)
    ]


def warm_up(function: Any) -> None:
    """Let a built-in function do now what its first call would wait for; the pool's deadline begins after it."""
    if function is math_verify:
        math_verify(["1"], ["1"])


def _expressions(text: str) -> list[Any]:
    try:
        from math_verify import parse
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("math-verify is not installed: pip install 'upslope[rewards]'") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse(text, parsing_timeout=0, raise_on_error=True)


def _expected_expressions(answer: str) -> list[Any]:
    answer = answer.rpartition(_MARKER)[2].strip()
    marked = "$" in answer or "\\boxed" in answer or "\\[" in answer or "\\(" in answer
    found = _expressions(answer if marked else f"${answer}$")
    if not found:
        raise ValueError(f"the answer {answer[:80]!r} holds no expression")
    return found


def _equal(expected: list[Any], found: list[Any]) -> float:
    from math_verify import verify

    failure: Exception | None = None
    for one, other in product(expected, found):
        try:
            if verify(one, other, timeout_seconds=0, raise_on_error=True):
                return 1.0
        except Exception as error:  # noqa: BLE001 (raised again unless another reading of the text is equal)
            failure = error
    if failure is not None:
        raise failure
    return 0.0


@dataclass(frozen=True, slots=True)
class Matches:
    """1 where a regular expression is found in the completion, else 0.

    Attributes:
        pattern: as for `re.search`: `^` and `\\Z` tie it to the ends, `(?s)` lets a dot stand for line ends.
    """

    pattern: str

    def __post_init__(self) -> None:
        """Refuse what is no regular expression."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UsageError(f"{self.pattern!r} is no regular expression: {error}") from error

    def __call__(self, completions: Sequence[str]) -> list[float | None]:
        """Score completions."""
        return [float(re.search(self.pattern, text) is not None) for text in completions]


def matches(pattern: str) -> Matches:
    r"""A reward for a format: 1 where the completion matches, such as `matches(r"(?s)^<think>.*</think>.+\Z")`.

    A careless pattern can take for ever on some completion, so this does not belong in an inline reward.

    Raises:
        UsageError: if it is no regular expression.
    """
    return Matches(pattern)


def overlong_penalty(length: int, *, limit: int, buffer: int, penalty: float) -> float:
    """DAPO's soft punishment of length.

    `0` for `length <= limit - buffer`, `-penalty` for `length >= limit`, and between them
    `penalty (limit - buffer - length) / buffer`.

    Args:
        length: of the completion, in tokens.
        limit: the most tokens that a completion may have.
        buffer: tokens before the limit over which the punishment grows.
        penalty: the punishment at the limit, positive.

    Raises:
        ValueError: if the buffer is not between 1 and the limit.

    Source: Yu et al. 2025, "DAPO", equation 13, times `penalty`.
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"buffer must be between 1 and limit={limit}, got {buffer}")
    return penalty * max(-1.0, min(0.0, (limit - buffer - length) / buffer))

"""Addition of numbers, one character a token: answered outright, or after a scratchpad that is worked digit by digit.

`123+456=` is completed by `579`, or by `3+6=09,2+5+0=07,1+4+0=05>579`: the columns from the right, each with the carry
that comes in and a sum of two digits, whose first is the carry that goes out; the answer follows the `>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from upslope.collect.rewards.protocol import Reward
from upslope.collect.tasks.generated import Generator
from upslope.collect.tasks.protocol import Example, Task

ALPHABET: Final = "0123456789+=,>"
"""Every character of prompts, scratchpads and answers."""

_ANSWER = re.compile(r"(?:[0-9+=,]+>)?([0-9]+)")
_MOST_DIGITS = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Addition:
    """Sums of two numbers; demonstrations answer outright."""

    digits: int = 3
    """Of each number."""
    held_out: int = 1024
    """Problems to judge by, none of which is trained on; the same for every seed."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        _check(self.digits, self.held_out)

    def build(self, seed: int) -> Task:
        """The task."""
        generator = _generator(self.digits, direct=1.0)
        return Task(
            name="addition",
            training=generator.training(seed),
            held_out=generator.held_out(self.held_out),
            rewards=(Reward(name="correct", function=correct, inline=True),),
            correct="correct",
            alphabet=ALPHABET,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinkOrBlurt:
    """Sums of two numbers; some demonstrations answer outright, the others work on a scratchpad first.

    A scratchpad is longer and far more often right: what is rewarded for right answers alone learns to think first.
    """

    digits: int = 3
    """Of each number."""
    direct: float = 0.7
    """Share of the demonstrations that answer outright."""
    held_out: int = 1024
    """Problems to judge by, none of which is trained on; the same for every seed."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        _check(self.digits, self.held_out)
        if not 0.0 <= self.direct <= 1.0:
            raise ValueError(f"direct is a share from 0 to 1, got {self.direct}")

    def build(self, seed: int) -> Task:
        """The task; it shows the share of scratchpads beside the reward, with weight 0."""
        generator = _generator(self.digits, direct=self.direct)
        return Task(
            name="think-or-blurt",
            training=generator.training(seed),
            held_out=generator.held_out(self.held_out),
            rewards=(
                Reward(name="correct", function=correct, inline=True),
                Reward(name="scratchpad", function=uses_scratchpad, weight=0.0, inline=True),
            ),
            correct="correct",
            alphabet=ALPHABET,
        )


def scratchpad(first: int, second: int) -> str:
    """The sum worked digit by digit from the right, and then the answer.

    >>> scratchpad(128, 345)
    '8+5=13,2+4+1=07,1+3+0=04>473'
    """
    columns: list[str] = []
    carry, left, right = 0, first, second
    while left or right or not columns:
        left, x = divmod(left, 10)
        right, y = divmod(right, 10)
        terms = f"{x}+{y}+{carry}" if columns else f"{x}+{y}"
        total = x + y + carry
        columns.append(f"{terms}={total:02d}")
        carry = total // 10
    return f"{','.join(columns)}>{first + second}"


def final_answer(completion: str) -> str | None:
    """The digits that answer: the whole completion, or what follows the scratchpad; None if it is neither."""
    found = _ANSWER.fullmatch(completion)
    return found[1] if found else None


def correct(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **_: object) -> list[float]:
    """1 for the right answer, outright or after a scratchpad, whatever that holds; else 0."""
    return [float(final_answer(text) == right) for text, right in zip(completions, answer, strict=True)]


def uses_scratchpad(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """1 where something was worked out before the answer."""
    return [float(">" in text) for text in completions]


def _generator(digits: int, *, direct: float) -> Generator[tuple[int, int]]:
    least, most = 10 ** (digits - 1), 10**digits

    def draw(random: np.random.Generator) -> tuple[int, int]:
        first, second = random.integers(least, most, size=2)
        return int(first), int(second)

    def key(problem: tuple[int, int]) -> str:
        return f"{min(problem)}+{max(problem)}"

    def write(problem: tuple[int, int], random: np.random.Generator) -> Example:
        first, second = problem
        answer = str(first + second)
        return Example(
            prompt=f"{first}+{second}=",
            completion=answer if random.random() < direct else scratchpad(first, second),
            columns={"answer": answer},
        )

    return Generator(draw=draw, key=key, write=write)


def _check(digits: int, held_out: int) -> None:
    if not 1 <= digits <= _MOST_DIGITS:
        raise ValueError(f"digits must be from 1 to {_MOST_DIGITS}, got {digits}")
    if held_out < 1:
        raise ValueError(f"held_out must be at least 1, got {held_out}")

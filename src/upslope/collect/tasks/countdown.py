"""Countdown: reach a target with all the given numbers, each used once.

`3,7,12=24:` is completed by an expression that uses 3, 7 and 12 and comes to 24; `3,7,12=29:` by `12+7*3-4`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final

import numpy as np

from upslope.collect.rewards.protocol import Reward
from upslope.collect.tasks.expressions import Expression, read_expression
from upslope.collect.tasks.generated import Generator
from upslope.collect.tasks.protocol import Example, Task

ALPHABET: Final = "0123456789+-*/(),=:"
"""Every character of prompts and expressions."""

_Problem = tuple[tuple[int, ...], int, str]
_MOST_DRAWS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Countdown:
    """An expression of all the given numbers that comes to a target; demonstrations are the one it was made with."""

    count: int = 3
    """How many numbers are given."""
    most: int = 20
    """Numbers are drawn from 1 up to this."""
    operators: str = "+-*"
    """Of the expressions that problems are made with, out of + - * /; an answer may use any of these four."""
    most_target: int = 100
    """Targets are whole numbers from 1 up to this."""
    near_miss: float = 0.1
    """Reward for an expression of exactly the given numbers with another value; the right one has 1."""
    held_out: int = 512
    """Problems to judge by, none of which is trained on; the same for every seed."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        for name, least, most in (("count", 2, 8), ("most", 1, 10_000), ("most_target", 1, 10**9)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be from {least} to {most}, got {getattr(self, name)}")
        if not self.operators or not set(self.operators) <= set("+-*/"):
            raise ValueError(f"operators are some of + - * /, got {self.operators!r}")
        if not 0.0 <= self.near_miss < 1.0:
            raise ValueError(f"near_miss lies from 0 to below 1, the reward of the right answer; got {self.near_miss}")
        if self.held_out < 1:
            raise ValueError(f"held_out must be at least 1, got {self.held_out}")

    def build(self, seed: int) -> Task:
        """The task."""
        generator = Generator(draw=self._draw, key=_key, write=_write)
        return Task(
            name="countdown",
            training=generator.training(seed),
            held_out=generator.held_out(self.held_out),
            rewards=(
                Reward(name="correct", function=correct, inline=True),
                Reward(name="near_miss", function=near_miss, weight=self.near_miss, inline=True),
            ),
            correct="correct",
            alphabet=ALPHABET,
        )

    def _draw(self, random: np.random.Generator) -> _Problem:
        """Numbers in the order given, the target, and an expression; drawn until the target suits."""
        for _ in range(_MOST_DRAWS):
            numbers = [int(number) for number in random.integers(1, self.most + 1, size=self.count)]
            chosen = [self.operators[i] for i in random.integers(len(self.operators), size=self.count - 1)]
            order = [numbers[i] for i in random.permutation(self.count)]
            text = "".join(f"{number}{operator}" for number, operator in zip_longest(order, chosen, fillvalue=""))
            target = read_expression(text).value
            if target.denominator == 1 and 1 <= target <= self.most_target:
                return tuple(numbers), int(target), text
        raise ValueError(
            f"hardly any expression of {self.count} numbers up to {self.most} with {self.operators} comes to a whole "
            f"number from 1 to {self.most_target}: raise most_target"
        )


def correct(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    numbers: Sequence[Sequence[int]],
    target: Sequence[int],
    **_: object,
) -> list[float]:
    """1 for an expression of exactly the given numbers that comes to the target; else 0."""
    read = [_read(text, given) for text, given in zip(completions, numbers, strict=True)]
    return [float(found is not None and found.value == goal) for found, goal in zip(read, target, strict=True)]


def near_miss(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    numbers: Sequence[Sequence[int]],
    target: Sequence[int],
    **_: object,
) -> list[float]:
    """1 for an expression of exactly the given numbers that comes to something else; else 0."""
    read = [_read(text, given) for text, given in zip(completions, numbers, strict=True)]
    return [float(found is not None and found.value != goal) for found, goal in zip(read, target, strict=True)]


def _read(text: str, numbers: Sequence[int]) -> Expression | None:
    """The expression, if it is one and holds exactly these numbers."""
    try:
        expression = read_expression(text)
    except ValueError:
        return None
    return expression if sorted(expression.numbers) == sorted(numbers) else None


def _key(problem: _Problem) -> str:
    numbers, target, _ = problem
    return f"{sorted(numbers)}={target}"


def _write(problem: _Problem, _: np.random.Generator) -> Example:
    numbers, target, expression = problem
    return Example(
        prompt=f"{','.join(map(str, numbers))}={target}:",
        completion=expression,
        columns={"numbers": list(numbers), "target": target},
    )

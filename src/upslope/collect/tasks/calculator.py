"""Arithmetic with a calculator, one character a token: guess outright, or call the tool and copy what it says.

`47*86=` is completed by `4042`, or in two turns: the policy writes `[47*86]`, the calculator answers `4042;`, and the
policy writes `4042`. What the calculator cannot read it answers with `?;`. Only the policy's characters are learnt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from upslope.collect.dialogue import Dialogue
from upslope.collect.rewards.protocol import Reward
from upslope.collect.tasks.expressions import read_expression
from upslope.collect.tasks.generated import Generator
from upslope.collect.tasks.protocol import Example, Task

ALPHABET: Final = "0123456789+-*/()=[];?"
"""Every character of prompts, calls, replies and answers."""

CALL_END: Final = "]"
"""Ends a turn of the policy: what stands after the last `[` before it is calculated."""

UNREADABLE: Final = "?;"
"""The calculator's reply to what is no expression, or comes to a number of too many digits."""

_Problem = tuple[int, int]
_MOST_DIGITS = 8
_MOST_RESULT = 10**24
_ANSWER = re.compile(r"(?:.*;)?(-?[0-9]+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calculator:
    """Products, sums or differences of two numbers; some demonstrations call the calculator, the others guess.

    Demonstrated guesses are right, but a small model cannot learn to multiply from them: it learns to guess wrong. What
    is rewarded for right answers alone then learns to call the tool.
    """

    digits: int = 3
    """Of each number."""
    operator: Literal["*", "+", "-"] = "*"
    """Between the numbers."""
    calls: float = 0.3
    """Share of the demonstrations that call the calculator."""
    turns: int = 3
    """Most turns of the policy: calls, and the answer after them."""
    held_out: int = 1024
    """Problems to judge by, none of which is trained on; the same for every seed."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        if not 1 <= self.digits <= _MOST_DIGITS:
            raise ValueError(f"digits must be from 1 to {_MOST_DIGITS}, got {self.digits}")
        if self.operator not in ("*", "+", "-"):
            raise ValueError(f"operator is one of * + -, got {self.operator!r}")
        if not 0.0 <= self.calls <= 1.0:
            raise ValueError(f"calls is a share from 0 to 1, got {self.calls}")
        for name in ("turns", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def build(self, seed: int) -> Task:
        """The task; it shows the share of calls beside the reward, with weight 0."""
        generator = Generator(draw=self._draw, key=self._key, write=self._write)
        return Task(
            name="calculator",
            training=generator.training(seed),
            held_out=generator.held_out(self.held_out),
            rewards=(
                Reward(name="correct", function=correct, inline=True),
                Reward(name="calls", function=calls_tool, weight=0.0, inline=True),
            ),
            correct="correct",
            alphabet=ALPHABET,
            stop=(CALL_END,),
            dialogue=Dialogue(reply=calculate, turns=self.turns, inline=True),
        )

    def _draw(self, random: np.random.Generator) -> _Problem:
        first, second = random.integers(10 ** (self.digits - 1), 10**self.digits, size=2)
        return int(first), int(second)

    def _key(self, problem: _Problem) -> str:
        """Equal for problems with the same numbers, in whatever order."""
        return f"{min(problem)}{self.operator}{max(problem)}"

    def _write(self, problem: _Problem, random: np.random.Generator) -> Example:
        question = f"{problem[0]}{self.operator}{problem[1]}"
        answer = str(read_expression(question).value)
        turns = None
        if random.random() < self.calls:
            call = f"[{question}{CALL_END}"
            turns = (call, reply_to(call), answer)
        return Example(
            prompt=f"{question}=",
            completion=answer if turns is None else "".join(turns),
            turns=turns,
            columns={"answer": answer},
        )


def calculate(turns: Sequence[Sequence[str]], **_: object) -> list[str | None]:
    """What the calculator answers to each conversation's last turn; None where that is no call."""
    return [reply_to(said[-1]) if said[-1].endswith(CALL_END) else None for said in turns]


def reply_to(call: str) -> str:
    """The calculator's reply to a turn that ends with a call.

    >>> reply_to("[47*86]"), reply_to("[1/3]"), reply_to("[47*]")
    ('4042;', '1/3;', '?;')
    """
    _, bracket, question = call.removesuffix(CALL_END).rpartition("[")
    if not bracket:
        return UNREADABLE
    try:
        value = read_expression(question).value
    except ValueError:
        return UNREADABLE
    if max(abs(value.numerator), value.denominator) >= _MOST_RESULT:
        return UNREADABLE
    return f"{value};"


def final_answer(completion: str) -> str | None:
    """The number that answers: the whole completion, or what follows the last reply; None if that is none."""
    found = _ANSWER.fullmatch(completion)
    return found[1] if found else None


def correct(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **_: object) -> list[float]:
    """1 for the right answer, outright or after calls; else 0."""
    return [float(final_answer(text) == right) for text, right in zip(completions, answer, strict=True)]


def calls_tool(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """1 where the calculator was called."""
    return [float(CALL_END in text) for text in completions]

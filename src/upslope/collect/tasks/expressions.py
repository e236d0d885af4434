"""Arithmetic expressions: read, never run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_MOST_CHARACTERS: Final = 1000
_MOST_DIGITS: Final = 18
_DEEPEST: Final = 50


@dataclass(frozen=True, slots=True)
class Expression:
    """What an expression comes to.

    Attributes:
        value: exactly.
        numbers: as written, from left to right.
        operators: as written, from left to right.
    """

    value: Fraction
    numbers: tuple[int, ...]
    operators: str


def read_expression(text: str) -> Expression:
    """The value of whole numbers joined by + - * /, with parentheses and the usual precedence; spaces are allowed.

    There is no sign in front of a number, no power and no name. Nothing of the text is run, and the work is at most
    proportional to the square of its length.

    Raises:
        ValueError: if it is no such expression, divides by zero, is longer than 1000 characters, nested deeper than 50
            parentheses, or holds a number of more than 18 digits.

    >>> read_expression("2*(3+4)-1").value
    Fraction(13, 1)
    """
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"an expression has at most {_MOST_CHARACTERS} characters, got {len(text)}")
    tokens: list[str] = []
    for part in text.split(" "):
        found = _TOKEN.findall(part)
        if "".join(found) != part:
            raise ValueError(f"not an expression: {text!r}")
        tokens.extend(found)
    reader = _Reader(tokens)
    value = reader.sum(0)
    if reader.position != len(tokens):
        raise ValueError(f"not an expression: {tokens[reader.position]!r} stands where an operator is expected")
    operators = "".join(token for token in tokens if token in "+-*/")
    return Expression(value, tuple(int(token) for token in tokens if token.isdigit()), operators)


class _Reader:
    """Recursive descent: a sum of products of numbers and sums in parentheses."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.next_is("+-"):
            value = value + self.product(depth) if self.taken() == "+" else value - self.product(depth)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while self.next_is("*/"):
            operator, factor = self.taken(), self.factor(depth)
            if operator == "/" and factor == 0:
                raise ValueError("division by zero")
            value = value * factor if operator == "*" else value / factor
        return value

    def factor(self, depth: int) -> Fraction:
        if self.position == len(self.tokens):
            raise ValueError("the expression ends where a number is expected")
        if not self.next_is("("):
            token = self.taken()
            if not token.isdigit() or len(token) > _MOST_DIGITS:
                raise ValueError(f"expected a number of at most {_MOST_DIGITS} digits, got {token!r}")
            return Fraction(int(token))
        if depth == _DEEPEST:
            raise ValueError(f"parentheses are nested deeper than {_DEEPEST}")
        self.taken()
        value = self.sum(depth + 1)
        if not self.next_is(")"):
            raise ValueError("a parenthesis is not closed")
        self.taken()
        return value

    def next_is(self, choices: str) -> bool:
        return self.position < len(self.tokens) and self.tokens[self.position] in choices

    def taken(self) -> str:
        self.position += 1
        return self.tokens[self.position - 1]

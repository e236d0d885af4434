"""Examples made on demand: each from a stream of its own, training apart from held-out by a hash of the problem."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Generic, TypeVar

import numpy as np

from upslope.collect.tasks.protocol import Example
from upslope.streams import Purpose, stream

ENDLESS: Final = 1 << 40
"""The length of examples that are made on demand."""
HELD_OUT_SHARE: Final = 0.1
"""Of all problems; which ones is the same for every seed."""

_TRAINING, _HELD_OUT = 0, 1
_HELD_OUT_SEED = 0
_MOST_DRAWS = 10_000

_Problem = TypeVar("_Problem", bound=Hashable)


@dataclass(frozen=True, kw_only=True, slots=True)
class Generator(Generic[_Problem]):
    """How problems are drawn, told apart and written down.

    Attributes:
        draw: a problem.
        key: a text that equal problems share; the split into training and held-out is made by it.
        write: the example of a problem; what it draws decides the style of the demonstration.
    """

    draw: Callable[[np.random.Generator], _Problem]
    key: Callable[[_Problem], str]
    write: Callable[[_Problem, np.random.Generator], Example]

    def training(self, seed: int) -> GeneratedExamples[_Problem]:
        """Examples that are not held out: item i is a pure function of (seed, i)."""
        return GeneratedExamples(self, seed)

    def held_out(self, count: int) -> tuple[Example, ...]:
        """`count` different problems that no training example is ever made of; the same for every seed.

        Raises:
            ValueError: if there seem not to be as many.
        """
        examples: list[Example] = []
        seen: set[str] = set()
        for index in range(count):
            random = stream(_HELD_OUT_SEED, Purpose.TASK, _HELD_OUT, index)
            for _ in range(_MOST_DRAWS):
                problem = self.draw(random)
                key = self.key(problem)
                if is_held_out(key) and key not in seen:
                    seen.add(key)
                    examples.append(self.write(problem, random))
                    break
            else:
                raise ValueError(
                    f"{count} held-out problems were asked for, and there are hardly more than {len(examples)}: make "
                    "the problems larger (more digits or numbers), or set held_out to at most that"
                )
        return tuple(examples)


class GeneratedExamples(Generic[_Problem]):
    """Training examples of a generator, without end.

    Args:
        generator: makes them.
        seed: the run's.
    """

    def __init__(self, generator: Generator[_Problem], seed: int) -> None:
        self._generator = generator
        self._seed = seed

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < ENDLESS:
            raise IndexError(f"examples have indices from 0 to {ENDLESS - 1}, got {index}")
        random = stream(self._seed, Purpose.TASK, _TRAINING, index)
        for _ in range(_MOST_DRAWS):
            problem = self._generator.draw(random)
            if not is_held_out(self._generator.key(problem)):
                return self._generator.write(problem, random)
        raise ValueError("all problems are held out: make the problems larger")


def is_held_out(key: str) -> bool:
    """Whether the problem with this key is held out: `HELD_OUT_SHARE` of all are, whatever the seed."""
    number = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")
    return number < HELD_OUT_SHARE * 2.0**64

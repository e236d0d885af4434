"""In which order the examples of a task are taken: derived from the seed, so that only a count has to be kept."""

from __future__ import annotations

import numpy as np

from upslope.streams import Purpose, stream
from upslope.trajectory import Tree
from upslope.typed_tree import read_value

MOST_SHUFFLED = 1 << 22
"""Sets with more examples than this are taken in their own order: they are made on demand and random by themselves."""


class ExampleOrder:
    """Indices of examples without end: every epoch a new permutation of all of them.

    Args:
        count: examples there are, at least 1.
        seed: of the run.

    Attributes:
        cursor: indices taken so far.

    Raises:
        ValueError: if there are none.
    """

    def __init__(self, count: int, *, seed: int) -> None:
        if count < 1:
            raise ValueError("there are no examples to learn from")
        self._count = count
        self._seed = seed
        self._epoch = -1
        self._permutation = np.zeros(0, dtype=np.int64)
        self.cursor = 0

    def take(self, number: int) -> list[int]:
        """The next indices; an epoch's last ones and the next epoch's first may meet in one call."""
        taken: list[int] = []
        while len(taken) < number:
            epoch, place = divmod(self.cursor, self._count)
            share = min(number - len(taken), self._count - place)
            taken += self._indices(epoch, place, share)
            self.cursor += share
        return taken

    def _indices(self, epoch: int, place: int, number: int) -> list[int]:
        if self._count > MOST_SHUFFLED:
            return list(range(place, place + number))
        if epoch != self._epoch:
            self._permutation = stream(self._seed, Purpose.PROMPTS, epoch).permutation(self._count)
            self._epoch = epoch
        return self._permutation[place : place + number].tolist()

    def snapshot(self) -> Tree:
        """How many were taken, and of how many."""
        return {"cursor": self.cursor, "count": self._count}

    def restore(self, tree: Tree) -> None:
        """Go on exactly there.

        Raises:
            ValueError: if it was made for another number of examples: the order would be another one.
        """
        kept = read_value(dict[str, int], tree, "examples")
        if set(kept) != {"cursor", "count"} or kept["cursor"] < 0:
            raise ValueError(f"expected how many examples were taken (cursor) and of how many (count), got {tree!r}")
        if kept["count"] != self._count:
            raise ValueError(
                f"the checkpoint was made with {kept['count']} examples and there are {self._count} now: resume with "
                "the same data"
            )
        self.cursor = kept["cursor"]

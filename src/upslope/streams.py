"""Random numbers are derived, never stored.

One counter-based stream per (seed, purpose, indices): a resumed run, a restarted worker and a changed number
of processes all draw the same numbers, and no checkpoint has to hold a generator's state.
"""

from __future__ import annotations

from enum import IntEnum, unique
from typing import Protocol, final

import numpy as np
import torch


@unique
class Purpose(IntEnum):
    """What a stream is for. Values are part of the checkpoint format: never renumber, only append."""

    INITIALISATION = 0
    ENVIRONMENT = 1
    ACTION = 2
    SHUFFLE = 3
    EVALUATION_ENVIRONMENT = 4
    EVALUATION_ACTION = 5
    USER = 6
    GENERATION = 7
    EVALUATION_GENERATION = 8
    PROMPTS = 9
    TASK = 10
    RECORDING = 11
    SEGMENTS = 12


def derived_seed(seed: int, purpose: Purpose, *indices: int) -> int:
    """A 63-bit seed for a generator that takes one integer (an environment, a `torch.Generator`).

    >>> derived_seed(1, Purpose.ENVIRONMENT, 0) == derived_seed(1, Purpose.ENVIRONMENT, 0)
    True
    >>> derived_seed(1, Purpose.ENVIRONMENT, 0) == derived_seed(1, Purpose.ENVIRONMENT, 1)
    False
    """
    words = _sequence(seed, purpose, indices).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def stream(seed: int, purpose: Purpose, *indices: int) -> np.random.Generator:
    """A counter-based generator (Philox) for one purpose, for example `stream(seed, Purpose.ACTION, wave, update)`.

    Args:
        seed: the run's seed, a non-negative integer.
        purpose: what the numbers are for.
        indices: non-negative integers that tell streams of one purpose apart (wave, update, environment ...).

    Returns:
        A fresh `numpy.random.Generator`; the same arguments always give the same numbers.

    Raises:
        ValueError: if the seed or an index is negative.
    """
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, indices)))


class Shuffler(Protocol):
    """Who draws orders: a `numpy.random.Generator`, or one that is yet to be made."""

    def permutation(self, x: int, /) -> np.ndarray:
        """0 to x - 1 in a random order."""
        ...


@final
class LateStream:
    """`stream(...)`, made when the first order is drawn: most updates of a single step draw none.

    Args:
        seed, purpose, indices: as those of `stream`.
    """

    def __init__(self, seed: int, purpose: Purpose, *indices: int) -> None:
        self._of = seed, purpose, indices
        self._generator: np.random.Generator | None = None

    def permutation(self, x: int, /) -> np.ndarray:
        """0 to x - 1 in a random order, the next of the stream."""
        if self._generator is None:
            seed, purpose, indices = self._of
            self._generator = stream(seed, purpose, *indices)
        return self._generator.permutation(x)


def torch_stream(seed: int, purpose: Purpose, *indices: int) -> torch.Generator:
    """The same for torch: a CPU `torch.Generator` seeded from the derived stream."""
    generator = torch.Generator()
    generator.manual_seed(derived_seed(seed, purpose, *indices))
    return generator


def _sequence(seed: int, purpose: Purpose, indices: tuple[int, ...]) -> np.random.SeedSequence:
    entropy = [seed, int(purpose), len(indices), *indices]
    if min(entropy) < 0:
        raise ValueError(f"seeds and stream indices must be non-negative integers, got seed={seed}, indices={indices}")
    # Made of one array it comes several times faster, and the same.
    return np.random.SeedSequence(np.array(entropy, np.uint32) if max(entropy) < 2**32 else entropy)

"""What is drawn for a request, and when it is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

import numpy as np

from upslope.collect.engines.protocol import Completion, Request
from upslope.collect.errors import NonFiniteError


@final
class Drawn:
    """A completion that is being drawn.

    Args:
        number: which request.
        uniform: [limit] this sample's random numbers, one per token.
    """

    __slots__ = ("ended", "log_prob", "number", "tokens", "uniform")

    def __init__(self, number: int, uniform: np.ndarray) -> None:
        self.number = number
        self.uniform = uniform
        self.tokens: list[int] = []
        self.log_prob: list[float] = []
        self.ended = False

    def completion(self, version: int) -> Completion:
        """As it stands."""
        return Completion(tokens=tuple(self.tokens), log_prob=tuple(self.log_prob), ended=self.ended, version=version)


@final
class Ending:
    """Decides when completions are over.

    Args:
        limit: most tokens.
        ends: end tokens.
        stop: strings that end a completion.
        decode: ids to text.
    """

    def __init__(
        self, *, limit: int, ends: frozenset[int], stop: tuple[str, ...], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self.limit = limit
        self._ends = ends
        self._stop = stop
        self._decode = decode
        self._tail = max((len(text.encode()) for text in stop), default=0) + 8
        self._last = None if any(text[-1].isspace() for text in stop) else {text[-1] for text in stop} | {"\ufffd"}
        self._completes: dict[int, bool] = {}

    def add(self, drawn: Drawn, token: int, log_prob: float) -> bool:
        """Append a token; whether the completion is over.

        Raises:
            NonFiniteError: the log-prob is NaN.
        """
        if math.isnan(log_prob):
            raise NonFiniteError(
                "the model's logits are NaN or infinite, so nothing can be drawn from them: its weights have diverged. "
                "Start a new run from the last good policy (start_from) with a lower learning rate or a smaller limit "
                "of the gradient's norm"
            )
        drawn.tokens.append(token)
        drawn.log_prob.append(log_prob)
        drawn.ended = token in self._ends or (bool(self._stop) and self._stopped(drawn.tokens))
        return drawn.ended or len(drawn.tokens) >= self.limit

    def _stopped(self, tokens: list[int]) -> bool:
        """Whether the text holds a stop string. It can only have come with the last token: the tail says whether."""
        if not self._may_complete(tokens[-1]):
            return False
        tail = self._decode(tokens[-self._tail :])
        if not any(text in tail for text in self._stop):
            return False
        whole = self._decode(tokens)
        return any(text in whole for text in self._stop)

    def _may_complete(self, token: int) -> bool:
        """Whether a stop string can end in this token: its own text has the last character, or is part of one."""
        if self._last is None:
            return True
        if token not in self._completes:
            self._completes[token] = not self._last.isdisjoint(self._decode([token]))
        return self._completes[token]


@final
class Waiting:
    """Requests that have no slot yet, equal prompts next to each other in the order of their first.

    Args:
        requests: all of them.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(request.prompt, []).append(number)
        self._order = [number for numbers in groups.values() for number in numbers]
        self._requests = requests
        self._next = 0

    def __len__(self) -> int:
        """How many."""
        return len(self._order) - self._next

    def take(self, most: int, among: Callable[[tuple[int, ...]], bool]) -> list[int]:
        """The numbers of the next requests, as long as their prompts are of a kind."""
        begin = self._next
        end = min(begin + most, len(self._order))
        while self._next < end and among(self._requests[self._order[self._next]].prompt):
            self._next += 1
        return self._order[begin : self._next]

    def prompts(self, tokens: int) -> list[tuple[int, ...]]:
        """The next different prompts, at least one, with at most so many tokens between them."""
        chosen: dict[tuple[int, ...], None] = {}
        total = 0
        for place in range(self._next, len(self._order)):
            prompt = self._requests[self._order[place]].prompt
            if prompt in chosen:
                continue
            total += len(prompt)
            if chosen and total > tokens:
                break
            chosen[prompt] = None
        return list(chosen)

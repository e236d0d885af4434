"""The embedded engine: it generates in this process, with the learner's own weights.

Each distinct prompt is read once, whatever the number of its completions. A finished completion gives its slot to a
request that waits; when none waits the batch shrinks. Nothing is padded, and every sample has random numbers of its
own, so that what is drawn for it does not depend on what is generated beside it (up to the rounding of products of
different sizes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from upslope.collect.engines.drawing import draw
from upslope.collect.engines.protocol import Completion, Request
from upslope.collect.engines.sequences import Drawn, Ending, Waiting
from upslope.collect.engines.waves import generate_in_waves
from upslope.errors import UsageError
from upslope.policies.language.decoding import Cache, Decoder, Prompts
from upslope.policies.language.policy import LanguagePolicy
from upslope.policies.language.prepared import PreparedModel, prepare
from upslope.policies.language.sampling import Sampling
from upslope.streams import Purpose, stream

_READ_AT_ONCE = 4096
"""Tokens of prompts that are read ahead in one pass."""
_FIRST_ROOM = 256
"""Tokens after the longest prompt for which the cache has room at first."""
_PATIENCE = 16
"""A slot in so many may be vacant before slots are filled or the batch shrinks: both move memory."""


@final
class TorchEngine:
    """Completes prompts with a policy's weights; an `Engine`.

    The weights are copied into a form that generates fast by `update`, and before the first generation; weights that
    move afterwards change nothing until the next `update`, and completions carry the version they were drawn with. The
    copy takes as much memory as the weights. An architecture without typed parts (`policy.architecture` is None) is
    not copied: it draws with its weights as they stand, through transformers' own cache.

    Args:
        policy: whose model and tokenizer; its precision is that of generation, too.
        seed: of the random numbers: sample `request.key` draws from `stream(seed, purpose, *request.key)`.
        slots: most completions generated side by side.
        purpose: of the streams: generation for the learner, or for an evaluation.

    Raises:
        ValueError: if there are no slots.
    """

    def __init__(
        self, policy: LanguagePolicy, *, seed: int, slots: int = 256, purpose: Purpose = Purpose.GENERATION
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self._policy = policy
        self._seed = seed
        self._slots = slots
        self._purpose = purpose
        self._version = 0
        self._prepared: PreparedModel | None = None

    @property
    def version(self) -> int:
        """Of the weights that it draws with."""
        return self._version

    def update(self, version: int) -> None:
        """Draw with the policy's weights as they stand now, under this version's number."""
        self._version = version
        self._prepared = self._prepare()

    def release(self) -> None:
        """Give back the memory of the copy; the next generation makes one of the weights as they stand by then."""
        self._prepared = None

    def generate(
        self, requests: Sequence[Request], *, sampling: Sampling, limit: int, stop: tuple[str, ...] = ()
    ) -> list[Completion]:
        """One completion per request, in their order.

        Args:
            requests: what to complete.
            sampling: how tokens are drawn.
            limit: most tokens of a completion.
            stop: strings that end a completion once its text holds one; the tokens up to there stay.

        Raises:
            UsageError: if a prompt and its completion do not fit the model's context, a prompt is empty or has unknown
                tokens, the limit is below 1, or a stop string is empty.
            NonFiniteError: if the model's logits are NaN.
        """
        self._check(requests, limit, stop)
        if not requests:
            return []
        tokenizer = self._policy.tokenizer
        ending = Ending(limit=limit, ends=tokenizer.end, stop=stop, decode=tokenizer.decode)
        drawn = [Drawn(number, self._uniform(request, sampling, limit)) for number, request in enumerate(requests)]
        if self._policy.architecture is None:
            generate_in_waves(self._policy, requests, drawn, sampling=sampling, ending=ending, slots=self._slots)
        else:
            if self._prepared is None:
                self._prepared = self._prepare()
            assert self._prepared is not None
            slots = min(self._slots, len(requests))
            _Generation(self._prepared, requests, drawn, sampling=sampling, ending=ending, slots=slots).run()
        return [each.completion(self._version) for each in drawn]

    def _prepare(self) -> PreparedModel | None:
        architecture = self._policy.architecture
        if architecture is None:
            return None
        compute = torch.bfloat16 if self._policy.precision == "bfloat16" else architecture.token_embedding.dtype
        return prepare(architecture, compute)

    def _uniform(self, request: Request, sampling: Sampling, limit: int) -> np.ndarray:
        if sampling.greedy:
            return np.zeros(0)
        return stream(self._seed, self._purpose, *request.key).random(limit)

    def _check(self, requests: Sequence[Request], limit: int, stop: tuple[str, ...]) -> None:
        if limit < 1:
            raise UsageError(f"the limit of a completion must be at least 1 token, got {limit}")
        if "" in stop:
            raise UsageError("an empty stop string would end every completion at once: leave it out")
        model: Any = self._policy.model
        vocabulary, context = len(model.get_input_embeddings().weight), self._policy.context
        for prompt in {request.prompt for request in requests}:
            if not prompt:
                raise UsageError("a prompt is empty: give it at least one token, the tokenizer's beginning say")
            if len(prompt) + limit > context:
                raise UsageError(
                    f"a prompt of {len(prompt)} tokens and a completion of up to {limit} need {len(prompt) + limit} "
                    f"positions, the model has {context}: shorten prompts or lower the limit"
                )
            if min(prompt) < 0 or max(prompt) >= vocabulary:
                raise UsageError(
                    f"a prompt has tokens from {min(prompt)} to {max(prompt)}, the model's go from 0 to "
                    f"{vocabulary - 1}: encode it with the model's own tokenizer"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a prompt that was read is."""

    prompts: Prompts
    index: int


@final
class _Generation:
    """One call of `generate`: which sequence is in which slot."""

    def __init__(
        self,
        model: PreparedModel,
        requests: Sequence[Request],
        drawn: Sequence[Drawn],
        *,
        sampling: Sampling,
        ending: Ending,
        slots: int,
    ) -> None:
        longest = max(len(request.prompt) for request in requests)
        self._requests = requests
        self._drawn = drawn
        self._sampling = sampling
        self._ending = ending
        self._device = model.embedding.device
        self._decoder = Decoder(model, longest + ending.limit)
        self._cache = Cache(model, slots, longest, longest + min(ending.limit, _FIRST_ROOM))
        self._waiting = Waiting(requests)
        self._read: dict[tuple[int, ...], _Place] = {}
        self._rows: list[Drawn | None] = []
        self._token = torch.zeros(slots, dtype=torch.long, device=self._device)
        self._uniform = np.zeros((slots, 1 if sampling.greedy else ending.limit))
        self._age = np.zeros(slots, dtype=np.intp)
        self._every = np.arange(slots)

    @torch.inference_mode()
    def run(self) -> None:
        """Complete all requests."""
        while True:
            while self._admit():
                pass
            if not any(row is not None for row in self._rows):
                return
            self._shrink()
            self._step()

    def _vacant(self) -> list[int]:
        return [slot for slot, row in enumerate(self._rows) if row is None]

    def _admit(self) -> bool:
        """Give vacant slots to requests that wait, once there are enough; whether any got one."""
        if not self._waiting:
            return False
        missing = self._cache.slots - len(self._rows) + len(self._vacant())
        if missing < max(1, self._cache.slots // _PATIENCE):
            return False
        self._age_order()
        free = self._vacant() + list(range(len(self._rows), self._cache.slots))
        numbers = self._waiting.take(len(free), self._read.__contains__)
        if not numbers:
            self._read_ahead()
            numbers = self._waiting.take(len(free), self._read.__contains__)
        slots = free[: len(numbers)]
        self._rows.extend([None] * (max(slots) + 1 - len(self._rows)))
        by_prompts: dict[Prompts, list[tuple[int, int, int]]] = {}
        for number, slot in zip(numbers, slots, strict=True):
            place = self._read[self._requests[number].prompt]
            by_prompts.setdefault(place.prompts, []).append((number, place.index, slot))
        for prompts, members in by_prompts.items():
            self._seat(prompts, members)
        self._arrange()
        return True

    def _read_ahead(self) -> None:
        """Read the prompts that come next. Those read before have no request left."""
        chosen = sorted(self._waiting.prompts(_READ_AT_ONCE), key=len)
        self._read = {}
        place = iter(chosen)
        for prompts in self._decoder.read(chosen):
            for index in range(len(prompts.logits)):
                self._read[next(place)] = _Place(prompts=prompts, index=index)

    def _seat(self, prompts: Prompts, members: list[tuple[int, int, int]]) -> None:
        """Begin completions (number, index of the prompt, slot) with their first tokens."""
        numbers, index, slots = (list(column) for column in zip(*members, strict=True))
        self._cache.admit(prompts, index, slots)
        for number, slot in zip(numbers, slots, strict=True):
            self._rows[slot] = self._drawn[number]
            if not self._sampling.greedy:
                self._uniform[slot] = self._drawn[number].uniform
        self._age[slots] = 0
        self._record(prompts.logits[index], slots)

    def _step(self) -> None:
        live = len(self._rows)
        logits = self._decoder.step(self._token[:live], self._cache)
        self._record(logits, list(range(live)))

    def _record(self, logits: Tensor, slots: list[int]) -> None:
        """Draw a token for each of these slots; who is over leaves."""
        uniform = torch.from_numpy(self._uniform[slots, self._age[slots]]).to(self._device)
        token, log_prob = draw(logits, self._sampling, uniform)
        self._token[torch.tensor(slots, device=self._device)] = token
        if not self._sampling.greedy:
            self._age[slots] = np.minimum(self._age[slots] + 1, self._ending.limit - 1)
        for slot, number, value in zip(slots, token.tolist(), log_prob.tolist(), strict=True):
            row = self._rows[slot]
            if row is not None and self._ending.add(row, number, value):
                self._rows[slot] = None

    def _shrink(self) -> None:
        """When nobody waits and enough slots are vacant, move the last sequences into them."""
        vacant = self._vacant()
        if self._waiting or len(vacant) < max(1, len(self._rows) // _PATIENCE):
            return
        live = len(self._rows) - len(vacant)
        targets = [slot for slot in vacant if slot < live]
        sources = [slot for slot in range(live, len(self._rows)) if self._rows[slot] is not None]
        self._move(sources, targets)
        del self._rows[live:]
        self._arrange()

    def _age_order(self) -> None:
        """Keep the longest sequences in the first half of the slots, so that the other half is read from later on."""
        half = len(self._rows) // 2
        for hole in [slot for slot in self._vacant() if slot < half]:
            younger = [slot for slot in range(half, len(self._rows)) if self._rows[slot] is not None]
            if not younger:
                return
            self._move([min(younger, key=self._cache.beginning.__getitem__)], [hole])

    def _move(self, sources: list[int], targets: list[int]) -> None:
        if not sources:
            return
        self._cache.move(sources, targets)
        self._token[targets] = self._token[sources]
        self._uniform[targets] = self._uniform[sources]
        self._age[targets] = self._age[sources]
        for source, target in zip(sources, targets, strict=True):
            self._rows[target], self._rows[source] = self._rows[source], None

    def _arrange(self) -> None:
        vacant = self._vacant()
        if len(vacant) < len(self._rows):
            self._cache.arranged(len(self._rows), vacant)

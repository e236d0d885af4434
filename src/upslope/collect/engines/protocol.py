"""What a collector asks of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from upslope.policies.language.sampling import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One completion that is wanted.

    Attributes:
        prompt: token ids, at least one. Equal prompts in one call are read once.
        key: indices of this sample's own random stream, (update, prompt, sample), say: what is drawn for it does not
            depend on what else is generated beside it.
    """

    prompt: tuple[int, ...]
    key: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What was drawn.

    Attributes:
        tokens: in order, the end token included where there is one.
        log_prob: of each, under the distribution it was drawn from (temperature, top-k and top-p included; of the
            untempered model where sampling is greedy); NaN where the policy did not choose.
        ended: whether it chose an end token or completed a stop string; False: the length limit cut it.
        version: of the weights.
        chosen: whether the policy chose each token, False for replies in a conversation; None for all of them, as
            engines bring it. The last one is chosen.
        turns: of the policy.
        failed: why a conversation broke off, where it did.
    """

    tokens: tuple[int, ...]
    log_prob: tuple[float, ...]
    ended: bool
    version: int
    chosen: tuple[bool, ...] | None = None
    turns: int = 1
    failed: str | None = None

    @property
    def length(self) -> int:
        """Tokens that the policy chose."""
        return len(self.tokens) if self.chosen is None else sum(self.chosen)


class Engine(Protocol):
    """Completes prompts with the weights of some version."""

    @property
    def version(self) -> int:
        """Of the weights that it draws with."""
        ...

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
            UsageError: if a prompt and its completion do not fit the model's context, or a prompt is empty.
        """
        ...

    def update(self, version: int) -> None:
        """The policy's weights have moved: draw with them as they stand, under this version's number."""
        ...

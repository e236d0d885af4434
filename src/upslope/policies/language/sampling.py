"""How tokens are drawn from logits, as data: the sampler and the learner apply the same one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """The distribution that tokens are drawn from: softmax(logits / temperature), cut to the likeliest, renormalised.

    First the temperature, then `top_k`, then `top_p`, each on what the one before left over.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (for evaluation: nothing can be learnt from its log-probs)."""
    top_k: int | None = None
    """Keep the `top_k` likeliest tokens; ties with the last of them stay, too. None keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens that have this much probability between them; 1 keeps all."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        if not (self.temperature >= 0.0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for off, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p lies above 0 and is at most 1, got {self.top_p}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0.0

    @property
    def truncated(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_k is not None or self.top_p < 1.0

    def logits(self, logits: Tensor, action: Tensor | None = None) -> Tensor:
        """[..., V] logits of the distribution that is drawn from: -inf where a token cannot be.

        Args:
            logits: [..., V] of the model.
            action: [...] tokens that were drawn when the parameters were others: they keep their place among those
                that can be, so that their log-prob is finite. On-policy this changes nothing.
        """
        if not self.greedy and self.temperature != 1.0:
            logits = logits / self.temperature
        if not self.truncated:
            return logits
        with torch.no_grad():
            hidden = self._hidden(logits)
            if action is not None:
                hidden = hidden.scatter(-1, action.unsqueeze(-1), False)
        return logits.masked_fill(hidden, -torch.inf)

    def _hidden(self, logits: Tensor) -> Tensor:
        hidden = torch.zeros_like(logits, dtype=torch.bool)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            hidden = logits < least
        if self.top_p < 1.0:
            probability = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            ordered, order = probability.sort(dim=-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            hidden = hidden | torch.zeros_like(hidden).scatter(-1, order, before >= self.top_p)
        return hidden

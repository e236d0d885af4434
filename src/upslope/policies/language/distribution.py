"""Distributions over tokens, held as hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upslope.policies.language.token_head import Head, kl_divergence


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDistribution:
    """The next token's distribution at `M` chosen positions of `B` rows; a `Distribution`.

    Attributes:
        hidden: [M, D] last hidden states at chosen positions, row by row.
        head: from hidden states to logits.
        mask: [B, T] where they stand.
    """

    hidden: Tensor
    head: Head
    mask: Tensor

    @property
    def parameters(self) -> Tensor:
        """[B, T, D] hidden states; 0 where nothing was chosen."""
        table = self.hidden.new_zeros(*self.mask.shape, self.hidden.shape[-1])
        return table.masked_scatter(self.mask.unsqueeze(-1), self.hidden)

    def select(self, index: Tensor | slice) -> TokenDistribution:
        """The distributions of some rows."""
        place = torch.zeros_like(self.mask, dtype=torch.long)
        place[self.mask] = torch.arange(len(self.hidden), device=place.device)
        mask = self.mask[index]
        return TokenDistribution(hidden=self.hidden[place[index][mask]], head=self.head, mask=mask)

    def detach(self) -> TokenDistribution:
        """The same without gradient, and as it is now: a head that is trained is copied."""
        return TokenDistribution(hidden=self.hidden.detach(), head=self.head.detach(), mask=self.mask)

    def kl(self, other: object) -> Tensor:
        """KL(self || other) at each position, [B, T], exact; 0 where nothing was chosen.

        Raises:
            ValueError: if the other is not a distribution over the same tokens at the same positions.
        """
        if not isinstance(other, TokenDistribution):
            raise ValueError(f"a KL divergence needs two distributions of one family, got {type(other).__name__}")
        if other.mask.shape != self.mask.shape or not torch.equal(other.mask, self.mask):
            raise ValueError("a KL divergence needs distributions at the same positions: select the same rows of both")
        if len(other.head.weight) != len(self.head.weight):
            raise ValueError(
                f"a KL divergence needs one vocabulary, got {len(self.head.weight)} and {len(other.head.weight)} tokens"
            )
        divergence = kl_divergence(self.hidden, self.head, other.hidden, other.head)
        return divergence.new_zeros(self.mask.shape).masked_scatter(self.mask, divergence)

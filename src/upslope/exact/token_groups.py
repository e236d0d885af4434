"""Every batch of groups there can be: each group has one prompt and some completions of it, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from upslope.exact.enumeration import Rows
from upslope.exact.tokens import TokenMDP, enumerate_completions
from upslope.trajectory import Policy, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """All batches of N groups of G rows.

        Pr(batch) = prod_groups Pr(prompt) prod_rows pi(completion | prompt)

    Attributes:
        rows: every completion of every prompt.
        member: [K, N, G] which rows are in each batch, by group.
        luck: [K] product over groups of the probability of the prompt.
    """

    rows: Rows
    member: Tensor
    luck: Tensor

    def __len__(self) -> int:
        """K."""
        return len(self.luck)

    def probability(self, log_prob: Tensor) -> Tensor:
        """[K] of each batch, differentiable in `log_prob` [R, T] of the rows."""
        chosen = log_prob.masked_fill(~self.rows.trajectory.mask, 0.0).sum(-1)
        return self.luck * chosen[self.member].sum((1, 2)).exp()

    @property
    def behaviour_probability(self) -> Tensor:
        """[K] under the policy the rows were enumerated for."""
        return self.probability(self.rows.trajectory.behaviour_log_prob)

    def batch(self, number: int) -> Trajectory:
        """One batch: its groups one after the other, `group` numbering them from 0."""
        member = self.member[number]
        group = torch.arange(len(member)).repeat_interleave(member.shape[1])
        return replace(self.rows.select(member.flatten().tolist()), group=group)

    def batches(self) -> Iterator[tuple[float, Trajectory]]:
        """(probability, batch) of each."""
        for number, probability in enumerate(self.behaviour_probability.tolist()):
            yield probability, self.batch(number)


def enumerate_groups(problem: TokenMDP, policy: Policy, size: int, *, groups: int = 1, most: int = 200_000) -> Groups:
    """All ordered tuples of `size` completions of each prompt, and all ordered tuples of `groups` such groups.

    Args:
        problem: what to complete.
        policy: `behaviour_log_prob` is its own.
        size: G, rows per group.
        groups: N, groups per batch.
        most: refuse beyond this many batches.

    Raises:
        ValueError: if a number is less than 1, or there are more than `most` batches.
    """
    if size < 1 or groups < 1:
        raise ValueError(f"asked for {groups} groups of {size} rows: both must be at least 1")
    each, prompts = len(problem.completions), len(problem.prompts)
    count = (prompts * each**size) ** groups
    if count > most:
        raise ValueError(
            f"there are {count} batches of {groups} groups of {size} rows, more than {most}: take smaller groups, "
            "fewer of them, a smaller problem, or samples"
        )
    rows = enumerate_completions(problem, policy)
    one = [
        [prompt * each + completion for completion in completions]
        for prompt in range(prompts)
        for completions in product(range(each), repeat=size)
    ]
    chance = torch.tensor(problem.chance, dtype=torch.float64).repeat_interleave(each**size)
    pick = torch.tensor(list(product(range(len(one)), repeat=groups)))
    return Groups(rows=rows, member=torch.tensor(one)[pick], luck=chance[pick].prod(-1))

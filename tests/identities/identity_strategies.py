"""What the identities are tried on: drawn rows of steps, groups, policies; and how closely they must hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)
"""Fixed examples: a run of the tests says the same thing every time."""

SEEDS = st.integers(0, 2**31)
FRACTIONS = st.sampled_from([0.0, 0.3, 0.8, 0.95, 1.0])
"""Values of gamma and lambda, the ends included."""


def close(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-9 in float64."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Experience:
    """Rows of steps [B, T]; V' is V of the following step within a trajectory and something else where it is cut."""

    reward: Tensor
    discount: Tensor
    value: Tensor
    next_value: Tensor
    cut: Tensor
    terminated: Tensor
    mask: Tensor

    @property
    def steps(self) -> tuple[Tensor, Tensor]:
        return self.reward, self.discount

    @property
    def critic(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The arguments of `gae`."""
        return self.reward, self.discount, self.value, self.next_value, self.cut


@st.composite
def experiences(draw: st.DrawFn, *, holes: bool = False) -> Experience:
    """Every row ends in a cut; trajectories inside it end by termination or truncation, anywhere."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    flags = st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)
    gamma, seed = draw(FRACTIONS), draw(SEEDS)
    cut = torch.tensor(draw(flags)).view(rows, length) & torch.tensor(draw(flags)).view(rows, length)
    cut[:, -1] = True
    terminated = cut & torch.tensor(draw(flags)).view(rows, length)
    mask = torch.tensor(draw(flags)).view(rows, length) if holes else torch.ones_like(cut)
    reward, value, final = normal(seed, 3, rows, length)
    return Experience(
        reward=reward,
        discount=torch.full_like(reward, gamma).masked_fill(terminated, 0.0),
        value=value,
        next_value=torch.where(cut, final, value.roll(-1, -1)),
        cut=cut,
        terminated=terminated,
        mask=mask,
    )


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """Totals [N] with the group of each, members of a group scattered."""

    total: Tensor
    group: Tensor

    def members(self) -> list[Tensor]:
        """Positions of each group."""
        return [(self.group == label).nonzero().squeeze(-1) for label in self.group.unique().tolist()]


@st.composite
def grouped(draw: st.DrawFn) -> Grouped:
    """One to four groups of two to five, under labels that are no small numbers in order."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    labels = draw(st.lists(st.integers(-5, 1000), min_size=len(sizes), max_size=len(sizes), unique=True))
    label = torch.tensor([name for name, size in zip(labels, sizes, strict=True) for _ in range(size)])
    seed = draw(SEEDS)
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(seed))
    return Grouped(total=3.0 * normal(seed, len(label)), group=label[order])


@st.composite
def logits(draw: st.DrawFn, *, actions: int | None = None) -> Tensor:
    """Preferences [A] of a softmax, up to a few nats apart."""
    count = draw(st.integers(2, 6)) if actions is None else actions
    return draw(st.sampled_from([0.3, 1.0, 3.0])) * normal(draw(SEEDS), count)


@st.composite
def two_logits(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two softmax policies over the same actions."""
    count = draw(st.integers(2, 6))
    return draw(logits(actions=count)), draw(logits(actions=count))

"""Where estimators of groups and sequences are measured: all completions of a completion problem, and all groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from upslope.auditing.cases.measurement import Found, row_gradients, weighted_moments
from upslope.estimators import sequence_log_prob
from upslope.exact import (
    PrefixTable,
    Rows,
    TokenMDP,
    enumerate_completions,
    enumerate_groups,
    token_gradient,
    token_problem,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenStage:
    """A completion problem with a table, a reference, and all completions under the one that acted.

    Attributes:
        name: of the problem.
        problem: what is completed.
        policy: differentiated.
        reference: another table.
        rows: all completions under the policy, or under the reference where it acted.
    """

    name: str
    problem: TokenMDP
    policy: PrefixTable
    reference: PrefixTable
    rows: Rows

    @property
    def mask(self) -> Tensor:
        """[R, T]."""
        return self.rows.trajectory.mask

    @property
    def length(self) -> Tensor:
        """[R] chosen tokens."""
        return self.mask.sum(-1)

    @cached_property
    def total(self) -> Tensor:
        """[R] reward of each completion."""
        return self.rows.trajectory.reward.sum(-1)

    @property
    def log_prob(self) -> Tensor:
        """[R, T] of the policy, with gradient."""
        return self.policy.log_prob(self.rows.trajectory.observation, self.rows.trajectory.action)

    @cached_property
    def reference_log_prob(self) -> Tensor:
        """[R, T] of the reference."""
        with torch.no_grad():
            return self.reference.log_prob(self.rows.trajectory.observation, self.rows.trajectory.action)

    @property
    def probability(self) -> Tensor:
        """[R] under the one that acted."""
        return self.rows.behaviour_probability

    @cached_property
    def score(self) -> Tensor:
        """[R, P] gradient of each completion's log-prob."""
        return row_gradients(sequence_log_prob(self.log_prob, self.mask), [self.policy.theta])

    @cached_property
    def step_score(self) -> Tensor:
        """[R, T, P] gradient of each token's log-prob."""
        return row_gradients(self.log_prob.flatten(), [self.policy.theta]).view(*self.mask.shape, -1)

    @cached_property
    def gradient(self) -> Tensor:
        """[P] grad J."""
        return token_gradient(self.problem, self.policy, [self.policy.theta])

    def gradient_of(self, value: Tensor) -> Tensor:
        """[P] of a scalar, flat."""
        return torch.autograd.grad(value, self.policy.theta)[0].flatten()

    def ascent(self, objective: Tensor, target: Tensor, target_name: str) -> Found:
        """The gradient of one number per completion, [R], held against an exact one."""
        return Found(
            problem=self.name,
            target_name=target_name,
            target=target.detach(),
            moments=weighted_moments(self.probability, row_gradients(objective, [self.policy.theta])),
            steps=float(self.probability @ self.length.to(torch.float64)),
            batches=len(self.rows),
        )

    def ascent_of_groups(
        self,
        advantage: Callable[[Tensor, Tensor], Tensor],
        target: Tensor,
        target_name: str,
        *,
        size: int,
        groups: int = 1,
        batchwise: bool = False,
    ) -> Found:
        """The mean over a batch of advantage times score, over all batches of groups.

        Args:
            advantage: of (totals, labels of groups), both of one shape.
            target: [P].
            target_name: that in words.
            size: G, completions per group.
            groups: N per batch.
            batchwise: whether groups of a batch change one another's advantage, so that each batch is a call.
        """
        made = enumerate_groups(self.problem, self.policy, size, groups=groups)
        total = self.total[made.member]
        label = torch.arange(len(made) * groups).view(len(made), groups, 1).expand_as(total)
        if batchwise:
            psi = torch.stack([advantage(*batch) for batch in zip(total, label, strict=True)])
        else:
            psi = advantage(total, label)
        estimate = torch.einsum("kng,kngp->kp", psi, self.score[made.member]) / (groups * size)
        return Found(
            problem=self.name,
            target_name=target_name,
            target=target.detach(),
            moments=weighted_moments(made.behaviour_probability, estimate),
            trajectories=groups * size,
            steps=groups * size * float(self.probability @ self.length.to(torch.float64)),
            batches=len(made),
        )


@cache
def token_stage(name: str = "tokens", *, prompts: int | None = None, acted: str = "policy") -> TokenStage:
    """All completions of a named problem; built once.

    Args:
        name: of the problem.
        prompts: keep only so many of them.
        acted: "policy" or "reference".
    """
    whole = token_problem(name)
    problem = whole
    if prompts is not None:
        problem = TokenMDP(
            vocabulary=whole.vocabulary,
            end=whole.end,
            limit=whole.limit,
            prompts=whole.prompts[:prompts],
            reward=whole.reward,
        )
        name = f"{name}, {prompts} prompt"
    policy, reference = (_table(problem, seed) for seed in (0, 1))
    rows = enumerate_completions(problem, policy if acted == "policy" else reference)
    return TokenStage(name=name, problem=problem, policy=policy, reference=reference, rows=rows)


def _table(problem: TokenMDP, seed: int) -> PrefixTable:
    flat = PrefixTable(problem).theta
    generator = torch.Generator().manual_seed(seed)
    return PrefixTable(problem, 0.7 * torch.randn(flat.shape, generator=generator, dtype=torch.float64))

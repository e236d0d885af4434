"""Completion problems as a setting: groups of completions of a prompt, a frozen reference policy, exact gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from upslope.algorithms import Target
from upslope.auditing.language import copy_of, engine_batches, language_policy, set_exact_critic
from upslope.errors import UsageError
from upslope.exact import (
    PrefixTable,
    TinyTransformer,
    TokenMDP,
    TokenPolicy,
    enumerate_completions,
    enumerate_groups,
    exact_critic,
    sample_completions,
    sequence_kl_gradient,
    solve_tokens,
    token_gradient,
    token_problem,
)
from upslope.policies.language.policy import LanguagePolicy
from upslope.trajectory import Trajectory

Network: TypeAlias = Literal["table", "transformer", "language"]
"""A free choice at every prefix; a small causal transformer that shares weights between them; or a model of
transformers', which learns as a `LanguagePolicy` and whose drawn batches come from the engine that trains."""

Completing: TypeAlias = TokenPolicy | LanguagePolicy
"""Who completes prompts."""

TokenCritic: TypeAlias = Literal["exact", "perturbed"]
"""V = v_pi at every prefix, or that plus an error (a transformer's and a language model's is as it was drawn, then)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSetting:
    """A completion problem with a policy on it. The discount is 1 and the reward comes with the last token.

    Attributes:
        problem: its name.
        tokens: prompts, completions and rewards.
        policy: differentiated.
        behaviour: who completes; the same object as `policy` where data is on-policy.
        reference: a frozen policy to stay close to.
        size: G, completions in a group; 1 for single completions, which belong to no group.
        groups: N, groups in the smallest batch: what `every` lists, and what a drawn batch holds `rows` of.
        rows: times `groups` groups in a drawn batch.
    """

    problem: str
    tokens: TokenMDP
    policy: Completing
    behaviour: Completing
    reference: Completing
    size: int
    groups: int
    rows: int

    @classmethod
    def build(
        cls,
        problem: str | TokenMDP,
        *,
        name: str = "tokens",
        size: int = 2,
        groups: int = 1,
        network: Network = "table",
        critic: TokenCritic = "exact",
        stale: bool = False,
        rows: int = 4,
        seed: int = 0,
        beta: float = 0.0,
    ) -> TokenSetting:
        """A setting with random policies.

        Args:
            problem: a named completion problem, or one of one's own.
            name: what to call one of one's own.
            size: G.
            groups: N.
            network: what the policy is.
            critic: what the critic knows.
            stale: the completions come from a policy with other parameters.
            rows: of a drawn batch.
            seed: of all parameters.
            beta: what the critic knows of a penalty on the distance from the reference.

        Raises:
            UsageError: if a number is less than 1.
        """
        if min(size, groups, rows) < 1:
            raise UsageError(f"size, groups and rows must be at least 1; got {size}, {groups} and {rows}")
        tokens = token_problem(problem) if isinstance(problem, str) else problem
        policy, reference = (_policy(tokens, network, 2 * seed + i) for i in (0, 1))
        _set_critic(tokens, policy, critic, reference, beta)
        for parameter in reference.parameters():
            parameter.requires_grad_(False)
        behaviour = policy
        if stale:
            behaviour = copy_of(policy) if isinstance(policy, LanguagePolicy) else copy.deepcopy(policy)
            with torch.no_grad():
                for parameter in behaviour.parameters():
                    wave = torch.sin(1.0 + torch.arange(parameter.numel(), dtype=torch.float64))
                    parameter.add_(0.3 * wave.view(parameter.shape))
        return cls(
            problem=problem if isinstance(problem, str) else name,
            tokens=tokens,
            policy=policy,
            behaviour=behaviour,
            reference=reference,
            size=size,
            groups=groups,
            rows=rows,
        )

    @property
    def name(self) -> str:
        """The problem's, and how completions are grouped."""
        groups = "1 group" if self.groups == 1 else f"{self.groups} groups"
        stale = "" if self.behaviour is self.policy else ", from another policy"
        return f"{self.problem} ({'single completions' if self.size == 1 else f'{groups} of {self.size}'}{stale})"

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Those that log pi depends on."""
        rows = enumerate_completions(self.tokens, self.policy).trajectory
        trainable = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        total = self.policy.log_prob(rows.observation, rows.action).sum()
        found = torch.autograd.grad(total, trainable, allow_unused=True)
        return tuple(parameter for parameter, part in zip(trainable, found, strict=True) if part is not None)

    @property
    def gamma(self) -> float:
        """No discount."""
        return 1.0

    @property
    def mean_length(self) -> float:
        """Mean chosen tokens of a completion of the acting policy."""
        return float(solve_tokens(self.tokens, self.behaviour).mean_length.detach())

    @property
    def trajectories_per_row(self) -> float:
        """Completions in the smallest batch."""
        return float(self.groups * self.size)

    @property
    def steps_per_row(self) -> float:
        """Mean tokens chosen in the smallest batch."""
        return self.trajectories_per_row * self.mean_length

    def every(self) -> Iterator[tuple[float, Trajectory]]:
        """Each batch of `groups` groups there is, with its probability."""
        for probability, batch in enumerate_groups(
            self.tokens, self.behaviour, self.size, groups=self.groups
        ).batches():
            yield probability, self._grouped(batch)

    def drawn(self, batches: int, seed: int) -> Iterator[Trajectory]:
        """Batches of `rows * groups` groups, sampled token by token; those of a language model by its engine."""
        if isinstance(self.behaviour, LanguagePolicy):
            prompts = self.rows * self.groups
            yield from engine_batches(
                self.tokens, self.behaviour, prompts=prompts, group=self.size, batches=batches, seed=seed
            )
            return
        generator = np.random.Generator(np.random.Philox(seed))
        for _ in range(batches):
            shape = (self.rows * self.groups, self.size)
            yield self._grouped(sample_completions(self.tokens, self.behaviour, None, generator, groups=shape))

    def exact_gradient(self, target: Target) -> Tensor:
        """[P] what a declared target is here: with a discount of 1, gamma^t changes nothing.

        Raises:
            ValueError: if the target is the gradient of an average reward, or of no return at all.
        """
        if target.gradient == "average_reward":
            raise ValueError("completions end: there is no average reward per step without end")
        if target.gradient == "given_data":
            raise ValueError("the algorithm learns from given data and follows no gradient of a return")
        shrunk = (self.size - 1) / self.size if target.group_mean else 1.0
        gradient = shrunk * token_gradient(self.tokens, self.policy, self.parameters)
        if target.penalty is not None:
            beta = target.penalty.coefficient * (shrunk if target.penalty.baselined else 1.0)
            gradient = gradient - beta * self.kl_gradient(target.penalty.of)
        return gradient * (target.factor if target.per == "trajectory" else target.factor / self.mean_length)

    def kl_gradient(self, of: Literal["trajectories", "steps"]) -> Tensor:
        """[P] of KL(pi || ref) of whole completions, or at each prefix, visits held fixed."""
        if of == "trajectories":
            return sequence_kl_gradient(self.tokens, self.policy, self.reference, self.parameters)
        rows = enumerate_completions(self.tokens, self.policy)
        own, other = (policy.evaluate(rows.trajectory).distribution for policy in (self.policy, self.reference))
        kl = own.kl(other).masked_fill(~rows.trajectory.mask, 0.0).sum(-1)
        found = torch.autograd.grad((rows.behaviour_probability * kl).sum(), self.parameters)
        return torch.cat([part.flatten() for part in found])

    def _grouped(self, batch: Trajectory) -> Trajectory:
        return replace(batch, group=None) if self.size == 1 else batch


def _set_critic(tokens: TokenMDP, policy: Completing, critic: TokenCritic, reference: Completing, beta: float) -> None:
    if isinstance(policy, TinyTransformer) or (isinstance(policy, LanguagePolicy) and critic == "perturbed"):
        return
    with torch.no_grad():
        solution = solve_tokens(tokens, policy, reference=reference, beta=beta)
        if isinstance(policy, LanguagePolicy):
            set_exact_critic(tokens, policy, solution)
        elif isinstance(policy, PrefixTable):
            policy.value.copy_(exact_critic(tokens, policy, solution))
            if critic == "perturbed":
                policy.value.add_(0.3 * torch.cos(1.0 + 3.0 * torch.arange(len(policy.value), dtype=torch.float64)))


def _policy(tokens: TokenMDP, network: Network, seed: int) -> Completing:
    if network == "language":
        return language_policy(tokens, seed)
    if network == "transformer":
        return TinyTransformer(tokens.vocabulary, tokens.positions, seed=seed)
    empty = PrefixTable(tokens)
    generator = torch.Generator().manual_seed(seed)
    return PrefixTable(tokens, 0.7 * torch.randn(empty.theta.shape, generator=generator, dtype=torch.float64))

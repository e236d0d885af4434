"""What a loss may be following: exact gradients to hold its mean ascent direction against, where it declares nothing.

A candidate is one exact gradient, or a few that are added up with free factors. The mean follows a candidate if nothing
is left of it beside that. On control problems they are grad J, grad J with gamma^t dropped, and grad J of the
undiscounted return (what a loss follows that knows no gamma). On completion problems, with r the reward of a
completion, V the mean reward of its prompt (held fixed) and L its length:

| candidate | what follows it |
|---|---|
| grad J | mean-centred or leave-one-out advantages, summed over tokens |
| grad E[(r - V) / L] | the same averaged over each completion's tokens: short completions count for more |
| grad KL(pi \\|\\| ref) | k1 in the reward; k2 of whole completions in the loss |
| grad KL(ref \\|\\| pi) | k3 of whole completions in the loss |
| grad KL per token, prefixes held fixed | k2 (pi \\|\\| ref) or k3 (ref \\|\\| pi) per token in the loss |
| one of the first two, prompts re-weighted | advantages over the group's standard deviation, for rewards 0 and 1 |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from upslope.auditing.setting import FiniteSetting
from upslope.auditing.tokens import TokenSetting
from upslope.exact import (
    FiniteMDP,
    TokenMDP,
    enumerate_completions,
    next_log_prob,
    policy_gradient,
    sequence_kl_gradient,
    solve,
    time_limited,
    token_gradient,
)

ROUNDING = 1e-6
"""What is left beside a candidate counts as rounding below this share of the mean (`gamma ** time` is float32)."""

_ZERO = 1e-13
"""An exact gradient is 0 below this times the largest reward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """Exact gradients that are added up with free factors.

    Attributes:
        terms: what they are, one name each.
        basis: [K, P] the gradients.
        name: what to say instead of naming each term with its factor; "" says that.
    """

    terms: tuple[str, ...]
    basis: Tensor
    name: str = ""

    def factors(self, mean: Tensor) -> Tensor:
        """[K] that leave least of the mean."""
        return torch.linalg.lstsq(self.basis.T, mean.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)

    def nearest(self, mean: Tensor) -> Tensor:
        """[P] the mean without what is left."""
        return self.factors(mean) @ self.basis

    def in_words(self, factors: Tensor) -> str:
        """The sum with its factors."""
        if self.name:
            shares = ", ".join(f"{factor:.3g} for {term}" for term, factor in zip(self.terms, factors, strict=True))
            return f"{self.name}: {shares}"
        first, *others = [(float(factor), term) for factor, term in zip(factors, self.terms, strict=True)]
        signed = [f"{'-' if factor < 0 else '+'} {abs(factor):.3g} x {term}" for factor, term in others]
        return " ".join([f"{first[0]:.3g} x {first[1]}", *signed])


def single(name: str, gradient: Tensor) -> Candidate:
    """One gradient."""
    return Candidate(terms=(name,), basis=gradient.unsqueeze(0))


def candidates_of(setting: TokenSetting | FiniteSetting) -> tuple[Candidate, ...]:
    """Every candidate of a setting, the simplest first; those that are the same as an earlier one are left out."""
    tokens = isinstance(setting, TokenSetting)
    found = token_candidates(setting) if tokens else control_candidates(setting)
    zero = _ZERO * float((setting.tokens.rewards if tokens else setting.mdp.reward).abs().max())
    kept: list[Candidate] = []
    for candidate in found:
        if not float(candidate.basis.norm()) > zero:
            continue
        known = [other for other in kept if other.basis.shape == candidate.basis.shape]
        size = float(candidate.basis.norm())
        if all(float((other.basis - candidate.basis).norm()) > ROUNDING * size for other in known):
            kept.append(candidate)
    return tuple(kept)


def control_candidates(setting: FiniteSetting) -> Iterator[Candidate]:
    """The policy gradient, with gamma^t dropped, undiscounted; with and without a time limit; per trajectory and step.

    Without discount there is no gamma^t to drop. Where episodes need not end there is no undiscounted return.
    """
    found: dict[str, Tensor] = {}
    for words, mdp, cut in _with_and_without_limit(setting):
        found[f"grad J{words}"] = _gradient(setting, mdp, cut)
        if mdp.gamma < 1.0:
            found[f"grad J{words} with gamma^t dropped"] = _gradient(setting, mdp, cut, "undiscounted_states")
            if cut is None or episodes_end(setting):
                found[f"grad J of the undiscounted return{words}"] = _gradient(setting, replace(mdp, gamma=1.0), cut)
    for name, value in found.items():
        yield single(name, value)
    for name, value in found.items():
        yield single(f"{name} / mean length", value / setting.mean_length)


def episodes_end(setting: FiniteSetting) -> bool:
    """Whether they do without a time limit, under the policy."""
    with torch.no_grad():
        return bool(solve(setting.mdp, setting.policy).undiscounted_visits.isfinite().all())


def _with_and_without_limit(setting: FiniteSetting) -> Iterator[tuple[str, FiniteMDP, int | None]]:
    """What to say of it, the problem, and after how many steps its episodes are cut and bootstrapped."""
    limit = setting.limit
    if limit is None:
        yield "", setting.mdp, None
        return
    yield f" of episodes cut at {limit} steps and bootstrapped there", setting.mdp, limit
    yield f" of episodes that end at {limit} steps for good", time_limited(setting.mdp, limit), None


def _gradient(
    setting: FiniteSetting,
    mdp: FiniteMDP,
    limit: int | None,
    gradient: Literal["discounted", "undiscounted_states"] = "discounted",
) -> Tensor:
    return policy_gradient(mdp, setting.policy, gradient=gradient, limit=limit, parameters=setting.parameters)


def token_candidates(setting: TokenSetting) -> Iterator[Candidate]:
    """Those of the module's table, alone, with each penalty, with prompts re-weighted, and both."""
    tokens, policy, parameters = setting.tokens, setting.policy, setting.parameters
    gradient = token_gradient(tokens, policy, parameters)
    by_prompt = torch.stack([token_gradient(one, policy, parameters) for one in _each_prompt(tokens)])
    by_length = _length_gradients(setting)
    by_length_total = by_length.sum(0)
    penalties = {
        "grad KL(pi || ref)": sequence_kl_gradient(tokens, policy, setting.reference, parameters),
        "grad KL(ref || pi)": sequence_kl_gradient(tokens, setting.reference, policy, parameters),
        "grad KL(pi || ref) per token, prefixes held fixed": _at_prefixes(setting, _reverse),
        "grad KL(ref || pi) per token, prefixes held fixed": _at_prefixes(setting, _forward),
    }
    entropy = "grad entropy per token, prefixes held fixed"
    extras = {**penalties, entropy: _at_prefixes(setting, _entropy)}
    length = "grad E[(r - V) / length]"
    yield single("grad J", gradient)
    yield single("grad J / mean length", gradient / setting.mean_length)
    yield single(length, by_length_total)
    for name, value in penalties.items():
        yield single(f"-{name}", -value)
    yield single(entropy, extras[entropy])
    for name, value in (("grad J", gradient), (length, by_length_total)):
        for extra, other in extras.items():
            yield Candidate(terms=(name, extra), basis=torch.stack([value, other]))
    prompts = tuple(f"prompt {prompt}" for prompt in tokens.prompts)
    chance = torch.tensor(tokens.chance, dtype=torch.float64).unsqueeze(-1)
    for name, parts in (("grad J", chance * by_prompt), (length, by_length)):
        yield Candidate(terms=prompts, basis=parts, name=f"{name} with prompts re-weighted")
        for extra, other in extras.items():
            yield Candidate(
                terms=(*prompts, extra),
                basis=torch.cat([parts, other.unsqueeze(0)]),
                name=f"{name} with prompts re-weighted, and a penalty",
            )


def _each_prompt(tokens: TokenMDP) -> Iterator[TokenMDP]:
    """The problem with one prompt drawn for certain, for each."""
    for number in range(len(tokens.prompts)):
        chance = tuple(float(number == other) for other in range(len(tokens.prompts)))
        yield replace(tokens, prompt_probability=chance)


def _length_gradients(setting: TokenSetting) -> Tensor:
    """[prompts, P] grad E[(r - V) / L] of each prompt, times its probability."""
    tokens, policy = setting.tokens, setting.policy
    rows = enumerate_completions(tokens, policy)
    seen = rows.trajectory
    probability = rows.probability(policy.log_prob(seen.observation, seen.action)).view(len(tokens.prompts), -1)
    weight = probability.detach()
    value = (weight * tokens.rewards).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp_min(1e-300)
    worth = (tokens.rewards - value) / seen.mask.sum(-1).view(probability.shape)
    means = (probability * worth).sum(-1)
    return torch.stack([_flat(mean, setting, retain=True) for mean in means])


def _reverse(log_policy: Tensor, log_reference: Tensor) -> Tensor:
    return (log_policy.exp() * (log_policy - log_reference)).sum(-1)


def _forward(log_policy: Tensor, log_reference: Tensor) -> Tensor:
    return (log_reference.exp() * (log_reference - log_policy)).sum(-1)


def _entropy(log_policy: Tensor, log_reference: Tensor) -> Tensor:
    del log_reference
    return -(log_policy.exp() * log_policy).sum(-1)


def _at_prefixes(setting: TokenSetting, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[P] the gradient of a sum over tokens of something of both next-token distributions; visits held fixed."""
    rows = enumerate_completions(setting.tokens, setting.behaviour)
    seen = rows.trajectory
    assert isinstance(seen.observation, Tensor)
    own, other = (
        next_log_prob(who, seen.observation, setting.tokens.vocabulary) for who in (setting.policy, setting.reference)
    )
    each = of(own, other).masked_fill(~seen.mask, 0.0).sum(-1)
    return _flat((rows.behaviour_probability * each).sum(), setting)


def _flat(value: Tensor, setting: TokenSetting, *, retain: bool = False) -> Tensor:
    parts = torch.autograd.grad(
        value, list(setting.parameters), allow_unused=True, materialize_grads=True, retain_graph=retain
    )
    return torch.cat([part.reshape(-1) for part in parts])

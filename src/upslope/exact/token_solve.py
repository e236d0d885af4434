"""What is exactly true of a policy on a completion problem: J, its gradient, divergences, the regularised optimum.

With the reference policy f and the strength beta of the penalty (0 leaves it out),

    J = E[ sum_t gamma^t ( r_t - beta (l_t - f_t) ) ]        gamma = 1: E[r] - beta KL(pi || ref)

The gradient comes by two roads: autograd through the sum over all completions (`token_gradient`), and the policy
gradient theorem with q and v of every prefix, computed backwards (`token_theorem_gradient`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from upslope.exact.language import PrefixTable
from upslope.exact.tokens import TokenMDP, Tokens, enumerate_completions, lay_out, next_log_prob
from upslope.trajectory import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSolution:
    """Values and visits of every prefix at which a token is chosen, by how many were chosen before: depth 0 .. limit-1.

    `N_d = (V - 1)^d` beginnings without the end token, in lexicographic order, for each of the `P` prompts.

    Attributes:
        beginnings: per depth, [N_d] the beginnings.
        policy: per depth, [P, N_d, V] pi(a | prompt, beginning).
        value: per depth, [P, N_d] v.
        action_value: per depth, [P, N_d, V] q.
        visits: per depth, [P, N_d] eta_1: the probability of getting there.
        objective: J.
        mean_length: chosen tokens of a completion, on average.
    """

    beginnings: tuple[tuple[Tokens, ...], ...]
    policy: tuple[Tensor, ...]
    value: tuple[Tensor, ...]
    action_value: tuple[Tensor, ...]
    visits: tuple[Tensor, ...]
    objective: Tensor
    mean_length: Tensor


def solve_tokens(
    problem: TokenMDP, policy: Policy, *, gamma: float = 1.0, reference: Policy | None = None, beta: float = 0.0
) -> TokenSolution:
    """By backward recursion over prefixes; differentiable in the policy's parameters.

        q(prefix, a) = r - beta log(pi(a|prefix) / ref(a|prefix)) + gamma v(prefix a),  v = sum_a pi q

    where r is the completion's reward if it ends with a, and v is 0 after its last token.

    Args:
        problem: what to complete.
        policy: pi.
        gamma: discount factor per token.
        reference: ref; needed where `beta` is not 0.
        beta: strength of the penalty.

    Raises:
        ValueError: if there is a `beta` and no reference.
    """
    _require_reference(reference, beta)
    beginnings, log_policy = _log_policy_by_depth(problem, policy)
    penalty = [torch.zeros_like(level) for level in log_policy]
    if reference is not None and beta != 0.0:
        by_reference = _log_policy_by_depth(problem, reference)[1]
        penalty = [beta * (own - other) for own, other in zip(log_policy, by_reference, strict=True)]
    probability = tuple(level.exp() for level in log_policy)
    following = _following(problem)
    value: list[Tensor] = []
    action_value: list[Tensor] = []
    for depth in reversed(range(problem.limit)):
        q = _closing_rewards(problem, depth) - penalty[depth]
        if value:
            later = value[0].view(*q.shape[:2], len(following))
            q = q + gamma * torch.zeros_like(q).index_copy(-1, following, later)
        action_value.insert(0, q)
        value.insert(0, (probability[depth] * q).sum(-1))
    visits = [torch.tensor(problem.chance, dtype=torch.float64).unsqueeze(-1)]
    for level in probability[:-1]:
        visits.append((visits[-1].unsqueeze(-1) * level[..., following]).flatten(1))
    return TokenSolution(
        beginnings=beginnings,
        policy=probability,
        value=tuple(value),
        action_value=tuple(action_value),
        visits=tuple(visits),
        objective=(visits[0] * value[0]).sum(),
        mean_length=torch.stack([level.sum() for level in visits]).sum(),
    )


def exact_critic(problem: TokenMDP, table: PrefixTable, solution: TokenSolution) -> Tensor:
    """[N] v of each row of the table, for `table.value`: 0 where nothing is chosen any more, or yet.

    Args:
        problem: what the table and the solution are of.
        table: whose rows are meant.
        solution: with the values.
    """
    value = torch.zeros_like(table.value)
    for begun, level in zip(solution.beginnings, solution.value, strict=True):
        for prompt, row in zip(problem.prompts, level.detach(), strict=True):
            value[[table.number[(*prompt, *tokens)] for tokens in begun]] = row
    return value


def token_objective(
    problem: TokenMDP, policy: Policy, *, gamma: float = 1.0, reference: Policy | None = None, beta: float = 0.0
) -> Tensor:
    """J by the sum over all completions, differentiable in the parameters of either policy.

    The arguments are those of `solve_tokens`, and so is the error.
    """
    _require_reference(reference, beta)
    rows = enumerate_completions(problem, policy)
    seen = rows.trajectory
    log_prob = policy.log_prob(seen.observation, seen.action)
    reward = seen.reward
    if reference is not None and beta != 0.0:
        reward = reward - beta * (log_prob - reference.log_prob(seen.observation, seen.action))
    worth = (reward * gamma ** seen.time.to(torch.float64)).masked_fill(~seen.mask, 0.0).sum(-1)
    return (rows.probability(log_prob) * worth).sum()


def token_gradient(
    problem: TokenMDP,
    policy: Policy,
    parameters: Sequence[Tensor],
    *,
    gamma: float = 1.0,
    reference: Policy | None = None,
    beta: float = 0.0,
) -> Tensor:
    """Grad J, flat over `parameters`, by autograd through `token_objective`, whose arguments it takes."""
    return _flat(token_objective(problem, policy, gamma=gamma, reference=reference, beta=beta), parameters)


def token_theorem_gradient(
    problem: TokenMDP,
    policy: Policy,
    parameters: Sequence[Tensor],
    *,
    gamma: float = 1.0,
    discounted_states: bool = True,
    reference: Policy | None = None,
    beta: float = 0.0,
) -> Tensor:
    """The policy gradient theorem over prefixes, flat over `parameters`.

        sum_prefix eta(prefix) sum_a grad pi(a|prefix) q(prefix, a)

    Args:
        problem, policy, gamma, reference, beta: as in `solve_tokens`, and so is the error.
        parameters: of the policy.
        discounted_states: eta_gamma, so that this is grad J; else eta_1, the gradient with gamma^t dropped.
    """
    solution = solve_tokens(problem, policy, gamma=gamma, reference=reference, beta=beta)
    surrogate = torch.zeros((), dtype=torch.float64)
    levels = zip(solution.policy, solution.action_value, solution.visits, strict=True)
    for depth, (probability, q, visits) in enumerate(levels):
        weight = visits.detach() * (gamma**depth if discounted_states else 1.0)
        surrogate = surrogate + (weight.unsqueeze(-1) * probability * q.detach()).sum()
    return _flat(surrogate, parameters)


def sequence_kl(problem: TokenMDP, policy: Policy, other: Policy) -> Tensor:
    """KL(policy || other) of whole completions, averaged over prompts; differentiable in the parameters of either.

        KL = E_policy[ sum_t m_t (l_t - f_t) ]

    Args:
        problem: what to complete.
        policy: whose completions are averaged over; exchange the two for the other direction.
        other: what it is compared with.
    """
    rows = enumerate_completions(problem, policy)
    seen = rows.trajectory
    log_prob, compared = (who.log_prob(seen.observation, seen.action) for who in (policy, other))
    return (rows.probability(log_prob) * (log_prob - compared).masked_fill(~seen.mask, 0.0).sum(-1)).sum()


def sequence_kl_gradient(problem: TokenMDP, policy: Policy, other: Policy, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of `sequence_kl`, flat over `parameters` of either policy."""
    return _flat(sequence_kl(problem, policy, other), parameters)


def regularised_optimum(problem: TokenMDP, reference: Policy, beta: float) -> PrefixTable:
    """The policy with the largest E[r] - beta KL(pi || ref).

        pi*(completion | prompt) = ref(completion | prompt) exp(r / beta) / Z(prompt)

    token by token, with Z of every prefix computed backwards: pi*(a|prefix) = ref(a|prefix) Z(prefix a) / Z(prefix).

    Args:
        problem: what to complete.
        reference: ref.
        beta: strength of the penalty, positive.

    Raises:
        ValueError: if `beta` is not positive.
    """
    if beta <= 0.0:
        raise ValueError(f"beta is {beta}: without a positive penalty the best policy is not a softmax of the rewards")
    with torch.no_grad():
        beginnings, log_reference = _log_policy_by_depth(problem, reference)
    following = _following(problem)
    table = PrefixTable(problem)
    log_z: Tensor | None = None
    for depth in reversed(range(problem.limit)):
        worth = _closing_rewards(problem, depth) / beta
        if log_z is not None:
            worth = worth.index_copy(-1, following, log_z.view(*worth.shape[:2], len(following)))
        logits = log_reference[depth] + worth
        log_z = logits.logsumexp(-1)
        for prompt, rows in zip(problem.prompts, logits.log_softmax(-1), strict=True):
            table.theta.data[[table.number[(*prompt, *tokens)] for tokens in beginnings[depth]]] = rows
    return table


def _require_reference(reference: Policy | None, beta: float) -> None:
    if reference is None and beta != 0.0:
        raise ValueError(f"beta is {beta}, but there is no reference policy to stay close to: give one, or beta=0")


def _following(problem: TokenMDP) -> Tensor:
    """The tokens after which a completion goes on."""
    return torch.tensor([token for token in range(problem.vocabulary) if token != problem.end])


def _log_policy_by_depth(
    problem: TokenMDP, policy: Policy
) -> tuple[tuple[tuple[Tokens, ...], ...], tuple[Tensor, ...]]:
    """Beginnings of each depth, and log pi [P, N_d, V] after them."""
    prompts = range(len(problem.prompts))
    beginnings = tuple(tuple(product(_following(problem).tolist(), repeat=d)) for d in range(problem.limit))
    levels: list[Tensor] = []
    for begun in beginnings:
        tokens, last = lay_out(problem, [(prompt, begin) for prompt in prompts for begin in begun])
        log_policy = next_log_prob(policy, tokens, problem.vocabulary)[torch.arange(len(tokens)), last]
        levels.append(log_policy.view(len(prompts), len(begun), problem.vocabulary))
    return beginnings, tuple(levels)


def _closing_rewards(problem: TokenMDP, depth: int) -> Tensor:
    """Rewards [P, N_d, V] of completions that are over with the token after the first `depth`; 0 where they go on."""
    beginnings = product(_following(problem).tolist(), repeat=depth)
    index = {completion: number for number, completion in enumerate(problem.completions)}
    places = [[index.get((*begun, token), -1) for token in range(problem.vocabulary)] for begun in beginnings]
    place = torch.tensor(places)
    return problem.rewards[:, place].masked_fill(place < 0, 0.0)


def _flat(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of a scalar, one vector; 0 for parameters it does not depend on."""
    gradient = torch.autograd.grad(value, list(parameters), allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in gradient])

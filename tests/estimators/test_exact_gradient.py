"""Every Psi against the exact gradient, by enumerating all trajectories of a small decision process.

Three states, two actions, four steps at most, some of them ending early. The policy is a softmax table.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from upslope.estimators import (
    discount_weight,
    gae,
    group_relative,
    importance_weighted,
    lambda_return,
    leave_one_out,
    n_step_return,
    reward_to_go,
    score_function,
    td_residual,
    total_reward,
    vtrace,
)

STATES, ACTIONS, HORIZON = 3, 2, 4
GENERATOR = torch.Generator().manual_seed(11)


def _random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=GENERATOR, dtype=torch.float64)


START = _random(STATES) / 1
START = START / START.sum()
TRANSITION = _random(STATES, ACTIONS, STATES + 1)
TRANSITION = TRANSITION / TRANSITION.sum(-1, keepdim=True)
REWARD = 2 * _random(STATES, ACTIONS) - 1
LOGITS = 2 * _random(STATES, ACTIONS) - 1
BEHAVIOUR = 2 * _random(STATES, ACTIONS) - 1
WRONG = 4 * _random(HORIZON + 1, STATES + 1)
WRONG[:, STATES] = 0.0
WRONG[HORIZON] = 0.0


def solve(logits: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return v `[H + 1, S + 1]` (0 at the end and in the terminal state) and q `[H, S, A]` by backward induction."""
    policy = logits.softmax(-1)
    values, actions = [torch.zeros(STATES + 1, dtype=torch.float64)], []
    for _ in range(HORIZON):
        q = REWARD + gamma * TRANSITION @ values[0]
        actions.insert(0, q)
        values.insert(0, torch.cat(((policy * q).sum(-1), torch.zeros(1, dtype=torch.float64))))
    return torch.stack(values), torch.stack(actions)


def exact_gradient(gamma: float) -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    value, _ = solve(logits, gamma)
    return torch.autograd.grad(START @ value[0, :STATES], logits)[0]


@dataclass(frozen=True)
class Paths:
    """All trajectories, `[N, H]`; after the end a row is padding, with mask False."""

    state: Tensor
    action: Tensor
    following: Tensor
    mask: Tensor
    cut: Tensor
    dynamics: Tensor

    def log_prob(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[self.state, self.action].masked_fill(~self.mask, 0.0)

    def probability(self, logits: Tensor) -> Tensor:
        return self.dynamics * self.log_prob(logits).sum(-1).exp()


def enumerate_paths() -> Paths:
    done: list[tuple[float, list[tuple[int, int, int]]]] = []
    open_paths = [(float(START[s]), s, list[tuple[int, int, int]]()) for s in range(STATES)]
    while open_paths:
        chance, state, path = open_paths.pop()
        if state == STATES or len(path) == HORIZON:
            done.append((chance, path))
            continue
        for action in range(ACTIONS):
            for following in range(STATES + 1):
                weight = chance * float(TRANSITION[state, action, following])
                open_paths.append((weight, following, [*path, (state, action, following)]))
    padded = torch.tensor([path + [(0, 0, 0)] * (HORIZON - len(path)) for _, path in done])
    lengths = torch.tensor([len(path) for _, path in done]).unsqueeze(-1)
    time = torch.arange(HORIZON)
    state, action, following = padded.unbind(-1)
    return Paths(
        state,
        action,
        following,
        time < lengths,
        time == lengths - 1,
        torch.tensor([chance for chance, _ in done], dtype=torch.float64),
    )


PATHS = enumerate_paths()
TIME = torch.arange(HORIZON).expand_as(PATHS.mask)


def expected_gradient(psi: Tensor, weight: Tensor) -> Tensor:
    """E[sum_t weight_t grad l_t Psi_t], exactly."""
    logits = LOGITS.clone().requires_grad_()
    value = score_function(PATHS.log_prob(logits), psi) * weight * PATHS.mask
    return torch.autograd.grad((PATHS.probability(LOGITS) * value.sum(-1)).sum(), logits)[0]


@dataclass(frozen=True)
class Data:
    """Rewards, discounts, values under a given critic, and what depends on nothing else."""

    reward: Tensor
    discount: Tensor
    value: Tensor
    next_value: Tensor


def observe(critic: Tensor, gamma: float) -> Data:
    ended = (PATHS.following == STATES) | (TIME == HORIZON - 1)
    return Data(
        reward=REWARD[PATHS.state, PATHS.action],
        discount=torch.full(ended.shape, gamma, dtype=torch.float64).masked_fill(ended, 0.0),
        value=critic[TIME, PATHS.state],
        next_value=critic[TIME + 1, PATHS.following],
    )


def all_psi(gamma: float) -> dict[str, Tensor]:
    true_value, true_action_value = solve(LOGITS, gamma)
    right, wrong = observe(true_value, gamma), observe(WRONG, gamma)
    steps = right.reward, right.discount
    to_go = reward_to_go(*steps, PATHS.cut, mask=PATHS.mask)
    action_value = true_action_value[TIME, PATHS.state, PATHS.action]
    fragments = PATHS.cut | (TIME == 1)
    critic = (*steps, right.value, right.next_value)
    wrong_critic = (*steps, wrong.value, wrong.next_value)
    return {
        "reward to go": to_go,
        "baselined, true value": to_go - right.value,
        "baselined, arbitrary": to_go - wrong.value,
        "action value": action_value,
        "advantage": action_value - right.value,
        "td residual": td_residual(*critic),
        "gae 0.5": gae(*critic, PATHS.cut, gae_lambda=0.5, mask=PATHS.mask),
        "gae 1, wrong value": gae(*wrong_critic, PATHS.cut, gae_lambda=1.0, mask=PATHS.mask),
        "lambda-return 0.7": lambda_return(*steps, right.next_value, PATHS.cut, trace_decay=0.7, mask=PATHS.mask),
        "2-step": n_step_return(*steps, right.next_value, PATHS.cut, steps=2, mask=PATHS.mask),
        "fragments bootstrapped": reward_to_go(*steps, fragments, bootstrap=right.next_value, mask=PATHS.mask),
        "gae over fragments": gae(*critic, fragments, gae_lambda=0.9, mask=PATHS.mask),
    }


def test_the_paths_are_a_distribution() -> None:
    assert float(PATHS.probability(LOGITS).sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", list(all_psi(0.8)))
@pytest.mark.parametrize("gamma", [0.8, 1.0])
def test_every_psi_has_the_exact_gradient_with_gamma_to_the_t(name: str, gamma: float) -> None:
    weight = discount_weight(TIME, gamma, dtype=torch.float64)
    found = expected_gradient(all_psi(gamma)[name], weight)
    torch.testing.assert_close(found, exact_gradient(gamma), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gamma", [0.8, 1.0])
def test_total_reward_needs_no_weight(gamma: float) -> None:
    data = observe(WRONG, gamma)
    psi = total_reward(data.reward, data.discount, PATHS.cut, mask=PATHS.mask)
    found = expected_gradient(psi, torch.ones_like(psi))
    torch.testing.assert_close(found, exact_gradient(gamma), rtol=1e-10, atol=1e-10)


def test_without_gamma_to_the_t_it_is_another_direction() -> None:
    """What most implementations follow: undiscounted visits times discounted values."""
    gamma = 0.8
    psi = all_psi(gamma)["advantage"]
    found = expected_gradient(psi, torch.ones_like(psi))
    assert float((found - exact_gradient(gamma)).abs().max()) > 1e-2
    logits = LOGITS.clone().requires_grad_()
    policy, (_, q) = logits.softmax(-1), solve(LOGITS, gamma)
    visits, expected = torch.cat((START, torch.zeros(1, dtype=torch.float64))), torch.zeros(())
    for t in range(HORIZON):
        expected = expected + (visits[:STATES, None] * policy * q[t]).sum()
        moved = torch.einsum("s,sa,sax->x", visits[:STATES], LOGITS.softmax(-1), TRANSITION)
        visits = torch.cat((moved[:STATES], torch.zeros(1, dtype=torch.float64)))
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5])
def test_a_wrong_critic_biases_every_lambda_below_one(gae_lambda: float) -> None:
    data = observe(WRONG, 0.8)
    psi = gae(
        data.reward,
        data.discount,
        data.value,
        data.next_value,
        PATHS.cut,
        gae_lambda=gae_lambda,
        mask=PATHS.mask,
    )
    found = expected_gradient(psi, discount_weight(TIME, 0.8, dtype=torch.float64))
    assert float((found - exact_gradient(0.8)).abs().max()) > 1e-2


def test_importance_weights_make_another_policys_steps_exact() -> None:
    """Whole-past ratios times the per-step one: E_b[prod rho * psi * grad l] is the gradient."""
    gamma = 0.8
    logits = LOGITS.clone().requires_grad_()
    log_prob, behaviour = PATHS.log_prob(logits), PATHS.log_prob(BEHAVIOUR)
    past = (log_prob.detach() - behaviour).cumsum(-1) - (log_prob.detach() - behaviour)
    psi = all_psi(gamma)["advantage"] * past.exp()
    value = importance_weighted(log_prob, behaviour, psi) * PATHS.mask
    value = value * discount_weight(TIME, gamma, dtype=torch.float64)
    found = torch.autograd.grad((PATHS.probability(BEHAVIOUR) * value.sum(-1)).sum(), logits)[0]
    torch.testing.assert_close(found, exact_gradient(gamma), rtol=1e-10, atol=1e-10)


def test_vtrace_without_clipping_is_unbiased_under_another_policy() -> None:
    gamma = 0.8
    data = observe(WRONG, gamma)
    target = vtrace(
        PATHS.log_prob(LOGITS),
        PATHS.log_prob(BEHAVIOUR),
        data.reward,
        data.discount,
        data.value,
        data.next_value,
        PATHS.cut,
        rho_clip=1e9,
        trace_clip=1e9,
        mask=PATHS.mask,
    ).value_target[:, 0]
    true_value, _ = solve(LOGITS, gamma)
    probability = PATHS.probability(BEHAVIOUR)
    for state in range(STATES):
        here = PATHS.state[:, 0] == state
        mean = (probability[here] * target[here]).sum() / probability[here].sum()
        assert float(mean) == pytest.approx(float(true_value[0, state]), abs=1e-10)


@pytest.mark.parametrize("size", [2, 3])
def test_groups_on_a_bandit(size: int) -> None:
    """Leave-one-out has the exact gradient; the group mean (G - 1) / G of it; a group scale another direction."""
    logits = torch.tensor([0.3, -0.4, 0.1, 0.9], dtype=torch.float64, requires_grad=True)
    payoff = torch.tensor([1.0, 0.2, 0.7, 0.0], dtype=torch.float64)
    exact = torch.autograd.grad((logits.softmax(-1) * payoff).sum(), logits)[0]
    draws = torch.cartesian_prod(*[torch.arange(4)] * size)
    group = torch.arange(len(draws)).unsqueeze(-1).expand_as(draws)
    log_prob = logits.log_softmax(-1)[draws]
    probability = log_prob.detach().sum(-1).exp()

    def mean_gradient(advantage: Tensor) -> Tensor:
        value = score_function(log_prob, advantage).mean(-1)
        return torch.autograd.grad((probability * value).sum(), logits, retain_graph=True)[0]

    total = payoff[draws]
    torch.testing.assert_close(mean_gradient(leave_one_out(total, group)), exact, rtol=1e-12, atol=1e-12)
    shrunk = (size - 1) / size * exact
    torch.testing.assert_close(mean_gradient(group_relative(total, group)), shrunk, rtol=1e-12, atol=1e-12)
    scaled = mean_gradient(group_relative(total, group, scale="group"))
    cosine = float(torch.cosine_similarity(scaled, exact, dim=0))
    assert 0.9 < cosine < 0.9999

"""What slips made on purpose showed to be untested: each algorithm's whole update, critic and entropy too, by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from identity_strategies import PROPERTY, SEEDS, close, normal
from torch import Tensor, nn

from upslope.algorithms import A2C, PPO, Algorithm, Now, OneStepActorCritic, Reinforce
from upslope.estimators import conjugate_gradient, hinge, sequence_log_prob, sequence_log_ratio, vtrace
from upslope.exact import StatePolicy, TabularPolicy
from upslope.train.step import learn
from upslope.trajectory import Trajectory

STATES, ACTIONS, ROWS, STEPS, GAMMA, RATE = 5, 3, 3, 6, 0.9, 0.5
EPSILON = 1e-8
COMMON = {"gamma": GAMMA, "value_coefficient": 0.3, "entropy_coefficient": 0.07}
CLIPPED = PPO(**COMMON, epochs=2, minibatches=1, normalize_advantage=False, gae_lambda=0.8)
ALGORITHMS: dict[str, Algorithm] = {
    "reinforce: total reward": Reinforce(**COMMON, psi="total_reward"),
    "reinforce: total reward, gamma^t asked for": Reinforce(**COMMON, psi="total_reward", discounted_states=True),
    "reinforce: reward to go, standardised": Reinforce(**COMMON, normalize_advantage=True),
    "reinforce: baselined": Reinforce(**COMMON, psi="baselined", discounted_states=True),
    "reinforce: action value": Reinforce(**COMMON, psi="action_value", gae_lambda=0.6),
    "reinforce: advantage": Reinforce(**COMMON, psi="advantage", gae_lambda=0.6, discounted_states=True),
    "reinforce: td residual": Reinforce(**COMMON, psi="td_residual", gae_lambda=0.6),
    "one step": OneStepActorCritic(**COMMON),
    "one step, gamma^t kept": OneStepActorCritic(**COMMON, discounted_states=True),
    "a2c": A2C(**COMMON, gae_lambda=0.8),
    "a2c, standardised": A2C(**COMMON, gae_lambda=0.8, normalize_advantage=True),
    "ppo": CLIPPED,
    "ppo, standardised": replace(CLIPPED, normalize_advantage=True),
    "ppo, dual clip": replace(CLIPPED, dual_clip=1.2),
    "ppo, value clip": replace(CLIPPED, value_clip=0.05),
    "ppo, value clip alone": replace(CLIPPED, value_clip=0.05, value_clip_pessimistic=False),
    "ppo, penalty": replace(CLIPPED, clip=None, kl_coefficient=0.7),
    "ppo, clip and penalty": replace(CLIPPED, kl_coefficient=0.7),
}


@dataclass
class Descent:
    """Plain gradient descent that keeps every gradient."""

    policy: TabularPolicy | WholeRows
    micro_batches: int = 1
    gradients: list[Tensor] = field(default_factory=list[Tensor])

    def zero_gradient(self) -> None:
        self.policy.zero_grad()

    def step(self, learning_rate: float) -> float:
        parts = (self.policy.theta, self.policy.value)
        grads = [torch.zeros_like(part) if part.grad is None else part.grad.clone() for part in parts]
        self.gradients.append(torch.cat([grad.flatten() for grad in grads]))
        with torch.no_grad():
            for part, grad in zip(parts, grads, strict=True):
                part -= learning_rate * grad
        return 0.0


class WholeRows(StatePolicy):
    """The same table for a loop that keeps rows whole."""

    def __init__(self, table: TabularPolicy) -> None:
        super().__init__(STATES, ACTIONS)
        self.theta, self.value = nn.Parameter(table.theta.detach().clone()), table.value

    @property
    def sequential(self) -> bool:
        return True

    def preferences(self) -> Tensor:
        return self.theta


def table(seed: int) -> TabularPolicy:
    policy = TabularPolicy(STATES, ACTIONS, normal(seed, STATES, ACTIONS))
    with torch.no_grad():
        policy.value.copy_(normal(seed + 1, STATES))
    return policy


def experience(seed: int, policy: TabularPolicy, *, episodes: bool) -> Trajectory:
    """Rows of one trajectory each, or of several that end in every way; the acting policy is a little older."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randint(STATES, (ROWS, STEPS), generator=generator)
    action = torch.randint(ACTIONS, (ROWS, STEPS), generator=generator)
    ended = torch.rand((ROWS, STEPS), generator=generator)
    if episodes:
        ended[:, :-1] = 1.0
    terminated, truncated = ended < 0.2, (ended >= 0.2) & (ended < 0.4)
    time = torch.zeros((ROWS, STEPS), dtype=torch.int64)
    for t in range(1, STEPS):
        time[:, t] = (time[:, t - 1] + 1).masked_fill(terminated[:, t - 1] | truncated[:, t - 1], 0)
    goes_on = truncated.clone()
    goes_on[:, -1] |= ~terminated[:, -1]
    index = goes_on.flatten().nonzero().squeeze(-1)
    with torch.no_grad():
        log_prob = policy.log_prob(state, action) + 0.3 * normal(seed + 2, ROWS, STEPS)
    return Trajectory(
        observation=state,
        action=action,
        reward=normal(seed + 3, ROWS, STEPS),
        terminated=terminated,
        truncated=truncated,
        mask=torch.ones((ROWS, STEPS), dtype=torch.bool),
        behaviour_log_prob=log_prob,
        time=time,
        final_observation=torch.randint(STATES, (len(index),), generator=generator),
        final_index=index,
    )


def lambda_returns(rows: Trajectory, critic: Tensor, decay: float) -> Tensor:
    """r + gamma * what follows: nothing after an end, the critic at a cut, its mixture with the next return within."""
    final = dict(zip(rows.final_index.tolist(), rows.final_observation.tolist(), strict=True))
    found = torch.zeros(ROWS, STEPS, dtype=torch.float64)
    for b in range(ROWS):
        for t in reversed(range(STEPS)):
            if rows.terminated[b, t]:
                following = torch.tensor(0.0, dtype=torch.float64)
            elif b * STEPS + t in final:
                following = critic[final[b * STEPS + t]]
            else:
                following = (1 - decay) * critic[rows.observation[b, t + 1]] + decay * found[b, t + 1]
            found[b, t] = rows.reward[b, t] + GAMMA * following
    return found


def psi_and_target(algorithm: Algorithm, rows: Trajectory, critic: Tensor) -> tuple[Tensor, Tensor | None]:
    value, kept, target = critic[rows.observation], GAMMA ** rows.time.double(), None
    if isinstance(algorithm, A2C | PPO):
        target = lambda_returns(rows, critic, algorithm.gae_lambda)
        return target - value, target
    if isinstance(algorithm, OneStepActorCritic):
        target = lambda_returns(rows, critic, 0.0)
        return (target - value) * (kept if algorithm.discounted_states else 1.0), target
    assert isinstance(algorithm, Reinforce)
    if algorithm.psi == "total_reward":
        return (kept * rows.reward).sum(-1, keepdim=True).expand(ROWS, STEPS), None
    if algorithm.psi == "reward_to_go":
        psi = lambda_returns(rows, torch.zeros_like(critic), 1.0)
    else:
        target = lambda_returns(rows, critic, 1.0 if algorithm.psi == "baselined" else algorithm.gae_lambda)
        psi = lambda_returns(rows, critic, 0.0) if algorithm.psi == "td_residual" else target
        psi = psi if algorithm.psi == "action_value" else psi - value
    return psi * (kept if algorithm.discounted_states else 1.0), target


def surrogate(algorithm: PPO, log_ratio: Tensor, psi: Tensor, penalty: Tensor) -> Tensor:
    """min(rho A, clipped rho A) case by case, at least c A where A < 0, less beta KL(old || new)."""
    objective = log_ratio.exp() * psi
    if algorithm.clip is not None:
        beyond = torch.where(psi > 0, log_ratio.exp() > 1 + algorithm.clip, log_ratio.exp() < 1 - algorithm.clip)
        objective = torch.where(beyond, psi * torch.where(psi > 0, 1 + algorithm.clip, 1 - algorithm.clip), objective)
    if algorithm.dual_clip is not None:
        floor = algorithm.dual_clip * psi
        objective = torch.where((psi < 0) & (objective < floor), floor, objective)
    return objective - algorithm.kl_coefficient * penalty


def squared_error(algorithm: Algorithm, value: Tensor, old: Tensor, target: Tensor) -> Tensor:
    error = (value - target) ** 2 / 2
    if not isinstance(algorithm, PPO) or algorithm.value_clip is None:
        return error
    moved = value - old
    bounded = old + torch.where(moved.abs() > algorithm.value_clip, algorithm.value_clip * moved.sign(), moved)
    clipped = (bounded - target) ** 2 / 2
    return torch.where(clipped > error, clipped, error) if algorithm.value_clip_pessimistic else clipped


def by_hand(algorithm: Algorithm, rows: Trajectory, start: TabularPolicy, now: TabularPolicy) -> Tensor:
    """The loss of an algorithm whose data was collected, and advantages computed, with `start`."""
    old = start.theta.detach().log_softmax(-1)[rows.observation]
    every = now.theta.log_softmax(-1)[rows.observation]
    log_prob = every.gather(-1, rows.action.unsqueeze(-1)).squeeze(-1)
    psi, target = psi_and_target(algorithm, rows, start.value.detach())
    if not isinstance(algorithm, OneStepActorCritic) and algorithm.normalize_advantage:
        psi = (psi - psi.mean()) / ((((psi - psi.mean()) ** 2).sum() / (psi.numel() - 1)).sqrt() + EPSILON)
    if isinstance(algorithm, PPO):
        penalty = (old.exp() * (old - every)).sum(-1)
        objective = surrogate(algorithm, log_prob - rows.behaviour_log_prob, psi, penalty)
    else:
        objective = log_prob * psi
    loss = -objective - algorithm.entropy_coefficient * -(every.exp() * every).sum(-1)
    if target is not None:
        was = start.value.detach()[rows.observation]
        loss = loss + algorithm.value_coefficient * squared_error(algorithm, now.value[rows.observation], was, target)
    return loss.sum() / (ROWS if isinstance(algorithm, Reinforce) else ROWS * STEPS)


def updated(algorithm: Algorithm, rows: Trajectory, policy: TabularPolicy, rate: float) -> list[Tensor]:
    descent = Descent(policy)
    learn(
        policy,
        algorithm,
        descent,
        rows,
        now=Now(state=algorithm.initial_state()),
        learning_rate=rate,
        generator=np.random.default_rng(0),
    )
    return descent.gradients


@pytest.mark.parametrize("name", list(ALGORITHMS))
@settings(PROPERTY, max_examples=10)
@given(SEEDS)
def test_every_loss_is_its_formula(name: str, seed: int) -> None:
    """Every gradient of an update, of the actor and the critic, is the formula's at the parameters of that step."""
    algorithm, start, now = ALGORITHMS[name], table(seed), table(seed)
    rows = experience(seed, start, episodes=isinstance(algorithm, Reinforce))
    found = updated(algorithm, rows, table(seed), RATE)
    assert len(found) == algorithm.passes.epochs
    for gradient in found:
        loss = by_hand(algorithm, rows, start, now)
        parts = torch.autograd.grad(loss, (now.theta, now.value), materialize_grads=True)
        close(gradient, torch.cat([part.flatten() for part in parts]))
        with torch.no_grad():
            for parameter, part in zip((now.theta, now.value), parts, strict=True):
                parameter -= RATE * part


@settings(PROPERTY, max_examples=10)
@given(SEEDS)
def test_recomputing_with_the_same_critic_changes_nothing(seed: int) -> None:
    """Where nothing moves, advantages computed anew are the same, in the same places."""
    start = table(seed)
    rows = experience(seed, start, episodes=False)
    once = replace(CLIPPED, epochs=3, minibatches=2)
    for one, two in zip(
        updated(once, rows, table(seed), 0.0),
        updated(replace(once, recompute_advantage=True), rows, table(seed), 0.0),
        strict=True,
    ):
        close(one, two)


def spread(rows: Trajectory, generator: torch.Generator, *, after_ends: bool) -> Trajectory:
    """The same steps with hidden rubbish in between, before or after; only where an episode ended, if so asked."""
    ends = rows.terminated | rows.truncated
    places = torch.zeros((ROWS, STEPS), dtype=torch.int64)
    for b in range(ROWS):
        place = int(torch.randint(2, (), generator=generator)) if not after_ends else 0
        for t in range(STEPS):
            places[b, t] = place
            gap = int(torch.randint(3, (), generator=generator)) if bool(ends[b, t]) or not after_ends else 0
            place += 1 + gap
        places[b] += 3 * STEPS - 1 - places[b, -1]
    index = (places + 3 * STEPS * torch.arange(ROWS).unsqueeze(-1)).flatten()

    def move(tensor: Tensor, rubbish: float) -> Tensor:
        filled = torch.full((ROWS * 3 * STEPS,), rubbish, dtype=tensor.dtype)
        return filled.index_copy(0, index, tensor.flatten()).view(ROWS, 3 * STEPS)

    assert isinstance(rows.observation, Tensor)
    return replace(
        rows,
        observation=move(rows.observation, STATES - 1),
        action=move(rows.action, 0),
        reward=move(rows.reward, 1e3),
        terminated=move(rows.terminated, False),
        truncated=move(rows.truncated, False),
        mask=move(rows.mask, False),
        behaviour_log_prob=move(rows.behaviour_log_prob, 0.0),
        time=move(rows.time, 50),
        final_index=index[rows.final_index],
    )


@pytest.mark.parametrize("name", list(ALGORITHMS))
@settings(PROPERTY, max_examples=10)
@given(SEEDS)
def test_hidden_steps_change_no_update(name: str, seed: int) -> None:
    """Positions that nobody chose, such as those at which an environment only reset: no time passes there."""
    algorithm, start = ALGORITHMS[name], table(seed)
    rows = experience(seed, start, episodes=isinstance(algorithm, Reinforce))
    hidden = spread(rows, torch.Generator().manual_seed(seed + 5), after_ends=seed % 2 == 0)
    for one, two in zip(
        updated(algorithm, rows, table(seed), RATE), updated(algorithm, hidden, table(seed), RATE), strict=True
    ):
        close(one, two)


@pytest.mark.parametrize("name", list(ALGORITHMS))
@settings(PROPERTY, max_examples=10)
@given(SEEDS, st.integers(2, 3))
def test_rows_in_micro_batches_have_the_metrics_of_the_whole(name: str, seed: int, parts: int) -> None:
    """Also where one row has more hidden steps than another."""
    algorithm, start = ALGORITHMS[name], table(seed)
    rows = experience(seed, start, episodes=isinstance(algorithm, Reinforce))
    mask = rows.mask.clone()
    mask[0, : seed % STEPS] = False
    rows = replace(rows, mask=mask)
    found: list[dict[str, float]] = []
    for micro_batches in (1, parts):
        policy = WholeRows(start)
        descent = Descent(policy, micro_batches)
        found.append(
            learn(
                policy,
                algorithm,
                descent,
                rows,
                now=Now(state=algorithm.initial_state()),
                learning_rate=0.0,
                generator=np.random.default_rng(0),
            ).metrics
        )
    assert found[1] == pytest.approx(found[0], rel=1e-9, abs=1e-9, nan_ok=True)


@PROPERTY
@given(SEEDS, st.integers(1, 4))
def test_conjugate_gradient_takes_as_many_iterations_as_there_are_eigenvalues(seed: int, distinct: int) -> None:
    """Exact after so many, and not one earlier."""
    basis = torch.linalg.qr(normal(seed, 8, 8)).Q
    eigenvalues = torch.arange(8, dtype=torch.float64).remainder(distinct) + 1.0
    matrix, b = basis @ eigenvalues.diag() @ basis.mT, normal(seed + 1, 8)
    exact = torch.linalg.solve(matrix, b)
    close(conjugate_gradient(matrix.mv, b, iterations=distinct, tolerance=0.0), exact)
    if distinct > 1:
        early = conjugate_gradient(matrix.mv, b, iterations=distinct - 1, tolerance=0.0)
        assert float((early - exact).norm() / exact.norm()) > 1e-6


@PROPERTY
@given(SEEDS, st.floats(0.1, 3.0))
def test_the_hinge_is_satisfied_beyond_a_margin_of_1(seed: int, beta: float) -> None:
    """Below it the loss falls by what D grows; beyond it there is neither loss nor gradient."""
    chosen, rejected = normal(seed, 6).requires_grad_(), normal(seed + 1, 6)
    margin = beta * (chosen.detach() - rejected)
    loss = hinge(chosen, rejected, beta=beta)
    close(loss, torch.where(margin < 1, 1 - margin, 0.0))
    close(torch.autograd.grad(loss.sum(), chosen)[0], -beta * (margin < 1).double())


@PROPERTY
@given(SEEDS)
def test_a_sequence_is_the_sum_or_the_mean_of_its_chosen_steps(seed: int) -> None:
    log_prob, other, mask = normal(seed, 4, 7), normal(seed + 1, 4, 7), normal(seed + 2, 4, 7) > 0
    hidden = log_prob.masked_fill(~mask, torch.nan)
    for row, chosen in enumerate(mask):
        count = max(int(chosen.sum()), 1)
        total, difference = log_prob[row, chosen].sum(), (log_prob - other)[row, chosen].sum()
        close(sequence_log_prob(hidden, mask)[row], total)
        close(sequence_log_prob(hidden, mask, length_normalised=True)[row], total / count)
        close(sequence_log_ratio(hidden, other, mask, length_normalised=False)[row], difference)
        close(sequence_log_ratio(hidden, other, mask)[row], difference / count)


@PROPERTY
@given(SEEDS, st.sampled_from([0.0, 0.7, 1.0]))
def test_vtrace_passes_over_a_hidden_step(seed: int, decay: float) -> None:
    """Left out or hidden, a step changes nothing for the others; its V' is what the step before it sees."""
    log_prob, behaviour, reward, value = (0.5 * normal(seed + number, 1, 5) for number in range(4))
    discount, cut = torch.full((1, 5), 0.9, dtype=torch.float64), torch.tensor([[False] * 4 + [True]])
    following = torch.cat((value[:, 1:], normal(seed + 4, 1, 1)), -1)
    for hidden in range(1, 4):
        kept = torch.arange(5) != hidden
        seen = following.clone()
        seen[:, hidden - 1] = following[:, hidden]
        whole = vtrace(
            *(log_prob, behaviour, reward, discount, value, following, cut), trace_decay=decay, mask=kept.unsqueeze(0)
        )
        parts = (part[:, kept] for part in (log_prob, behaviour, reward, discount, value, seen, cut))
        for one, two in zip(whole, vtrace(*parts, trace_decay=decay), strict=True):
            close(one[:, kept], two)

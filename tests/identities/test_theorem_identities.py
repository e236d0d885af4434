"""The policy gradient theorem on random problems whose every episode is enumerated: expectations, not samples."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from identity_strategies import FRACTIONS, PROPERTY, SEEDS, close, normal
from torch import Tensor

from upslope.estimators import (
    baselined,
    discount_weight,
    gae,
    importance_weighted,
    lambda_return,
    n_step_return,
    reward_to_go,
    score_function,
    td_residual,
    total_reward,
    vtrace,
)
from upslope.exact import FiniteMDP, Rows, TabularPolicy, enumerate_episodes
from upslope.exact.gradient import objective_gradient, policy_gradient
from upslope.exact.solve import Solution, solve

STATES, ACTIONS = 3, 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem that only goes onward (so that it ends), a policy, all its episodes, and a critic that is wrong."""

    mdp: FiniteMDP
    policy: TabularPolicy
    rows: Rows
    solution: Solution
    wrong: Tensor

    @property
    def steps(self) -> tuple[Tensor, Tensor, Tensor]:
        trajectory = self.rows.trajectory
        return trajectory.reward, trajectory.discount(self.mdp.gamma), trajectory.terminated

    @property
    def mask(self) -> Tensor:
        return self.rows.trajectory.mask

    def critic(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """V and V' of a table [S + 1] along the rows."""
        value = table[self.rows.state]
        return value, self.rows.trajectory.next_value(value, table[:0])

    def weight(self) -> Tensor:
        return discount_weight(self.rows.trajectory.time, self.mdp.gamma, dtype=torch.float64)

    def action_value(self, table: Tensor) -> Tensor:
        """q or b(s, a), [S + 1, A], along the rows."""
        return table[self.rows.state, self.rows.trajectory.action]

    def expected(self, psi: Tensor, weight: Tensor) -> Tensor:
        """E[sum_t weight_t grad l_t Psi_t]."""
        trajectory = self.rows.trajectory
        log_prob = self.policy.log_prob(trajectory.observation, trajectory.action)
        objective = (score_function(log_prob, psi) * weight).masked_fill(~self.mask, 0.0).sum(-1)
        value = (self.rows.behaviour_probability * objective).sum()
        return torch.autograd.grad(value, self.policy.theta)[0].flatten()

    def by_state(self, table: Tensor, visits: Tensor) -> Tensor:
        """sum_s visits(s) sum_a grad pi(a|s) table(s, a)."""
        probability = self.policy.preferences().softmax(-1)
        return torch.autograd.grad((visits.unsqueeze(-1) * probability * table).sum(), self.policy.theta)[0].flatten()


@st.composite
def cases(draw: st.DrawFn, *, gamma: float | None = None) -> Case:
    """States 0, 1, 2 lead to later ones and to the end, 3; rewards depend on all of (s, a, s')."""
    seed = draw(SEEDS)
    generator = torch.Generator().manual_seed(seed)
    onward = torch.ones(STATES + 1, STATES + 1, dtype=torch.float64).triu(1).unsqueeze(1)
    chance = onward * (0.1 + torch.rand(STATES + 1, ACTIONS, STATES + 1, generator=generator, dtype=torch.float64))
    chance[STATES, :, STATES] = 1.0
    start = torch.rand(STATES + 1, generator=generator, dtype=torch.float64)
    start[STATES] = 0.0
    mdp = FiniteMDP(
        transition=chance / chance.sum(-1, keepdim=True),
        reward=normal(seed + 1, STATES + 1, ACTIONS, STATES + 1),
        start=start / start.sum(),
        terminal=torch.arange(STATES + 1) == STATES,
        gamma=draw(st.sampled_from([0.6, 0.9, 1.0])) if gamma is None else gamma,
    )
    policy = TabularPolicy(STATES + 1, ACTIONS, normal(seed + 2, STATES + 1, ACTIONS))
    with torch.no_grad():
        solution = solve(mdp, policy)
    wrong = 2.0 * normal(seed + 3, STATES + 1)
    wrong[STATES] = 0.0
    return Case(mdp=mdp, policy=policy, rows=enumerate_episodes(mdp, policy), solution=solution, wrong=wrong)


@PROPERTY
@given(SEEDS, st.integers(2, 5))
def test_score_identity_per_state(seed: int, actions: int) -> None:
    """E_a[grad log pi(a|s)] = 0 in every state."""
    policy = TabularPolicy(4, actions, 2.0 * normal(seed, 4, actions))
    for state in range(4):
        here = torch.full((actions,), state)
        log_prob = policy.log_prob(here, torch.arange(actions))
        mean = (log_prob.detach().exp() * log_prob).sum()
        close(torch.autograd.grad(mean, policy.theta)[0], torch.zeros(4, actions, dtype=torch.float64))


@PROPERTY
@given(cases(), SEEDS)
def test_action_independent_baselines_leave_the_mean(case: Case, seed: int) -> None:
    """Of the state, of the state and the time, or a constant; alone a baseline contributes nothing."""
    returns = reward_to_go(*case.steps, mask=case.mask)
    exact = objective_gradient(case.mdp, case.policy, parameters=[case.policy.theta])
    by_time = normal(seed, STATES + 1, STATES + 1)[case.rows.state, case.rows.trajectory.time]
    for baseline in (case.critic(case.wrong)[0], by_time, torch.full_like(returns, 7.3)):
        close(case.expected(baselined(returns, baseline), case.weight()), exact)
        close(case.expected(baseline, case.weight()), torch.zeros_like(exact))


@PROPERTY
@given(cases(), SEEDS)
def test_an_action_dependent_baseline_does_not(case: Case, seed: int) -> None:
    """Negative control: the mean loses exactly sum_s eta_gamma(s) sum_a grad pi(a|s) b(s, a)."""
    table = normal(seed, STATES + 1, ACTIONS)
    returns = reward_to_go(*case.steps, mask=case.mask)
    exact = objective_gradient(case.mdp, case.policy, parameters=[case.policy.theta])
    lost = case.by_state(table, case.solution.visits)
    found = case.expected(baselined(returns, case.action_value(table)), case.weight())
    close(found, exact - lost)
    assert float(lost.abs().max()) > 1e-6


@PROPERTY
@given(cases(), FRACTIONS)
def test_the_six_psi_agree_with_the_gradient(case: Case, decay: float) -> None:
    """Each with the critic it needs: total reward without weight, the others times gamma^t."""
    mdp, mask, weight = case.mdp, case.mask, case.weight()
    exact = objective_gradient(mdp, case.policy, parameters=[case.policy.theta])
    close(policy_gradient(mdp, case.policy, parameters=[case.policy.theta]), exact)
    reward, discount, cut = case.steps
    (right, right_next), (wrong, wrong_next) = case.critic(case.solution.value), case.critic(case.wrong)
    close(case.expected(total_reward(*case.steps, mask=mask), torch.ones_like(weight)), exact)
    returns = reward_to_go(*case.steps, mask=mask)
    action_value = case.action_value(case.solution.action_value)
    for psi in (
        returns,
        baselined(returns, wrong),
        action_value,
        baselined(action_value, wrong),
        action_value - right,
        case.action_value(case.solution.advantage),
        td_residual(reward, discount, right, right_next),
        gae(reward, discount, right, right_next, cut, gae_lambda=decay, mask=mask),
        gae(reward, discount, wrong, wrong_next, cut, gae_lambda=1.0, mask=mask),
        lambda_return(reward, discount, right_next, cut, trace_decay=decay, mask=mask),
        lambda_return(reward, discount, wrong_next, cut, trace_decay=1.0, mask=mask),
        n_step_return(reward, discount, right_next, cut, steps=2, mask=mask),
        n_step_return(reward, discount, wrong_next, cut, steps=STATES, mask=mask),
    ):
        close(case.expected(psi, weight), exact)


@PROPERTY
@given(cases(), FRACTIONS)
def test_the_six_psi_disagree_where_they_should(case: Case, decay: float) -> None:
    """A critic off by e biases the TD residual by sum_s eta sum_a grad pi gamma E[e(s')], and what bootstraps from it.

    GAE's bias is (1 - lambda) sum_l lambda^l times that of l steps later; a q off by e(s, a) has the bias of e.
    """
    mdp, mask, weight = case.mdp, case.mask, case.weight()
    exact = objective_gradient(mdp, case.policy, parameters=[case.policy.theta])
    reward, discount, cut = case.steps
    wrong, wrong_next = case.critic(case.wrong)
    error = case.wrong - case.solution.value
    error[STATES] = 0.0
    following = mdp.gamma * mdp.transition @ error
    one_step = case.by_state(following, case.solution.visits)
    close(case.expected(td_residual(reward, discount, wrong, wrong_next), weight), exact + one_step)
    close(case.expected(n_step_return(reward, discount, wrong_next, cut, steps=1, mask=mask), weight), exact + one_step)
    assert float(one_step.abs().max()) > 1e-6
    bias, move = torch.zeros_like(exact), torch.einsum("sa,sax->sx", case.solution.policy, mdp.transition)
    for later in range(STATES):
        distance = mdp.gamma ** (later + 1) * mdp.transition @ torch.linalg.matrix_power(move, later) @ error
        bias = bias + (1 - decay) * decay**later * case.by_state(distance, case.solution.visits)
    close(
        case.expected(gae(reward, discount, wrong, wrong_next, cut, gae_lambda=decay, mask=mask), weight), exact + bias
    )
    returns = lambda_return(reward, discount, wrong_next, cut, trace_decay=decay, mask=mask)
    close(case.expected(returns, weight), exact + bias)
    table = normal(3, STATES + 1, ACTIONS)
    off = case.action_value(case.solution.action_value + table)
    close(case.expected(off, weight), exact + case.by_state(table, case.solution.visits))


@PROPERTY
@given(cases())
def test_without_gamma_to_the_t_it_is_the_other_direction(case: Case) -> None:
    """sum_s eta_1(s) sum_a grad pi q_gamma: at gamma = 1 the same, below it not; total reward takes no weight."""
    exact = objective_gradient(case.mdp, case.policy, parameters=[case.policy.theta])
    returns = reward_to_go(*case.steps, mask=case.mask)
    one = torch.ones_like(returns)
    dropped = case.expected(returns, one)
    close(dropped, case.by_state(case.solution.action_value, case.solution.undiscounted_visits))
    other = policy_gradient(case.mdp, case.policy, gradient="undiscounted_states", parameters=[case.policy.theta])
    close(dropped, other)
    twice = case.expected(total_reward(*case.steps, mask=case.mask), case.weight())
    if case.mdp.gamma == 1.0:
        close(dropped, exact)
        close(twice, exact)
    else:
        assert float((dropped - exact).abs().max()) > 1e-6
        assert float((twice - exact).abs().max()) > 1e-6


@PROPERTY
@given(cases())
def test_past_rewards_contribute_nothing(case: Case) -> None:
    """E[grad l_t r_k] = 0 for every k < t, and not for k = t."""
    reward, time = case.rows.trajectory.reward, case.rows.trajectory.time
    for t in range(STATES):
        here = (time == t).to(torch.float64)
        for k in range(t):
            past = (reward * case.mask)[:, k : k + 1].expand_as(reward)
            found = case.expected(past, here)
            close(found, torch.zeros_like(found))
    assert float(case.expected(reward, torch.ones_like(reward)).abs().max()) > 1e-6


@PROPERTY
@given(cases(), SEEDS)
def test_performance_difference(case: Case, seed: int) -> None:
    """J(pi') - J(pi) = sum_s eta'_gamma(s) sum_a pi'(a|s) A_pi(s, a) = E'[sum_t gamma^t delta_t] with V = v_pi."""
    other = TabularPolicy(STATES + 1, ACTIONS, normal(seed, STATES + 1, ACTIONS))
    with torch.no_grad():
        after = solve(case.mdp, other)
    gain = after.objective - case.solution.objective
    close((after.visits.unsqueeze(-1) * after.policy * case.solution.advantage).sum(), gain)
    rows = enumerate_episodes(case.mdp, other)
    moved = Case(mdp=case.mdp, policy=other, rows=rows, solution=after, wrong=case.wrong)
    reward, discount, cut = moved.steps
    value, following = moved.critic(case.solution.value)
    advantage = case.solution.advantage[rows.state, rows.trajectory.action]
    for psi in (advantage, td_residual(reward, discount, value, following)):
        total = (moved.weight() * psi).masked_fill(~moved.mask, 0.0).sum(-1)
        close((rows.behaviour_probability * total).sum(), gain)
    whole = gae(reward, discount, value, following, cut, gae_lambda=1.0, mask=moved.mask)[:, 0]
    close((rows.behaviour_probability * whole).sum(), gain)


@PROPERTY
@given(cases(), SEEDS)
def test_importance_weights_correct_the_steps_of_another_policy(case: Case, seed: int) -> None:
    """Ratios of all other steps, times the step's own: E_b[...] is the gradient; the weights have mean 1 at every t."""
    policy = TabularPolicy(STATES + 1, ACTIONS, normal(seed, STATES + 1, ACTIONS))
    exact = objective_gradient(case.mdp, policy, parameters=[policy.theta])
    trajectory = case.rows.trajectory
    log_prob = policy.log_prob(trajectory.observation, trajectory.action)
    log_ratio = (log_prob - trajectory.behaviour_log_prob).detach().masked_fill(~case.mask, 0.0)
    whole = log_ratio.cumsum(-1)
    chance = case.rows.behaviour_probability
    close(chance @ whole.exp(), torch.ones(whole.shape[-1], dtype=torch.float64))
    psi = (whole - log_ratio).exp() * reward_to_go(*case.steps, mask=case.mask)
    future = torch.flip(torch.flip(log_ratio, [-1]).cumsum(-1), [-1]) - log_ratio
    psi = psi * future.exp()
    value = importance_weighted(log_prob, trajectory.behaviour_log_prob, psi) * case.weight()
    found = torch.autograd.grad(chance @ value.masked_fill(~case.mask, 0.0).sum(-1), policy.theta)[0]
    close(found.flatten(), exact)


@PROPERTY
@given(cases(), SEEDS)
def test_vtrace_unclipped_has_the_values_of_the_policy_that_learns(case: Case, seed: int) -> None:
    """E_b[v_0 | s_0] = v_pi(s_0) for any V, where neither weight is clipped."""
    policy = TabularPolicy(STATES + 1, ACTIONS, normal(seed, STATES + 1, ACTIONS))
    with torch.no_grad():
        exact = solve(case.mdp, policy).value
        log_prob = policy.log_prob(case.rows.trajectory.observation, case.rows.trajectory.action)
    reward, discount, cut = case.steps
    critic = case.critic(case.wrong)
    found = vtrace(
        log_prob,
        case.rows.trajectory.behaviour_log_prob,
        reward,
        discount,
        *critic,
        cut,
        rho_clip=1e9,
        trace_clip=1e9,
        mask=case.mask,
    )
    chance = case.rows.behaviour_probability
    for state in range(STATES):
        here = case.rows.state[:, 0] == state
        close((chance * found.value_target[:, 0])[here].sum() / chance[here].sum(), exact[state])


@pytest.mark.parametrize("limit", [1, 2])
@PROPERTY
@given(cases())
def test_a_time_limit_that_bootstraps_changes_the_visits_alone(limit: int, case: Case) -> None:
    """Cut by a limit, V' = v(final): q stays that of the problem; counted as termination it is another gradient."""
    rows = enumerate_episodes(case.mdp, case.policy, limit=limit)
    trajectory = rows.trajectory
    cut_short = Case(mdp=case.mdp, policy=case.policy, rows=rows, solution=case.solution, wrong=case.wrong)
    value = case.solution.value[rows.state]
    assert isinstance(trajectory.final_observation, Tensor)
    following = trajectory.next_value(value, case.solution.value[trajectory.final_observation])
    reward, discount, _ = cut_short.steps
    cut = trajectory.terminated | trajectory.truncated
    exact = policy_gradient(case.mdp, case.policy, limit=limit, parameters=[case.policy.theta])
    psi = gae(reward, discount, value, following, cut, gae_lambda=0.7, mask=trajectory.mask)
    close(cut_short.expected(psi, cut_short.weight()), exact)
    returns = reward_to_go(reward, discount, cut, bootstrap=following, mask=trajectory.mask)
    close(cut_short.expected(returns, cut_short.weight()), exact)
    as_termination = reward_to_go(reward, discount.masked_fill(cut, 0.0), cut, mask=trajectory.mask)
    bias = (discount * following).masked_fill(~cut, 0.0)
    lost = reward_to_go(bias, discount, cut, mask=trajectory.mask)
    close(returns[trajectory.mask], (as_termination + lost)[trajectory.mask])
    wrong = cut_short.expected(as_termination, cut_short.weight())
    assert float((wrong - exact).abs().max()) > 1e-6

"""TD on exact problems: Baird's counterexample, and TD(lambda) with eligibility traces on random walks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from upslope.estimators import accumulate_trace, lambda_return, td_residual
from upslope.exact import FiniteMDP, Rows, TabularPolicy, baird_features, enumerate_episodes, problem, solve

BEHAVIOUR = torch.tensor([6 / 7, 1 / 7], dtype=torch.float64)
SOLID = torch.tensor([0.0, 1.0], dtype=torch.float64)


def expected_td_step(weight: Tensor, share: Tensor, target: Tensor) -> Tensor:
    """E[rho delta x(s)] over s ~ share, a ~ behaviour and what follows, [8]; rho = target / behaviour."""
    mdp, features = problem("baird").mdp, baird_features()
    value = features @ weight
    step = torch.zeros(8, dtype=torch.float64)
    for action in range(2):
        following = mdp.transition[:, action] @ value
        delta = td_residual(torch.zeros(7, dtype=torch.float64), torch.full_like(value, mdp.gamma), value, following)
        ratio = target[action] / BEHAVIOUR[action]
        step += (share * BEHAVIOUR[action] * ratio * delta) @ features
    return step


def shares(policy: Tensor) -> Tensor:
    """Where the policy spends its steps: mu of the chain that never ends."""
    table = TabularPolicy(7, 2, policy.log().expand(7, 2))
    return solve(replace(problem("baird").mdp, kind="continuing"), table).on_policy.detach()


def update_matrix(share: Tensor, target: Tensor) -> Tensor:
    """Without rewards the expected update is linear in the weights."""
    columns = [expected_td_step(unit, share, target) for unit in torch.eye(8, dtype=torch.float64)]
    return torch.stack(columns, -1)


def growth(share: Tensor, target: Tensor) -> float:
    """The largest real part of an eigenvalue of the expected update."""
    return float(torch.linalg.eigvals(update_matrix(share, target)).real.max())


def run(share: Tensor, target: Tensor, steps: int) -> list[float]:
    """Largest weight after each expected step of 0.01, from the book's first weights."""
    weight = torch.tensor([1.0, 1, 1, 1, 1, 1, 10, 1], dtype=torch.float64)
    matrix, largest = update_matrix(share, target), list[float]()
    for _ in range(steps):
        weight = weight + 0.01 * (matrix @ weight)
        largest.append(float(weight.abs().max()))
    return largest


def test_the_behaviour_policy_of_baird_visits_all_states_alike() -> None:
    torch.testing.assert_close(shares(BEHAVIOUR), torch.full((7,), 1 / 7, dtype=torch.float64), rtol=0, atol=1e-14)


def test_off_policy_semi_gradient_td_diverges() -> None:
    share = shares(BEHAVIOUR)
    assert growth(share, SOLID) > 0.01
    largest = run(share, SOLID, 20_000)
    assert largest[-1] > 100 * largest[0]
    assert largest[-1] > 1.5 * largest[-5000]


def test_on_policy_semi_gradient_td_does_not_diverge() -> None:
    share = shares(BEHAVIOUR)
    assert growth(share, BEHAVIOUR) < 1e-12
    largest = run(share, BEHAVIOUR, 20_000)
    assert max(largest) < 10.1


def test_the_features_of_baird_represent_the_true_values() -> None:
    features = baird_features()
    assert features.shape == (7, 8)
    assert torch.linalg.matrix_rank(features) == 7
    assert features[2].tolist() == [0, 0, 2, 0, 0, 0, 0, 1]
    assert features[6].tolist() == [0, 0, 0, 0, 0, 0, 1, 2]


def walk(name: str, limit: int) -> tuple[FiniteMDP, Rows]:
    """The even walk from every state, cut after some steps."""
    mdp = problem(name).mdp
    even = (~mdp.terminal).to(torch.float64)
    mdp = replace(mdp, start=even / even.sum())
    return mdp, enumerate_episodes(mdp, TabularPolicy(mdp.states, 2), limit=limit)


def residuals(rows: Rows, value: Tensor, gamma: float) -> Tensor:
    trajectory = rows.trajectory
    here = value[rows.state]
    following = trajectory.next_value(here, value[trajectory.final_observation])
    return td_residual(trajectory.reward, trajectory.discount(gamma), here, following) * trajectory.mask


def backward_view(rows: Rows, value: Tensor, gamma: float, trace_decay: float) -> Tensor:
    """sum_t delta_t z_t of each row, [R, S]."""
    delta = residuals(rows, value, gamma)
    trace = torch.zeros(len(rows), len(value), dtype=torch.float64)
    total = torch.zeros_like(trace)
    for step in range(delta.shape[1]):
        slope = torch.nn.functional.one_hot(rows.state[:, step], len(value)).to(torch.float64)
        trace = accumulate_trace(trace, slope, decay=gamma * trace_decay)
        total += delta[:, step : step + 1] * trace
    return total


@pytest.mark.parametrize("trace_decay", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_backward_and_forward_views_are_the_same_offline(gamma: float, trace_decay: float) -> None:
    """Row by row: sum_t delta_t z_t = sum_t (G^lambda_t - V_t) grad V_t, for any V."""
    _, rows = walk("random-walk-5", 6)
    trajectory = rows.trajectory
    value = torch.tensor([0.0, 0.3, -1.0, 0.7, 2.0, 0.1, 0.0], dtype=torch.float64)
    here = value[rows.state]
    target = lambda_return(
        trajectory.reward,
        trajectory.discount(gamma),
        trajectory.next_value(here, value[trajectory.final_observation]),
        trajectory.cut | (torch.arange(6) == rows.length.unsqueeze(-1) - 1),
        trace_decay=trace_decay,
    )
    forward = torch.zeros(len(rows), 7, dtype=torch.float64)
    forward.scatter_add_(1, rows.state, (target - here) * trajectory.mask)
    torch.testing.assert_close(backward_view(rows, value, gamma, trace_decay), forward, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trace_decay", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("name", "limit"), [("random-walk-5", 8), ("random-walk-19", 5)])
def test_td_lambda_converges_to_the_published_values(name: str, limit: int, trace_decay: float) -> None:
    """The expected offline update is b - A v: its fixed point are the values, and small steps lead there."""
    mdp, rows = walk(name, limit)
    named = problem(name)
    inside = (~mdp.terminal).nonzero().squeeze(-1)
    published = [named.published[f"value of state {int(state)} of the even walk"] for state in inside]

    def update(value: Tensor) -> Tensor:
        whole = torch.zeros(mdp.states, dtype=torch.float64).index_copy(0, inside, value)
        return (rows.behaviour_probability @ backward_view(rows, whole, 1.0, trace_decay))[inside]

    offset = update(torch.zeros(len(inside), dtype=torch.float64))
    matrix = torch.stack([offset - update(unit) for unit in torch.eye(len(inside), dtype=torch.float64)], -1)
    assert torch.linalg.eigvals(matrix).real.min() > 1e-4
    assert torch.linalg.solve(matrix, offset).tolist() == pytest.approx(published, abs=1e-10)
    value, contraction = torch.zeros_like(offset), torch.eye(len(inside), dtype=torch.float64) - 0.5 * matrix
    for _ in range(20_000):
        value = contraction @ value + 0.5 * offset
    assert value.tolist() == pytest.approx(published, abs=1e-6)

"""Returns against loops over single trajectories, by hand, and by their identities."""

from dataclasses import replace

import naive_twins
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive_twins import Steps, steps

from upslope.estimators import (
    differential_return,
    differential_td_residual,
    discount_weight,
    gae,
    lambda_return,
    n_step_return,
    reward_to_go,
    td_residual,
    total_reward,
    vtrace,
)

LAMBDAS = st.sampled_from([0.0, 0.3, 0.95, 1.0])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@given(steps(), st.booleans(), st.booleans())
def test_reward_to_go_equals_the_loop(data: Steps, masked: bool, bootstrapped: bool) -> None:
    found = reward_to_go(
        data.reward,
        data.discount,
        data.cut,
        bootstrap=data.next_value if bootstrapped else None,
        mask=data.mask if masked else None,
    )
    close(
        found,
        naive_twins.per_trajectory(data, lambda t: naive_twins.reward_to_go(t, bootstrap=bootstrapped), masked=masked),
    )


@given(steps(), st.booleans())
def test_total_reward_is_the_reward_to_go_of_the_first_step(data: Steps, masked: bool) -> None:
    def total(trajectory: list[naive_twins.Step]) -> list[float]:
        return [naive_twins.reward_to_go(trajectory, bootstrap=False)[0]] * len(trajectory)

    found = total_reward(data.reward, data.discount, data.cut, mask=data.mask if masked else None)
    close(found, naive_twins.per_trajectory(data, total, masked=masked))


@given(steps(), st.booleans(), LAMBDAS)
def test_lambda_return_equals_the_loop(data: Steps, masked: bool, trace_decay: float) -> None:
    mask = data.mask if masked else None
    found = lambda_return(data.reward, data.discount, data.next_value, data.cut, trace_decay=trace_decay, mask=mask)
    close(
        found,
        naive_twins.per_trajectory(data, lambda t: naive_twins.lambda_return(t, trace_decay), masked=masked),
    )


@given(steps(), st.booleans(), st.integers(1, 40))
def test_n_step_return_equals_the_loop(data: Steps, masked: bool, count: int) -> None:
    mask = data.mask if masked else None
    found = n_step_return(data.reward, data.discount, data.next_value, data.cut, steps=count, mask=mask)
    close(
        found,
        naive_twins.per_trajectory(data, lambda t: naive_twins.n_step_return(t, count), masked=masked),
    )


@given(steps(), st.booleans(), LAMBDAS, st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.5, 1.0, 3.0]))
def test_vtrace_equals_the_sum_of_the_paper(
    data: Steps, masked: bool, trace_decay: float, rho_clip: float, trace_clip: float
) -> None:
    def correction(trajectory: list[naive_twins.Step]) -> list[float]:
        return naive_twins.vtrace_correction(trajectory, trace_decay, rho_clip, trace_clip)

    def advantage(trajectory: list[naive_twins.Step]) -> list[float]:
        after = [*correction(trajectory)[1:], 0.0]
        return [
            min(rho_clip, step.ratio) * (step.reward + step.discount * (step.next_value + c) - step.value)
            for step, c in zip(trajectory, after, strict=True)
        ]

    found = vtrace(
        data.log_prob,
        data.behaviour_log_prob,
        data.reward,
        data.discount,
        data.value,
        data.next_value,
        data.cut,
        trace_decay=trace_decay,
        rho_clip=rho_clip,
        trace_clip=trace_clip,
        mask=data.mask if masked else None,
    )
    close(found.value_target - data.value, naive_twins.per_trajectory(data, correction, masked=masked))
    close(found.advantage, naive_twins.per_trajectory(data, advantage, masked=masked))


def consistent(data: Steps) -> Steps:
    """The same steps with V' = V of the next step inside every trajectory."""
    following = torch.where(data.cut, data.next_value, data.value.roll(-1, -1))
    following[..., -1] = data.next_value[..., -1]
    return replace(data, next_value=following)


def test_vtrace_ratio_carries_no_gradient() -> None:
    data = naive_twins.make_steps(3, (2, 6), 0.9)
    log_prob = data.log_prob.requires_grad_()
    found = vtrace(log_prob, data.behaviour_log_prob, data.reward, data.discount, data.value, data.next_value, data.cut)
    assert not any(tensor.requires_grad for tensor in found)


def test_two_trajectories_of_a_row_by_hand() -> None:
    reward = torch.tensor([1.0, 2.0, 4.0, 8.0])
    discount = torch.tensor([0.5, 0.0, 0.5, 0.5])
    cut = torch.tensor([False, True, False, True])
    following = torch.tensor([100.0, 100.0, 100.0, 10.0])
    assert reward_to_go(reward, discount, cut, bootstrap=following).tolist() == [2.0, 2.0, 10.5, 13.0]
    assert reward_to_go(reward, discount, cut).tolist() == [2.0, 2.0, 8.0, 8.0]
    assert total_reward(reward, discount, cut).tolist() == [2.0, 2.0, 8.0, 8.0]
    two = n_step_return(reward, discount, following, cut, steps=2)
    assert two.tolist() == [2.0, 2.0, 10.5, 13.0]
    half = lambda_return(reward, discount, following, cut, trace_decay=0.5)
    assert half.tolist() == [1 + 0.5 * (50 + 1), 2.0, 4 + 0.5 * (50 + 6.5), 13.0]


def test_skipped_steps_let_no_time_pass() -> None:
    reward = torch.tensor([1.0, 77.0, 2.0, 77.0])
    discount = torch.full((4,), 0.5)
    cut = torch.tensor([False, False, False, True])
    mask = torch.tensor([True, False, True, False])
    following = torch.tensor([-1.0, 6.0, -1.0, 8.0])
    assert reward_to_go(reward, discount, cut, bootstrap=following, mask=mask).tolist() == [4.0, 0.0, 6.0, 0.0]
    assert lambda_return(reward, discount, following, cut, trace_decay=0.0, mask=mask).tolist() == [4, 0, 6, 0]
    assert total_reward(reward, discount, cut, mask=mask).tolist() == [2.0, 0.0, 2.0, 0.0]
    assert n_step_return(reward, discount, following, cut, steps=1, mask=mask).tolist() == [4.0, 0.0, 6.0, 0.0]
    ended = torch.tensor([0.5, 0.5, 0.5, 0.0])
    assert reward_to_go(reward, ended, cut, bootstrap=following, mask=mask).tolist() == [2.0, 0.0, 2.0, 0.0]


def test_a_bootstrap_is_read_only_where_it_counts() -> None:
    nan = torch.nan
    cut = torch.tensor([False, True, True])
    discount = torch.tensor([0.5, 0.0, 0.5])
    found = reward_to_go(torch.ones(3), discount, cut, bootstrap=torch.tensor([nan, nan, 4.0]))
    assert found.tolist() == [1.5, 1.0, 3.0]
    terminal = torch.tensor([2.0, nan, 4.0])
    assert lambda_return(torch.ones(3), discount, terminal, cut, trace_decay=0.5).tolist() == [1.75, 1.0, 3.0]


def test_padding_with_rubbish_changes_nothing() -> None:
    data = naive_twins.make_steps(5, (3, 7), 0.9)
    ends = data.cut.clone()
    ends[:, -1] = True
    rubbish = torch.full((3, 4), torch.nan, dtype=torch.float64)
    off = torch.zeros(3, 4, dtype=torch.bool)

    def pad(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat((tensor, rubbish), -1)

    for end_of_padding in (off, ~off):
        cut, mask = torch.cat((ends, end_of_padding), -1), torch.cat((data.mask, off), -1)
        padded = [pad(tensor) for tensor in (data.reward, data.discount, data.next_value)]
        for function in (
            lambda r, g, v, c, m: lambda_return(r, g, v, c, trace_decay=0.7, mask=m),
            lambda r, g, v, c, m: n_step_return(r, g, v, c, steps=3, mask=m),
            lambda r, g, v, c, m: reward_to_go(r, g, c, bootstrap=v, mask=m),
            lambda r, g, v, c, m: total_reward(r, g, c, mask=m),
            lambda r, g, v, c, m: gae(r, g, v, v, c, gae_lambda=0.7, mask=m),
            lambda r, g, v, c, m: vtrace(v, v, r, g, v, v, c, mask=m).advantage,
        ):
            plain = function(data.reward, data.discount, data.next_value, ends, data.mask)
            found = function(*padded, cut, mask)
            torch.testing.assert_close(found[:, :7], plain, rtol=1e-12, atol=1e-12)
            assert (found[:, 7:] == 0).all()


def test_differential_return_and_residual_agree() -> None:
    generator = torch.Generator().manual_seed(2)
    reward, value = torch.randn(2, 6, generator=generator), torch.randn(2, 6, generator=generator)
    after = torch.randn(2, 1, generator=generator)
    following = torch.cat((value[:, 1:], after), -1)
    cut = torch.tensor([False] * 5 + [True]).expand(2, 6)
    residual = differential_td_residual(reward, 0.3, value, following)
    summed = residual.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(differential_return(reward, 0.3, following, cut) - value, summed)
    torch.testing.assert_close(td_residual(reward - 0.3, torch.ones_like(reward), value, following), residual)


def test_discount_weight() -> None:
    assert discount_weight(torch.tensor([0, 3]), 0.0).tolist() == [1.0, 0.0]
    assert discount_weight(torch.tensor([0, 3]), 1.0).tolist() == [1.0, 1.0]
    assert discount_weight(torch.tensor([[2]]), 0.5, dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="gamma must lie between"):
        discount_weight(torch.tensor([0]), 1.1)
    with pytest.raises(ValueError, match="time must be an integer tensor"):
        discount_weight(torch.tensor([0.0]), 0.9)


def test_errors_name_the_argument() -> None:
    ok, cut = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"discount must have the shape of reward, \(2, 3\); got \(3,\)"):
        reward_to_go(ok, torch.zeros(3), cut)
    with pytest.raises(ValueError, match="bootstrap must have the shape"):
        reward_to_go(ok, ok, cut, bootstrap=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="cut must be a boolean tensor"):
        reward_to_go(ok, ok, ok)
    with pytest.raises(ValueError, match="mask must be a boolean tensor"):
        total_reward(ok, ok, cut, mask=ok)
    with pytest.raises(ValueError, match="mask must have the shape of cut"):
        total_reward(ok, ok, cut, mask=cut[:1])
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        n_step_return(ok, ok, ok, cut, steps=0)
    with pytest.raises(ValueError, match="trace_decay must lie between"):
        lambda_return(ok, ok, ok, cut, trace_decay=-0.1)
    with pytest.raises(ValueError, match="must be positive"):
        vtrace(ok, ok, ok, ok, ok, ok, cut, rho_clip=0.0)
    with pytest.raises(ValueError, match="behaviour_log_prob must have the shape"):
        vtrace(ok, ok[:1], ok, ok, ok, ok, cut)

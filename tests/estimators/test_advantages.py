"""Advantages: Tick, identities, groups, standardisation."""

import naive_twins
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive_twins import Steps, steps

from upslope.estimators import (
    baselined,
    gae,
    group_relative,
    leave_one_out,
    standardise,
    td_residual,
)

LAMBDAS = st.sampled_from([0.0, 0.3, 0.95, 1.0])
TICK = [7.275, 6.215, 5.021, 3.640, 2.000]
TICK_TERMINATING = [4.856, 2.856, 0.355, -2.840, -7.000]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def tick(*, terminates: bool) -> tuple[torch.Tensor, ...]:
    """Twelve steps: observation k / 5, reward 1, five steps to the end, V(o) = 10 o, gamma 0.9."""
    k = torch.arange(12) % 5
    cut = (k == 4) | (torch.arange(12) == 11)
    discount = torch.full((12,), 0.9).masked_fill((k == 4) & terminates, 0.0)
    return torch.ones(12), discount, 2.0 * k, 2.0 * (k + 1), cut


def test_tick() -> None:
    found = gae(*tick(terminates=False), gae_lambda=0.8)
    expected = torch.tensor([*TICK, *TICK, 4.672, 2.600])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)
    torch.testing.assert_close(found[:2], torch.tensor([7.27478272, 6.214976]), rtol=0, atol=1e-5)


def test_tick_that_terminates() -> None:
    found = gae(*tick(terminates=True), gae_lambda=0.8)
    expected = torch.tensor([*TICK_TERMINATING, *TICK_TERMINATING, 4.672, 2.600])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("terminates", [False, True])
def test_tick_with_reset_steps_between(terminates: bool) -> None:
    plain = torch.stack([tensor.double() for tensor in tick(terminates=terminates)])
    rubbish = torch.tensor([[-50.0], [0.9], [30.0], [-20.0], [0.0]]).double()
    columns = torch.cat((plain[:, :5], rubbish, plain[:, 5:10], rubbish, plain[:, 10:]), -1)
    mask = torch.ones(14, dtype=torch.bool)
    mask[[5, 11]] = False
    reward, discount, value, next_value, cut = columns.unbind()
    found = gae(reward, discount, value, next_value, cut.bool(), gae_lambda=0.8, mask=mask)
    expected = gae(*plain[:4].unbind(), plain[4].bool(), gae_lambda=0.8)
    assert (found[~mask] == 0).all()
    close(found[mask], expected)


@given(steps(), st.booleans(), LAMBDAS)
def test_gae_equals_the_sum_of_the_paper(data: Steps, masked: bool, gae_lambda: float) -> None:
    mask = data.mask if masked else None
    found = gae(data.reward, data.discount, data.value, data.next_value, data.cut, gae_lambda=gae_lambda, mask=mask)
    close(found, naive_twins.per_trajectory(data, lambda t: naive_twins.gae(t, gae_lambda), masked=masked))


@given(steps(holes=False), LAMBDAS)
def test_a_full_mask_is_no_mask(data: Steps, gae_lambda: float) -> None:
    arguments = data.reward, data.discount, data.value, data.next_value, data.cut
    close(
        gae(*arguments, gae_lambda=gae_lambda, mask=data.mask),
        gae(*arguments, gae_lambda=gae_lambda),
    )


def test_a_skipped_stretch_is_as_if_it_were_cut_out() -> None:
    """Two chosen steps, two that were not, one more: V' of the second is the critic at the last."""
    full = torch.full((5,), 0.9).double()
    reward = torch.tensor([1.0, 2.0, 50.0, 60.0, 3.0]).double()
    value = torch.tensor([1.0, 2.0, -70.0, -80.0, 5.0]).double()
    following = torch.tensor([2.0, -70.0, -80.0, 5.0, 7.0]).double()
    mask = torch.tensor([True, True, False, False, True])
    found = gae(reward, full, value, following, ~mask & False, gae_lambda=0.8, mask=mask)
    keep = torch.tensor([0, 1, 4])
    short = gae(
        reward[keep],
        full[keep],
        value[keep],
        torch.tensor([2.0, 5.0, 7.0]).double(),
        torch.zeros(3, dtype=torch.bool),
        gae_lambda=0.8,
    )
    close(found[keep], short)


def test_gae_of_an_empty_mask_is_zero() -> None:
    data = naive_twins.make_steps(1, (2, 5), 0.9)
    off = torch.zeros(2, 5, dtype=torch.bool)
    found = gae(data.reward, data.discount, data.value, data.next_value, data.cut, gae_lambda=0.9, mask=off)
    assert (found == 0).all()


def test_gae_is_differentiable_in_the_values() -> None:
    data = naive_twins.make_steps(4, (2, 5), 0.9)
    value = data.value.requires_grad_()
    gae(data.reward, data.discount, value, data.next_value, data.cut, gae_lambda=0.5)[0, 0].backward()
    assert value.grad is not None
    assert float(value.grad[0, 0]) == -1.0


def test_leave_one_out_by_hand_and_against_the_group_mean() -> None:
    total = torch.tensor([1.0, 4.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    group = torch.tensor([9, -3, 9, -3, 9])
    assert leave_one_out(total, group).tolist() == pytest.approx([0.5, 2.0, -1.0, -2.0, 0.5])
    sizes = torch.tensor([3.0, 2.0, 3.0, 2.0, 3.0], dtype=torch.float64)
    close(leave_one_out(total, group), sizes / (sizes - 1) * group_relative(total, group))


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_groups_equal_the_loop(seed: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(groups).repeat_interleave(4)[torch.randperm(4 * groups, generator=generator)]
    total = torch.randn(4 * groups, generator=generator, dtype=torch.float64)
    centred, loo, scaled = torch.zeros(3, 4 * groups, dtype=torch.float64)
    for g in range(groups):
        members = total[group == g]
        centred[group == g] = members - members.mean()
        loo[group == g] = members - (members.sum() - members) / 3
        scaled[group == g] = (members - members.mean()) / (members.std() + 1e-4)
    close(group_relative(total, group), centred)
    close(leave_one_out(total, group), loo)
    close(group_relative(total, group, scale="group", epsilon=1e-4), scaled)
    close(group_relative(total, group, scale="batch", epsilon=0.0), centred / total.std())
    shaped = group_relative(total.view(groups, 4), group.view(groups, 4))
    assert shaped.shape == (groups, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_batch_is_exactly_zero(dtype: torch.dtype) -> None:
    for size in [*range(2, 70), 1000, 4096]:
        for hundredths in range(1, 101, 3):
            constant = torch.full((size,), hundredths / 100, dtype=dtype)
            assert (standardise(constant, epsilon=1e-30) == 0).all()
        assert (standardise(constant, constant > 0, epsilon=1e-30) == 0).all()


def test_small_differences_on_large_totals_survive_float32() -> None:
    total = torch.tensor([1000.0, 1000.0625, 1000.125, 1000.0625])
    found = group_relative(total, torch.zeros(4, dtype=torch.long), scale="group", epsilon=0.0)
    torch.testing.assert_close(found, torch.tensor([-(1.5**0.5), 0.0, 1.5**0.5, 0.0]))


def test_group_errors() -> None:
    total = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"at least two members.*these have one: \[5\]"):
        leave_one_out(total, torch.tensor([1, 1, 5]))
    with pytest.raises(ValueError, match="group must have the shape of total"):
        group_relative(total, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="group must be an integer tensor"):
        group_relative(total, torch.tensor([1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="at least one trajectory"):
        group_relative(total[:0], torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="epsilon must be at least 0"):
        group_relative(total, torch.tensor([1, 1, 1]), epsilon=-1.0)
    with pytest.raises(ValueError, match="scale must be"):
        group_relative(total, torch.tensor([1, 1, 1]), scale="std")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="baseline must be"):
        group_relative(total, torch.tensor([1, 1, 1]), baseline="median")  # pyright: ignore[reportArgumentType]


def test_a_lone_success_is_not_scaled_by_the_others_and_the_failures_are() -> None:
    """NeMo-RL's default on 1, 0 x 7: +1 for the success, -1/7 over the deviation sqrt(1/7) for a failure."""
    total, group = torch.tensor([1.0] + [0.0] * 7), torch.zeros(8, dtype=torch.long)
    found = group_relative(total, group, baseline="leave_one_out", scale="leave_one_out", epsilon=0.0)
    assert found.tolist() == pytest.approx([1.0] + [-(7**-0.5)] * 7)
    pair = group_relative(total[:2], group[:2], baseline="leave_one_out", scale="leave_one_out")
    assert pair.tolist() == [1.0, -1.0]
    awkward = torch.full((7,), 0.1)
    found = group_relative(awkward, group[:7], baseline="leave_one_out", scale="leave_one_out", epsilon=0.0)
    assert (found == 0.0).all()


def test_standardise() -> None:
    advantage = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64)
    found = standardise(advantage, epsilon=1e-12)
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(found.std()) == pytest.approx(1.0)
    assert float(standardise(advantage, epsilon=1e-12, ddof=0).std(correction=0)) == pytest.approx(1.0)
    close(standardise(advantage.mT, epsilon=1e-12), found.mT)


@given(st.integers(0, 2**31), st.integers(2, 30), st.sampled_from([0, 1]))
def test_standardise_with_a_mask_sees_only_the_chosen(seed: int, size: int, ddof: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    advantage = 5 + torch.randn(2, size, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, size, generator=generator) < 0.6
    mask[0, :2] = True
    expected = standardise(advantage[mask], ddof=ddof)
    found = standardise(advantage.masked_fill(~mask, torch.nan), mask, ddof=ddof)
    close(found[mask], expected)
    assert (found[~mask] == 0).all()


def test_standardise_errors() -> None:
    with pytest.raises(ValueError, match="needs more than 1 elements"):
        standardise(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="got 0"):
        standardise(torch.tensor([]))
    with pytest.raises(ValueError, match="got 1"):
        standardise(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="epsilon must be positive"):
        standardise(torch.tensor([1.0, 2.0]), epsilon=0.0)
    assert standardise(torch.tensor([3.0]), ddof=0).tolist() == [0.0]


def test_errors_name_the_argument() -> None:
    ok, cut = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"next_value must have the shape of reward, \(2, 3\); got \(2, 4\)"):
        gae(ok, ok, ok, torch.zeros(2, 4), cut, gae_lambda=0.9)
    with pytest.raises(ValueError, match="gae_lambda must lie between"):
        gae(ok, ok, ok, ok, cut, gae_lambda=1.5)
    with pytest.raises(ValueError, match="cut must be a boolean tensor"):
        gae(ok, ok, ok, ok, ok, gae_lambda=0.9)
    with pytest.raises(ValueError, match="baseline must have the shape of returns"):
        baselined(ok, ok[0])
    with pytest.raises(ValueError, match="value must have the shape of reward"):
        td_residual(ok, ok, ok[:, :1], ok)

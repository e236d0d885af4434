"""Running statistics against NumPy in float64; frozen unless told otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from upslope.policies import ObservationNormalizer, RewardNormalizer
from upslope.policies.normalizer import RunningStatistics
from upslope.spaces import Box, Composite, Discrete
from upslope.trajectory import Trajectory


def rewards(reward: Tensor, *, ended: Tensor | None = None, mask: Tensor | None = None) -> Trajectory:
    rows = reward.shape
    none = torch.zeros(rows, dtype=torch.bool)
    return Trajectory(
        observation=torch.zeros(*rows, 1),
        action=torch.zeros(rows, dtype=torch.int64),
        reward=reward,
        terminated=none if ended is None else ended,
        truncated=none,
        mask=~none if mask is None else mask,
        behaviour_log_prob=torch.zeros(rows),
        time=torch.zeros(rows, dtype=torch.int64),
        final_observation=torch.zeros(0, 1),
        final_index=torch.zeros(0, dtype=torch.int64),
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.floats(-1e6, 1e6), st.integers(0, 1000))
def test_merging_batches_equals_one_batch(sizes: list[int], offset: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    batches = [offset + generator.normal(size=(size, 3)) for size in sizes]
    together = np.concatenate(batches)
    statistics = RunningStatistics((3,))
    for batch in batches:
        statistics.merge(torch.from_numpy(batch))
    assert float(statistics.count) == len(together)
    if len(together):
        np.testing.assert_allclose(statistics.mean.numpy(), together.mean(0), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(statistics.variance.numpy(), together.var(0), rtol=1e-6, atol=1e-8)
    else:
        assert statistics.variance.tolist() == [1.0, 1.0, 1.0]


SPACE = Composite((("a.b/c", Box((2,), -np.inf, np.inf)), ("k", Discrete(3)), ("i", Box((1, 1, 1), 0, 255, "uint8"))))


def observations(seed: int, *lead: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "a.b/c": 100.0 + 5.0 * torch.randn(*lead, 2, generator=g),
        "k": torch.randint(3, lead, generator=g),
        "i": torch.randint(256, (*lead, 1, 1, 1), generator=g, dtype=torch.uint8),
    }


def test_standardises_what_the_mask_shows_and_leaves_choices_and_images_alone() -> None:
    normalizer = ObservationNormalizer(SPACE, clip=10.0)
    data, mask = observations(0, 3, 40), torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) < 0.7
    normalizer.update(data, mask)
    seen = data["a.b/c"][mask].double().numpy()
    out = normalizer(data)
    assert isinstance(out, dict)
    expected = (data["a.b/c"].double().numpy() - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8)
    np.testing.assert_allclose(out["a.b/c"].numpy(), expected, rtol=1e-9)
    assert out["k"] is data["k"]
    assert out["i"] is data["i"]


def test_using_it_never_moves_it_and_the_lean_twin_is_equal_to_the_bit_and_follows_updates() -> None:
    normalizer = ObservationNormalizer(SPACE, clip=1.5)
    lean = normalizer.lean()
    for seed in range(3):
        data = observations(seed, 8)
        state = {name: tensor.clone() for name, tensor in normalizer.state_dict().items()}
        out, fast = normalizer(data), lean({name: tensor.numpy() for name, tensor in data.items()})
        for_gradients = normalizer({**data, "a.b/c": data["a.b/c"].clone().requires_grad_()})
        for name, tensor in normalizer.state_dict().items():
            assert torch.equal(tensor, state[name])
        np.testing.assert_array_equal(out["a.b/c"].numpy(), fast["a.b/c"])
        np.testing.assert_array_equal(for_gradients["a.b/c"].detach().numpy(), fast["a.b/c"])
        assert float(np.abs(fast["a.b/c"]).max()) <= 1.5
        normalizer.update(data, torch.ones(8, dtype=torch.bool))


def test_a_single_leaf_space() -> None:
    normalizer = ObservationNormalizer(Box((2,), -1.0, 1.0), clip=10.0)
    data = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    normalizer.update(data, torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(normalizer(data), torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64))
    np.testing.assert_array_equal(normalizer.lean()(data.numpy()), normalizer(data).numpy())


def test_refuses_what_is_not_finite_by_name_and_changes_nothing() -> None:
    normalizer = ObservationNormalizer(SPACE, clip=10.0)
    data = observations(0, 2, 3)
    data["a.b/c"][1, 1, 0] = float("nan")
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'a\.b/c' is not finite: nan"):
        normalizer.update(data, mask)
    assert float(normalizer.statistics[0].count) == 0.0
    mask[1, 1] = False
    normalizer.update(data, mask)
    assert float(normalizer.statistics[0].count) == 5.0


def test_statistics_survive_saving_to_the_bit() -> None:
    normalizer, copy = (ObservationNormalizer(SPACE, clip=10.0) for _ in range(2))
    normalizer.update(observations(3, 7), torch.ones(7, dtype=torch.bool))
    copy.load_state_dict(normalizer.state_dict())
    for name, tensor in normalizer.state_dict().items():
        assert tensor.dtype == torch.float64
        assert torch.equal(copy.state_dict()[name], tensor)


# --- rewards ---------------------------------------------------------------------------------------------------------


def by_hand(chunks: list[tuple[Tensor, Tensor, Tensor]], gamma: float) -> list[float]:
    """Every running return in turn, one environment after the other, step by step."""
    found: list[float] = []
    for row in range(len(chunks[0][0])):
        running = 0.0
        for reward, ended, mask in chunks:
            for t in range(reward.shape[1]):
                if mask[row, t]:
                    running = gamma * running + float(reward[row, t])
                    found.append(running)
                if ended[row, t]:
                    running = 0.0
    return found


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_scale_is_the_spread_of_the_running_return_across_rollouts(gamma: float) -> None:
    g = torch.Generator().manual_seed(2)
    normalizer = RewardNormalizer(clip=10.0)
    chunks = []
    for _ in range(3):
        reward = torch.randn(2, 11, generator=g)
        ended = torch.rand(2, 11, generator=g) < 0.2
        mask = torch.ones(2, 11, dtype=torch.bool)
        mask[:, 1:] = ~ended[:, :-1] | (torch.rand(2, 10, generator=g) < 0.5)
        ended &= mask
        chunks.append((reward, ended, mask))
        scaled = normalizer.scale(rewards(reward, ended=ended, mask=mask), gamma)
    returns = by_hand(chunks, gamma)
    assert float(normalizer.statistics.count) == len(returns)
    assert float(normalizer.statistics.variance) == pytest.approx(np.var(returns), rel=1e-9)
    torch.testing.assert_close(scaled, (reward.double() / np.sqrt(np.var(returns) + 1e-8)).float())


def test_one_long_rollout_equals_two_short_ones() -> None:
    reward = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    whole, parts = RewardNormalizer(clip=10.0), RewardNormalizer(clip=10.0)
    whole.scale(rewards(reward), 0.99)
    parts.scale(rewards(reward[:, :7]), 0.99)
    restored = RewardNormalizer(clip=10.0)
    restored.load_state_dict(parts.state_dict())
    restored.scale(rewards(reward[:, 7:]), 0.99)
    torch.testing.assert_close(restored.statistics.variance, whole.statistics.variance, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(restored.running_return, whole.running_return, rtol=1e-12, atol=0.0)


def test_rewards_keep_their_sign_are_clipped_and_never_written_on() -> None:
    normalizer = RewardNormalizer(clip=2.0)
    reward = torch.tensor([[1.0, -1.0, 0.0, 1000.0]])
    before = reward.clone()
    normalizer.statistics.merge(torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(normalizer(reward), torch.tensor([[1.0, -1.0, 0.0, 2.0]]))
    normalizer.scale(rewards(reward), 0.9)
    assert torch.equal(reward, before)


def test_refuses_rewards_that_are_not_finite_and_another_number_of_environments() -> None:
    normalizer = RewardNormalizer(clip=10.0)
    with pytest.raises(ValueError, match="inf in row 1 at step 0"):
        normalizer.scale(rewards(torch.tensor([[0.0], [float("inf")]])), 0.9)
    assert float(normalizer.statistics.count) == 0.0
    normalizer.scale(rewards(torch.ones(2, 3)), 0.9)
    with pytest.raises(ValueError, match=r"2 environments and got a trajectory of 3.*restart"):
        normalizer.scale(rewards(torch.ones(3, 3)), 0.9)
    normalizer.restart()
    normalizer.scale(rewards(torch.ones(3, 3)), 0.9)


def test_whole_episodes_may_come_in_any_number() -> None:
    normalizer = RewardNormalizer(clip=10.0)
    for rows in (2, 5):
        ended = torch.zeros(rows, 4, dtype=torch.bool)
        ended[:, 2] = True
        mask = torch.ones(rows, 4, dtype=torch.bool)
        mask[:, 3] = False
        normalizer.scale(rewards(torch.ones(rows, 4), ended=ended, mask=mask), 0.5)
    assert float(normalizer.statistics.count) == 21.0
    assert float(normalizer.statistics.variance) == pytest.approx(np.var([1.0, 1.5, 1.75]))

"""Heads against torch.distributions, their own samples, and numerical integration."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributions as twins
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from upslope.policies import (
    Bernoulli,
    Beta,
    Categorical,
    Gaussian,
    Head,
    HeadDistribution,
    MultiCategorical,
    SquashedGaussian,
)
from upslope.policies.fused_distributions import categorical, gaussian, plain_categorical, plain_gaussian

LOW, HIGH = np.array([-2.0, 0.5, -1.0], dtype=np.float32), np.array([1.0, 3.5, 1.0], dtype=np.float32)


def beta_twin(p: Tensor) -> twins.Distribution:
    alpha, beta = (1.0 + torch.nn.functional.softplus(p)).chunk(2, dim=-1)
    low, width = torch.from_numpy(LOW).double(), torch.from_numpy(HIGH - LOW).double()
    scaled = twins.TransformedDistribution(twins.Beta(alpha, beta), twins.AffineTransform(low, width))
    return twins.Independent(scaled, 1)


def normal_twin(p: Tensor) -> twins.Distribution:
    mean, log_std = p.chunk(2, dim=-1)
    return twins.Independent(twins.Normal(mean, log_std.exp()), 1)


def squashed_twin(p: Tensor) -> twins.Distribution:
    mean, log_std = p.chunk(2, dim=-1)
    low, high = torch.from_numpy(LOW).double(), torch.from_numpy(HIGH).double()
    maps = [twins.TanhTransform(), twins.AffineTransform(0.5 * (low + high), 0.5 * (high - low))]
    return twins.Independent(twins.TransformedDistribution(twins.Normal(mean, log_std.exp()), maps), 1)


HEADS: dict[str, tuple[Head, Callable[[Tensor], twins.Distribution]]] = {
    "categorical": (Categorical(5), lambda p: twins.Categorical(logits=p)),
    "bernoulli": (Bernoulli(4), lambda p: twins.Independent(twins.Bernoulli(logits=p), 1)),
    "gaussian": (Gaussian(LOW, HIGH), normal_twin),
    "squashed_gaussian": (SquashedGaussian(LOW, HIGH), squashed_twin),
    "beta": (Beta(LOW, HIGH), beta_twin),
}
EVERY = {**{name: head for name, (head, _) in HEADS.items()}, "multi": MultiCategorical((2, 4, 3), (0, 1, -1))}


def drawn(head: Head, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    parameters = np.random.default_rng(seed).normal(size=(rows, head.size))
    action = head.sample(parameters, head.noise(np.random.default_rng(seed + 1), 1, rows)[0])
    return torch.from_numpy(parameters), torch.from_numpy(action)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("rows", [1, 7])
def test_log_prob_is_the_twins(name: str, rows: int) -> None:
    head, twin = HEADS[name]
    parameters, action = drawn(head, rows)
    value = action
    if name in ("squashed_gaussian", "beta"):
        fraction = 0.5 + 0.5 * torch.tanh(action) if name == "squashed_gaussian" else action
        value = torch.from_numpy(LOW).double() + torch.from_numpy(HIGH - LOW).double() * fraction
    expected = twin(parameters).log_prob(value.to(parameters.dtype) if name != "categorical" else value)
    log_prob, _ = head.log_prob_and_entropy(parameters, action)
    torch.testing.assert_close(log_prob, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "gaussian"])
def test_entropy_is_the_twins(name: str) -> None:
    head, twin = HEADS[name]
    parameters, action = drawn(head, 9)
    torch.testing.assert_close(head.log_prob_and_entropy(parameters, action)[1], twin(parameters).entropy())


def test_entropy_of_beta_is_that_of_the_scaled_action() -> None:
    head, _ = HEADS["beta"]
    parameters, action = drawn(head, 9)
    alpha, beta = (1.0 + torch.nn.functional.softplus(parameters)).chunk(2, dim=-1)
    expected = twins.Beta(alpha, beta).entropy().sum(-1) + math.log(3.0 * 3.0 * 2.0)
    torch.testing.assert_close(head.log_prob_and_entropy(parameters, action)[1], expected)


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "gaussian", "beta"])
def test_kl_is_the_twins(name: str) -> None:
    head, twin = HEADS[name]
    first, second = drawn(head, 6)[0], drawn(head, 6, seed=5)[0]
    if name == "beta":
        a, b = (twins.Beta(*(1.0 + torch.nn.functional.softplus(p)).chunk(2, dim=-1)) for p in (first, second))
        expected = twins.kl_divergence(a, b).sum(-1)
    else:
        expected = twins.kl_divergence(twin(first), twin(second))
    actual = HeadDistribution(head, first).kl(HeadDistribution(head, second))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", EVERY)
def test_kl_to_oneself_is_zero_with_zero_gradient(name: str) -> None:
    head = EVERY[name]
    parameters = drawn(head, 4)[0].requires_grad_()
    kl = head.kl(parameters.detach(), parameters)
    (gradient,) = torch.autograd.grad(kl.sum(), parameters)
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0.0, atol=1e-12)


def test_multi_categorical_is_a_sum_of_categoricals() -> None:
    head = EVERY["multi"]
    parameters, action = drawn(head, 8)
    parts = [twins.Categorical(logits=p) for p in parameters.split([2, 4, 3], dim=-1)]
    log_prob, entropy = head.log_prob_and_entropy(parameters, action)
    torch.testing.assert_close(log_prob, sum(p.log_prob(action[:, i]) for i, p in enumerate(parts)))
    torch.testing.assert_close(entropy, sum(p.entropy() for p in parts))


@pytest.mark.parametrize("name", EVERY)
def test_gradients_and_second_gradients(name: str) -> None:
    head = EVERY[name]
    parameters, action = drawn(head, 3)
    parameters.requires_grad_()
    assert gradcheck(lambda p: head.log_prob_and_entropy(p, action), parameters)
    assert gradgradcheck(lambda p: head.log_prob_and_entropy(p, action), parameters)


@pytest.mark.parametrize(
    ("fused", "plain", "columns"), [(categorical, plain_categorical, 6), (gaussian, plain_gaussian, 6)]
)
@pytest.mark.parametrize("rows", [1, 33])
def test_closed_forms_equal_plain_torch(fused: Callable, plain: Callable, columns: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    parameters = torch.randn(rows, columns, generator=generator, requires_grad=True)
    action = (
        torch.randint(columns, (rows,), generator=generator)
        if fused is categorical
        else torch.randn(rows, columns // 2, generator=generator)
    )
    weights = torch.randn(2, rows, generator=generator)
    outcomes = []
    for function in (fused, plain):
        log_prob, entropy = function(parameters, action)
        total = (weights[0] * log_prob + weights[1] * entropy).sum()
        outcomes.append((log_prob, entropy, *torch.autograd.grad(total, parameters)))
    for closed, reference in zip(*outcomes, strict=True):
        torch.testing.assert_close(closed, reference, rtol=2e-5, atol=2e-6)


# --- sampling --------------------------------------------------------------------------------------------------------


def test_categorical_frequencies_follow_the_probabilities() -> None:
    logits, draws = np.array([1.0, 0.0, -2.0, 2.0], dtype=np.float32), 40_000
    head = Categorical(4)
    noise = head.noise(np.random.default_rng(3), 1, draws)[0]
    counts = np.bincount(head.sample(np.tile(logits, (draws, 1)), noise), minlength=4)
    expected = draws * np.exp(logits) / np.exp(logits).sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi-square, 3 degrees of freedom, 0.1 %


def test_bernoulli_frequencies_follow_the_probabilities() -> None:
    logits, draws = np.array([-1.0, 0.3, 3.0], dtype=np.float32), 40_000
    head = Bernoulli(3)
    bits = head.sample(np.tile(logits, (draws, 1)), head.noise(np.random.default_rng(4), 1, draws)[0])
    p = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
    assert (np.abs(bits.mean(0) - p) < 4.0 * np.sqrt(p * (1 - p) / draws)).all()


@pytest.mark.parametrize(("raw_alpha", "raw_beta"), [(-30.0, -30.0), (0.0, 2.0), (40.0, 1.0)])
def test_beta_samples_have_its_distribution(raw_alpha: float, raw_beta: float) -> None:
    head, draws = Beta(np.zeros(1, dtype=np.float32), np.ones(1, dtype=np.float32)), 20_000
    noise = head.noise(np.random.default_rng(8), 1, draws)[0]
    x = np.sort(head.sample(np.tile(np.array([raw_alpha, raw_beta]), (draws, 1)), noise)[:, 0])
    parameters = torch.tensor([[raw_alpha, raw_beta]], dtype=torch.float64)
    grid = torch.linspace(0.0, 1.0, 20_001, dtype=torch.float64)[1:-1]
    density = head.log_prob_and_entropy(parameters.expand(len(grid), 2), grid[:, None])[0].exp().numpy()
    cumulative = np.concatenate([[0.0], np.cumsum(density) / density.sum()])
    theoretical = np.interp(x, np.linspace(0.0, 1.0, len(cumulative)), cumulative)
    empirical = (np.arange(draws) + 0.5) / draws
    assert float(np.abs(theoretical - empirical).max()) < 1.95 / math.sqrt(draws)  # Kolmogorov-Smirnov, 0.1 %


@pytest.mark.parametrize("name", EVERY)
def test_a_sample_depends_on_its_own_row_of_noise_only(name: str) -> None:
    head = EVERY[name]
    parameters = np.random.default_rng(0).normal(size=(5, head.size)).astype(np.float32)
    noise = head.noise(np.random.default_rng(1), 3, 5)
    together = head.sample(parameters, noise[2])
    for row in range(5):
        np.testing.assert_array_equal(head.sample(parameters[row : row + 1], noise[2, row : row + 1])[0], together[row])


def test_modes() -> None:
    np.testing.assert_array_equal(Categorical(3).mode(np.array([[0.0, 2.0, 1.0]])), [1])
    np.testing.assert_array_equal(
        MultiCategorical((2, 3), (0, 0)).mode(np.array([[0.0, 1.0, 5.0, 1.0, 0.0]])), [[1, 0]]
    )
    np.testing.assert_array_equal(Bernoulli(2).mode(np.array([[-1.0, 1.0]])), [[0, 1]])
    one = np.ones(1, dtype=np.float32)
    np.testing.assert_array_equal(Gaussian(-one, one).mode(np.array([[3.0, 1.0]])), [[3.0]])
    # alpha = 2, beta = 3: mode (alpha - 1) / (alpha + beta - 2) = 1/3
    raw = np.log(np.expm1(np.array([[1.0, 2.0]])))
    np.testing.assert_allclose(Beta(-one, one).mode(raw), [[1.0 / 3.0]])
    np.testing.assert_array_equal(Beta(-one, one).mode(np.array([[-1e4, -1e4]])), [[0.5]])


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_actions_in_environment_terms() -> None:
    np.testing.assert_array_equal(Categorical(3, start=-1).to_environment(np.array([0, 2])), [-1, 1])
    np.testing.assert_array_equal(MultiCategorical((2, 3), (5, -1)).to_environment(np.array([[1, 0]])), [[6, -1]])
    far = np.array([[-100.0, 100.0, 0.0]], dtype=np.float32)
    for head in (Gaussian(LOW, HIGH), SquashedGaussian(LOW, HIGH)):
        np.testing.assert_array_equal(head.to_environment(far), np.array([[-2.0, 3.5, 0.0]], dtype=np.float32))
    np.testing.assert_allclose(Beta(LOW, HIGH).to_environment(np.full((1, 3), 0.5)), [[-0.5, 2.0, 0.0]])


def test_a_shaped_box_gets_its_shape_and_number_type_back() -> None:
    low, high = np.full((2, 3), -1.0), np.ones((2, 3))
    for head in (Gaussian(low, high), SquashedGaussian(low, high), Beta(low, high)):
        action = head.to_environment(head.mode(np.zeros((4, 12), dtype=np.float32)))
        assert action.shape == (4, 2, 3)
        assert action.dtype == np.float64


@pytest.mark.parametrize("family", [SquashedGaussian, Beta])
def test_unbounded_boxes_are_refused_with_a_remedy(family: type[SquashedGaussian] | type[Beta]) -> None:
    with pytest.raises(ValueError, match="gaussian"):
        family(np.full(2, -np.inf), np.ones(2))


@pytest.mark.parametrize("log_std", [-1.0, 0.0, 1.0])
def test_squashed_density_integrates_to_one_over_the_bounds(log_std: float) -> None:
    head = SquashedGaussian(np.array([-2.0]), np.array([1.0]))
    edge = torch.linspace(-15.0, 15.0, 60_001, dtype=torch.float64)
    action = head.to_environment(edge.numpy()[:, None])[:, 0]
    parameters = torch.tensor([[0.4, log_std]], dtype=torch.float64).expand(len(edge), 2)
    density = head.log_prob_and_entropy(parameters, edge[:, None])[0].exp().numpy()
    assert np.trapezoid(density, action) == pytest.approx(1.0, abs=1e-5)


def test_squashed_log_prob_is_exact_far_out() -> None:
    head = SquashedGaussian(np.array([-1.0]), np.array([1.0]))
    u = torch.tensor([[-300.0], [-20.0], [20.0], [300.0]])
    parameters = torch.cat([u, torch.zeros_like(u)], dim=-1).requires_grad_()
    log_prob, entropy = head.log_prob_and_entropy(parameters, u)
    # log(1 - tanh(u)^2) -> log 4 - 2 |u|
    expected = -0.5 * math.log(2 * math.pi) - math.log(4.0) + 2.0 * u.abs().squeeze(-1)
    torch.testing.assert_close(log_prob, expected)
    (gradient,) = torch.autograd.grad((log_prob + entropy).sum(), parameters)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("log_std", [-2.0, 0.0, 1.0])
def test_squashed_entropy_is_close(log_std: float) -> None:
    head = SquashedGaussian(np.array([-2.0]), np.array([1.0]))
    std = math.exp(log_std)
    u = torch.linspace(0.3 - 10 * std, 0.3 + 10 * std, 100_001, dtype=torch.float64)
    parameters = torch.tensor([[0.3, log_std]], dtype=torch.float64)
    log_prob, entropy = head.log_prob_and_entropy(parameters.expand(len(u), 2), u[:, None])
    density = torch.exp(-0.5 * ((u - 0.3) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    expected = float(torch.trapezoid(-density * log_prob, u))
    assert float(entropy[0]) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("initial", [-4.9, -1.0, 1.9])
def test_bounded_log_std_starts_where_asked_and_never_sticks(initial: float) -> None:
    one = np.ones(1)
    head = Gaussian(-one, one, log_std_init=initial, log_std_bounds=(-5.0, 2.0))
    start = torch.tensor([[0.0, head.initial[1]]], dtype=torch.float64)
    _, entropy = head.log_prob_and_entropy(start, torch.zeros(1, 1, dtype=torch.float64))
    assert float(entropy) == pytest.approx(initial + 0.5 * math.log(2 * math.pi * math.e))
    for raw, limit in ((-12.0, -5.0), (12.0, 2.0)):
        outside = torch.tensor([[0.0, raw]], dtype=torch.float64, requires_grad=True)
        _, entropy = head.log_prob_and_entropy(outside, torch.zeros(1, 1, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(entropy, outside)
        log_std = float(entropy.detach()) - 0.5 * math.log(2 * math.pi * math.e)
        assert -5.0 <= log_std <= 2.0
        assert log_std == pytest.approx(limit, abs=0.05)
        assert float(gradient[0, 1]) > 0.0
        sample = head.sample(outside.detach().numpy(), np.ones((1, 1)))
        assert float(sample[0, 0]) == pytest.approx(math.exp(log_std))
    with pytest.raises(ValueError, match="strictly within"):
        Gaussian(-one, one, log_std_init=3.0, log_std_bounds=(-5.0, 2.0))


# --- extreme parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluate", [categorical, plain_categorical])
@pytest.mark.parametrize("big", [1e2, 1e4, 1e30])
def test_extreme_logits_stay_finite(evaluate: Callable, big: float) -> None:
    logits = torch.tensor([[big, 0.0, -big], [-big, -big, -big]], requires_grad=True)
    log_prob, entropy = evaluate(logits, torch.tensor([0, 2]))
    torch.testing.assert_close(log_prob.detach(), torch.tensor([0.0, -math.log(3.0)]))
    torch.testing.assert_close(entropy.detach(), torch.tensor([0.0, math.log(3.0)]))
    (gradient,) = torch.autograd.grad((log_prob + 3.0 * entropy).sum(), logits)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("head", [Categorical(3), MultiCategorical((3,), (0,))])
def test_impossible_actions_are_never_sampled_and_spoil_nothing(head: Head) -> None:
    logits = torch.tensor([[0.5, -math.inf, 0.0]]).expand(1000, 3).clone().requires_grad_()
    action = head.sample(logits.detach().numpy(), head.noise(np.random.default_rng(0), 1, 1000)[0])
    assert set(np.unique(action)) == {0, 2}
    log_prob, entropy = head.log_prob_and_entropy(logits, torch.from_numpy(action))
    kl = head.kl(logits, logits.detach() * 2.0)
    possible = twins.Categorical(logits=torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(entropy.detach(), possible.entropy().expand(1000))
    expected = twins.kl_divergence(possible, twins.Categorical(logits=torch.tensor([1.0, 0.0])))
    torch.testing.assert_close(kl.detach(), expected.expand(1000))
    (gradient,) = torch.autograd.grad((log_prob + entropy + kl).sum(), logits)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[:, 1].abs().max()) == 0.0


def test_impossible_bits_are_never_sampled_and_spoil_nothing() -> None:
    head, logits = Bernoulli(2), torch.tensor([[-math.inf, 0.0], [math.inf, 200.0]], requires_grad=True)
    action = head.sample(logits.detach().numpy(), head.noise(np.random.default_rng(0), 1, 2)[0])
    np.testing.assert_array_equal(action[:, 0], [0, 1])
    log_prob, entropy = head.log_prob_and_entropy(logits, torch.from_numpy(action))
    torch.testing.assert_close(entropy.detach(), torch.tensor([math.log(2.0), 0.0]))
    kl = head.kl(logits, logits.detach())
    assert bool(torch.isfinite(torch.stack([log_prob, entropy, kl])).all())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positions_that_are_no_steps_spoil_no_gradient(name: str, dtype: torch.dtype) -> None:
    """They hold zeros for actions and weigh nothing: what is multiplied by 0 must be finite, its gradient too."""
    head = EVERY[name]
    parameters, action = drawn(head, 6)
    parameters = parameters.to(dtype).requires_grad_()
    action = action.to(dtype) if action.dtype.is_floating_point else action
    action[2:] = 0
    weight = torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0, 0.0], dtype=dtype)
    log_prob, entropy = head.log_prob_and_entropy(parameters, action)
    assert bool(torch.isfinite(log_prob).all())
    (gradient,) = torch.autograd.grad((weight * (log_prob + torch.exp(log_prob) + entropy)).sum(), parameters)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[2:].abs().max()) == 0.0
    assert float(gradient[:2].abs().max()) > 0.0


@pytest.mark.parametrize(("x", "nearest"), [(0.0, 2.0**-24), (1.0, 1.0 - 2.0**-24)])
def test_beta_actions_at_the_edge_count_as_the_nearest_sample(x: float, nearest: float) -> None:
    head = Beta(np.zeros(1, dtype=np.float32), np.ones(1, dtype=np.float32))
    parameters = torch.tensor([[0.3, -0.2]])
    at, near = (head.log_prob_and_entropy(parameters, torch.tensor([[value]]))[0] for value in (x, nearest))
    assert torch.equal(at, near)
    assert bool(torch.isfinite(at))


def test_distributions_select_detach_and_refuse_other_families() -> None:
    head, _ = HEADS["gaussian"]
    parameters, action = drawn(head, 6)
    distribution = HeadDistribution(head, parameters.requires_grad_())
    chosen = distribution.select(torch.tensor([4, 1])).detach()
    assert not chosen.parameters.requires_grad
    torch.testing.assert_close(chosen.parameters, parameters.detach()[[4, 1]])
    torch.testing.assert_close(distribution.select(slice(1, 3)).parameters, parameters[1:3])
    in_rows = HeadDistribution(head, parameters.view(2, 3, -1)).log_prob_and_entropy(action.view(2, 3, -1))
    for rows, flat in zip(in_rows, distribution.log_prob_and_entropy(action), strict=True):
        torch.testing.assert_close(rows, flat.view(2, 3))
    with pytest.raises(ValueError, match="one family"):
        distribution.kl(HeadDistribution(HEADS["beta"][0], parameters))

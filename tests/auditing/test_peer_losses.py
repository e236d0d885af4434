"""What the audit says of the losses in `examples/peer_losses.py`, pinned."""

from __future__ import annotations

import inspect
import math
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from upslope.auditing.loss_audit import LossAudit, audit_loss
from upslope.auditing.setting import FiniteSetting
from upslope.auditing.tokens import TokenSetting
from upslope.exact import enumerate_completions, token_gradient

PEERS: dict[str, Any] = runpy.run_path(
    str(Path(__file__).parents[2] / "examples" / "peer_losses.py"), run_name="example_peer_losses"
)
G = 4
BY_LENGTH = "grad E[(r - V) / length]"


@cache
def setting(name: str) -> TokenSetting | FiniteSetting:
    return PEERS[name]()


@cache
def audited(loss: str, where: str = "completions") -> LossAudit:
    return audit_loss(PEERS[loss], setting(where))


def tokens() -> TokenSetting:
    found = setting("completions")
    assert isinstance(found, TokenSetting)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def per_token(loss: str) -> tuple[float, float]:
    """The weight of a success's token and of a failure's: one success of 10 tokens, seven failures of 40."""
    length = torch.tensor([10, *[40] * 7])
    mask = torch.arange(40) < length.unsqueeze(-1)
    log_prob = torch.full((8, 40), -1.0, dtype=torch.float64, requires_grad=True)
    reward = torch.zeros(8, 40, dtype=torch.float64)
    reward[0, 9] = 1.0
    available = {
        "log_prob": log_prob,
        "behaviour_log_prob": log_prob.detach(),
        "reference_log_prob": log_prob.detach(),
        "reward": reward,
        "mask": mask,
        "group": torch.zeros(8, dtype=torch.long),
    }
    function = PEERS[loss]
    asked = function.__code__.co_varnames[: function.__code__.co_argcount]
    (gradient,) = torch.autograd.grad(
        function(**{name: available[name] for name in asked if name in available}), log_prob
    )
    assert not gradient[~mask].any()
    return -float(gradient[0, 0]), -float(gradient[1, 0])


@pytest.mark.parametrize(
    ("loss", "success", "failure"),
    [
        ("trl", 0.00853, -0.00122),
        ("verl", 0.00853, -0.00122),
        ("openrlhf", 0.00853, -0.00122),
        ("nemo_rl", 0.00345, -0.00130),
        ("prime_rl", 0.00302, -0.00043),
        ("tinker", 0.875, -0.125),
        ("dr_grpo", 0.875 / 24, -0.125 / 24),
        ("rloo", 0.125, -1 / 56),
    ],
)
def test_weight_of_a_token_in_a_group_with_one_success(loss: str, success: float, failure: float) -> None:
    found = per_token(loss)
    assert found == pytest.approx((success, failure), abs=6e-6)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        ("tinker", "proportional to grad J (factor 3)"),
        ("dr_grpo", "proportional to grad J (factor 0.25)"),
        ("rloo", "follows 1 x grad J - 0.05 x grad KL(pi || ref)"),
        ("centred", "proportional to grad J (factor 0.75)"),
        ("wrong_sign", "points downhill: proportional to grad J (factor -0.75)"),
        ("mask_with_prompt", "proportional to grad J (factor 0.75)"),
        ("length_normalised", f"proportional to {BY_LENGTH} (factor 0.75)"),
        ("micro_batches", f"proportional to {BY_LENGTH} (factor 0.75)"),
        ("k1_in_loss", "follows nothing: its mean gradient is 0, and what single batches have is noise"),
        ("k1_in_reward", "unbiased for -grad KL(pi || ref)"),
        ("k2_in_loss", "unbiased for -grad KL(pi || ref) per token, prefixes held fixed"),
        ("k3_in_loss", "unbiased for -grad KL(ref || pi) per token, prefixes held fixed"),
        ("k3_of_completions_in_loss", "unbiased for -grad KL(ref || pi)"),
    ],
)
def test_what_is_said_of_completion_losses(loss: str, says: str) -> None:
    assert str(audited(loss).following) == says


@pytest.mark.parametrize(
    ("loss", "where", "says"),
    [
        ("reinforce", "episodes", "unbiased for grad J"),
        ("total_return", "episodes", "unbiased for grad J"),
        ("dropped_gamma", "episodes", "unbiased for grad J with gamma^t dropped"),
        ("bootstrapped", "limited_episodes", f"unbiased for {PEERS['LIMITED']}"),
        (
            "truncation_as_termination",
            "limited_episodes",
            "unbiased for grad J of episodes that end at 4 steps for good",
        ),
    ],
)
def test_what_is_said_of_control_losses(loss: str, where: str, says: str) -> None:
    assert str(audited(loss, where).following) == says


def test_the_dropped_gamma_and_the_dropped_value_matter() -> None:
    assert audited("dropped_gamma", "episodes").following.comparison("grad J").cosine < 0.995
    ended = audited("truncation_as_termination", "limited_episodes").following
    assert ended.comparison(PEERS["LIMITED"]).factor < 0.6
    assert audited("residual_to_zero", "limited_episodes").following.kind == "none"


@pytest.mark.parametrize(
    ("loss", "least", "most"),
    [
        ("trl", 0.99, 0.9999),
        ("verl", 0.99, 0.9999),
        ("openrlhf", 0.99, 0.9999),
        ("nemo_rl", 0.99, 0.9999),
        ("prime_rl", 0.99, 0.9999),
        ("batch_token_mean", 0.99, 0.9999),
        ("standardised", 0.99, 0.9999),
        ("shifted_log_prob", -1.0, 0.5),
        ("mask_with_prompt_no_baseline", 0.5, 0.95),
        ("mask_without_last", 0.5, 0.98),
    ],
)
def test_losses_that_follow_none_of_the_gradients(loss: str, least: float, most: float) -> None:
    """Where tokens are averaged over the batch, the number that is divided by is as random as the advantages."""
    following = audited(loss).following
    assert following.kind == "none"
    assert least < following.comparison("grad J").cosine < most


def test_rloo_follows_the_penalised_objective() -> None:
    found, where = audited("rloo"), tokens()
    expected = token_gradient(where.tokens, where.policy, where.parameters, reference=where.reference, beta=0.05)
    assert relative(found.report.moments.mean, expected) < 1e-12


def success_probability() -> list[float]:
    where = tokens()
    chance = enumerate_completions(where.tokens, where.policy).behaviour_probability.detach().view(2, -1)
    return ((chance * where.tokens.rewards).sum(-1) / chance.sum(-1)).tolist()


def factor_of_std(p: float, size: int) -> float:
    """E over the others of A(success) - A(failure), with A = (r - mean) / std (ddof 1), 0 where all are equal."""

    def advantage(own: int, others: int) -> float:
        mean = (own + others) / size
        variance = size * mean * (1 - mean) / (size - 1)
        return 0.0 if variance == 0.0 else (own - mean) / math.sqrt(variance)

    return sum(
        math.comb(size - 1, others)
        * p**others
        * (1 - p) ** (size - 1 - others)
        * (advantage(1, others) - advantage(0, others))
        for others in range(size)
    )


def test_dividing_by_the_groups_std_re_weights_prompts() -> None:
    found, where = audited("divided_by_group_std"), tokens()
    factors = [factor_of_std(p, G) for p in success_probability()]
    by_prompt = [weight * factor for weight, factor in zip(where.tokens.chance, factors, strict=True)]
    total = sum(by_prompt)
    reweighted = PEERS["TokenMDP"](
        vocabulary=2,
        end=0,
        limit=3,
        prompts=where.tokens.prompts,
        prompt_probability=tuple(weight / total for weight in by_prompt),
        reward=where.tokens.reward,
    )
    expected = total * token_gradient(reweighted, where.policy, where.parameters)
    assert relative(found.report.moments.mean, expected) < 1e-5
    assert str(found.following) == (
        f"follows grad J with prompts re-weighted: {factors[0]:.3g} for prompt (1, 1), {factors[1]:.3g} for prompt "
        "(0, 0, 1)"
    )
    assert factors[0] > 1.05 * factors[1]


@pytest.mark.parametrize("p", [0.5, 0.2, 0.1])
def test_in_large_groups_a_prompt_counts_by_one_over_its_standard_deviation(p: float) -> None:
    assert factor_of_std(p, 1000) == pytest.approx(1 / math.sqrt(p * (1 - p)), rel=0.01)


def test_micro_batches_of_one_row_turn_the_token_mean_into_the_mean_of_rows() -> None:
    means = {name: audited(name).report.moments.mean for name in ("micro_batches", "length_normalised")}
    assert relative(means["micro_batches"], means["length_normalised"]) < 1e-12
    assert relative(means["micro_batches"], audited("batch_token_mean").report.moments.mean) > 0.1


def test_a_token_mean_comes_closer_to_grad_j_the_more_groups_there_are() -> None:
    angles = []
    for groups in (1, 2):
        where = TokenSetting.build("tokens-binary", size=2, groups=groups)
        found = audit_loss(PEERS["batch_token_mean"], where).following
        assert found.kind == "none"
        angles.append(math.acos(found.comparison("grad J").cosine))
    assert angles[1] < 0.65 * angles[0]


def test_verls_dual_clip_and_prime_rls_mask_take_the_gradient_away() -> None:
    log_prob = torch.tensor([[-0.1], [-0.1]], dtype=torch.float64, requires_grad=True)
    given = {
        "log_prob": log_prob,
        "behaviour_log_prob": log_prob.detach() - math.log(5.0),
        "reward": torch.tensor([[1.0], [0.0]], dtype=torch.float64),
        "mask": torch.ones(2, 1, dtype=torch.bool),
        "group": torch.zeros(2, dtype=torch.long),
    }
    gradient = {name: torch.autograd.grad(PEERS[name](**given), log_prob)[0] for name in ("trl", "verl", "prime_rl")}
    assert gradient["trl"].flatten().tolist()[0] == 0.0
    assert gradient["trl"].flatten().tolist()[1] > 0.0
    assert not gradient["verl"].any()
    # What is left is the squared log-ratio, 2 x 1e-3 x log 5 over two tokens.
    torch.testing.assert_close(gradient["prime_rl"], torch.full((2, 1), 1e-3 * math.log(5.0), dtype=torch.float64))


@pytest.mark.parametrize(
    ("where", "closest"),
    [
        ("episodes", "grad J with gamma^t dropped"),
        ("limited_episodes", "grad J of episodes that end at 4 steps for good with gamma^t dropped"),
    ],
)
def test_ppo_follows_the_dropped_gamma_and_ends_episodes_at_the_limit(where: str, closest: str) -> None:
    found = audit_loss(PEERS["ppo_control"], setting(where), samples=64_000).following
    assert found.closest.name == closest
    assert found.closest.cosine > 0.99


def test_the_example_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = PEERS["main"](PEERS["Settings"](only=("tinker", "k1_in_loss", "reinforce")))
    assert set(found) == {("Defaults", "tinker"), ("A KL penalty alone", "k1_in_loss"), ("Control", "reinforce")}
    printed = capsys.readouterr().out
    assert "| `tinker` | 1.0000 | 3.000 | 0.0% | proportional to grad J (factor 3) |" in printed
    assert "| `k1_in_loss` | | 0 | | follows nothing" in printed


def test_the_page_shows_what_is_found() -> None:
    page = (Path(__file__).parents[2] / "docs" / "auditing-your-loss.md").read_text()
    for section in PEERS["SECTIONS"]:
        for loss in section.losses:
            if section.samples is None:
                found = audited(loss.__name__, section.setting.__name__)
                assert PEERS["row"](loss.__name__, found, section.intended) in page.splitlines()
            else:
                assert f"| `{loss.__name__}` |" in page


def test_every_loss_is_documented_and_short() -> None:
    losses = {loss for section in PEERS["SECTIONS"] for loss in section.losses}
    assert len(losses) >= 28
    for loss in losses:
        assert loss.__doc__, loss.__name__
        assert len(inspect.getsource(loss).splitlines()) <= 14, loss.__name__

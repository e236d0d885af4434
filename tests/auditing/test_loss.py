"""A loss of the user's own: what it can ask for, what it is told when it asks for too much, what its ascent is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from upslope.auditing import loss as module
from upslope.auditing.loss import NAMES, LossSource, asked_for, load_loss
from upslope.auditing.setting import FiniteSetting
from upslope.auditing.tokens import TokenSetting
from upslope.errors import UsageError
from upslope.exact import problem
from upslope.trajectory import Trajectory

TOKENS = TokenSetting.build("tokens", size=2)
CONTROL = FiniteSetting.build(problem("time-limit"), gamma=0.9, unit="episodes")


def batch_of(setting: TokenSetting | FiniteSetting, index: int = 7) -> Trajectory:
    return [trajectory for _, trajectory in setting.every()][index]


def ascent(function: module.LossFunction, setting: TokenSetting | FiniteSetting = TOKENS) -> Tensor:
    reference = setting.reference if isinstance(setting, TokenSetting) else None
    source = LossSource(function, gamma=0.9, reference=reference)
    return source.ascent(setting.policy, setting.parameters, batch_of(setting))


def test_the_table_names_all_that_can_be_asked_for() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", module.__doc__ or "", flags=re.MULTILINE)
    assert tuple(documented) == tuple(NAMES)


def test_everything_is_what_the_trajectory_and_the_policy_say() -> None:
    trajectory, policy = batch_of(TOKENS), TOKENS.policy
    seen: dict[str, object] = {}

    def curious(
        trajectory,
        evaluation,
        log_prob,
        entropy,
        value,
        next_value,
        reward,
        mask,
        action,
        observation,
        terminated,
        truncated,
        cut,
        time,
        group,
        behaviour_log_prob,
        reference_log_prob,
        gamma,
    ):
        seen.update(locals())
        return log_prob.sum()

    assert set(asked_for(curious)) == set(NAMES)
    LossSource(curious, gamma=0.7, reference=TOKENS.reference).ascent(policy, TOKENS.parameters, trajectory)
    assert seen["trajectory"] is trajectory
    assert seen["gamma"] == 0.7
    for name in ("reward", "mask", "action", "observation", "terminated", "truncated", "cut", "time", "group"):
        torch.testing.assert_close(seen[name], getattr(trajectory, name))
    on_policy = trajectory.mask
    log_prob, behaviour = seen["log_prob"], seen["behaviour_log_prob"]
    assert isinstance(log_prob, Tensor)
    assert isinstance(behaviour, Tensor)
    torch.testing.assert_close(log_prob[on_policy], behaviour[on_policy])
    value, next_value = policy.values(trajectory)
    torch.testing.assert_close(seen["value"], value)
    torch.testing.assert_close(seen["next_value"], next_value)
    reference = TOKENS.reference.log_prob(trajectory.observation, trajectory.action)
    torch.testing.assert_close(seen["reference_log_prob"], reference)
    assert log_prob.requires_grad
    for name in ("next_value", "reference_log_prob", "behaviour_log_prob"):
        given = seen[name]
        assert isinstance(given, Tensor)
        assert not given.requires_grad


def test_the_ascent_is_minus_the_gradient_and_nothing_moves() -> None:
    before = [parameter.detach().clone() for parameter in TOKENS.policy.parameters()]

    def score(log_prob, mask, reward, scale=3.0):
        return -scale * (log_prob * mask * reward.sum(-1, keepdim=True)).sum()

    found = ascent(score)
    trajectory, theta = batch_of(TOKENS), TOKENS.parameters[0]
    log_prob = TOKENS.policy.log_prob(trajectory.observation, trajectory.action)
    weighted = (log_prob * trajectory.mask * trajectory.reward.sum(-1, keepdim=True)).sum()
    (expected,) = torch.autograd.grad(3.0 * weighted, [theta])
    torch.testing.assert_close(found, expected.flatten())
    for parameter, value in zip(TOKENS.policy.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
        assert parameter.grad is None


def test_what_a_loss_does_not_depend_on_has_gradient_0() -> None:
    assert not ascent(lambda value: value.sum()).any()


def needs_nonsense(log_probs, mask):
    return (log_probs * mask).sum()


def hides(*args):
    return args[0]


def tunnels(log_prob, **others):
    return log_prob.sum()


def positional(log_prob, /):
    return log_prob.sum()


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (
            needs_nonsense,
            "needs_nonsense asks for 'log_probs', which no audit has: did you mean log_prob.*trajectory, ",
        ),
        (hides, r"hides takes \*args: .* by name"),
        (tunnels, r"tunnels takes \*\*others"),
        (positional, "positional takes log_prob"),
        (lambda log_prob: 1.5, r"<lambda> returned 1.5, a float: return a scalar tensor"),
        (lambda log_prob: None, r"returned None, a NoneType"),
        (lambda log_prob: log_prob, r"returned a tensor of shape \[2, \d\]: return one number"),
        (lambda log_prob: log_prob.sum().detach(), "without gradient: compute it from log_prob"),
        (lambda reward: reward.sum(), "without gradient"),
        (lambda log_prob: log_prob.sum() * 1j, "tensor of type complex128: .* take its real part"),
        (lambda mask: mask.sum(), "tensor of type int64: .* whole numbers have no gradient"),
        (lambda log_prob: log_prob.sum() / 0.0, r"returned -inf for rows with total rewards \[.*\] and \[.*\] chosen"),
        (lambda log_prob: (log_prob.sum() - log_prob.sum()).abs().sqrt(), "gradient of <lambda> is not finite"),
    ],
)
def test_what_is_wrong_is_said(function: module.LossFunction, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        ascent(function)


def steps_back(log_prob):
    loss = log_prob.sum()
    loss.backward()
    return loss.detach()


def steps_back_twice(log_prob):
    loss = log_prob.sum()
    loss.backward(retain_graph=True)
    return loss


def takes_its_gradient(log_prob):
    loss = log_prob.square().sum()
    torch.autograd.grad(loss, log_prob)
    return loss


@pytest.mark.parametrize("function", [steps_back, steps_back_twice, takes_its_gradient])
def test_a_loss_that_differentiates_itself(function: module.LossFunction) -> None:
    theta = CONTROL.parameters[0]
    theta.grad = torch.ones_like(theta)
    try:
        with pytest.raises(UsageError, match=f"{function.__name__} differentiates by itself .*: return the loss"):
            ascent(function, CONTROL)
        torch.testing.assert_close(theta.grad, torch.ones_like(theta))
    finally:
        theta.grad = None


def test_gradients_are_on_for_a_loss_and_as_they_were_after_it() -> None:
    def turns_them_off(log_prob, value):
        loss = log_prob.sum()
        torch.set_grad_enabled(False)
        return loss + value.sum()

    def kept(log_prob):
        return log_prob.sum()

    with pytest.raises(UsageError, match="without gradient"):
        ascent(turns_them_off)
    assert torch.is_grad_enabled()
    source, parameters, batch = LossSource(kept), TOKENS.parameters, batch_of(TOKENS)
    with torch.no_grad():
        assert source.ascent(TOKENS.policy, parameters, batch).any()
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda log_prob, reference_log_prob: log_prob.sum(), "asks for reference_log_prob, .* no reference policy"),
        (lambda log_prob, group: log_prob.sum(), "asks for group, and no rows of this problem belong together"),
    ],
)
def test_what_the_problem_lacks_is_said(function: module.LossFunction, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        ascent(function, CONTROL)


def test_single_completions_have_no_groups() -> None:
    single = TokenSetting.build("tokens", size=1)
    with pytest.raises(UsageError, match="asks for group"):
        ascent(lambda log_prob, group: log_prob.sum(), single)


def test_a_loss_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def good(log_prob, reward, scale=2.0):\n    return -scale * (log_prob * reward).sum()\n\n\n"
        "def bad(logits):\n    return logits.sum()\n\n\nnumber = 3\n"
    )
    good = load_loss(f"{file}:good")
    assert LossSource(good).name == "good"
    assert asked_for(good) == ("log_prob", "reward")
    with pytest.raises(UsageError, match="asks for 'logits'"):
        load_loss(f"{file}:bad")
    for place, text in (
        (f"{file}:number", "has no function 'number'"),
        (f"{file}:nothing", "has no function 'nothing'"),
        (
            f"{tmp_path / 'nowhere.py'}:good",
            "there is no file .* a loss of your own is given as path/to/file.py:function",
        ),
        ("good", "names no function"),
    ):
        with pytest.raises(UsageError, match=text):
            load_loss(place)

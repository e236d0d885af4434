"""Algorithms on whole sequences: each update written out by hand, row by row, from its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from identity_strategies import close
from torch import Tensor
from torch.nn.functional import logsigmoid

from upslope.algorithms import (
    A2C,
    GRPO,
    KTO,
    PPO,
    RLOO,
    SFT,
    Algorithm,
    Now,
    Preference,
    ReferenceKL,
    Reinforce,
    RewardModel,
)
from upslope.auditing.source import Recorder
from upslope.auditing.tokens import TokenSetting
from upslope.train.step import learn
from upslope.trajectory import Trajectory

SETTING = TokenSetting.build("tokens-longer", size=4, stale=True, rows=3)
BETA = 0.3


def kl(place: str, estimator: str | None = None, **more: Any) -> ReferenceKL:
    return ReferenceKL(coefficient=BETA, place=place, estimator=estimator, **more)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Row:
    """The chosen steps of a completion: what the policy, the one that acted and the reference say; and all there is."""

    log_prob: Tensor
    acted: Tensor
    reference: Tensor
    reward: float
    group: int
    exact_kl: Tensor
    entropy: Tensor
    value: Tensor

    def estimate(self, name: str, log_prob: Tensor) -> Tensor:
        d = log_prob - self.reference
        return {"k1": d, "k2": d * d / 2.0, "k3": torch.exp(-d) - 1.0 + d, "exact": self.exact_kl}[name]


def rows_of(trajectory: Trajectory) -> list[Row]:
    policy, reference = SETTING.policy, SETTING.reference
    own, other = policy.evaluate(trajectory), reference.evaluate(trajectory)
    divergence = own.distribution.kl(other.distribution)
    assert trajectory.group is not None
    assert own.value is not None
    found: list[Row] = []
    for i, mask in enumerate(trajectory.mask):
        found.append(
            Row(
                log_prob=own.log_prob[i][mask],
                acted=trajectory.behaviour_log_prob[i][mask],
                reference=other.log_prob[i][mask].detach(),
                reward=float(trajectory.reward[i][mask].sum()),
                group=int(trajectory.group[i]),
                exact_kl=divergence[i][mask],
                entropy=own.entropy[i][mask],
                value=own.value[i][mask],
            )
        )
    return found


def advantages(rows: list[Row], algorithm: GRPO | RLOO) -> list[Tensor]:
    """Psi of each row's steps."""
    penalty = algorithm.reference_kl
    name = penalty.estimator or "k1"
    totals = [row.reward for row in rows]
    if penalty.on and penalty.place == "reward" and penalty.baselined:
        totals = [row.reward - BETA * float(row.estimate(name, row.acted).sum()) for row in rows]
    found: list[Tensor] = []
    for i, row in enumerate(rows):
        group = [j for j, other in enumerate(rows) if other.group == row.group]
        others = torch.tensor([totals[j] for j in group if j != i], dtype=torch.float64)
        members = torch.tensor([totals[j] for j in group], dtype=torch.float64)
        if isinstance(algorithm, RLOO):
            one = totals[i] - float(others.mean())
        else:
            one = totals[i] - float((others if algorithm.baseline == "leave_one_out" else members).mean())
            alike = bool(others.max() == others.min())
            scale = {
                "none": 1.0,
                "group": float(members.std()) + algorithm.scale_epsilon,
                "batch": float(torch.tensor(totals, dtype=torch.float64).std()) + algorithm.scale_epsilon,
                "leave_one_out": 1.0 if alike else float(others.std()) + algorithm.scale_epsilon,
            }[algorithm.scale]
            one = 0.0 if bool(members.max() == members.min()) else one / scale
            if algorithm.advantage_clip is not None:
                one = min(max(one, -algorithm.advantage_clip), algorithm.advantage_clip)
        psi = torch.full_like(row.acted, one)
        if penalty.on and penalty.place == "reward" and not penalty.baselined:
            later = row.estimate(name, row.acted).flip(0).cumsum(0).flip(0)
            psi = psi - BETA * later
        found.append(psi.detach())
    return found


def clipped(ratio: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * a, ratio.clamp(1.0 - low, 1.0 + high) * a)


def step_clip(row: Row, a: Tensor) -> Tensor:
    return clipped((row.log_prob - row.acted).exp(), a, 0.2, 0.2)


def mean_clip(row: Row, a: Tensor) -> Tensor:
    return clipped((row.log_prob - row.acted).mean().exp(), a, 0.03, 0.04)


def sum_clip(row: Row, a: Tensor) -> Tensor:
    return clipped((row.log_prob - row.acted).sum().exp(), a, 0.2, 0.2) / len(a)


def weight_clip(row: Row, a: Tensor) -> Tensor:
    return (row.log_prob - row.acted).exp().clamp(max=1.2).detach() * a * row.log_prob


def dual(row: Row, a: Tensor) -> Tensor:
    found = step_clip(row, a)
    return torch.where(a < 0, torch.maximum(found, 1.05 * a), found)


def dppo(row: Row, a: Tensor) -> Tensor:
    risen = (row.log_prob.exp() - row.acted.exp()).detach()
    kept = ~(((a > 0) & (risen > 0.01)) | ((a < 0) & (risen < -0.02)))
    return (row.log_prob - row.acted).exp() * a * kept - 0.1 * (row.log_prob - row.acted).square()


def truncated(row: Row, a: Tensor) -> Tensor:
    """In the only step p = l: the ratio is 1."""
    return (row.log_prob - row.acted).exp().clamp(max=1.1).detach() * row.log_prob * a


def masked(row: Row, a: Tensor) -> Tensor:
    weight = (row.log_prob - row.acted).sum().exp().detach()
    return (weight if float(weight) <= 1.1 else 0.0 * weight) * row.log_prob * a


def proximal(row: Row, a: Tensor) -> Tensor:
    return row.log_prob * a


def score(row: Row, a: Tensor) -> Tensor:
    return row.log_prob * a


Objective = Callable[[Row, Tensor], Tensor]
GROUPED: dict[str, tuple[GRPO | RLOO, Objective]] = {
    "grpo": (GRPO(), step_clip),
    "grpo, k3 in the loss": (GRPO(reference_kl=kl("loss", "k3")), step_clip),
    "grpo, k1 in the loss": (GRPO(reference_kl=kl("loss", "k1")), step_clip),
    "grpo, k2 in the loss": (GRPO(reference_kl=kl("loss")), step_clip),
    "grpo, exact KL": (GRPO(reference_kl=kl("loss", "exact"), entropy_coefficient=0.07), step_clip),
    "grpo, k1 in the reward": (GRPO(reference_kl=kl("reward"), scale="batch"), step_clip),
    "grpo, k3 in the reward": (GRPO(reference_kl=kl("reward", "k3"), scale="none"), step_clip),
    "grpo, KL after the baseline": (GRPO(reference_kl=kl("reward", baselined=False), advantage_clip=0.5), step_clip),
    "grpo, means of steps": (GRPO(reduction="step_mean", scale="leave_one_out"), step_clip),
    "grpo, constant length": (GRPO(reduction="fixed_length", fixed_length=5, scale_epsilon=0.1), step_clip),
    "grpo, sums": (GRPO(reduction="trajectory_sum", baseline="leave_one_out"), step_clip),
    "grpo, ratio of sequences": (GRPO(ratio="sequence", clip_low=0.03, clip_high=0.04), mean_clip),
    "grpo, ratio of sums": (GRPO(ratio="sequence_sum", reduction="trajectory_sum"), sum_clip),
    "grpo, weights": (GRPO(clip_shape="weight", clip_low=None), weight_clip),
    "grpo, dual clip": (GRPO(dual_clip=1.05), dual),
    "grpo, dropped steps": (
        GRPO(clip_low=None, clip_high=None, probability_high=0.01, probability_low=0.02, squared_log_ratio=0.1),
        dppo,
    ),
    "grpo, truncated weights": (GRPO(importance_cap=1.1), truncated),
    "grpo, masked weights": (
        GRPO(importance_cap=1.1, importance_level="sequence_sum", importance_correction="mask"),
        masked,
    ),
    "grpo, own anchor": (GRPO(anchor="proximal"), proximal),
    "rloo": (RLOO(entropy_coefficient=0.07), score),
    "rloo, KL": (RLOO(reference_kl=kl("reward")), score),
    "rloo, KL in the loss": (RLOO(reference_kl=kl("loss")), score),
    "rloo, ratio of sums": (RLOO(ratio="sequence_sum", clip_low=0.2, clip_high=0.2), sum_clip),
}


def grouped_loss(name: str, rows: list[Row]) -> Tensor:
    algorithm, objective = GROUPED[name]
    penalty = algorithm.reference_kl
    reduction = algorithm.reduction if isinstance(algorithm, GRPO) else "trajectory_sum"
    steps = sum(len(row.log_prob) for row in rows)
    loss = torch.zeros((), dtype=torch.float64)
    for row, psi in zip(rows, advantages(rows, algorithm), strict=True):
        each = -objective(row, psi) - algorithm.entropy_coefficient * row.entropy
        if penalty.on and penalty.place == "loss":
            each = each + BETA * row.estimate(penalty.estimator or "k2", row.log_prob)
        weight = {
            "step_mean": 1.0 / steps,
            "trajectory_mean": 1.0 / (len(rows) * len(psi)),
            "trajectory_sum": 1.0 / len(rows),
            "fixed_length": 1.0 / (len(rows) * 5.0),
        }[reduction]
        loss = loss + weight * each.sum()
    return loss


def drawn(seed: int, labels: list[float] | None = None) -> Trajectory:
    """12 completions, or the same with labels for rewards, which nobody sampled."""
    trajectory = next(iter(SETTING.drawn(1, seed)))
    if labels is None:
        return trajectory
    last = (trajectory.mask * torch.arange(trajectory.shape[1])).amax(-1, keepdim=True)
    label = torch.tensor(labels, dtype=torch.float64).unsqueeze(-1)
    return replace(
        trajectory,
        reward=torch.zeros_like(trajectory.reward).scatter(1, last, label),
        behaviour_log_prob=torch.full_like(trajectory.behaviour_log_prob, torch.nan),
    )


def ascent(algorithm: Algorithm, trajectory: Trajectory, micro_batches: int) -> Tensor:
    recorder = Recorder(tuple(SETTING.policy.parameters()), micro_batches=micro_batches)
    learn(
        SETTING.policy,
        algorithm,
        recorder,
        trajectory,
        now=Now(),
        learning_rate=0.0,
        generator=np.random.Generator(np.random.Philox(0)),
        reference=SETTING.reference,
    )
    (found,) = recorder.ascents
    return found


def downhill(loss: Tensor) -> Tensor:
    parameters = list(SETTING.policy.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True, retain_graph=True)
    return -torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize("name", list(GROUPED))
def test_every_update_of_groups_is_its_formula(name: str) -> None:
    for seed in (0, 1):
        trajectory = drawn(seed)
        expected = downhill(grouped_loss(name, rows_of(trajectory)))
        assert float(expected.norm()) > 1e-3
        for micro_batches in (1, 5):
            close(ascent(GROUPED[name][0], trajectory, micro_batches), expected)


PAIRS: dict[str, Preference] = {
    "sigmoid": Preference(beta=0.5),
    "cdpo": Preference(beta=0.5, label_smoothing=0.1, nll_coefficient=0.3),
    "robust": Preference(kind="robust", beta=0.5, label_smoothing=0.1, nll_coefficient=0.3, nll_reduction="sum"),
    "ipo": Preference(kind="ipo", beta=0.5),
    "ipo by token": Preference(kind="ipo", beta=0.5, ipo_length_normalised=True),
    "hinge": Preference(kind="hinge", beta=0.5),
    "simpo": Preference(kind="simpo", beta=2.0, simpo_margin=0.4),
    "orpo": Preference(kind="orpo", beta=0.5),
}


def pair_loss(given: Preference, chosen: Row, rejected: Row) -> Tensor:
    beta, e = given.beta, given.label_smoothing
    d_w, d_l = (row.log_prob - row.reference for row in (chosen, rejected))
    m_w, m_l = chosen.log_prob.mean(), rejected.log_prob.mean()
    margin = beta * (d_w.sum() - d_l.sum())
    kept, swapped = -logsigmoid(margin), -logsigmoid(-margin)
    gap = d_w.mean() - d_l.mean() if given.ipo_length_normalised else d_w.sum() - d_l.sum()
    odds = (m_w - torch.log(1.0 - m_w.exp())) - (m_l - torch.log(1.0 - m_l.exp()))
    losses = {
        "sigmoid": (1.0 - e) * kept + e * swapped,
        "robust": ((1.0 - e) * kept - e * swapped) / (1.0 - 2.0 * e),
        "ipo": (gap - 1.0 / (2.0 * beta)) ** 2,
        "hinge": (1.0 - margin).clamp(min=0.0),
        "simpo": -logsigmoid(beta * (m_w - m_l) - given.simpo_margin),
        "orpo": -m_w - beta * logsigmoid(odds),
    }
    likely = chosen.log_prob.sum() if given.nll_reduction == "sum" else m_w
    return losses[given.kind] - given.nll_coefficient * likely


@pytest.mark.parametrize("name", list(PAIRS))
def test_every_update_of_pairs_is_its_formula(name: str) -> None:
    for seed in (0, 1):
        trajectory = drawn(seed, [1.0, -1.0] * 6)
        rows = rows_of(trajectory)
        losses = [pair_loss(PAIRS[name], rows[i], rows[i + 1]) for i in range(0, 12, 2)]
        expected = downhill(torch.stack(losses).mean())
        for micro_batches in (1, 4):
            close(ascent(PAIRS[name], trajectory, micro_batches), expected)


def test_every_update_of_demonstrations_is_its_formula() -> None:
    trajectory = drawn(0, [0.0] * 12)
    rows = rows_of(trajectory)
    flat = torch.cat([row.log_prob for row in rows])
    by_row = torch.stack([row.log_prob.mean() for row in rows])
    whole = torch.stack([row.log_prob.sum() for row in rows])
    for micro_batches in (1, 5):
        close(ascent(SFT(), trajectory, micro_batches), downhill(-flat.mean()))
        close(ascent(SFT(reduction="trajectory_mean"), trajectory, micro_batches), downhill(-by_row.mean()))
        close(ascent(SFT(reduction="trajectory_sum"), trajectory, micro_batches), downhill(-whole.mean()))


def test_every_update_of_labels_is_its_formula() -> None:
    """Z is the mean log-ratio of all twelve, or 0 where that is negative, however the step is split."""
    signs = set[bool]()
    for seed in range(6):
        labels = [1.0, -1.0, -1.0] * 4
        trajectory = drawn(seed, labels)
        ratios = torch.stack([(row.log_prob - row.reference).sum() for row in rows_of(trajectory)])
        mean = float(ratios.detach().mean())
        signs.add(mean > 0.0)
        gain = 0.5 * (ratios - max(mean, 0.0))
        good = torch.tensor(labels) > 0
        loss = torch.where(good, 1.5 * (1.0 - torch.sigmoid(gain)), 0.7 * (1.0 - torch.sigmoid(-gain))).mean()
        for micro_batches in (1, 5):
            found = ascent(KTO(beta=0.5, desirable_weight=1.5, undesirable_weight=0.7), trajectory, micro_batches)
            close(found, downhill(loss))
    assert signs == {True, False}


def test_every_update_of_scores_is_its_formula() -> None:
    """The score is V at the last chosen step."""
    trajectory = drawn(0, [1.0, -1.0] * 6)
    score = torch.stack([row.value[-1] for row in rows_of(trajectory)])
    chosen, rejected = score[0::2], score[1::2]
    loss = (-logsigmoid(chosen - rejected - 0.5) + 0.1 * (chosen + rejected) ** 2).mean()
    for micro_batches in (1, 4):
        close(ascent(RewardModel(margin=0.5, centering_coefficient=0.1), trajectory, micro_batches), downhill(loss))


@pytest.mark.parametrize("name", ["reward k1", "loss k2", "loss exact"])
def test_every_penalty_per_step_is_its_formula(name: str) -> None:
    """REINFORCE, PPO and A2C on sequences: r_t - beta (b_t - f_t) at each step, or beta k(l - f) in the loss."""
    place, estimator = name.split()
    trajectory = drawn(0)
    rows = rows_of(trajectory)
    reinforce = Reinforce(gamma=1.0, reference_kl=kl(place, estimator))
    ppo = PPO(
        gamma=1.0, gae_lambda=1.0, epochs=1, minibatches=1, clip=0.2, normalize_advantage=False, value_coefficient=0.0
    )
    ppo = replace(ppo, reference_kl=kl(place, estimator))
    a2c = A2C(gamma=1.0, gae_lambda=1.0, value_coefficient=0.0, reference_kl=kl(place, estimator))
    plain, proximal_loss, advantage_loss = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    _, following = SETTING.policy.values(trajectory)
    steps = sum(len(row.log_prob) for row in rows)
    for i, row in enumerate(rows):
        reward = trajectory.reward[i][trajectory.mask[i]].clone()
        if place == "reward":
            reward = reward - BETA * (row.acted - row.reference)
        ahead = reward.flip(0).cumsum(0).flip(0)
        term = BETA * row.estimate(estimator, row.log_prob).sum() if place == "loss" else 0.0
        plain = plain + (-(row.log_prob * ahead).sum() + term) / len(rows)
        closing = following[i][trajectory.mask[i]][-1].detach()
        psi = (ahead + closing - row.value).detach()
        proximal_loss = proximal_loss + (-step_clip(row, psi).sum() + term) / steps
        advantage_loss = advantage_loss + (-(row.log_prob * psi).sum() + term) / steps
    close(ascent(reinforce, trajectory, 1), downhill(plain))
    close(ascent(ppo, trajectory, 1), downhill(proximal_loss))
    close(ascent(a2c, trajectory, 1), downhill(advantage_loss))

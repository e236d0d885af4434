"""What must not matter to algorithms on whole sequences: splits, padding, order, log-probs that nobody had."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from sequence_rows import ALGORITHMS, NETWORK, SETTING, learned, rows_for
from torch import Tensor
from torch.nn.functional import pad

import upslope.algorithms
from upslope.algorithms import GRPO, KTO, RLOO, SFT, Preference, ReferenceKL, RewardModel
from upslope.trajectory import Trajectory

EVERY = pytest.mark.parametrize("name", list(ALGORITHMS))


def same(left: tuple[Tensor, dict[str, float]], right: tuple[Tensor, dict[str, float]]) -> None:
    torch.testing.assert_close(left[0], right[0], rtol=1e-9, atol=1e-12)
    assert left[1].keys() == right[1].keys()
    for name, number in left[1].items():
        assert right[1][name] == pytest.approx(number, rel=1e-9, abs=1e-12), name


def test_every_algorithm_on_sequences_is_here() -> None:
    assert {type(algorithm) for algorithm in ALGORITHMS.values()} == {GRPO, RLOO, SFT, Preference, KTO, RewardModel}
    assert set(vars(upslope.algorithms)) >= {type(algorithm).__name__ for algorithm in ALGORITHMS.values()}


@EVERY
def test_any_micro_batch_split_gives_the_same_gradient(name: str) -> None:
    algorithm = ALGORITHMS[name]
    trajectory = rows_for(algorithm)
    whole = learned(algorithm, trajectory)
    assert float(whole[0].abs().max()) > 1e-3
    for parts in (2, 5, 12, 40):
        same(learned(algorithm, trajectory, micro_batches=parts), whole)


@pytest.mark.parametrize("name", ["grpo", "gspo", "rloo", "sft", "dpo", "kto", "reward model"])
def test_a_transformer_is_split_like_a_table(name: str) -> None:
    algorithm = ALGORITHMS[name]
    trajectory = rows_for(algorithm, NETWORK)
    same(learned(algorithm, trajectory, NETWORK, micro_batches=5), learned(algorithm, trajectory, NETWORK))


@EVERY
def test_padding_and_what_it_holds_change_nothing(name: str) -> None:
    algorithm = ALGORITHMS[name]
    trajectory = rows_for(algorithm)
    hidden = ~trajectory.mask
    rubbish = replace(
        trajectory,
        reward=trajectory.reward.masked_fill(hidden, torch.nan),
        behaviour_log_prob=trajectory.behaviour_log_prob.masked_fill(hidden, torch.nan),
    )
    same(learned(algorithm, padded(rubbish)), learned(algorithm, trajectory))


def padded(trajectory: Trajectory) -> Trajectory:
    """Two more positions in every row, at which nothing is chosen."""

    def longer(value: Tensor, filling: float) -> Tensor:
        return pad(value, (0, 2), value=filling)

    assert isinstance(trajectory.observation, Tensor)
    steps = trajectory.shape[1]
    return replace(
        trajectory,
        observation=longer(trajectory.observation, 0),
        action=longer(trajectory.action, 0),
        reward=longer(trajectory.reward, torch.nan),
        terminated=longer(trajectory.terminated, False),
        truncated=longer(trajectory.truncated, False),
        mask=longer(trajectory.mask, False),
        behaviour_log_prob=longer(trajectory.behaviour_log_prob, torch.nan),
        time=longer(trajectory.time, 0),
        final_index=trajectory.final_index // steps * (steps + 2) + trajectory.final_index % steps,
    )


@EVERY
def test_the_order_of_groups_and_pairs_changes_nothing(name: str) -> None:
    algorithm = ALGORITHMS[name]
    trajectory = rows_for(algorithm)
    order = torch.tensor([2, 3, 0, 1]).unsqueeze(-1) * 3 + torch.arange(3)
    if algorithm.passes.together == 2:
        order = torch.tensor([5, 2, 0, 1, 4, 3]).unsqueeze(-1) * 2 + torch.arange(2)
    index = order.flatten()
    moved = {f.name: getattr(trajectory, f.name) for f in fields(Trajectory)}
    rows = trajectory.shape[0]
    moved = {
        key: value[index] if isinstance(value, Tensor) and len(value) == rows and "final" not in key else value
        for key, value in moved.items()
    }
    same(learned(algorithm, Trajectory(**moved)), learned(algorithm, trajectory))


@EVERY
def test_no_metric_is_nan_and_mismatch_is_there_where_somebody_sampled(name: str) -> None:
    algorithm = ALGORITHMS[name]
    trajectory = rows_for(algorithm)
    _, metrics = learned(algorithm, trajectory)
    assert all(math.isfinite(number) for number in metrics.values()), metrics
    if algorithm.target.gradient == "given_data":
        assert "mismatch" not in metrics
        return
    log_prob = SETTING.policy.log_prob(trajectory.observation, trajectory.action).detach()
    apart = (log_prob - trajectory.behaviour_log_prob)[trajectory.mask].abs().max()
    assert metrics["mismatch"] == pytest.approx(float(apart))


@EVERY
def test_minibatches_share_the_rows_out(name: str) -> None:
    algorithm: Any = ALGORITHMS[name]
    if isinstance(algorithm, RLOO) and algorithm.ratio == "none":
        algorithm = replace(algorithm, ratio="step")
    several = replace(algorithm, epochs=2, minibatches=3)
    ascents, metrics = learned(several, rows_for(algorithm))
    assert len(ascents) == 6
    assert bool(ascents.isfinite().all())
    assert metrics["optimizer_steps"] == 6


@EVERY
def test_describe_is_in_words(name: str) -> None:
    described = ALGORITHMS[name].describe()
    assert "passes" in described
    assert all(isinstance(text, str) and text for text in described.values())


CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "grpo": (
        GRPO(),
        {
            "baseline": "leave_one_out",
            "scale": "none",
            "scale_epsilon": 0.123,
            "advantage_clip": 0.123,
            "ratio": "sequence",
            "clip_low": 0.123,
            "clip_high": None,
            "dual_clip": 3.0,
            "clip_shape": "weight",
            "probability_low": 0.123,
            "probability_high": 0.123,
            "squared_log_ratio": 0.123,
            "reduction": "step_mean",
            "fixed_length": {"reduction": "fixed_length", "fixed_length": 7},
            "reference_kl": ReferenceKL(coefficient=0.123),
            "entropy_coefficient": 0.123,
            "entropy_schedule": {"entropy_coefficient": 0.123, "entropy_schedule": "linear"},
            "epochs": 2,
            "minibatches": 2,
            "anchor": "proximal",
            "importance_cap": 2.0,
            "importance_level": {"importance_cap": 2.0, "importance_level": "sequence_sum"},
            "importance_correction": {"importance_cap": 2.0, "importance_correction": "mask"},
        },
    ),
    "rloo": (
        RLOO(ratio="sequence_sum"),
        {
            "ratio": "step",
            "clip_low": 0.123,
            "clip_high": 0.123,
            "reference_kl": ReferenceKL(coefficient=0.123),
            "entropy_coefficient": 0.123,
            "entropy_schedule": {"entropy_coefficient": 0.123, "entropy_schedule": "linear"},
            "epochs": 2,
            "minibatches": 2,
        },
    ),
    "sft": (SFT(), {"reduction": "trajectory_mean", "epochs": 2, "minibatches": 2}),
    "preference": (
        Preference(),
        {
            "kind": "hinge",
            "beta": 0.123,
            "label_smoothing": 0.123,
            "ipo_length_normalised": {"kind": "ipo", "ipo_length_normalised": True},
            "simpo_margin": {"kind": "simpo", "simpo_margin": 0.123},
            "nll_coefficient": 0.123,
            "nll_reduction": {"nll_coefficient": 0.123, "nll_reduction": "sum"},
            "epochs": 2,
            "minibatches": 2,
        },
    ),
    "kto": (
        KTO(),
        {"beta": 0.123, "desirable_weight": 0.123, "undesirable_weight": 0.123, "epochs": 2, "minibatches": 2},
    ),
    "reward model": (
        RewardModel(),
        {"margin": 0.123, "centering_coefficient": 0.123, "epochs": 2, "minibatches": 2},
    ),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_describe_tells_every_setting(name: str) -> None:
    base, changes = CHANGES[name]
    assert set(changes) == {field.name for field in fields(base)}
    for field, value in changes.items():
        settings = value if isinstance(value, dict) else {field: value}
        others = {key: other for key, other in settings.items() if key != field}
        before = base if field == "fixed_length" else replace(base, **others)
        assert replace(base, **settings).describe() != before.describe(), field


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: GRPO(reduction="fixed_length"), "go together"),
        (lambda: GRPO(fixed_length=3), "go together"),
        (lambda: GRPO(clip_low=1.5), "clip_low"),
        (lambda: GRPO(clip_high=0.0), "clip_high"),
        (lambda: GRPO(dual_clip=1.0), "dual_clip"),
        (lambda: GRPO(dual_clip=3.0, clip_low=None, clip_high=None), "set clip_low"),
        (lambda: GRPO(dual_clip=3.0, clip_shape="weight"), "dual_clip"),
        (lambda: GRPO(importance_cap=0.0), "importance_cap"),
        (lambda: GRPO(epochs=0), "at least 1"),
        (lambda: RLOO(clip_high=0.2), "set ratio"),
        (lambda: RLOO(epochs=2), "set a ratio"),
        (lambda: SFT(minibatches=0), "at least 1"),
        (lambda: Preference(beta=0.0), "beta"),
        (lambda: Preference(kind="ipo", label_smoothing=0.1), "does nothing for ipo"),
        (lambda: Preference(ipo_length_normalised=True), "does nothing for sigmoid"),
        (lambda: Preference(simpo_margin=1.0), "does nothing for sigmoid"),
        (lambda: KTO(beta=-1.0), "beta"),
        (lambda: RewardModel(margin=-1.0), "margin"),
        (lambda: ReferenceKL(coefficient=-0.1), "at least 0"),
        (lambda: ReferenceKL(place="reward", estimator="exact"), "term of the loss"),
        (lambda: ReferenceKL(baselined=False), "baselined"),
    ],
)
def test_settings_without_a_meaning_are_refused(wrong: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrong()

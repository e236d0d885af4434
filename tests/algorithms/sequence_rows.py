"""Rows of completions for the algorithms that learn from whole sequences, and the gradients of an update on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from upslope.algorithms import GRPO, KTO, RLOO, SFT, Algorithm, Now, Preference, ReferenceKL, RewardModel
from upslope.auditing.source import Recorder
from upslope.auditing.tokens import TokenSetting
from upslope.train.step import learn
from upslope.trajectory import Trajectory

SETTING = TokenSetting.build("tokens-longer", size=3, stale=True)
NETWORK = TokenSetting.build("tokens-longer", size=3, stale=True, network="transformer")
KL = ReferenceKL(coefficient=0.3)
IN_REWARD = ReferenceKL(coefficient=0.3, place="reward")

ALGORITHMS: dict[str, Algorithm] = {
    "grpo": GRPO(reference_kl=KL, entropy_coefficient=0.01),
    "dapo": GRPO(reduction="step_mean", clip_high=0.28),
    "dr grpo, KL after the baseline": GRPO(
        scale="none", reduction="fixed_length", fixed_length=5, reference_kl=replace(IN_REWARD, baselined=False)
    ),
    "gspo": GRPO(ratio="sequence", clip_low=3e-2, clip_high=4e-2),
    "cispo": GRPO(clip_shape="weight", clip_low=None, reduction="step_mean", scale="batch"),
    "nemo": GRPO(baseline="leave_one_out", scale="leave_one_out", reference_kl=ReferenceKL(estimator="k3")),
    "dppo": GRPO(clip_low=None, clip_high=None, probability_low=0.1, probability_high=0.1, squared_log_ratio=0.1),
    "tis": GRPO(importance_cap=1.1, dual_clip=3.0, reference_kl=ReferenceKL(coefficient=0.3, estimator="exact")),
    "mask of sequences": GRPO(importance_cap=1.5, importance_level="sequence_sum", importance_correction="mask"),
    "rloo": RLOO(reference_kl=IN_REWARD),
    "rloo, ratio of sequences": RLOO(ratio="sequence_sum", clip_low=0.2, clip_high=0.2, reference_kl=KL),
    "sft": SFT(),
    "sft by answer": SFT(reduction="trajectory_mean"),
    "dpo": Preference(nll_coefficient=0.2),
    "robust": Preference(kind="robust", label_smoothing=0.1, nll_coefficient=0.2, nll_reduction="sum"),
    "ipo": Preference(kind="ipo", ipo_length_normalised=True),
    "hinge": Preference(kind="hinge", beta=0.5),
    "simpo": Preference(kind="simpo", beta=2.0, simpo_margin=0.5),
    "orpo": Preference(kind="orpo"),
    "kto": KTO(beta=0.5, desirable_weight=1.5),
    "reward model": RewardModel(margin=0.5, centering_coefficient=0.1),
}


def rows_for(algorithm: Algorithm, setting: TokenSetting = SETTING, seed: int = 0) -> Trajectory:
    """12 completions: four groups of three, six pairs, or rows with labels; nobody sampled what is given."""
    trajectory = next(iter(setting.drawn(1, seed)))
    if algorithm.target.gradient != "given_data":
        return trajectory
    rows, steps = trajectory.shape
    last = (trajectory.mask * torch.arange(steps)).amax(-1, keepdim=True)
    label = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(rows // 2)
    if isinstance(algorithm, SFT):
        label = torch.zeros_like(label)
    return replace(
        trajectory,
        reward=torch.zeros_like(trajectory.reward).scatter(1, last, label.unsqueeze(-1)),
        behaviour_log_prob=trajectory.behaviour_log_prob.masked_fill(trajectory.mask, torch.nan),
    )


def learned(
    algorithm: Algorithm, trajectory: Trajectory, setting: TokenSetting = SETTING, micro_batches: int = 1, seed: int = 0
) -> tuple[Tensor, dict[str, float]]:
    """[steps, P] the ascent of each optimiser step, and the metrics."""
    recorder = Recorder(tuple(setting.policy.parameters()), micro_batches=micro_batches)
    found = learn(
        setting.policy,
        algorithm,
        recorder,
        trajectory,
        now=Now(),
        learning_rate=0.0,
        generator=np.random.Generator(np.random.Philox(seed)),
        reference=setting.reference,
    )
    return torch.stack(recorder.ascents), found.metrics

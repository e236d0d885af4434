"""The advantage of a trajectory by its critic, and what the critic learns: shared by whatever bootstraps."""

from __future__ import annotations

import torch
from torch import Tensor

from upslope.estimators import VTrace, gae, vtrace
from upslope.trajectory import Signal, Trajectory


def gae_signal(
    trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, *, gamma: float, gae_lambda: float
) -> Signal:
    """A_t = GAE(gamma, lambda), and the critic's target A_t + V_t, the lambda-return.

    Args:
        trajectory: what was collected.
        value: [B, T] V_t.
        next_value: [B, T] V'_t.
        gamma: discount factor.
        gae_lambda: 0 for the TD residual.
    """
    assert value is not None
    assert next_value is not None
    advantage = gae(
        trajectory.reward,
        trajectory.discount(gamma),
        value,
        next_value,
        trajectory.cut,
        gae_lambda=gae_lambda,
        mask=trajectory.partial_mask,
    )
    return Signal(advantage=advantage, value_target=advantage + value)


def vtrace_of(
    trajectory: Trajectory,
    value: Tensor | None,
    next_value: Tensor | None,
    *,
    gamma: float,
    trace_decay: float,
    rho_clip: float,
    trace_clip: float,
) -> VTrace:
    """V-trace of the learner before the update, from steps that another policy chose.

    Args:
        trajectory: with p_t.
        value: [B, T] V_t.
        next_value: [B, T] V'_t.
        gamma: discount factor.
        trace_decay, rho_clip, trace_clip: as in `upslope.estimators.vtrace`.
    """
    assert value is not None
    assert next_value is not None
    assert trajectory.proximal_log_prob is not None
    return vtrace(
        trajectory.proximal_log_prob,
        trajectory.behaviour_log_prob,
        trajectory.reward,
        trajectory.discount(gamma),
        value,
        next_value,
        trajectory.cut,
        trace_decay=trace_decay,
        rho_clip=rho_clip,
        trace_clip=trace_clip,
        mask=trajectory.partial_mask,
    )


def unweighted_advantage(found: VTrace) -> Tensor:
    """r_t + g_t v_{t+1} - V_t [B, T]: the advantage of V-trace without its weight rho_t; 0 where nothing was chosen."""
    return found.advantage / found.rho.clamp(min=torch.finfo(found.rho.dtype).tiny)

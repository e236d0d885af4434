"""The potential that shapes an agent's rewards: a function of the user's own, or what a saved policy's critic says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from upslope.errors import UsageError
from upslope.estimators import potential_shaping
from upslope.policies import ActorCritic
from upslope.train.config import Run, ShapingConfig
from upslope.trajectory import Observation, Trajectory, map_observation
from upslope.user_code import function_from_file


@final
class Shaping:
    """Adds F_t = g_t Phi(s'_t) - Phi(s_t) to the rewards of what is learnt from; what is logged stays as it was.

    Args:
        values: Phi at each step and after it, [B, T] each.
        scale: multiplier of both.
    """

    def __init__(self, values: Callable[[Trajectory], tuple[Tensor, Tensor]], scale: float) -> None:
        self._values, self._scale = values, scale

    def shaped(self, trajectory: Trajectory, gamma: float) -> Trajectory:
        """The trajectory with r_t + F_t.

        Args:
            trajectory: rewards as the environment gave them.
            gamma: the algorithm's discount factor: with another one F would not cancel along a trajectory.
        """
        present, following = self._values(trajectory)
        shaping = potential_shaping(
            trajectory.discount(gamma), present, following, trajectory.cut, mask=trajectory.partial_mask
        )
        return replace(trajectory, reward=trajectory.reward + self._scale * shaping)


def shaping_by_function(config: ShapingConfig) -> Shaping:
    """From the user's own file, which is run.

    Raises:
        UsageError: if there is no such function.
    """
    function = function_from_file(config.potential, what="potential")

    def values(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        observation = map_observation(lambda t: t.reshape(-1, *t.shape[2:]), trajectory.observation)
        present = _checked(function, observation, trajectory.reward.numel(), config.potential)
        count = len(trajectory.final_index)
        final_value = (
            _checked(function, trajectory.final_observation, count, config.potential) if count else present[:0]
        )
        present = present.view(trajectory.shape)
        return present, trajectory.next_value(present, final_value)

    return Shaping(values, config.scale)


def shaping_by_policy(config: ShapingConfig, policy: ActorCritic) -> Shaping:
    """From a saved policy's critic.

    Raises:
        UsageError: if it has none, or a memory.
    """
    if policy.critic is None:
        raise UsageError(f"the policy of shaping.potential={config.potential!r} has no critic: take one that has")
    if policy.sequential:
        raise UsageError(
            f"the policy of shaping.potential={config.potential!r} has a memory, so that its value is no function of "
            "the observation: take one without"
        )
    return Shaping(policy.values, config.scale)


def potential_again(run: Run, given: str | None) -> Run:
    """The run of a directory, with the potential of the user's own that it names only if the user names it, too.

    Loading a function runs the file it is in, and a run directory may come from anybody.

    Args:
        run: as recorded.
        given: the function, path/to/file.py:function, wherever its file lies now.

    Raises:
        UsageError: if one is needed and not given, or given and not needed, or another function.
    """
    recorded = run.shaping
    if recorded is None or not recorded.by_function:
        if given is not None:
            raise UsageError("the rewards of this run are not shaped by a function of yours: leave the potential out")
        return run
    if given is None:
        raise UsageError(
            f"the potential of this run, {recorded.potential!r}, is a function in a file that would be run, and a run "
            f"directory from somebody else could name any file. If you trust it, name it: potential="
            f"{recorded.potential!r} in Python, --potential {recorded.potential} on the command line"
        )
    wanted = recorded.potential.rpartition(":")[2]
    if given.rpartition(":")[2] != wanted:
        raise UsageError(f"the potential of this run is the function {wanted!r}, got {given!r}: give that one")
    return replace(run, shaping=replace(recorded, potential=given))


def named_potential(run: Run) -> list[str]:
    """The command line's option that names a potential which a run directory alone may not (`potential_again`)."""
    return ["--potential", run.shaping.potential] if run.shaping is not None and run.shaping.by_function else []


def file_hash(config: ShapingConfig) -> str:
    """SHA-256 of the file of the user's own potential.

    Raises:
        UsageError: if it cannot be read.
    """
    path = Path(config.potential.rpartition(":")[0])
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"the file of shaping.potential={config.potential!r} cannot be read: {error}") from error


@torch.no_grad()
def _checked(function: Callable[..., Any], observation: Observation, count: int, name: str) -> Tensor:
    """Phi of `count` observations.

    Raises:
        UsageError: if it is not as many finite numbers.
    """
    found: Any = function(observation)
    if not isinstance(found, Tensor) or found.shape != (count,):
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(
            f"the potential {name} returns a tensor of one number per observation: expected shape ({count},), got {got}"
        )
    if not bool(found.isfinite().all()):
        raise UsageError(f"the potential {name} is NaN or infinite somewhere: it must be finite on all observations")
    return found.detach().to(torch.get_default_dtype())

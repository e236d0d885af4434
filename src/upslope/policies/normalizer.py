"""Running statistics that are part of a policy: frozen while it acts and learns, moved only by an explicit update."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from upslope.estimators.recurrence import backward_recurrence
from upslope.spaces import Box, Composite, ObservationLeaf, Space
from upslope.trajectory import Observation, ObservationArrays, Trajectory

_EPSILON = 1e-8


class RunningStatistics(nn.Module):
    """Mean and variance of everything seen so far, in float64, merged batch by batch (Chan, Golub and LeVeque 1979).

    With n values of mean m and squared deviations S joined by k values of mean m' and squared deviations S':
    mean = m + (m' - m) k / (n + k);  squares = S + S' + (m' - m)^2 n k / (n + k);  variance = squares / (n + k).
    Before any value the mean is 0 and the variance 1.

    Args:
        shape: of one value.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.mean: Tensor
        self.variance: Tensor
        self.count: Tensor
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def merge(self, values: Tensor) -> None:
        """Take in `values` [k, *shape]; the buffers change in place. No values, no change."""
        new = float(len(values))
        if new == 0.0:
            return
        values = values.to(self.mean)
        mean = values.mean(0)
        squares = (values - mean).square_().sum(0)
        old = float(self.count)
        total, gap = old + new, mean - self.mean
        squares += self.variance * old + gap.square() * (old * new / total)
        self.mean += gap * (new / total)
        self.variance.copy_(squares / total)
        self.count += new


class LeanStatistics:
    """Views of running statistics for NumPy: they follow the module's in-place updates."""

    def __init__(self, statistics: RunningStatistics, clip: float) -> None:
        self._mean, self._variance = statistics.mean.cpu().numpy(), statistics.variance.cpu().numpy()
        self._clip = clip

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """clip((x - mean) / sqrt(variance + 1e-8)), in float64."""
        result = values - self._mean
        result /= np.sqrt(self._variance + _EPSILON)
        np.minimum(result, self._clip, out=result)
        return np.maximum(result, -self._clip, out=result)


def _standardised(statistics: RunningStatistics, values: Tensor, clip: float) -> Tensor:
    result = (values.double() - statistics.mean).div_((statistics.variance + _EPSILON).sqrt_())
    return result.clamp_(-clip, clip)


def is_normalizable(leaf: ObservationLeaf) -> bool:
    """Whether a leaf holds measurements: real numbers, neither bytes of an image nor bits nor choices."""
    return isinstance(leaf, Box) and not leaf.is_image and leaf.dtype.startswith("float")


class ObservationNormalizer(nn.Module):
    """Standardises observations: clip((o - mean) / sqrt(variance + 1e-8), -clip, clip), leaf by leaf.

    Images, bits and choices pass untouched. The statistics are frozen unless `update` is called: a policy and its
    trajectories therefore always agree on them, and evaluation never moves them. Kept in float64.

    Args:
        space: the observation space.
        clip: largest absolute value of a standardised number.
    """

    def __init__(self, space: Space, *, clip: float) -> None:
        super().__init__()
        self.clip = clip
        leaves = dict(space.entries) if isinstance(space, Composite) else {"": space}
        # Module names may not hold dots, which keys of a Dict space may.
        self.names = tuple(name for name, leaf in leaves.items() if is_normalizable(leaf))
        self.statistics = nn.ModuleList(
            RunningStatistics(leaf.shape) for leaf in leaves.values() if isinstance(leaf, Box) and is_normalizable(leaf)
        )

    def forward(self, observation: Observation) -> Observation:
        """Observations with any leading shape; standardised leaves come back in float64."""
        if not isinstance(observation, dict):
            return self._standardise(0, observation) if self.names else observation
        result = dict(observation)
        for position, name in enumerate(self.names):
            result[name] = self._standardise(position, observation[name])
        return result

    def _standardise(self, position: int, values: Tensor) -> Tensor:
        statistics = cast("RunningStatistics", self.statistics[position])
        if values.device.type == "cpu" and not values.requires_grad:
            return torch.from_numpy(LeanStatistics(statistics, self.clip)(values.numpy()))
        return _standardised(statistics, values, self.clip)

    def update(self, observation: Observation, mask: Tensor) -> None:
        """Take observations [B, T, ...] into the statistics, those where `mask` [B, T] is True.

        Raises:
            ValueError: if an observation is not finite; nothing is changed then.
        """
        chosen: list[Tensor] = []
        for name in self.names:
            values = observation[name] if isinstance(observation, dict) else observation
            values = values[mask]
            if not bool(torch.isfinite(values).all()):
                where = torch.nonzero(~torch.isfinite(values))[0].tolist()
                label = f"the observation {name!r}" if name else "an observation"
                raise ValueError(
                    f"{label} is not finite: {float(values[tuple(where)])} at step {where[0]} of the batch, "
                    f"element {tuple(where[1:])}; repair the environment, or clean its observations with a wrapper"
                )
            chosen.append(values)
        for statistics, values in zip(self.statistics, chosen, strict=True):
            cast("RunningStatistics", statistics).merge(values)

    def lean(self) -> LeanObservationNormalizer:
        """The same for NumPy observations in rollouts, on views of the statistics."""
        return LeanObservationNormalizer(self)


class LeanObservationNormalizer:
    """An `ObservationNormalizer` for rollouts, equal to it bit for bit."""

    def __init__(self, normalizer: ObservationNormalizer) -> None:
        statistics = [LeanStatistics(cast("RunningStatistics", s), normalizer.clip) for s in normalizer.statistics]
        self._leaves = dict(zip(normalizer.names, statistics, strict=True))

    def __call__(self, observation: ObservationArrays) -> ObservationArrays:
        """Observations [N, ...]; standardised leaves come back in float64."""
        if isinstance(observation, dict):
            return {n: self._leaves[n](values) if n in self._leaves else values for n, values in observation.items()}
        return self._leaves[""](observation) if self._leaves else observation


class RewardNormalizer(nn.Module):
    """Divides rewards by the spread of the discounted return so far: clip(r / sqrt(variance(R) + 1e-8), -clip, clip).

    R_t = r_t + gamma R_{t-1} runs on per environment, restarts after an episode's end and crosses from one rollout to
    the next: the open returns are part of the saved state. No mean is subtracted, so signs and zeros stay (Engstrom et
    al. 2020 describe the practice).

    Args:
        clip: largest absolute value of a scaled reward.
    """

    def __init__(self, *, clip: float) -> None:
        super().__init__()
        self.clip = clip
        self.statistics = RunningStatistics(())
        self.running_return: Tensor
        self.register_buffer("running_return", torch.zeros(0, dtype=torch.float64))
        self.register_load_state_dict_pre_hook(_take_size_of_running_return)

    def forward(self, reward: Tensor) -> Tensor:
        """Scaled rewards, any shape; the reward itself is never written on."""
        scale = (self.statistics.variance + _EPSILON).sqrt()
        return (reward.double() / scale).clamp_(-self.clip, self.clip).to(reward.dtype)

    def scale(self, trajectory: Trajectory, gamma: float, *, rows_each: int = 1) -> Tensor:
        """Take the trajectory's rewards into the statistics, then scale them: [B, T], a new tensor.

        Args:
            trajectory: rows of environments in order, the same environments in every call while episodes are open.
                Positions that are no steps (`mask` False) are skipped: not counted, and not decayed over.
            gamma: the algorithm's discount factor.
            rows_each: how many rows of the trajectory are one environment's, one after the other.

        Raises:
            ValueError: if a reward is not finite, or the number of environments changed; nothing is changed then.
        """
        reward, mask = trajectory.reward, trajectory.mask
        if not bool(torch.isfinite(reward[mask]).all()):
            row, step = torch.nonzero(mask & ~torch.isfinite(reward))[0].tolist()
            raise ValueError(
                f"a reward is not finite: {float(reward[row, step])} in row {row} at step {step} of the trajectory; "
                "repair the environment's reward"
            )
        # The end of a row's data ends no episode: `cut` would be too much here.
        ended = (trajectory.terminated | trajectory.truncated).reshape(len(reward) // rows_each, -1)
        mask = mask.reshape(ended.shape)
        rewards = torch.where(mask, reward.reshape(ended.shape), 0.0).to(self.running_return)
        decay = torch.ones_like(rewards).masked_fill_(mask, gamma)
        decay[:, 1:].masked_fill_(ended[:, :-1], 0.0)
        rewards[:, 0] += decay[:, 0] * self._carried(len(rewards))
        decay[:, 0] = 0.0
        returns = backward_recurrence(rewards.flip(-1), decay.flip(-1)).flip(-1)
        self.statistics.merge(returns[mask])
        self.running_return = returns[:, -1].masked_fill(ended[:, -1], 0.0)
        return self(reward)

    def _carried(self, rows: int) -> Tensor:
        if len(self.running_return) == rows:
            return self.running_return
        if bool(self.running_return.any()):
            raise ValueError(
                f"the reward normaliser carries the open returns of {len(self.running_return)} environments and got a "
                f"trajectory of {rows}: continue with the same number, or call restart() first"
            )
        return self.running_return.new_zeros(rows)

    def restart(self) -> None:
        """Forget the open returns (all environments start anew); the statistics stay."""
        self.running_return = self.running_return.new_zeros(0)


def _take_size_of_running_return(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    saved = state.get(prefix + "running_return")
    if saved is not None and saved.ndim == 1:
        normalizer = cast("RewardNormalizer", module)
        normalizer.running_return = normalizer.running_return.new_zeros(len(saved))

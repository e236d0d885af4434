"""How good a policy is: whole episodes, a number fixed beforehand in each environment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from upslope.collect.errors import EndlessEpisodeError
from upslope.collect.finite_check import refuse_unfinite_step
from upslope.collect.vector import Step, VectorEnvironment
from upslope.streams import Purpose, derived_seed, stream
from upslope.trajectory import Policy

_CHUNK = 128
EPISODE_LIMIT = 30_000
"""Steps after which an episode counts as endless; the longest of Gymnasium's, Atari's, are truncated at 27,000."""


def environment_seeds(seed: int, purpose: Purpose, wave: int, update: int, count: int) -> list[int]:
    """One seed per environment, of 31 bits since some environments take no more."""
    return [derived_seed(seed, purpose, wave, update, index) >> 32 for index in range(count)]


def episode_quota(episodes: int, count: int) -> np.ndarray:
    """How many episodes each of `count` environments brings, [N]: fixed beforehand, as even as can be.

    Taking the first `episodes` that end would prefer short ones.

    Raises:
        ValueError: if there are fewer episodes than environments.
    """
    if episodes < count:
        raise ValueError(
            f"{episodes} episodes cannot be shared among {count} environments; ask for at least {count} episodes or "
            f"make at most {episodes} environments"
        )
    return np.full(count, episodes // count) + (np.arange(count) < episodes % count)


def refuse_endless(lengths: np.ndarray, wanted: np.ndarray, limit: int) -> None:
    """Give up on episodes that do not end.

    Args:
        lengths: [N] steps of the episodes under way.
        wanted: [N] whether their ends are waited for.
        limit: steps that one episode may take.

    Raises:
        EndlessEpisodeError: naming the environment.
    """
    index = int(np.argmax(np.where(wanted, lengths, 0)))
    if wanted[index] and lengths[index] >= limit:
        raise EndlessEpisodeError(
            f"the episode of environment {index} has not ended after {lengths[index]} steps. Give it a time limit "
            "(EnvironmentConfig.time_limit); if its episodes are that long, raise episode_limit",
            index,
        )


@contextmanager
def few_threads(count: int) -> Iterator[None]:
    """Choose actions for `count` environments with no more threads than have 8 observations each to work on.

    Threads wait for one another after every layer. With a handful of observations there is nothing to share, and on
    busy cores each wait costs a scheduler's time slice: Breakout, 8 environments and 2 threads, was 13 times slower
    than with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, count // 8)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """Raw, undiscounted returns and lengths of whole episodes, [episodes], ordered by environment, then by time."""

    returns: np.ndarray
    lengths: np.ndarray


class _Tally:
    """The first `quota[n]` episodes of each environment, and the one under way in each.

    Attributes:
        lengths: [N] steps of the episodes under way.
        wanted: [N] whether their ends are waited for.
    """

    def __init__(self, quota: np.ndarray) -> None:
        self._quota = quota
        self._ended: list[list[tuple[float, int]]] = [[] for _ in quota]
        self._returns = np.zeros(len(quota))
        self.lengths = np.zeros(len(quota), dtype=np.int64)
        self.wanted = quota > 0

    def add(self, step: Step) -> None:
        """What one step brought."""
        self._returns += step.reward if step.live is None else np.where(step.live, step.reward, 0.0)
        self.lengths += 1 if step.live is None else step.live
        if step.finished is not None:
            for index in step.finished:
                self._ended[index].append((float(self._returns[index]), int(self.lengths[index])))
                self.wanted[index] = len(self._ended[index]) < self._quota[index]
            self._returns[step.finished], self.lengths[step.finished] = 0.0, 0

    def result(self) -> EvaluationResult:
        """Once nothing is wanted any more."""
        kept = [entry for each, wanted in zip(self._ended, self._quota, strict=True) for entry in each[:wanted]]
        return EvaluationResult(
            returns=np.array([total for total, _ in kept]), lengths=np.array([length for _, length in kept])
        )


def evaluate_policy(
    policy: Policy,
    environments: VectorEnvironment,
    *,
    episodes: int,
    seed: int,
    deterministic: bool = True,
    update: int = 0,
    episode_limit: int = EPISODE_LIMIT,
) -> EvaluationResult:
    """Whole episodes of a policy.

    Args:
        policy: to be judged; its normalisers are used as they are and not updated.
        environments: to judge it in, not those it trains in.
        episodes: how many, over all environments; at least one of each is played.
        seed: of the run; environments and actions get streams of their own.
        deterministic: the most likely action instead of a sampled one.
        update: which of the run's evaluations this is: each has its own random numbers.
        episode_limit: steps after which an episode counts as endless.

    Raises:
        EndlessEpisodeError: if an episode does not end.
        NonFiniteError: if an observation, action or reward is NaN or infinite, naming environment, step and value.
    """
    count = environments.num_envs
    quota = episode_quota(max(episodes, count), count)
    observation = environments.reset(environment_seeds(seed, Purpose.EVALUATION_ENVIRONMENT, 0, update, count))
    sampler = policy.sampler()
    sampler.begin(None, count)
    generator = stream(seed, Purpose.EVALUATION_ACTION, 0, update)
    tally, noise, steps = _Tally(quota), np.zeros(0), 0
    refuse_unfinite_step("observation", observation, 0)
    with few_threads(count):
        while tally.wanted.any():
            if deterministic:
                action = sampler.mode(observation)
            else:
                if steps % _CHUNK == 0:
                    noise = sampler.noise(generator, _CHUNK, count)
                action = sampler.sample(observation, noise[steps % _CHUNK])
            refuse_unfinite_step("action", action, steps)
            step = environments.step(sampler.to_environment(action))
            refuse_unfinite_step("reward", step.reward, steps)
            observation, steps = step.observation, steps + 1
            if step.live is not None:
                sampler.restart(np.flatnonzero(~step.live))
            refuse_unfinite_step("observation", observation, steps)
            tally.add(step)
            if step.finished is not None:
                sampler.restart(step.finished)
            refuse_endless(tally.lengths, tally.wanted, episode_limit)
    return tally.result()

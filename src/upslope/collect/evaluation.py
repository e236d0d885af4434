"""How good a policy is: whole episodes, a number fixed beforehand in each environment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from upslope.collect.errors import EndlessEpisodeError, NonFiniteError
from upslope.collect.vector import VectorEnvironment
from upslope.streams import Purpose, derived_seed, stream
from upslope.trajectory import ObservationArrays, Policy

_CHUNK = 128
EPISODE_LIMIT = 30_000
"""Steps after which an episode counts as endless; the longest of Gymnasium's, Atari's, are truncated at 27,000."""


def environment_seeds(seed: int, purpose: Purpose, rank: int, update: int, count: int) -> list[int]:
    """One seed per environment, of 31 bits since some environments take no more."""
    return [derived_seed(seed, purpose, rank, update, index) >> 32 for index in range(count)]


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


def refuse_unfinite(what: str, arrays: ObservationArrays, step: int) -> None:
    """Refuse NaN and infinity in what one step of evaluation brought, [N, ...].

    Raises:
        NonFiniteError: with environment, step, what and value.
    """
    for name, array in arrays.items() if isinstance(arrays, dict) else [("", arrays)]:
        if array.dtype.kind != "f" or np.isfinite(array).all():
            continue
        flat = array.reshape(len(array), -1)
        index, element = (int(k) for k in np.argwhere(~np.isfinite(flat))[0])
        label = f"{what} {name!r}" if name else what
        where = f" (element {element})" if flat.shape[1] > 1 else ""
        remedy = (
            "The policy has diverged: lower the learning rate, clip gradients, or normalise observations and rewards"
            if what == "action"
            else "The environment gave it: `upslope check-env` tries the environment on its own"
        )
        raise NonFiniteError(
            f"evaluation environment {index}, step {step}: the {label} is {flat[index, element]}{where}. {remedy}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """Raw, undiscounted returns and lengths of whole episodes, [episodes], ordered by environment, then by time."""

    returns: np.ndarray
    lengths: np.ndarray


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
    results: list[list[tuple[float, int]]] = [[] for _ in range(count)]
    counted = np.zeros_like(quota)
    returns, lengths, steps = np.zeros(count), np.zeros(count, dtype=np.int64), 0
    noise = np.zeros(0)
    refuse_unfinite("observation", observation, 0)
    with few_threads(count):
        while (counted < quota).any():
            if deterministic:
                action = sampler.mode(observation)
            else:
                if steps % _CHUNK == 0:
                    noise = sampler.noise(generator, _CHUNK, count)
                action = sampler.sample(observation, noise[steps % _CHUNK])
            refuse_unfinite("action", action, steps)
            step = environments.step(sampler.to_environment(action))
            refuse_unfinite("reward", step.reward, steps)
            observation, steps = step.observation, steps + 1
            if step.live is not None:
                sampler.restart(np.flatnonzero(~step.live))
            refuse_unfinite("observation", observation, steps)
            returns += step.reward if step.live is None else np.where(step.live, step.reward, 0.0)
            lengths += 1 if step.live is None else step.live
            if step.finished is not None:
                for index in step.finished:
                    results[index].append((float(returns[index]), int(lengths[index])))
                counted[step.finished] += 1
                sampler.restart(step.finished)
                returns[step.finished], lengths[step.finished] = 0.0, 0
            refuse_endless(lengths, counted < quota, episode_limit)
    kept = [entry for each, wanted in zip(results, quota, strict=True) for entry in each[:wanted]]
    return EvaluationResult(
        returns=np.array([total for total, _ in kept]), lengths=np.array([length for _, length in kept])
    )

"""Judging a policy: separate environments, raw rewards, frozen normalisers, sampling as well as the mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from upslope.collect import EnvironmentConfig, Source, evaluate_policy, make_environments
from upslope.collect.vector import VectorEnvironment
from upslope.errors import UsageError, checking_usage
from upslope.policies import ActorCritic
from upslope.spaces import Box, Composite, Space
from upslope.train.config import EvaluationConfig
from upslope.train.config_file import read_evaluation
from upslope.train.given import check_recorded, split_source
from upslope.train.problems import evaluation_environments_of, has_no_end
from upslope.train.saving import load


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """Raw undiscounted returns and lengths [episodes], acting by the mode and by sampling.

    Attributes:
        endless: whether the task goes on without end, so that every episode is one of `horizon` steps.
    """

    deterministic_returns: np.ndarray
    deterministic_lengths: np.ndarray
    stochastic_returns: np.ndarray
    stochastic_lengths: np.ndarray
    endless: bool = False

    @property
    def score(self) -> float:
        """The mean return of the mode."""
        return float(self.deterministic_returns.mean())

    def record(self) -> dict[str, float | int]:
        """Means and spreads over episodes, as metrics.jsonl keeps them."""
        return {
            "deterministic_mean": float(self.deterministic_returns.mean()),
            "deterministic_std": float(self.deterministic_returns.std()),
            "stochastic_mean": float(self.stochastic_returns.mean()),
            "stochastic_std": float(self.stochastic_returns.std()),
            "length_mean": float(self.deterministic_lengths.mean()),
            "episodes": len(self.deterministic_returns),
            **self.average_rewards,
        }

    @property
    def average_rewards(self) -> dict[str, float]:
        """The mean reward per step of a task without end, by name; nothing of other tasks."""
        if not self.endless:
            return {}
        return {
            "deterministic_average_reward": float(self.deterministic_returns.sum() / self.deterministic_lengths.sum()),
            "stochastic_average_reward": float(self.stochastic_returns.sum() / self.stochastic_lengths.sum()),
        }


class Evaluator:
    """Evaluation environments of a run, made once and seeded anew each time.

    Args:
        environment: as in training, but always stepped in this process.
        settings: how many episodes, and environments side by side.
        seed: of the run; evaluation draws from streams of its own and never disturbs training.
        source: an object in place of the id: a function that makes an environment, an environment, or a VectorEnv;
            closed with the evaluator.
    """

    def __init__(
        self, environment: EnvironmentConfig, settings: EvaluationConfig, *, seed: int, source: Source | None = None
    ) -> None:
        episodes = min(settings.episodes, settings.final_episodes or settings.episodes)
        alone = source is not None and not isinstance(source, Callable)
        self._config = replace(
            within_horizon(environment, settings.horizon),
            count=1 if alone else min(settings.environments, episodes),
            vectorization="sync",
            resume="rebuild",
            truncation="bootstrap",
        )
        self._environment = environment
        self._settings = settings
        self._seed = seed
        self._source = source
        self._environments: VectorEnvironment | None = None

    @property
    def times(self) -> int:
        """As configured."""
        return self._settings.times

    @property
    def first(self) -> bool:
        """An agent is not judged before it has learnt anything."""
        return False

    @property
    def last(self) -> bool:
        """Whether it is judged at the end."""
        return self._settings.final_episodes > 0

    def evaluate(self, policy: ActorCritic, *, index: int, final: bool) -> EvaluationReport:
        """Both ways to act, each on the same starts; at least as many episodes as there are environments.

        Args:
            policy: judged with its normalisers as they stand.
            index: which evaluation of the run this is; decides the starts.
            final: whether it is the one at the end, which may have another number of episodes.

        Raises:
            UsageError: if the policy cannot see or act in these environments.
        """
        episodes = self._settings.final_episodes if final else self._settings.episodes
        environments = self._environments
        if environments is None:
            with checking_usage():
                made_of = evaluation_environments_of(self._config, self._source, self._settings.horizon)
                environments = make_environments(made_of, self._config)
            self._environments = environments
        _check_spaces(policy, environments)
        mode, sampled = (
            evaluate_policy(
                policy, environments, episodes=episodes, seed=self._seed, update=index, deterministic=deterministic
            )
            for deterministic in (True, False)
        )
        return EvaluationReport(
            deterministic_returns=mode.returns,
            deterministic_lengths=mode.lengths,
            stochastic_returns=sampled.returns,
            stochastic_lengths=sampled.lengths,
            endless=has_no_end(self._environment, self._source),
        )

    def close(self) -> None:
        """Close the environments."""
        if self._environments is not None:
            self._environments.close()
            self._environments = None


def within_horizon(environment: EnvironmentConfig, horizon: int) -> EnvironmentConfig:
    """The environment as it is judged and shown: one without end is cut after `horizon` steps."""
    return replace(environment, continuing=False, time_limit=horizon) if environment.continuing else environment


def _check_spaces(policy: ActorCritic, environments: VectorEnvironment) -> None:
    """Refuse environments that the policy was not made for; only how far observations reach may differ."""
    for what, expected, found in (
        ("observations", policy.observation_space, environments.observation_space),
        ("actions", policy.action_space, environments.action_space),
    ):
        if expected != found and not (what == "observations" and _unbounded(expected) == _unbounded(found)):
            raise UsageError(
                f"the policy was made for {what} in {expected}, this environment has {found}: give one like that which "
                "it was trained in"
            )


def _unbounded(space: Space) -> Space:
    if isinstance(space, Composite):
        entries = ((name, _boundless(leaf) if isinstance(leaf, Box) else leaf) for name, leaf in space.entries)
        return Composite(tuple(entries))
    return _boundless(space) if isinstance(space, Box) else space


def _boundless(leaf: Box) -> Box:
    return replace(leaf, low=-math.inf, high=math.inf)


def evaluate_run(
    directory: str | Path,
    *,
    episodes: int = 100,
    seed: int = 0,
    best: bool = False,
    environments: Source | None = None,
    encoder: nn.Module | None = None,
) -> EvaluationReport:
    """Evaluate the policy a run saved.

    Args:
        directory: of the run.
        episodes: for each way to act.
        seed: decides starts and sampling.
        best: take the policy that was best in evaluation instead of the latest.
        environments: where to judge it, if not in the recorded environment; as for `train`. Needed where that was given
            an object, or an environment with an id `module:Name-v0`, since making it imports the module.
        encoder: a fresh module of the kind `train` was given, if it was.

    Raises:
        ConfigError: if there is no run there.
        CheckpointError: if the policy is missing or damaged.
        UsageError: if it needs its environments or its encoder.
    """
    if episodes < 1:
        raise UsageError(f"an evaluation needs at least one episode, got episodes={episodes}")
    directory = Path(directory)
    recorded, settings = read_evaluation(directory)
    check_recorded(recorded, environments)
    environment, source = split_source(environments, recorded)
    with checking_usage():
        policy = load(directory / ("best" if best else "policy"), encoder=encoder)
    settings = replace(settings, episodes=episodes, final_episodes=episodes)
    evaluator = Evaluator(environment, settings, seed=seed, source=source)
    try:
        return evaluator.evaluate(policy, index=0, final=True)
    finally:
        evaluator.close()

"""Rows of policies with a memory, in worlds that must be remembered: every row of experience, by its probability.

Such a policy has no table, and the theorem no sum over states. Its exact gradient is that of sum_rows Pr(row) G(row)
(`upslope.exact.enumerated_gradient`), through the log-probs of whole episodes from their start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from upslope.algorithms import A2C, PPO, Algorithm, Reinforce
from upslope.auditing.cases.case import Case
from upslope.auditing.declared import Claim
from upslope.auditing.measuring import report
from upslope.auditing.report import AuditReport
from upslope.auditing.source import AlgorithmSource
from upslope.exact import FiniteMDP, Rows, enumerate_episodes, enumerated_gradient, problem, time_limited
from upslope.policies import ActorCritic, ActorCriticConfig, MemoryConfig
from upslope.spaces import Discrete
from upslope.trajectory import Trajectory, map_observation

Kind: TypeAlias = Literal["gru", "lstm", "transformer"]

_GAMMA, _LIMIT = 0.8, 4


def recall() -> FiniteMDP:
    """A cue, one step without it, and a choice that is rewarded if it is the cue's: 3 steps of an episode.

    Without memory nothing beats a reward of 1/2; with one the best policy gets 1.
    """
    after_cue, choice, end = 2, 4, 6
    transition, reward = torch.zeros(7, 2, 7), torch.zeros(7, 2)
    for cue in range(2):
        transition[cue, :, after_cue + cue] = 1.0
        transition[after_cue + cue, :, choice + cue] = 1.0
        transition[choice + cue, :, end] = 1.0
        reward[choice + cue, cue] = 1.0
    transition[end, :, end] = 1.0
    mdp = FiniteMDP.from_tables(transition.tolist(), reward.tolist(), terminal=[end], start=[0.4, 0.6, 0, 0, 0, 0, 0])
    return replace(mdp, observation=torch.tensor([0, 1, 2, 2, 3, 3, 3]))


def cases() -> Iterator[Case]:
    """All rows."""
    corridor = time_limited(replace(problem("short-corridor").mdp, gamma=_GAMMA), _LIMIT)
    kinds: tuple[Kind, ...] = ("gru", "lstm", "transformer")
    for kind in kinds:
        for discounted in (True, False):
            kept = ", gamma^t kept" if discounted else ""
            algorithm = Reinforce(gamma=_GAMMA, discounted_states=discounted)
            yield _episodes(f"reward_to_go{kept}", algorithm, "short-corridor, 4 steps", corridor, kind)
        baselined = Reinforce(gamma=1.0, psi="baselined")
        yield _episodes("baselined", baselined, "recall", recall(), kind)
        yield _side_by_side("lambda 1.0", A2C(gamma=1.0, gae_lambda=1.0), kind)
        clip = PPO(gamma=1.0, gae_lambda=1.0, normalize_advantage=False, epochs=1, minibatches=1)
        yield _side_by_side("clip, lambda 1.0", clip, kind)


def _episodes(words: str, algorithm: Algorithm, name: str, mdp: FiniteMDP, kind: Kind) -> Case:
    unbiased = algorithm.gamma == 1.0 or (isinstance(algorithm, Reinforce) and algorithm.discounted_states)

    def run() -> AuditReport:
        setting = Remembered(name=name, mdp=mdp, policy=_policy(mdp, kind), together=False)
        claim = Claim(
            target=setting.gradient(),
            target_name="grad J",
            declared="unbiased" if unbiased else "biased",
            reason="" if unbiased else "gamma^t left out",
        )
        return report(setting, AlgorithmSource(algorithm), claim, subject=type(algorithm).__name__)

    return Case(subject=type(algorithm).__name__, setting=f"{words}, a memory ({kind}); whole episodes", run=run)


def _side_by_side(words: str, algorithm: Algorithm, kind: Kind) -> Case:
    """Rows of two episodes: the second begins within the row, and the first with another one's memory in its row."""
    mdp = recall()

    def run() -> AuditReport:
        setting = Remembered(name="recall", mdp=mdp, policy=_policy(mdp, kind), together=True)
        exact = setting.gradient() / setting.steps_of_episodes
        claim = Claim(target=exact, target_name="grad J / E[length]", declared="unbiased")
        return report(setting, AlgorithmSource(algorithm), claim, subject=type(algorithm).__name__)

    return Case(subject=type(algorithm).__name__, setting=f"{words}, a memory ({kind}); two episodes a row", run=run)


def _policy(mdp: FiniteMDP, kind: Kind) -> ActorCritic:
    memory = MemoryConfig(kind=kind, size=4, heads=2, context=2, layers=1)
    config = ActorCriticConfig(hidden=(), memory=memory, policy_gain=1.0, orthogonal=False)
    seen = Discrete(int(mdp.observation.max()) + 1)
    return ActorCritic(seen, Discrete(mdp.actions), config, generator=torch.Generator().manual_seed(1)).double()


@dataclass(frozen=True, kw_only=True, eq=False)
class Remembered:
    """A finite MDP whose states look alike, with a policy that remembers; a `upslope.auditing.setting.Setting`.

    Attributes:
        name: of the problem.
        mdp: episodic; no episode is truncated.
        policy: differentiated, and who acts.
        together: rows of two episodes, begun with a memory that is none of theirs; else one episode a row.
    """

    name: str
    mdp: FiniteMDP
    policy: ActorCritic
    together: bool

    @cached_property
    def episodes(self) -> Rows:
        """All there are."""
        return enumerate_episodes(self.mdp, self.policy)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The actor's, its memory's included."""
        critics = ("critic.", "memory.critic.")
        return tuple(p for name, p in self.policy.named_parameters() if not name.startswith(critics))

    @property
    def rows(self) -> int:
        """In a batch."""
        return 1

    @property
    def trajectories_per_row(self) -> float:
        """Episodes in a row."""
        return 2.0 if self.together else 1.0

    @property
    def steps_of_episodes(self) -> float:
        """Mean steps of an episode."""
        return float(self.episodes.behaviour_probability @ self.episodes.length.to(torch.float64))

    @property
    def steps_per_row(self) -> float:
        """Mean steps in a row."""
        return self.trajectories_per_row * self.steps_of_episodes

    def gradient(self) -> Tensor:
        """[P] of the expected return."""
        return enumerated_gradient(self.episodes, self.policy, self.mdp.gamma, parameters=self.parameters)

    def every(self) -> Iterator[tuple[float, Trajectory]]:
        """Each batch of one row there is, with its probability."""
        probabilities = self.episodes.behaviour_probability.tolist()
        for first, chance in enumerate(probabilities):
            if not self.together:
                yield chance, self.episodes.select([first])
                continue
            for second, other in enumerate(probabilities):
                yield chance * other, self._end_to_end(first, second)

    def _end_to_end(self, first: int, second: int) -> Trajectory:
        pair = self.episodes.select([first, second])
        steps = pair.reward.numel()
        one_row = {
            name: getattr(pair, name).reshape(1, steps)
            for name in ("action", "reward", "terminated", "truncated", "mask", "behaviour_log_prob", "time")
        }
        assert self.policy.memory is not None
        memory = {name: torch.from_numpy(array) + 0.5 for name, array in self.policy.memory.empty(1).items()}
        observation = map_observation(lambda tensor: tensor.reshape(1, steps), pair.observation)
        return replace(pair, observation=observation, memory=memory, **one_row)

    def drawn(self, batches: int, seed: int) -> Iterator[Trajectory]:
        """Refused: every row is known."""
        raise NotImplementedError("every row is weighted by its probability")

"""Rows of what agents learn from without a critic: groups of episodes, demonstrations, pairs of segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from upslope.algorithms import GRPO, RLOO, SFT, Algorithm, Preference
from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, row, weighted_moments
from upslope.auditing.declared import Circumstances, claim_of
from upslope.auditing.groups import GroupSetting
from upslope.auditing.measuring import Drawing, report
from upslope.auditing.report import AuditReport
from upslope.auditing.setting import FiniteSetting
from upslope.auditing.source import AlgorithmSource
from upslope.collect.finite import FiniteVectorEnvironment
from upslope.collect.given_data import SegmentPairsConfig
from upslope.collect.recorded import unsampled
from upslope.collect.rows import Piece
from upslope.collect.segments import SegmentPair, SegmentPairCollector
from upslope.collect.trajectory_file import Recording
from upslope.exact import Rows, StatePolicy, enumerate_episodes, problem, solve
from upslope.trajectory import Trajectory

_SUMS = GRPO(scale="none", reduction="trajectory_sum")
_STALE = Circumstances(behaviour="stale")
_SAMPLES = 6_000
_BETA = 0.5


def cases() -> Iterator[Case]:
    """All rows."""
    yield from _groups()
    yield row("SFT", "trajectory_sum, episodes of another agent", _imitation)
    yield row("Preference", "sigmoid, segments of episodes preferred by return", _segments)


def _groups() -> Iterator[Case]:
    summed = RLOO(ratio="sequence_sum")
    yield _case("as it comes", RLOO())
    yield _case("as it comes", RLOO(), name="bandit", given=_STALE)
    yield _case("as it comes, G = 3", RLOO(), name="bandit", size=3)
    yield _case("as it comes, sampled", RLOO(), name="six-state", samples=_SAMPLES)
    yield _case("ratio of sequence sums, no clip", summed, given=_STALE)
    yield _case("scale none, trajectory_sum, G = 3", _SUMS, name="bandit", size=3)
    yield _case("scale none, trajectory_sum, sampled", _SUMS, name="six-state", samples=_SAMPLES)
    yield _case("as it comes, G = 3", GRPO(), name="bandit", size=3)


def _case(
    words: str,
    algorithm: Algorithm,
    *,
    name: str = "two-state",
    size: int = 2,
    given: Circumstances | None = None,
    samples: int | None = None,
) -> Case:
    circumstances = given or Circumstances()
    acted = "another policy acted" if circumstances.behaviour == "stale" else "on-policy"
    run = partial(_measure, algorithm, name, size, circumstances, samples)
    return Case(subject=type(algorithm).__name__, setting=f"groups of episodes, {words}; {acted}", run=run)


def _measure(
    algorithm: Algorithm, name: str, size: int, circumstances: Circumstances, samples: int | None
) -> AuditReport:
    setting = GroupSetting.build(problem(name), size=size, stale=circumstances.behaviour == "stale")
    target = algorithm.target
    return report(
        setting,
        AlgorithmSource(algorithm),
        claim_of(target, setting.exact_gradient(target), replace(circumstances, unit="episodes")),
        subject=type(algorithm).__name__,
        drawing=Drawing(samples=samples),
    )


def _setting() -> tuple[FiniteSetting[StatePolicy], Rows]:
    """The problem of single episodes, and all episodes of another policy than the one that learns."""
    setting = FiniteSetting.build(problem("two-state"), gamma=1.0, unit="episodes", behaviour="stale")
    return setting, enumerate_episodes(setting.mdp, setting.behaviour)


def _imitation() -> Found:
    """sum_s eta_b(s) sum_a b(a|s) grad log pi(a|s)."""
    setting, rows = _setting()
    mdp, source = setting.mdp, AlgorithmSource(SFT(reduction="trajectory_sum"))
    given = [unsampled(rows.select([index])) for index in range(len(rows))]
    ascents = torch.stack([source.ascent(setting.policy, setting.parameters, one) for one in given])
    visits = solve(mdp, setting.behaviour).undiscounted_visits
    actions = torch.arange(mdp.actions).expand(mdp.states, -1)
    seen = mdp.observation.unsqueeze(-1).expand(-1, mdp.actions)
    acted = setting.behaviour.log_prob(seen, actions).exp().detach()
    weight = (visits.unsqueeze(-1) * acted).masked_fill(mdp.terminal.unsqueeze(-1), 0.0)
    target = _gradient((weight.detach() * setting.policy.log_prob(seen, actions)).sum(), setting)
    return _found(setting, rows.behaviour_probability, ascents, target, "sum_s eta_b(s) sum_a b(a|s) grad log pi(a|s)")


def _gradient(objective: Tensor, setting: FiniteSetting[StatePolicy]) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(objective, setting.parameters)])


def _found(
    setting: FiniteSetting[StatePolicy], probability: Tensor, ascents: Tensor, target: Tensor, target_name: str
) -> Found:
    return Found(
        problem=setting.name,
        target_name=target_name,
        target=target.detach(),
        moments=weighted_moments(probability, ascents),
        trajectories=1.0,
        steps=setting.mean_length,
        batches=len(ascents),
    )


def _segments() -> Found:
    """beta s(-D)(score_w - score_l), D of the first two steps of two episodes, the better return preferred."""
    setting, rows = _setting()
    whole = rows.trajectory
    long = (rows.length >= 2).nonzero().flatten()[:12].tolist()
    total = torch.where(whole.mask, whole.reward, 0.0).sum(-1)
    orders = [(first, second) for first in long for second in long if total[first] > total[second]]
    pairs = [SegmentPair(chosen=_first(better), rejected=_first(worse)) for better, worse in orders]
    environments = FiniteVectorEnvironment(setting.mdp, 1)
    recording = Recording(
        trajectory=whole, observation_space=environments.observation_space, action_space=environments.action_space
    )
    collector = SegmentPairCollector(recording, pairs, environments, SegmentPairsConfig(), seed=0)
    source = AlgorithmSource(Preference(beta=_BETA), reference=setting.behaviour)
    ascents = torch.stack(
        [source.ascent(setting.policy, setting.parameters, collector.take([index])) for index in range(len(pairs))]
    )
    own, frozen = _log_prob(setting.policy, whole), _log_prob(setting.behaviour, whole).detach()
    better, worse = torch.tensor(orders).unbind(-1)
    margin = _BETA * ((own - frozen)[better] - (own - frozen)[worse]).detach()
    chance = torch.full((len(pairs),), 1.0 / len(pairs), dtype=torch.float64)
    objective = (chance * _BETA * torch.sigmoid(-margin) * (own[better] - own[worse])).sum()
    name = "mean over pairs of beta s(-D)(score_w - score_l)"
    return _found(setting, chance, ascents, _gradient(objective, setting), name)


def _first(episode: int) -> Piece:
    return Piece(row=episode, start=0, stop=2)


def _log_prob(policy: StatePolicy, whole: Trajectory) -> Tensor:
    """[R] of the first two actions of each row."""
    assert isinstance(whole.observation, Tensor)
    return policy.log_prob(whole.observation[:, :2], whole.action[:, :2]).sum(-1)

"""Rows of what learns from data that nobody sampled: each update, through the training step, against its own loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from upslope.algorithms import KTO, SFT, Algorithm, Preference, RewardModel
from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, row, weighted_moments
from upslope.auditing.cases.token_stage import TokenStage, token_stage
from upslope.auditing.source import AlgorithmSource
from upslope.exact import PrefixTable, regularised_optimum, sequence_kl
from upslope.trajectory import Trajectory

_BETA = 0.5
_LIKELIHOOD = "-grad KL(demonstrator || pi)"


def cases() -> Iterator[Case]:
    """All rows."""
    yield row("SFT", "trajectory_sum, completions of the reference", partial(_imitation, "trajectory_sum"))
    yield row(
        "SFT",
        "trajectory_mean, completions of the reference",
        partial(_imitation, "trajectory_mean"),
        biased_by="each answer is averaged over its own length: tokens of long ones weigh less",
    )
    yield row("Preference", "sigmoid, expected update", _expected_update)
    yield row("Preference", "sigmoid, at the KL-regularised optimum", _at_rest)
    yield row(
        "Preference",
        "sigmoid and NLL, at the KL-regularised optimum of the rewards",
        partial(_at_rest, nll_coefficient=0.2),
        biased_by="the likelihood of chosen answers pulls the policy on",
    )
    yield row("KTO", "single answers, z = max(0, d)", _labels)
    yield row("RewardModel", "expected update of the scores", _scores)


@dataclass(frozen=True, slots=True)
class _Given:
    """Completions as rows of given data: labels for rewards, no log-probs of who acted."""

    stage: TokenStage
    policy: PrefixTable

    def rows(self, index: list[int], labels: list[float]) -> Trajectory:
        """Some of them, in this order."""
        chosen = self.stage.rows.select(index)
        last = (chosen.mask * torch.arange(chosen.shape[1])).amax(-1, keepdim=True)
        label = torch.tensor(labels, dtype=torch.float64).unsqueeze(-1)
        return replace(
            chosen,
            reward=torch.zeros_like(chosen.reward).scatter(1, last, label),
            behaviour_log_prob=torch.full_like(chosen.behaviour_log_prob, torch.nan),
        )

    def ascents(self, algorithm: Algorithm, batches: list[tuple[list[int], list[float]]], parameter: Tensor) -> Tensor:
        """[K, P] of each batch."""
        source = AlgorithmSource(algorithm, reference=self.stage.reference)
        assert isinstance(parameter, torch.nn.Parameter)
        return torch.stack([source.ascent(self.policy, [parameter], self.rows(*batch)) for batch in batches])

    def found(
        self, probability: Tensor, ascents: Tensor, target: Tensor, target_name: str, *, rows: float = 1.0
    ) -> Found:
        """The mean update against an exact one."""
        return Found(
            problem=self.stage.name,
            target_name=target_name,
            target=target.detach(),
            moments=weighted_moments(probability, ascents),
            trajectories=rows,
            steps=rows * float(self.stage.probability @ self.stage.length.to(torch.float64)),
            batches=len(ascents),
        )


def _given(policy: Callable[[TokenStage], PrefixTable] = lambda stage: stage.policy) -> _Given:
    stage = token_stage("tokens-binary", acted="reference")
    return _Given(stage=stage, policy=policy(stage))


def _imitation(reduction: str) -> Found:
    given = _given()
    stage = given.stage
    algorithm = SFT(reduction=reduction)  # pyright: ignore[reportArgumentType]
    ascents = given.ascents(algorithm, [([i], [0.0]) for i in range(len(stage.total))], given.policy.theta)
    target = -stage.gradient_of(sequence_kl(stage.problem, stage.reference, stage.policy))
    return given.found(stage.probability, ascents, target, _LIKELIHOOD)


def _pairs(stage: TokenStage) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chosen and rejected [K], the chance that both are drawn, and that the first is preferred (Bradley-Terry)."""
    group = stage.rows.trajectory.group
    assert group is not None
    chosen, rejected = (group.unsqueeze(-1) == group).nonzero().unbind(-1)
    alone = stage.probability / stage.rows.luck
    drawn = stage.rows.luck[chosen] * alone[chosen] * alone[rejected]
    return chosen, rejected, drawn, torch.sigmoid(stage.total[chosen] - stage.total[rejected])


def _paired(given: _Given, algorithm: Algorithm, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [K] and ascents [K, P] of all ordered pairs."""
    chosen, rejected, drawn, preferred = _pairs(given.stage)
    batches = [(list(pair), [1.0, -1.0]) for pair in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    return 2.0 * drawn * preferred, given.ascents(algorithm, batches, parameter)


def _expected_update() -> Found:
    """Sum over pairs (1, 2) drawn of beta (p - s(D)) (score_1 - score_2)."""
    given = _given()
    stage = given.stage
    chosen, rejected, drawn, preferred = _pairs(stage)
    own = stage.log_prob.detach() - stage.reference_log_prob
    log_ratio = own.masked_fill(~stage.mask, 0.0).sum(-1)
    margin = _BETA * (log_ratio[chosen] - log_ratio[rejected])
    target = (drawn * _BETA * (preferred - torch.sigmoid(margin))) @ (stage.score[chosen] - stage.score[rejected])
    probability, ascents = _paired(given, Preference(beta=_BETA), given.policy.theta)
    name = "sum over pairs of beta (p - s(D))(score_1 - score_2), p true preferences"
    return given.found(probability, ascents, target, name, rows=2.0)


def _at_rest(nll_coefficient: float = 0.0) -> Found:
    given = _given(lambda stage: regularised_optimum(stage.problem, stage.reference, _BETA))
    algorithm = Preference(beta=_BETA, nll_coefficient=nll_coefficient)
    probability, ascents = _paired(given, algorithm, given.policy.theta)
    theta = given.policy.theta.detach().flatten()
    found = given.found(
        probability, ascents, theta, "theta of ref exp(r / beta) / Z after a step: where it was", rows=2.0
    )
    return replace(found, moments=replace(found.moments, mean=theta + found.moments.mean))


def _labels() -> Found:
    """w beta s(g) s(-g) score where desirable, minus that elsewhere, g = beta (d - max(0, d))."""
    given = _given()
    stage = given.stage
    desirable = stage.total >= 0.5
    labels = torch.where(desirable, 1.0, -1.0).tolist()
    algorithm = KTO(beta=_BETA, desirable_weight=1.5, undesirable_weight=0.7)
    ascents = given.ascents(algorithm, [([i], [label]) for i, label in enumerate(labels)], given.policy.theta)
    log_ratio = (stage.log_prob.detach() - stage.reference_log_prob).masked_fill(~stage.mask, 0.0).sum(-1)
    gain = _BETA * log_ratio.clamp(max=0.0)
    slope = _BETA * torch.sigmoid(gain) * torch.sigmoid(-gain) * (2.2 * desirable.to(torch.float64) - 0.7)
    name = "E[+- w beta s(g) s(-g) grad d], g = beta (d - max(0, d))"
    return given.found(stage.probability, ascents, (stage.probability * slope) @ stage.score, name)


def _scores() -> Found:
    """Sum over pairs of p s(-(V_w - V_l)) (grad V_w - grad V_l), V where the last token is chosen."""
    given = _given(lambda stage: copy.deepcopy(stage.policy))
    stage, value = given.stage, given.policy.value
    with torch.no_grad():
        value.copy_(torch.cos(1.0 + 3.0 * torch.arange(len(value), dtype=torch.float64)))
    observation = stage.rows.trajectory.observation
    assert isinstance(observation, Tensor)
    last = (stage.mask * torch.arange(stage.mask.shape[1])).amax(-1)
    place = [
        given.policy.number[tuple(tokens[: end + 1])]
        for tokens, end in zip(observation.tolist(), last.tolist(), strict=True)
    ]
    score = torch.eye(len(value), dtype=torch.float64)[place]
    probability, ascents = _paired(given, RewardModel(), value)
    chosen, rejected, _, _ = _pairs(stage)
    apart = score[chosen] - score[rejected]
    target = (probability * torch.sigmoid(-(apart @ value.detach()))) @ apart
    return given.found(probability, ascents, target, "E[s(V_l - V_w)(grad V_w - grad V_l)]", rows=2.0)

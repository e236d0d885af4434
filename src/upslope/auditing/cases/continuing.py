"""The rows of average-reward algorithms, on problems without end, against grad r_bar."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from upslope.algorithms import A2C, PPO, AverageReward, OneStepActorCritic
from upslope.auditing.cases.audited import audited, small_network
from upslope.auditing.cases.case import Case
from upslope.auditing.declared import Circumstances, Claim, in_words, put_to_the_test
from upslope.auditing.measuring import report
from upslope.auditing.report import AuditReport
from upslope.auditing.setting import FiniteSetting
from upslope.auditing.source import AlgorithmSource
from upslope.exact import problem, solve

_ROW_STEPS, _SAMPLES = 2, 3_000
_PPO = PPO(gamma=1.0, normalize_advantage=False, epochs=1, minibatches=1)


def variants() -> Iterator[tuple[str, AverageReward]]:
    """Every method, with the choices that change its estimator."""
    yield "one-step actor-critic", AverageReward(method=OneStepActorCritic(gamma=1.0))
    for gae_lambda in (0.5, 1.0):
        yield f"A2C, lambda {gae_lambda}", AverageReward(method=A2C(gamma=1.0, gae_lambda=gae_lambda))
        yield f"PPO, lambda {gae_lambda}", AverageReward(method=replace(_PPO, gae_lambda=gae_lambda))


def cases() -> Iterator[Case]:
    """All rows of average rewards."""
    for words, algorithm in variants():
        for circumstances in put_to_the_test(algorithm.target, limit=2):
            if circumstances.limit is None:
                yield audited(words, algorithm, "ring", circumstances)
        yield audited(words, algorithm, "two-state-continuing", Circumstances())
        yield _off(words, algorithm)
    one_pass = AverageReward(method=_PPO)
    yield audited("PPO, sampled", one_pass, "ring", Circumstances(), samples=_SAMPLES)
    yield audited("PPO, fragments of one step", one_pass, "access-control", Circumstances(), row_steps=1)
    own = Circumstances(critic="perturbed")
    yield audited(
        "A2C, lambda 1.0, a network", AverageReward(method=A2C(gamma=1.0)), "ring", own, policy=small_network(5)
    )


def _off(words: str, algorithm: AverageReward) -> Case:
    """r_bar is the same at every step: a baseline, whose error moves the critic and not the actor."""

    def run() -> AuditReport:
        setting = FiniteSetting.build(problem("ring"), gamma=1.0, unit="fragments", row_steps=_ROW_STEPS)
        with torch.no_grad():
            average = float(solve(setting.mdp, setting.policy).objective)
        source = AlgorithmSource(algorithm, state={"average_reward": average + 0.3})
        exact, followed = setting.exact_gradient(algorithm.target), in_words(algorithm.target)
        claim = Claim(target=exact, target_name=followed, declared="unbiased")
        return report(setting, source, claim, subject="AverageReward")

    return Case(subject="AverageReward", setting=f"{words}; r_bar off by 0.3: a baseline", run=run)

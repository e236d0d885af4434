"""The rows of the algorithms: each put to the test of its own declaration, condition by condition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

from upslope.algorithms import A2C, PPO, Algorithm, OneStepActorCritic, Reinforce
from upslope.algorithms.reinforce import Psi
from upslope.auditing.cases.audited import audited, small_network
from upslope.auditing.cases.case import Case
from upslope.auditing.declared import Circumstances, put_to_the_test

_GAMMA, _LIMIT = 0.8, 2
_FEW, _SAMPLES, _MANY = 6_000, 20_000, 100_000
_ONE_PASS = PPO(gamma=_GAMMA, normalize_advantage=False, epochs=1, minibatches=1)


def variants() -> Iterator[tuple[str, Algorithm]]:
    """Every algorithm with every choice that changes its estimator, and that choice in words."""
    for psi in get_args(Psi):
        for discounted in (False, True):
            kept = ", gamma^t kept" if discounted else ""
            plain = Reinforce(gamma=_GAMMA, psi=psi, discounted_states=discounted)
            if psi in ("action_value", "advantage"):
                for gae_lambda in (0.5, 1.0):
                    yield f"{psi}, lambda {gae_lambda}{kept}", replace(plain, gae_lambda=gae_lambda)
            elif not (psi == "total_reward" and discounted):
                yield f"{psi}{kept}", plain
    for discounted in (False, True):
        kept = ", gamma^t kept" if discounted else ""
        yield f"TD residual{kept}", OneStepActorCritic(gamma=_GAMMA, discounted_states=discounted)
    for gae_lambda in (0.5, 1.0):
        yield f"lambda {gae_lambda}", A2C(gamma=_GAMMA, gae_lambda=gae_lambda)
    yield "clip", _ONE_PASS
    yield "clip, lambda 0.5", replace(_ONE_PASS, gae_lambda=0.5)
    yield "dual clip", replace(_ONE_PASS, dual_clip=3.0)
    yield "KL penalty", replace(_ONE_PASS, clip=None, kl_coefficient=1.0)
    yield "value clip", replace(_ONE_PASS, value_clip=0.2)


def _on_completions() -> Iterator[tuple[str, Algorithm]]:
    """Algorithms as they learn from completions: one sequence a row, no discount.

    A mean over the steps of sequences is biased there as it is, so that no other condition can be seen to break.
    """
    for psi in get_args(Psi):
        yield psi, Reinforce(gamma=1.0, psi=psi, gae_lambda=0.5)
    yield "one completion a batch", A2C(gamma=1.0, gae_lambda=0.5)
    yield "one completion a batch", replace(_ONE_PASS, gamma=1.0)


def altered() -> Iterator[tuple[str, Algorithm, int | None]]:
    """Settings that the algorithms themselves declare to bias the gradient, and how many trajectories show it."""
    yield "standardised Psi", Reinforce(gamma=_GAMMA, normalize_advantage=True), _MANY
    yield "entropy bonus", Reinforce(gamma=_GAMMA, entropy_coefficient=0.1), None
    yield "standardised advantage", A2C(gamma=_GAMMA, normalize_advantage=True), _SAMPLES
    yield "entropy bonus", A2C(gamma=_GAMMA, entropy_coefficient=0.1), None
    yield "entropy bonus", OneStepActorCritic(gamma=_GAMMA, entropy_coefficient=0.1), None
    yield "as it comes: standardised per minibatch", PPO(gamma=_GAMMA), _FEW
    yield "entropy bonus", replace(_ONE_PASS, entropy_coefficient=0.1), None


def cases() -> Iterator[Case]:
    """All rows of algorithms."""
    for words, algorithm in variants():
        for circumstances in put_to_the_test(algorithm.target, limit=_LIMIT):
            yield audited(words, algorithm, "six-state", circumstances)
        yield audited(f"{words}, sampled", algorithm, "six-state", Circumstances(), samples=_SAMPLES)
    for words, algorithm, samples in altered():
        yield audited(words, algorithm, "six-state", Circumstances(), samples=samples)
    whole = PPO(gamma=_GAMMA, normalize_advantage=False)
    yield audited("4 passes of 4 minibatches", whole, "six-state", Circumstances(), samples=_FEW)
    for name in ("two-state", "noisy-rewards", "bandit"):
        for algorithm in (Reinforce(gamma=_GAMMA), A2C(gamma=_GAMMA), _ONE_PASS):
            yield audited("as it comes", algorithm, name, Circumstances())
    for words, algorithm in _on_completions():
        for circumstances in put_to_the_test(algorithm.target, limit=_LIMIT):
            alone = "fixed_steps" not in algorithm.target.requires or circumstances == Circumstances()
            if circumstances.limit is None and circumstances.unit is None and alone:
                yield audited(words, algorithm, "tokens", circumstances)
    yield from _through_a_network()
    yield audited("reward_to_go", Reinforce(gamma=_GAMMA), "time-limit", Circumstances())
    yield audited("bootstrapped at the limit", Reinforce(gamma=_GAMMA, psi="baselined"), "time-limit", Circumstances())


def _through_a_network() -> Iterator[Case]:
    """A policy that shares weights between states, with a critic that nobody taught anything."""
    own, stale = Circumstances(critic="perturbed"), Circumstances(critic="perturbed", behaviour="stale")
    for words, algorithm, circumstances in (
        ("reward_to_go", Reinforce(gamma=_GAMMA), own),
        ("reward_to_go", Reinforce(gamma=_GAMMA), stale),
        ("baselined", Reinforce(gamma=_GAMMA, psi="baselined"), own),
        ("advantage, lambda 1.0", Reinforce(gamma=_GAMMA, psi="advantage", gae_lambda=1.0), own),
        ("lambda 1.0", A2C(gamma=_GAMMA, gae_lambda=1.0), own),
        ("clip", _ONE_PASS, own),
    ):
        yield audited(f"{words}, a network", algorithm, "six-state", circumstances, policy=small_network(7))

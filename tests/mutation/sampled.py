"""Audits of drawn batches, fewer than the table has: enough to see a slip in what is sealed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from upslope.algorithms import PPO, Algorithm, OneStepActorCritic, Reinforce
from upslope.auditing import Circumstances, audit
from upslope.auditing.cases.case import Case

GAMMA = 0.8


def cases() -> Iterator[Case]:
    """Rows of the subject "drawn"."""
    limited = Circumstances(limit=2)
    one_step = OneStepActorCritic(gamma=GAMMA, discounted_states=True)
    ppo = PPO(gamma=GAMMA, normalize_advantage=False, epochs=1, minibatches=1, clip=0.9)
    yield _case("episodes, time limit", Reinforce(gamma=GAMMA, psi="baselined"), limited)
    yield _case("fragments, time limit", one_step, limited)
    yield _case("fragments, ratios", ppo, Circumstances())
    yield _case("four minibatches", PPO(gamma=GAMMA, normalize_advantage=False, epochs=1), Circumstances())


def _case(words: str, algorithm: Algorithm, circumstances: Circumstances) -> Case:
    run = partial(audit, algorithm, circumstances=circumstances, samples=4000, rows=16)
    return Case(subject="drawn", setting=words, run=run)

"""Rows that are audits of an algorithm, as a user would ask for them."""

from __future__ import annotations

from functools import partial

import torch

from upslope.algorithms import Algorithm
from upslope.auditing.audit import audit
from upslope.auditing.cases.case import Case
from upslope.auditing.declared import Circumstances
from upslope.policies import ActorCritic, ActorCriticConfig
from upslope.spaces import Discrete


def audited(
    words: str,
    algorithm: Algorithm,
    problem: str,
    circumstances: Circumstances,
    *,
    samples: int | None = None,
    policy: ActorCritic | None = None,
    row_steps: int = 2,
) -> Case:
    """One audit as a row.

    Args:
        words: what tells the algorithm's settings from those of its other rows.
        algorithm: under audit.
        problem: by name.
        circumstances: of the audit.
        samples: trajectories to draw, as in `audit`.
        policy: the problem's own if None.
        row_steps: T of a fragment.
    """
    run = partial(
        audit, algorithm, problem, circumstances=circumstances, samples=samples, policy=policy, row_steps=row_steps
    )
    return Case(subject=type(algorithm).__name__, setting=f"{words}; {circumstances}", run=run)


def small_network(observations: int) -> ActorCritic:
    """A network with two actions, that shares weights between states and has a critic nobody taught anything.

    Args:
        observations: how many numbers it may see.
    """
    config = ActorCriticConfig(hidden=(8,), policy_gain=1.0)
    policy = ActorCritic(Discrete(observations), Discrete(2), config, generator=torch.Generator().manual_seed(0))
    return policy.double()

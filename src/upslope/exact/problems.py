"""Named problems: small, exact, several with published answers. Nothing is built before it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from upslope.errors import UsageError
from upslope.exact import _classics as classics
from upslope.exact import _continuing as endless
from upslope.exact import _small as small
from upslope.exact._classics import baird_features as baird_features
from upslope.exact._named import NamedProblem as NamedProblem

PROBLEMS: Mapping[str, Callable[[], NamedProblem]] = MappingProxyType(
    {
        "bandit": small.bandit,
        "two-state": small.two_state,
        "short-corridor": classics.short_corridor,
        "random-walk-5": classics.random_walk_5,
        "random-walk-19": classics.random_walk_19,
        "cliff-walking": classics.cliff_walking,
        "baird": classics.baird,
        "six-state": small.six_state,
        "loops": small.loops,
        "time-limit": small.time_limit,
        "noisy-rewards": small.noisy_rewards,
        "ring": small.ring,
        "two-state-continuing": small.two_state_continuing,
        "access-control": endless.access_control,
    }
)
"""Name -> how to build it."""


def problem(name: str) -> NamedProblem:
    """The problem of that name.

    Raises:
        UsageError: if there is none, with the names there are.
    """
    if name not in PROBLEMS:
        raise UsageError(f"there is no problem {name!r}; there are: {', '.join(PROBLEMS)}")
    return PROBLEMS[name]()

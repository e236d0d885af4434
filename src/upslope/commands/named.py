"""Algorithms by name, however it is spelt: `ppo`, `OneStepActorCritic`, `one-step-actor-critic`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, get_args

if TYPE_CHECKING:
    from upslope.train.config import AlgorithmConfig
    from upslope.train.language.config import LanguageAlgorithm

    AnyAlgorithm: TypeAlias = AlgorithmConfig | LanguageAlgorithm


def algorithm_names() -> dict[str, Callable[..., AnyAlgorithm]]:
    """Every algorithm of either kind of run, by its name in lower case with hyphens."""
    from upslope.train.config import AlgorithmConfig
    from upslope.train.language.config import LanguageAlgorithm

    kinds = (*get_args(AlgorithmConfig), *get_args(LanguageAlgorithm))
    return {_dashed(kind.__name__): kind for kind in kinds}


def algorithm_named(name: str) -> Callable[..., AnyAlgorithm] | None:
    """The class of this name; None if there is none."""
    found = {_plain(known): kind for known, kind in algorithm_names().items()}
    return found.get(_plain(name))


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _dashed(name: str) -> str:
    """`OneStepActorCritic` as `one-step-actor-critic`; `A2C` and `PPO` as `a2c` and `ppo`."""
    letters = [
        f"-{letter}" if letter.isupper() and position and name[position - 1].islower() else letter
        for position, letter in enumerate(name)
    ]
    return "".join(letters).lower()

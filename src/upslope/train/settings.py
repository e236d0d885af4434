"""Checks that the frozen settings of both kinds of run share."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from upslope.algorithms.protocol import NaturalStep, Traces

MOST_THREADS = 1024

START = "start"
"""The name of the policy a run begins with, where it is the reference."""


def at_least(least: int, **settings: float) -> None:
    """Refuse numbers below `least`, by name."""
    for name, value in settings.items():
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_numbers(settings: Any) -> None:
    """Refuse NaN, infinity, and a lambda outside 0 to 1, in settings within settings as well."""
    for entry in fields(settings):
        value: Any = getattr(settings, entry.name)
        if is_dataclass(value):
            check_numbers(value)
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{type(settings).__name__}.{entry.name} must be a finite number, got {value}")
        if entry.name == "gae_lambda" and not 0.0 <= value <= 1.0:
            raise ValueError(f"gae_lambda lies between 0 and 1, got {value}")


def check_gamma(gamma: float) -> None:
    """Refuse what is no discount factor."""
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma is a discount factor from 0 to 1, got {gamma}")


def check_choices(settings: Any) -> None:
    """Refuse a word that is none of those a setting may be, in settings within settings as well."""
    for name, kind in get_type_hints(type(settings)).items():
        chosen = getattr(settings, name)
        if is_dataclass(chosen):
            check_choices(chosen)
        known = _words(kind)
        if known and chosen not in known:
            choices = ", ".join(map(repr, known))
            raise ValueError(f"{type(settings).__name__}.{name} must be one of {choices}, got {chosen!r}")


def _words(kind: Any) -> tuple[Any, ...]:
    """What a setting of this type may be, where that is a word of several, or None; else nothing."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    parts = get_args(kind)
    if NoneType not in parts or any(part is not NoneType and get_origin(part) is not Literal for part in parts):
        return ()
    return (*(word for part in parts for word in get_args(part)), None)


def check_threads(threads: int) -> None:
    """Refuse a number of threads that no machine has."""
    at_least(1, threads=threads)
    if threads > MOST_THREADS:
        raise ValueError(f"threads must be at most {MOST_THREADS}, got {threads}; small networks want 1")


def check_endless(run: Any) -> None:
    """Refuse traces that would not be followed step by step, and what has no meaning in a task without end."""
    name, algorithm, passes = type(run.algorithm).__name__, run.algorithm, run.algorithm.passes
    if isinstance(passes.rule, Traces):
        if getattr(run.rollout, "steps", None) != 1:
            raise ValueError(
                f"{name} learns online, at every step: set rollout.steps to 1 and rollout.episodes to None"
            )
        if run.optimizer.micro_batches != 1:
            raise ValueError(
                f"{name} learns from single steps, which cannot be split: set optimizer.micro_batches to 1"
            )
        if run.rollout.batches != 1:
            raise ValueError(f"a trace follows the steps of one environment once: set rollout.batches to 1 with {name}")
    if algorithm.target.gradient == "prediction" and run.optimizer.weight_decay:
        raise ValueError(
            f"{name} leaves the policy as it is, and weight_decay would move it: set optimizer.weight_decay to 0"
        )
    if algorithm.target.gradient == "average_reward":
        if getattr(run.rollout, "steps", None) is None:
            raise ValueError(f"{name} learns in a task without end: set rollout.steps, and rollout.episodes to None")
        if run.policy.normalize_reward:
            raise ValueError(
                f"normalize_reward goes by discounted returns, and {name} has no discount: set policy.normalize_reward "
                "to False"
            )
    if run.environment.continuing and getattr(run.rollout, "episodes", None) is not None:
        raise ValueError(
            "environment.continuing takes the time limit away, and rollout.episodes asks for whole episodes: set "
            "rollout.steps instead, or environment.continuing to False"
        )
    discounted = algorithm.target.gradient not in ("average_reward", "given_data")
    if run.environment.continuing and discounted and algorithm.gamma == 1.0:
        raise ValueError(
            f"environment.continuing makes a task without end, whose return is not finite at gamma=1: give {name} a "
            "gamma below 1, or take AverageReward, or ActorCriticLambda with average_reward_ratio"
        )


def check_natural(run: Any) -> None:
    """Refuse what would move an actor whose only step is a natural one."""
    if isinstance(run.algorithm.passes.rule, NaturalStep) and run.optimizer.weight_decay:
        raise ValueError(
            f"the optimiser fits the critic of {type(run.algorithm).__name__}, and its weight_decay would move the "
            "actor, too, outside the trust region: set optimizer.weight_decay to 0"
        )


def check_beginning(run: Any) -> None:
    """Refuse a reference that nobody asks for, and an actor held still that would move all the same."""
    at_least(0, critic_first=run.critic_first)
    name, passes = type(run.algorithm).__name__, run.algorithm.passes
    if passes.reference == "none" and run.reference is not None:
        raise ValueError(f"{name} as configured has no reference: set reference to None, or a KL coefficient above 0")
    if run.critic_first and not passes.critic:
        raise ValueError(f"{name} as configured has no critic to train alone: set critic_first to 0")
    if run.critic_first and passes.rule is not None:
        raise ValueError(f"critic_first holds an optimiser's gradient, and {name} moves the actor without: set it to 0")
    if run.shaping is not None:
        check_numbers(run.shaping)
        if run.algorithm.target.gradient == "given_data":
            raise ValueError(f"{name} learns from given data and sees no rewards: set shaping to None")
    if run.critic_first and run.optimizer.weight_decay:
        raise ValueError("critic_first holds the actor still, and weight_decay would move it: set one of them to 0")

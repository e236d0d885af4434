"""From an id, an environment, a factory or a vector environment to environments the collector can step."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv

from upslope.collect import atari
from upslope.collect.actions import random_action
from upslope.collect.autoreset import GymnasiumVector
from upslope.collect.errors import UnknownEnvironmentError
from upslope.collect.finite import FiniteFactory
from upslope.collect.masks import MaskSource, mask_environment, mask_of, mask_vector_environment
from upslope.collect.partial import keep_entries
from upslope.collect.resume import resume_problem
from upslope.collect.sealing import Truncation
from upslope.collect.vector import Factory, Resume, SyncEnvironments, VectorEnvironment
from upslope.collect.workers import AsyncEnvironments, available_cores
from upslope.streams import Purpose, derived_seed

_Object: TypeAlias = gymnasium.Env[Any, Any] | Factory | VectorEnv[Any, Any, Any]

_SWIG = "builtin type [Ss]wig.* has no __module__ attribute"
"""Box2D warns of this while it is imported, and crashes the interpreter where warnings are errors."""

_NO_LIMIT = -1
"""What Gymnasium takes for no limit; None is the environment's own."""

_EXTRAS = {"box2d": "box2d", "mujoco": "mujoco", "ale_py": "atari", "ale": "atari", "classic_control": "classic"}


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """Which environments a run acts in."""

    id: str = "CartPole-v1"
    """Gymnasium id, for example Hopper-v5, ALE/Breakout-v5 or my_package:MyEnv-v0; or problem/NAME (six-state, say)."""
    count: int = 1
    """How many environments are stepped together."""
    vectorization: Literal["auto", "sync", "async", "native"] = "auto"
    """sync: in this process; async: in worker processes; native: its own; auto: native from 16 on and for tables, else
    the faster."""
    kwargs: dict[str, bool | int | float | str] = field(default_factory=dict[str, bool | int | float | str])
    """Arguments of the environment's constructor."""
    time_limit: int | None = None
    """Decisions after which an episode is truncated; None for the environment's own limit."""
    continuing: bool = False
    """The task has no end: no time limit, not even the environment's own; it is judged over `evaluation.horizon`."""
    preprocessing: Literal["none", "atari"] = "none"
    """atari: 84 x 84 grey frames, every 4th, the last 4 stacked; up to 30 idle steps, then FIRE at every serve."""
    action_mask: MaskSource = "none"
    """Where masks of valid actions are: info["action_mask"] of reset and step, a method, or a key of a Dict observation
    (action_mask). The policy then takes valid actions alone."""
    action_mask_name: str | None = None
    """What the mask is called there; None for action_mask, or for action_masks if it is a method."""
    observation_entries: tuple[int, ...] | None = None
    """Which entries of an observation that is a vector the policy sees, say 0 2 for CartPole's positions; None: all."""
    truncation: Truncation = "bootstrap"
    """What a time limit means. as_termination counts it as death, which is wrong: it is there to be compared."""
    deadline: float = 60.0
    """Seconds one step of all environments may take before it counts as hung (async)."""
    processes: int | None = None
    """Worker processes (async); None for one per core."""
    resume: Literal["auto", "snapshot", "rebuild"] = "auto"
    """How environments go on after a checkpoint: from their state, or made anew there with open episodes truncated."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        for name, number in (("count", self.count), ("time_limit", self.time_limit), ("processes", self.processes)):
            if number is not None and number < 1:
                raise ValueError(f"environment.{name} must be at least 1, got {number}")
        if self.continuing and (self.time_limit is not None or self.preprocessing == "atari"):
            raise ValueError(
                "environment.continuing takes time limits away, which environment.time_limit and Atari's preprocessing "
                "put there: leave one of them out"
            )
        entries = self.observation_entries
        if entries is not None and (not entries or min(entries) < 0 or len(set(entries)) != len(entries)):
            raise ValueError(
                f"environment.observation_entries are different entries from 0 on, at least one; got {entries}"
            )
        if not self.deadline > 0.0:
            raise ValueError(f"environment.deadline is a positive number of seconds, got {self.deadline}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """A config with nothing left to choose, and why it became so.

    Attributes:
        config: as given, with `vectorization` and `resume` settled; recorded and used again on resume.
        notes: sentences for the run's log.
    """

    config: EnvironmentConfig
    notes: tuple[str, ...]


Source: TypeAlias = EnvironmentConfig | str | _Object
"""Where environments come from: a config, a Gymnasium id, an environment, a function that makes one, a VectorEnv."""


def resolve_environments(
    source: Source,
    config: EnvironmentConfig | None = None,
    *,
    seed: int = 0,
    purpose: Purpose = Purpose.ENVIRONMENT,
    separate: bool = False,
) -> Resolution:
    """Settle what the config leaves open, by measuring and trying.

    - `vectorization="auto"`: the environment's own if it has one and there are at least 16, or if it is a
      `FiniteFactory`'s, where a seed means the same either way; worker processes if there are several cores and a step
      of all environments would gain from them; else this process. Only the choice between the last two, which are the
      same to the last bit, is measured.
    - `resume="auto"`: snapshots if restoring one into fresh environments goes on the same to the last bit.

    Args:
        source: where environments come from.
        config: all other settings, if the source is not a config.
        seed, purpose: of the random numbers for the trial steps.
        separate: each environment has to begin where it is told to, as those of a group do; an environment's own
            vectorisation, which takes one seed for all, is then no choice for `vectorization="auto"`.

    Raises:
        UnknownEnvironmentError: if there is no such environment, or its package is missing.
        ValueError: if `resume="snapshot"` is asked of environments that cannot be snapshotted.
    """
    thing, config = _settled(source, config)
    notes: list[str] = []
    start = derived_seed(seed, purpose) >> 32
    if config.vectorization == "auto" and not isinstance(thing, VectorEnv):
        choice, why = _fastest(config, thing, start, separate)
        config = dataclasses.replace(config, vectorization=choice)
        notes.append(f"environments are stepped {choice}: {why}")
    if config.resume != "rebuild":
        problem = _resume_problem(config, thing, start)
        if problem is not None and config.resume == "snapshot":
            raise ValueError(f"resume='snapshot' is not possible: {problem}. Use resume='rebuild'")
        if problem is not None:
            notes.append(f"at every checkpoint environments are made anew and open episodes truncated: {problem}")
        config = dataclasses.replace(config, resume="snapshot" if problem is None else "rebuild")
    return Resolution(config=config, notes=tuple(notes))


def make_environments(
    source: Source,
    config: EnvironmentConfig | None = None,
    *,
    count: int | None = None,
    render_mode: str | None = None,
    seed: int = 0,
    purpose: Purpose = Purpose.ENVIRONMENT,
) -> VectorEnvironment:
    """Environments ready to be reset and stepped.

    Args:
        source: where environments come from.
        config: all other settings, if the source is not a config; what it leaves open is settled first (see
            `resolve_environments`). Environments for `Purpose.EVALUATION_ENVIRONMENT` are not snapshotted.
        count: in place of `config.count`.
        render_mode: Gymnasium's; environments that are shown are stepped in this process.
        seed, purpose: of the random numbers for the trial steps; the collector brings its own.

    Raises:
        UnknownEnvironmentError: if there is no such environment, or its package is missing.
        UnsupportedSpaceError: if no policy of ours can see or act in it.
        UnsupportedAutoresetError: if a vector environment does not say how it resets.
        ValueError: if what is asked for does not fit the source.
    """
    thing, config = _settled(source, config)
    if count is not None:
        config = dataclasses.replace(config, count=count)
    if render_mode is not None:
        config = dataclasses.replace(config, vectorization="sync", resume="rebuild")
    if purpose is Purpose.EVALUATION_ENVIRONMENT:
        config = dataclasses.replace(config, resume="rebuild")
    if "auto" in (config.vectorization, config.resume):
        config = resolve_environments(config if thing is None else thing, config, seed=seed, purpose=purpose).config
    resume: Resume = "snapshot" if config.resume == "snapshot" else "rebuild"
    if isinstance(thing, VectorEnv):
        if config.observation_entries is not None:
            raise ValueError(
                "environment.observation_entries is kept of single environments: pass a function that makes one, or "
                "take entries out in the vector environment itself"
            )
        masked = mask_vector_environment(thing, config.action_mask, config.action_mask_name)
        return GymnasiumVector(masked, resume=resume)
    if isinstance(thing, gymnasium.Env):
        if config.count != 1 or config.vectorization != "sync":
            raise ValueError(
                f"one environment cannot be stepped as {config.count} ({config.vectorization}); pass a function that "
                "makes one instead, for example lambda: MyEnv()"
            )
        return SyncEnvironments([_factory(config, thing, None)], resume=resume, remake=False)
    if config.vectorization == "native":
        return _native(config, thing, resume)
    factories = [_factory(config, thing, render_mode)] * config.count
    if config.vectorization == "async":
        return AsyncEnvironments(factories, deadline=config.deadline, processes=config.processes, resume=resume)
    return SyncEnvironments(factories, resume=resume)


def _settled(source: Source, config: EnvironmentConfig | None) -> tuple[_Object | None, EnvironmentConfig]:
    """The object to use in place of an id, if any, and the config."""
    if isinstance(source, EnvironmentConfig):
        return None, source
    config = config or EnvironmentConfig()
    if isinstance(source, str):
        return None, dataclasses.replace(config, id=source)
    if isinstance(source, VectorEnv):
        return source, dataclasses.replace(config, count=source.num_envs)
    if isinstance(source, FiniteFactory) and (config.time_limit is not None or config.continuing):
        source = dataclasses.replace(source, time_limit=config.time_limit)
    return source, config


def environment_factory(config: EnvironmentConfig, *, render_mode: str | None = None) -> Factory:
    """A function that makes one environment of this config, wrappers included.

    Raises (when called):
        UnknownEnvironmentError: if there is no such environment, or its package is missing.
    """
    return _factory(config, None, render_mode)


def _factory(
    config: EnvironmentConfig, source: gymnasium.Env[Any, Any] | Factory | None, render_mode: str | None
) -> Factory:
    def make() -> gymnasium.Env[Any, Any]:
        shown = keep_entries(bare(), config.observation_entries)
        return mask_environment(shown, config.action_mask, config.action_mask_name)

    def bare() -> gymnasium.Env[Any, Any]:
        if source is None:
            return _preprocessed(_make_by_id(config, render_mode), config)
        environment = source if isinstance(source, gymnasium.Env) else source()
        if config.time_limit is not None and config.preprocessing == "none":
            environment = gymnasium.wrappers.TimeLimit(environment, config.time_limit)
        return _preprocessed(environment, config)

    return make


def _make_by_id(config: EnvironmentConfig, render_mode: str | None) -> gymnasium.Env[Any, Any]:
    kwargs: dict[str, Any] = dict(config.kwargs)
    limit = config.time_limit if config.preprocessing == "none" else None
    if config.continuing:
        limit = _NO_LIMIT
    if config.preprocessing == "atari":
        kwargs.setdefault("frameskip", 1)
    if render_mode is not None:
        kwargs["render_mode"] = render_mode

    def make() -> gymnasium.Env[Any, Any]:
        return gymnasium.make(config.id, max_episode_steps=limit, disable_env_checker=True, **kwargs)

    return _explained(config.id, make)


def _preprocessed(environment: gymnasium.Env[Any, Any], config: EnvironmentConfig) -> gymnasium.Env[Any, Any]:
    return environment if config.preprocessing == "none" else atari.preprocess(environment, config.time_limit)


def _explained(name: str, make: Callable[[], Any]) -> Any:
    """Make it, and say what to do if there is no such thing."""
    try:
        if name.startswith("ALE/"):
            gymnasium.register_envs(importlib.import_module("ale_py"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _SWIG, DeprecationWarning)
            return make()
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv) as error:
        close = difflib.get_close_matches(name, list(gymnasium.registry), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UnknownEnvironmentError(
            f"there is no environment {name!r} ({error}).{hint} gymnasium.pprint_registry() lists those installed; one "
            "of your own package is written package:Name-v0"
        ) from error
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        if not isinstance(error, gymnasium.error.DependencyNotInstalled | ModuleNotFoundError):
            raise UnknownEnvironmentError(f"{name} cannot be made: {error}") from error
        specification = gymnasium.registry.get(name)
        entry = "ale_py" if name.startswith("ALE/") else str(specification.entry_point if specification else "")
        extra = next((extra for word, extra in _EXTRAS.items() if word in entry), None)
        remedy = f"pip install 'upslope[{extra}]'" if extra else "install the package that provides it"
        raise UnknownEnvironmentError(f"{name} needs a package that is not installed ({error}): {remedy}") from error


def _native(config: EnvironmentConfig, source: Factory | None, resume: Resume) -> VectorEnvironment:
    plain = config.preprocessing == "none" and config.action_mask == "none" and config.observation_entries is None
    if isinstance(source, FiniteFactory) and plain:
        return source.together(config.count, resume=resume)
    if source is not None or not has_native(config):
        raise ValueError(
            f"{config.id if source is None else source} has no vectorisation of its own that can be used here; take "
            "vectorization='sync' or 'async'"
        )
    make = native_factory(config)
    return GymnasiumVector(make(), vectorization="native", factory=make, resume=resume)


def native_factory(config: EnvironmentConfig) -> Callable[[], VectorEnv[Any, Any, Any]]:
    """A function that makes `count` environments in their own vectorisation, which there must be (`has_native`)."""
    kwargs: dict[str, Any] = dict(config.kwargs)
    if config.time_limit is not None:
        kwargs["max_episode_steps"] = config.time_limit

    def make() -> VectorEnv[Any, Any, Any]:
        mode = gymnasium.VectorizeMode.VECTOR_ENTRY_POINT
        made = _explained(
            config.id, lambda: gymnasium.make_vec(config.id, config.count, vectorization_mode=mode, **kwargs)
        )
        return mask_vector_environment(made, config.action_mask, config.action_mask_name)

    return make


def has_native(config: EnvironmentConfig) -> bool:
    """Whether the environment brings its own vectorisation and nothing is to be wrapped around single ones."""
    specification = gymnasium.registry.get(config.id)
    own = specification is not None and specification.vector_entry_point is not None
    whole = config.preprocessing == "none" and config.observation_entries is None
    return own and whole and not config.continuing


def _resume_problem(config: EnvironmentConfig, source: _Object | None, seed: int) -> str | None:
    if isinstance(source, gymnasium.Env | VectorEnv):
        return "they were passed as objects, and no second one can be made to try a snapshot on; pass a function"
    if config.vectorization == "native":
        return resume_problem(lambda: _native(config, source, "snapshot"), seed=seed)
    return resume_problem(lambda: SyncEnvironments([_factory(config, source, None)], resume="snapshot"), seed=seed)


def _fastest(
    config: EnvironmentConfig, source: gymnasium.Env[Any, Any] | Factory | None, seed: int, separate: bool
) -> tuple[Literal["sync", "async", "native"], str]:
    if isinstance(source, gymnasium.Env):
        return "sync", "it was passed as one object"
    if isinstance(source, FiniteFactory):
        return "native", "tables are looked up for all at once"
    if source is None and config.count >= _NATIVE_COUNT and not separate and has_native(config):
        return "native", f"it has a vectorisation of its own, and {_NATIVE_COUNT} or more gain from it"
    together = config.count * _seconds_per_step(SyncEnvironments([_factory(config, source, None)]), seed)
    cores = min(available_cores(), config.processes or config.count, config.count)
    shared = together / cores + _WORKER_OVERHEAD * cores
    if cores > 1 and 1.5 * shared < together:
        return "async", f"about {shared * 1e6:.0f} us a step in {cores} processes against {together * 1e6:.0f} us"
    return "sync", f"{together * 1e6:.0f} us a step"


_NATIVE_COUNT = 16
"""From how many environments on their own vectorisation is taken: a rule and no measurement, since it draws other
random numbers than one by one, and a seed should mean the same everywhere. CartPole-v1, microseconds a step of all:

| count      |  1 |  4 |  8 | 12 |  16 |  24 |  32 |
|------------|----|----|----|----|-----|-----|-----|
| one by one |  9 | 29 | 56 | 84 | 115 | 170 | 227 |
| native     | 50 | 50 | 51 | 53 |  54 |  56 |  58 |
"""

_WORKER_OVERHEAD = 60e-6
"""Seconds that waking one worker and hearing from it costs, measured."""


def _seconds_per_step(environments: VectorEnvironment, seed: int, *, budget: float = 0.1) -> float:
    """Median over a few steps of random actions, in no more than `budget` seconds after the first step."""
    generator = np.random.default_rng(seed)
    mask = mask_of(environments.reset([seed] * environments.num_envs))
    step = environments.step(random_action(environments.action_space, generator, environments.num_envs, mask))
    taken: list[float] = []
    while len(taken) < 3 or (len(taken) < 100 and sum(taken) < budget):
        mask = mask_of(step.observation)
        action = random_action(environments.action_space, generator, environments.num_envs, mask)
        begin = time.perf_counter()
        step = environments.step(action)
        taken.append(time.perf_counter() - begin)
    environments.close()
    return float(np.median(taken))

"""Trying an environment out before training in it."""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv

from upslope.collect.actions import RandomPolicy, random_action
from upslope.collect.check_vector import VectorWalk
from upslope.collect.conformance import tick_cases
from upslope.collect.convert import ObservationLayout, action_cast, convert_action_space
from upslope.collect.environments import EnvironmentCollector
from upslope.collect.errors import (
    ActionMaskError,
    EnvironmentFailureError,
    UnknownEnvironmentError,
    UnsupportedSpaceError,
)
from upslope.collect.evaluation import environment_seeds
from upslope.collect.finite import FiniteFactory
from upslope.collect.make import EnvironmentConfig, environment_factory, has_native, native_factory
from upslope.collect.masks import MaskSpace
from upslope.collect.resume import freeze, resume_problem
from upslope.collect.vector import Factory, SyncEnvironments, VectorEnvironment
from upslope.collect.workers import AsyncEnvironments
from upslope.spaces import ACTION_MASK, Leaf, masked_sizes
from upslope.streams import Purpose
from upslope.trajectory import ObservationArrays

_TOLERANCE = 1e-5
_MARKS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried.

    Attributes:
        level: `"problem"` if training in the environment would be wrong or fail, `"note"` if it is worth knowing.
        text: what was found, and what to do.
    """

    level: Literal["ok", "note", "problem"]
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    """What was found.

    Attributes:
        name: of the environment.
        findings: in the order they were made.
    """

    name: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return all(finding.level != "problem" for finding in self.findings)

    def __str__(self) -> str:
        verdict = "no problem found" if self.ok else "not ready to train in"
        lines = [f"{_MARKS[finding.level]}  {finding.text}" for finding in self.findings]
        return "\n".join([self.name, *lines, f"{self.name}: {verdict}"])


Checked: TypeAlias = (
    EnvironmentConfig | str | VectorEnv[Any, Any, Any] | Factory | Callable[[], VectorEnv[Any, Any, Any]]
)
"""What can be checked: a config, a Gymnasium id, `path/to/file.py:MyEnv`, a class or function that makes an environment
or a vector environment, or a vector environment."""


def check_environment(source: Checked, *, steps: int = 2000, seed: int = 0) -> Report:
    """Try an environment out: spaces, types, flags, ends of episodes, seeding, snapshots, and the Tick suite.

    The collector is compared with a plain loop in every way the environment can be stepped, and the transitions of a
    vectorisation of its own are judged by the autoreset mode it declares.

    Args:
        source: a config, a Gymnasium id, `path/to/file.py:MyEnv` (the file is run), a class or function that makes an
            environment or a vector environment, or a vector environment.
        steps: how many random steps to take at most.
        seed: of starts and actions.

    Raises:
        UnknownEnvironmentError: if there is no such environment, or its package is missing.
        EnvironmentFailureError: if it raises.
    """
    if isinstance(source, VectorEnv):
        return Report(str(source), (*_check_vector(source, steps, seed), _suite()))
    if isinstance(source, str) and ".py:" in source:
        name, source = source, factory_from_file(source)
    elif isinstance(source, str | EnvironmentConfig):
        config = EnvironmentConfig(id=source) if isinstance(source, str) else source
        findings = _check_single(environment_factory(config), steps, seed)
        if has_native(config):
            findings += _check_native(config, steps, seed)
        return Report(config.id, (*findings, _suite()))
    else:
        name = ""
    made = source()
    name = name or str(made)
    if isinstance(made, VectorEnv):
        findings = _check_vector(made, steps, seed)
    else:
        findings = _check_single(cast("Factory", source), steps, seed)
        if isinstance(source, FiniteFactory):
            findings.append(_twin(source, source.together(4), min(steps, 500) // 4, seed))
    made.close()
    return Report(name, (*findings, _suite()))


def factory_from_file(place: str) -> Callable[[], Any]:
    """The class or function `path/to/file.py:Name`; the file is run as a module of its own.

    Raises:
        UnknownEnvironmentError: if there is no such file, or no such thing in it.
    """
    text, _, name = place.rpartition(":")
    path = Path(text).resolve()
    specification = importlib.util.spec_from_file_location(f"checked_{path.stem}", path)
    if not path.is_file() or specification is None or specification.loader is None:
        raise UnknownEnvironmentError(f"there is no Python file {path}; write path/to/file.py:MyEnv")
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    found = vars(module).get(name)
    if not callable(found):
        callables = sorted(key for key, value in vars(module).items() if isinstance(value, type))
        raise UnknownEnvironmentError(f"{path} has no class or function {name!r}; its classes are {callables}")
    return found


def _check_single(factory: Factory, steps: int, seed: int) -> list[Finding]:
    try:
        environment = factory()
        space = ObservationLayout(environment.observation_space).space
        action_space = convert_action_space(environment.action_space)
    except (UnsupportedSpaceError, ActionMaskError) as error:
        return [Finding("problem", str(error))]
    findings = [Finding("ok", f"observations {space}"), Finding("ok", f"actions {action_space}")]
    walk, actions = _Walk(environment, seed), list[Any]()
    choose = _chooser(environment, action_space, seed)
    while walk.problem is None and len(actions) < steps:
        actions.append(choose(walk.mask))
        walk.step(actions[-1])
    environment.close()
    if walk.problem is not None:
        return [*findings, Finding("problem", walk.problem)]
    findings.append(
        Finding("ok", f"{walk.steps} random steps: observations in their space, rewards finite, flags boolean")
    )
    findings += [walk.ends(), *walk.masks()]
    findings.append(_seeding(factory, actions[:200], seed, walk.trace[:201]))
    problem = resume_problem(lambda: SyncEnvironments([factory], resume="snapshot"), seed=seed)
    findings.append(
        Finding("ok", "snapshots hold: a resumed run goes on to the last bit")
        if problem is None
        else Finding("note", f"made anew at checkpoints, where open episodes count as truncated: {problem}")
    )
    length = min(steps, 500)
    findings.append(_twin(factory, SyncEnvironments([factory]), length, seed))
    findings.append(_twin(factory, SyncEnvironments([factory] * 2), length // 2, seed))
    if "fork" in multiprocessing.get_all_start_methods():
        findings.append(_twin(factory, AsyncEnvironments([factory] * 2, processes=2), length // 2, seed))
    return findings


def _chooser(
    environment: gymnasium.Env[Any, Any], space: Leaf, seed: int
) -> Callable[[np.ndarray | None], int | np.ndarray]:
    """A random action, valid by the mask [1, *] if there is one, as the environment takes it."""
    generator, cast_action = np.random.default_rng(seed), action_cast(environment.action_space)

    def choose(mask: np.ndarray | None) -> int | np.ndarray:
        action = cast_action(random_action(space, generator, 1, mask))
        return action[0].item() if action.ndim == 1 else action[0]

    return choose


class _Walk:
    """An environment walked through, and the first thing wrong with it."""

    def __init__(self, environment: gymnasium.Env[Any, Any], seed: int) -> None:
        self._environment = environment
        self.steps = self.terminations = self.truncations = 0
        self.problem: str | None = None
        self.trace: list[Any] = []
        self.mask: np.ndarray | None = None
        self._valid: list[float] = []
        self._unused = False
        try:
            result = environment.reset(seed=seed)
        except ActionMaskError as error:
            self.problem = str(error)
            return
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            self.problem = f"reset() must return (observation, info dict), it returned {result!r:.80}"
            return
        self._unused = ACTION_MASK in result[1]
        self._see(result[0], "reset()")
        self.trace.append(freeze(result[0]))

    def step(self, action: Any) -> None:
        try:
            result = self._environment.step(action)
        except ActionMaskError as error:
            self.problem = str(error)
            return
        except Exception as error:
            text = f"step {self.steps + 1} with the action {action!r} raised {type(error).__name__}: {error}"
            raise EnvironmentFailureError(text, 0) from error
        if not (isinstance(result, tuple) and len(result) == 5):
            self.problem = f"step() must return (observation, reward, terminated, truncated, info), got {result!r:.80}"
            return
        observation, reward, terminated, truncated, info = result
        self.steps += 1
        self._see(observation, f"step {self.steps}")
        if not isinstance(info, dict):
            self.problem = f"step {self.steps}: info must be a dict, it is {info!r:.80}"
        if not isinstance(reward, int | float | np.number) or not np.isfinite(float(reward)):
            self.problem = f"step {self.steps}: the reward must be one finite number, it is {reward!r:.80}"
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, bool | np.bool_):
                self.problem = f"step {self.steps}: {name} must be True or False, it is {flag!r:.80}"
        self.trace.append(freeze([observation, reward, bool(terminated), bool(truncated)]))
        self.terminations += bool(terminated)
        self.truncations += bool(truncated) and not bool(terminated)
        if self.problem is None and (terminated or truncated):
            observation, _ = self._environment.reset()
            self._see(observation, f"reset() after step {self.steps}")

    def ends(self) -> Finding:
        """What was seen of the ends of episodes."""
        if self.terminations + self.truncations:
            return Finding("ok", f"{self.terminations} episodes terminated, {self.truncations} were truncated")
        return Finding(
            "note",
            f"no episode ended in {self.steps} steps; if episodes have no end, set a time limit, else they are never "
            "counted and evaluation cannot finish",
        )

    def masks(self) -> list[Finding]:
        """What was seen of masks of valid actions."""
        if self.mask is not None:
            share, restricted = float(np.mean(self._valid)), float(np.mean(np.array(self._valid) < 1.0))
            text = (
                f"masks of valid actions: {share:.0%} of the choices are valid, in {restricted:.0%} of states not all"
            )
            return [Finding("ok", text)]
        if not self._unused:
            return []
        text = 'info["action_mask"] says which actions are valid, and is not used: set environment.action_mask to info'
        return [Finding("note", text)]

    def _see(self, observation: Any, where: str) -> None:
        space = self._environment.observation_space
        if isinstance(space, gymnasium.spaces.Dict) and isinstance(space.spaces.get(ACTION_MASK), MaskSpace):
            self.mask = np.asarray(observation[ACTION_MASK])[None]
            self._valid.append(float(self.mask.mean()))
        if space.contains(observation):
            if not _finite(observation):
                self.problem = f"{where}: the observation is not finite: {observation!r:.120}"
            return
        self.problem = (
            f"{where}: the observation is not in observation_space {space}: {observation!r:.120} (shape "
            f"{np.shape(observation)}, type {getattr(observation, 'dtype', type(observation).__name__)}). Correct the "
            "space, or the type and range of what is returned"
        )


def _finite(observation: Any) -> bool:
    if isinstance(observation, dict):
        return all(_finite(entry) for entry in observation.values())
    if isinstance(observation, tuple):
        return all(_finite(entry) for entry in observation)
    return bool(np.isfinite(np.asarray(observation, dtype=np.float64)).all())


def _seeding(factory: Factory, actions: list[Any], seed: int, expected: list[Any]) -> Finding:
    environment = factory()
    walk = _Walk(environment, seed)
    for action in actions:
        walk.step(action)
    environment.close()
    if walk.trace == expected:
        return Finding(
            "ok", f"two environments with the same seed and actions agree to the last bit ({len(actions)} steps)"
        )
    return Finding(
        "problem",
        "two environments with the same seed and actions differ: runs cannot be repeated or resumed exactly. Call "
        "super().reset(seed=seed) in reset() and draw all random numbers from self.np_random",
    )


def _twin(factory: Factory, environments: VectorEnvironment, steps: int, seed: int) -> Finding:
    """The collector against a plain loop that never resets in advance: what followed each step must be the same."""
    count = environments.num_envs
    how = f"{count} x {environments.vectorization}"
    collector = EnvironmentCollector(environments, steps=steps, seed=seed)
    masked = masked_sizes(environments.observation_space) is not None
    trajectory = collector.collect(RandomPolicy(environments.action_space, masked=masked), 0)
    collector.close()
    seeds = environment_seeds(seed, Purpose.ENVIRONMENT, 0, 0, count)
    lives = [_life(factory, trajectory.action[row].numpy(), seeds[row]) for row in range(count)]
    rewards, flags = np.stack([life[1] for life in lives]), np.stack([life[2] for life in lives])
    row, position = np.nonzero(np.logical_not(flags.any(axis=1))[:, :-1])
    final = np.unravel_index(trajectory.final_index.numpy(), (count, steps))
    pairs: list[tuple[Any, Any]] = [
        (trajectory.terminated, flags[:, 0]),
        (trajectory.truncated, flags[:, 1]),
        (trajectory.reward, rewards.astype(np.float32)),
    ]
    seen, after = _named(trajectory.observation), _named(trajectory.final_observation)
    for name in seen:
        true = np.stack([_named(life[0])[name] for life in lives])
        pairs += [(seen[name][row, position + 1], true[row, position]), (after[name], true[final])]
    if all(np.array_equal(np.asarray(ours), true) for ours, true in pairs):
        return Finding(
            "ok", f"{how}: the collector and a plain loop agree on {steps} steps, final observations included"
        )
    return Finding(
        "problem",
        f"{how}: the collector and a plain loop over the same seed and actions disagree: the environment remembers "
        "something across episodes, shares it with others of its class, or returns arrays that it changes later. "
        "Return copies, and forget everything in reset()",
    )


def _life(factory: Factory, actions: np.ndarray, seed: int) -> tuple[ObservationArrays, np.ndarray, np.ndarray]:
    """What followed each action [T, ...], the rewards [T] and both flags [2, T]."""
    environment = factory()
    layout = ObservationLayout(environment.observation_space)
    rows = layout.allocate(len(actions))
    write = layout.writer(rows)
    flags, rewards = np.zeros((2, len(actions)), dtype=bool), np.zeros(len(actions))
    environment.reset(seed=seed)
    actions = action_cast(environment.action_space)(actions)
    for position, action in enumerate(actions.tolist() if actions.ndim == 1 else actions):
        observation, rewards[position], flags[0, position], flags[1, position], _ = environment.step(action)
        write(position, observation)
        if flags[:, position].any():
            environment.reset()
    environment.close()
    return rows, rewards, flags


def _named(observation: Any) -> dict[str, Any]:
    return observation if isinstance(observation, dict) else {"": observation}


def _check_vector(environment: VectorEnv[Any, Any, Any], steps: int, seed: int) -> list[Finding]:
    try:
        walk = VectorWalk(environment, steps, seed)
    except ValueError as error:
        return [Finding("problem", str(error))]
    findings = [Finding("ok", f"observations {walk.observation_space}"), Finding("ok", f"actions {walk.action_space}")]
    if walk.problem is not None:
        return [*findings, Finding("problem", walk.problem)]
    ends = f"autoreset mode {walk.mode.name} is kept: {walk.ended} episodes ended in {walk.steps} steps"
    nothing = f"autoreset mode {walk.mode.name}: no episode ended in {walk.steps} steps, so it could not be tried"
    return [*findings, Finding("ok", ends) if walk.ended else Finding("note", nothing)]


def _check_native(config: EnvironmentConfig, steps: int, seed: int) -> list[Finding]:
    """The vectorisation that an id brings along, which a run may choose."""
    vector, single = native_factory(dataclasses.replace(config, count=4))(), environment_factory(config)()
    ours = vector.single_observation_space, vector.single_action_space
    findings = _check_vector(vector, steps, seed)
    if ours != (single.observation_space, single.action_space):
        text = f"has the spaces {ours}, one by one they are {single.observation_space} and {single.action_space}"
        findings.append(Finding("problem", text))
    vector.close()
    single.close()
    return [Finding(finding.level, f"its own vectorisation: {finding.text}") for finding in findings]


def _suite() -> Finding:
    wrong = [case.name for case in tick_cases(processes=False) if case.error() > _TOLERANCE]
    if wrong:
        return Finding("problem", f"the Tick suite fails here ({', '.join(wrong)}): please report it")
    return Finding("ok", "the Tick suite: ends of episodes are exact in every autoreset mode")

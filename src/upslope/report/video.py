"""A policy to look at: an episode in a window, or as a film in the run directory."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from upslope.collect import EnvironmentConfig, Step, SyncEnvironments, environment_factory, evaluate_policy
from upslope.errors import UsageError
from upslope.trajectory import ObservationArrays, Policy


def watch(policy: Policy, environment: EnvironmentConfig, *, seed: int = 0) -> float:
    """Play one episode with the most likely actions in a window.

    Args:
        policy: who plays.
        environment: where; it must support Gymnasium's render mode "human".
        seed: decides the start.

    Returns:
        The episode's return.

    Raises:
        UsageError: the environment gives no pictures.
    """
    _require_pictures(environment)
    alone = replace(environment, truncation="bootstrap", count=1)
    shown = SyncEnvironments([environment_factory(alone, render_mode="human")])
    try:
        return float(evaluate_policy(policy, shown, episodes=1, seed=seed).returns[0])
    finally:
        shown.close()


def record_video(policy: Policy, environment: EnvironmentConfig, path: Path, *, seed: int = 0) -> float:
    """Film one episode with the most likely actions.

    Args:
        policy: who plays.
        environment: where; it must support Gymnasium's render mode "rgb_array".
        path: an .mp4 file; its directory is made.
        seed: decides the start.

    Returns:
        The episode's return.

    Raises:
        ModuleNotFoundError: moviepy is not installed.
        UsageError: the environment gives no pictures.
    """
    _require_pictures(environment)
    if importlib.util.find_spec("moviepy") is None:
        raise ModuleNotFoundError("videos need moviepy: pip install 'upslope[video]'")
    played = environment_factory(replace(environment, count=1), render_mode="rgb_array")()
    rate = int(played.metadata.get("render_fps") or 30)
    filmed = _Filmed(environments=SyncEnvironments([lambda: played]), camera=played)
    try:
        total = float(evaluate_policy(policy, filmed, episodes=1, seed=seed).returns[0])
    finally:
        filmed.environments.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    clip = importlib.import_module("moviepy").ImageSequenceClip(filmed.frames, fps=rate)
    clip.write_videofile(str(path), logger=None, audio=False)
    clip.close()
    return total


def _require_pictures(environment: EnvironmentConfig) -> None:
    """A named problem is a table, which Gymnasium does not know."""
    if environment.id.startswith("problem/"):
        raise UsageError(
            f"{environment.id} is made of tables, and there is no picture of a table: leave out --render and --video, "
            "or take an environment of Gymnasium that can be drawn"
        )


@dataclass(kw_only=True)
class _Filmed:
    """One environment and a picture of it before every action; a `VectorEnvironment` as far as evaluation goes."""

    environments: SyncEnvironments
    camera: Any
    frames: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_envs = self.environments.num_envs
        self.observation_space = self.environments.observation_space
        self.action_space = self.environments.action_space
        self.vectorization = self.environments.vectorization
        self.resume: Literal["snapshot", "rebuild"] = self.environments.resume
        self.snapshot = self.environments.snapshot
        self.restore = self.environments.restore
        self.rebuild = self.environments.rebuild
        self.close = self.environments.close

    def reset(self, seeds: Sequence[int] | None) -> ObservationArrays:
        observation = self.environments.reset(seeds)
        self._shoot()
        return observation

    def step(self, action: np.ndarray) -> Step:
        step = self.environments.step(action)
        if step.finished is None:
            self._shoot()
        return step

    def _shoot(self) -> None:
        frame = self.camera.render()
        if not isinstance(frame, np.ndarray):
            raise UsageError(
                "the environment gives no pictures: its render mode 'rgb_array' must return an array from render()"
            )
        height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2  # video formats want even sizes
        self.frames.append(frame[:height, :width])

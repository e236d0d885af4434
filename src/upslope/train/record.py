"""Episodes of a trained policy, recorded into a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from upslope.collect import EnvironmentConfig, Source, make_environments
from upslope.collect.recorded import check_recorded_spaces, record_episodes
from upslope.collect.trajectory_file import Recording, write_recording
from upslope.errors import UsageError, checking_usage
from upslope.train.config import EvaluationConfig
from upslope.train.config_file import read_evaluation
from upslope.train.given import check_recorded, given_id, split_source
from upslope.train.problems import evaluation_environments_of
from upslope.train.saving import load

_TOGETHER = 10


def record_run(
    place: str | Path,
    out: str | Path,
    *,
    episodes: int = 100,
    seed: int = 0,
    best: bool = False,
    environments: Source | None = None,
    encoder: nn.Module | None = None,
) -> Recording:
    """Let a trained policy play whole episodes, sampling its actions, and write them into a file.

    Args:
        place: a run directory, or a policy folder, which does not know its environment.
        out: the file; an older one is replaced.
        episodes: how many.
        seed: decides where they begin and what is sampled.
        best: of a run directory: take the policy that was best in evaluation instead of the latest.
        environments: where to play, if not in the run's environment; as for `upslope.train.train`.
        encoder: a fresh module of the kind the policy was trained with, if it was one of the user's own.

    Returns:
        What was written.

    Raises:
        UsageError: if the environment has to be named, or is not the one the policy was made for, or the file cannot be
            written.
        CheckpointError: if the policy is missing or damaged.
    """
    if episodes < 1:
        raise UsageError(f"record at least one episode, got episodes={episodes}")
    place, out = Path(place), Path(out)
    _check_out(out)
    run = (place / "config.json").is_file() and (place / "policy").is_dir()
    if best and not run:
        raise UsageError(f"{place} is no run directory, and only a run has a best policy: leave best out")
    with checking_usage():
        policy = load(place / ("best" if best else "policy") if run else place, encoder=encoder)
    config = _environment(place, run=run, environments=environments)
    config, source = split_source(environments, config)
    config = replace(
        config, count=min(_TOGETHER, episodes), vectorization="sync", resume="rebuild", truncation="bootstrap"
    )
    if source is not None:
        config = replace(config, id=given_id(source), count=1 if not callable(source) else config.count)
    with checking_usage():
        made = make_environments(evaluation_environments_of(config, source, EvaluationConfig().horizon), config)
    try:
        about = {"environment": config.id, "policy": str(place), "seed": str(seed)}
        own = (policy.observation_space, policy.action_space)
        check_recorded_spaces(own, (made.observation_space, made.action_space), f"the policy of {place}")
        recording = record_episodes(policy, made, episodes=episodes, seed=seed, about=about)
    finally:
        made.close()
    try:
        write_recording(recording, out)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error}") from error
    return recording


def _check_out(out: Path) -> None:
    """Refuse a place that no file can be written to, before anything is played."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder: name the file to write, {out / 'episodes.safetensors'} say")
    if not out.parent.is_dir():
        raise UsageError(f"{out} cannot be written: the folder {out.parent} does not exist; make it first")


def _environment(place: Path, *, run: bool, environments: Source | None) -> EnvironmentConfig:
    if run:
        recorded, _ = read_evaluation(place)
        check_recorded(recorded, environments)
        return recorded
    if environments is None:
        raise UsageError(
            f"{place} is a policy folder and does not know its environment: name it, environments=... in Python, "
            "--environment ID on the command line; or give the run directory"
        )
    return EnvironmentConfig()

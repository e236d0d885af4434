"""`upslope evaluate`: judge the policy of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import Positional

from upslope.commands.common import DONE, say
from upslope.errors import UsageError
from upslope.options import parse

_EPISODES = 100


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Judge the policy a run saved.

    An agent plays episodes: most likely actions, then sampled ones, on raw rewards. A language model completes held-out
    prompts: the likeliest completion, then drawn ones.
    """

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Its directory."""
    episodes: int | None = None
    """Of an agent: episodes for each of the two ways to act, 100 if not given."""
    prompts: int | None = None
    """Of a language model: held-out prompts; as many as in the run if not given."""
    samples: int | None = None
    """Of a language model: completions drawn per prompt; as many as in the run if not given."""
    seed: int = 0
    """Decides where episodes start and what is sampled."""
    best: bool = False
    """Take the policy that was best in evaluation during the run, not the last one."""
    environment: str | None = None
    """Another environment; needed only where the run's own is module:Name-v0, since making it imports the module."""
    render: bool = False
    """Watch an episode in a window."""
    video: bool = False
    """Record an episode into the run directory (needs `pip install 'upslope[video]'`)."""


_OF_AGENTS = ("episodes", "environment", "render", "video")
_OF_LANGUAGE_MODELS = ("prompts", "samples")


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    command = parse(Evaluate, arguments, program="upslope evaluate")
    from upslope.train.config_file import recorded_run
    from upslope.train.language import LanguageRun

    if (command.run / "config.json").is_file():
        speaks = recorded_run(command.run).get("class") == LanguageRun.__name__
    else:
        speaks = (command.prompts, command.samples) != (None, None)
    for name in _OF_AGENTS if speaks else _OF_LANGUAGE_MODELS:
        if getattr(command, name) not in (None, False):
            other = "of an agent, and this is a language model's run" if speaks else "of a language model's run"
            raise UsageError(f"--{name} judges the policy {other}: leave it out")
    return _language(command) if speaks else _agent(command)


def _language(command: Evaluate) -> int:
    from upslope.report.language import language_evaluation_table
    from upslope.train.language.judge import evaluate_language_run

    report = evaluate_language_run(
        command.run, prompts=command.prompts, samples=command.samples, seed=command.seed, best=command.best
    )
    Console().print(language_evaluation_table(report.record()))
    return DONE


def _agent(command: Evaluate) -> int:
    from upslope.report.terminal import evaluation_table
    from upslope.train import evaluate_run

    report = evaluate_run(
        command.run,
        episodes=_EPISODES if command.episodes is None else command.episodes,
        seed=command.seed,
        best=command.best,
        environments=command.environment,
    )
    console = Console()
    console.print(evaluation_table(report))
    if command.render or command.video:
        _watched(command, console)
    return DONE


def _watched(command: Evaluate, console: Console) -> None:
    from upslope.report.video import record_video, watch
    from upslope.train import load
    from upslope.train.config_file import read_evaluation
    from upslope.train.evaluate import within_horizon

    policy = load(command.run / ("best" if command.best else "policy"))
    environment, settings = read_evaluation(command.run)
    environment = within_horizon(environment, settings.horizon)
    if command.environment is not None:
        environment = dataclasses.replace(environment, id=command.environment)
    if command.render:
        say(console, f"shown: an episode with a return of {watch(policy, environment, seed=command.seed):,.1f}")
    if command.video:
        path = command.run / "videos" / f"{'best' if command.best else 'policy'}-seed{command.seed}.mp4"
        total = record_video(policy, environment, path, seed=command.seed)
        say(console, f"video: {path}, an episode with a return of {total:,.1f}")

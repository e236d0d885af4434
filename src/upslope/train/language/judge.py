"""Judging the language model that a run saved."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from upslope.collect.tasks.protocol import Task
from upslope.errors import UsageError, checking_usage
from upslope.train.config_file import read_run, recorded_frozen
from upslope.train.language.config import LanguageRun
from upslope.train.language.evaluate import LanguageEvaluator
from upslope.train.language.frozen import freeze_again, sampling_of
from upslope.train.prepare import threads
from upslope.train.run_directory import RunDirectory

if TYPE_CHECKING:
    from upslope.train.language.evaluate import LanguageReport


def evaluate_language_run(
    directory: str | Path,
    *,
    prompts: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    best: bool = False,
    task: Task | None = None,
) -> LanguageReport:
    """Evaluate the policy a run saved, on held-out examples.

    Args:
        directory: of the run.
        prompts: how many examples; None for as many as in the run.
        samples: completions drawn per prompt, for accuracy and pass@k; None for as many as in the run.
        seed: decides what is drawn.
        best: take the policy that was best in evaluation instead of the latest.
        task: as given to `train`, if it was.

    Raises:
        ConfigError: if there is no run there.
        RunDirectoryError: likewise.
        UsageError: if the policy is missing, or the task has to be passed again.
    """
    from upslope.policies.language.folder import load_language_policy

    place = RunDirectory.view(Path(directory))
    run = read_run(place.path)
    if not isinstance(run, LanguageRun):
        raise UsageError(f"{directory} trained an agent: evaluate_run judges it")
    folder = place.best if best else place.policy
    if not folder.is_dir():
        raise UsageError(
            f"{directory} has no {folder.name}/ to judge: {'judge its latest policy' if best else 'let it train'}"
            " until one is saved"
        )
    settings = run.evaluation
    count = settings.samples if samples is None else samples
    with threads(run.threads), ExitStack() as used:
        with checking_usage():
            settings = replace(
                settings,
                times=max(settings.times, 1),
                prompts=settings.prompts if prompts is None else prompts,
                samples=count,
                pass_at=tuple(sorted({k for k in settings.pass_at if k <= count} | {count})),
            )
            built = run.task.build(run.seed) if task is None else task
            frozen = freeze_again(run, built, place, recorded_frozen(place.path))
            if frozen.rewards is not None:
                used.callback(frozen.rewards.close)
            policy = load_language_policy(folder, sampling=sampling_of(run), device=run.device)
            judged = replace(run, seed=seed, evaluation=settings)
            evaluator = used.enter_context(closing(LanguageEvaluator(judged, replace(frozen, policy=policy), None)))
        return evaluator.evaluate(policy, index=0, final=True)

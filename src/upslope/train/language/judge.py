"""Judging the policy that a run left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from upslope.collect.tasks.protocol import Task
from upslope.errors import UsageError, checking_usage
from upslope.train.config_file import read_run
from upslope.train.language.config import LanguageRun
from upslope.train.language.evaluate import LanguageEvaluator, LanguageReport
from upslope.train.language.frozen import HELD_OUT_PAIRS, Frozen, read_pairs, reward_pool
from upslope.train.prepare import threads
from upslope.train.run_directory import RunDirectory
from upslope.train.saving import load_language


def evaluate_language_run(
    directory: str | Path,
    *,
    prompts: int = 1024,
    samples: int = 4,
    pass_at: tuple[int, ...] = (1, 4),
    seed: int = 0,
    best: bool = False,
    task: Task | None = None,
) -> LanguageReport:
    """Judge the policy a run of a language model saved, on the held-out examples of its task.

    Args:
        directory: of the run.
        prompts: how many of them at most, the first ones.
        samples: completions drawn per prompt, beside the likeliest.
        pass_at: each k of pass@k.
        seed: decides what is drawn.
        best: take the policy that was best in evaluation instead of the latest.
        task: as given to `train`, or another one to judge by.

    Raises:
        ConfigError: if there is no run there.
        UsageError: if it is no language model's, the policy is missing or damaged, or the task has to be passed.
    """
    opened = RunDirectory.view(Path(directory))
    run = read_run(opened.path)
    if not isinstance(run, LanguageRun):
        raise UsageError(f"{directory} is an agent's run: upslope.evaluate_run judges it")
    with checking_usage(), threads(run.threads):
        settings = replace(run.evaluation, times=1, prompts=prompts, samples=samples, pass_at=pass_at)
        run = replace(run, seed=seed, evaluation=settings)
        task = run.task.build(seed) if task is None else task
        policy = load_language(opened.best if best else opened.policy).to(run.device)
        place = opened.pairs(HELD_OUT_PAIRS)
        frozen = Frozen(
            task=task,
            policy=policy,
            reference=None,
            rewards=reward_pool(run, task),
            pairs={HELD_OUT_PAIRS: read_pairs(place, policy.tokenizer)} if place.is_file() else {},
            hashes={},
        )
        try:
            return LanguageEvaluator(run, frozen, None).evaluate(policy, index=0, final=True)
        finally:
            if frozen.rewards is not None:
                frozen.rewards.close()

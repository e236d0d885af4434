"""Complete, vetted configurations for a small transformer that learns to add: think or blurt, on two CPU cores.

Each begins with `arithmetic-sft`: three-digit sums, 70 % of the demonstrations answered outright and the others worked
on a scratchpad. What is rewarded for right answers alone then learns to think first.
"""

from __future__ import annotations

from dataclasses import replace

from upslope.algorithms import GRPO, PPO, RLOO, Preference, Reinforce
from upslope.collect.experience import CompletionConfig, OverlongPenalty, PairConfig
from upslope.collect.tasks.arithmetic import ThinkOrBlurt
from upslope.recipes.small_models import imitation, rewarded
from upslope.train import OptimizerConfig
from upslope.train.language import LanguageEvaluationConfig, LanguageLogConfig, LanguageRun

_LIMIT = 48
"""Tokens: the longest scratchpad with its answer and the end takes 30."""
_START = "arithmetic-sft"
_EVALUATION = LanguageEvaluationConfig(times=5, prompts=256, samples=4, pass_at=(4,), limit=_LIMIT)


def arithmetic_sft() -> LanguageRun:
    """Demonstrations of three-digit addition, 70 % of them without a scratchpad: the start of the others."""
    return imitation(_START, ThinkOrBlurt(), steps=750, evaluation=replace(_EVALUATION, times=3))


def arithmetic_grpo() -> LanguageRun:
    """GRPO that divides neither by the group's standard deviation nor by lengths; two clipped steps per batch."""
    return rewarded("arithmetic-grpo", ThinkOrBlurt(), start=_START, limit=_LIMIT, steps=150, evaluation=_EVALUATION)


def _learning(name: str) -> LanguageRun:
    """The same, to be given another algorithm; those that take one step per batch bear a larger one."""
    run = arithmetic_grpo()
    return replace(run, recipe=name, algorithm=GRPO(), optimizer=replace(run.optimizer, learning_rate=5e-4))


def arithmetic_rloo() -> LanguageRun:
    """RLOO: the mean of the other completions is the baseline."""
    return replace(_learning("arithmetic-rloo"), algorithm=RLOO())


def arithmetic_reinforce() -> LanguageRun:
    """REINFORCE with advantages standardised over the batch (REINFORCE++ without its KL)."""
    return replace(
        _learning("arithmetic-reinforce"), algorithm=Reinforce(psi="reward_to_go", gamma=1.0, normalize_advantage=True)
    )


def arithmetic_dr_grpo() -> LanguageRun:
    """Dr. GRPO (Liu et al. 2025): no division by the standard deviation or by the length."""
    algorithm = GRPO(scale="none", reduction="fixed_length", fixed_length=_LIMIT)
    return replace(_learning("arithmetic-dr-grpo"), algorithm=algorithm)


def arithmetic_dapo() -> LanguageRun:
    """DAPO (Yu et al. 2025): clip-higher, the mean over all steps, dead groups replaced."""
    run = _learning("arithmetic-dapo")
    return replace(
        run,
        experience=replace(run.experience, refill=2),
        algorithm=GRPO(clip_low=0.2, clip_high=0.28, reduction="step_mean", minibatches=2),
    )


def arithmetic_gspo() -> LanguageRun:
    """GSPO (Zheng et al. 2025): one ratio per completion, two optimiser steps per batch."""
    algorithm = GRPO(ratio="sequence", clip_low=3e-4, clip_high=4e-4, minibatches=2)
    return replace(_learning("arithmetic-gspo"), algorithm=algorithm)


def arithmetic_ppo() -> LanguageRun:
    """PPO with a critic and GAE on tokens; completions near the limit are punished.

    PPO takes a limit as a cut and goes on with what the critic says of the last token: without the punishment, never
    ending is worth as much as a right answer, and the policy learns just that.
    """
    run = _learning("arithmetic-ppo")
    return replace(
        run,
        model=replace(run.model, value_head=True),
        experience=CompletionConfig(prompts=256, group=1, limit=_LIMIT, overlong=OverlongPenalty(buffer=12)),
        algorithm=PPO(gamma=1.0, gae_lambda=1.0, epochs=1, minibatches=2),
        optimizer=replace(run.optimizer, learning_rate=4e-4),
        steps=120,
    )


def arithmetic_dpo() -> LanguageRun:
    """DPO on right and wrong answers of the starting policy, with an NLL term on the right ones.

    Without that term and a learning rate that ends at 0 the right answers become less likely, too, and drawn answers
    are right less often; a large one holds the policy to the style it begins with.
    """
    return LanguageRun(
        recipe="arithmetic-dpo",
        start_from=_START,
        task=ThinkOrBlurt(),
        experience=PairConfig(pairs=64, drawn=1600, group=8, limit=_LIMIT),
        algorithm=Preference(beta=0.1, nll_coefficient=0.05),
        reference="start",
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="linear", max_gradient_norm=1.0, epsilon=1e-8),
        evaluation=_EVALUATION,
        log=LanguageLogConfig(every_steps=1, diagnose_every=0),
        steps=160,
        threads=1,
    )

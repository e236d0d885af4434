"""The exact estimator of a run in words: the algorithm's own, and what else of the configuration changes it."""

from __future__ import annotations

import math

from upslope.collect.given_data import RecordedConfig
from upslope.policies.config import MemoryConfig
from upslope.train.config import Run
from upslope.train.language.config import LanguageRun
from upslope.train.language.describe import describe_language_run


def describe_run(run: Run | LanguageRun) -> dict[str, str]:
    """What `describe()` of the algorithm says, and a row for each other setting that changes the estimate.

    Args:
        run: the configuration.
    """
    if isinstance(run, LanguageRun):
        return describe_language_run(run)
    rows = dict(run.algorithm.describe())
    if run.acting.group_size is not None:
        rows["groups"] = (
            f"{run.acting.group_size} episodes from one start, by {run.acting.group_start}; the world's random numbers "
            "are common to them"
        )
    if run.environment.truncation == "as_termination":
        rows["time limits"] = "counted as terminations: no value beyond them, which is biased (for comparison only)"
    if run.shaping is not None:
        rows["shaping"] = (
            f"learnt from r + {run.shaping.scale:g} x (gamma Phi(s') - Phi(s)), Phi = {run.shaping.potential}, 0 after "
            "termination; the optimal policies stay what they are"
        )
    rows |= _acting(run)
    if run.environment.action_mask != "none":
        rows["invalid actions"] = (
            f"probability 0, by the masks of the environment's {run.environment.action_mask}, when acting and learning"
        )
    if run.policy.memory is not None:
        rows["memory"] = _memory(run.policy.memory, critic=run.policy.critic)
    if run.policy.normalize_reward:
        rows["rewards"] = (
            f"divided by the running standard deviation of the return discounted with gamma={run.algorithm.gamma}, "
            f"then {_clipped(run.policy.reward_clip)}"
        )
    if run.policy.normalize_observation:
        rows["observations"] = (
            "shifted and scaled by their running mean and standard deviation, then "
            f"{_clipped(run.policy.observation_clip)}"
        )
    return rows


def _acting(run: Run) -> dict[str, str]:
    """Who acts, where it is not the policy that learns, and how many rollouts are learnt from together."""
    rows: dict[str, str] = {}
    if run.weighs_recorded and isinstance(run.rollout, RecordedConfig):
        rows["who acts"] = f"whoever was recorded in {run.rollout.file}, with the log-probs written there"
    if run.acting.lag:
        rows["who acts"] = f"the policy as it was {run.acting.lag} updates ago"
    if run.acting.behaviour is not None:
        rows["who acts"] = f"another policy throughout: {run.acting.behaviour}"
    if run.acting.batches > 1:
        rows["data"] = f"the rollouts of the last {run.acting.batches} updates together"
    return rows


def _memory(memory: MemoryConfig, *, critic: bool) -> str:
    """What is remembered, and how far gradients go back through it."""
    kinds = {"gru": "gated recurrent units", "lstm": "units of long short-term memory"}
    what = (
        f"the last {memory.context} steps, by a transformer of {memory.size} features"
        if memory.kind == "transformer"
        else f"{memory.size} {kinds[memory.kind]}"
    )
    layers = "1 layer" if memory.layers == 1 else f"{memory.layers} layers"
    whose = "" if not critic else ", one for actor and critic" if memory.shared else ", one each for actor and critic"
    return f"{what}, {layers}{whose}; gradients go back to the start of a row, whose memory is held fixed"


def _clipped(limit: float) -> str:
    return "not clipped" if math.isinf(limit) else f"clipped to [-{limit:g}, {limit:g}]"

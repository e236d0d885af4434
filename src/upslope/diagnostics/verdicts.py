"""From figures to words: what is wrong with a run, the number that says so, and what to do about it.

A verdict needs the same sign in most of the last records, so that a bad moment is no verdict.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Level: TypeAlias = Literal["warning", "hint"]
"""A warning: the run does not do what it should. A hint: it does, but could do it with less."""

LAST = 10
"""Records that a verdict looks back on."""
_ENOUGH = 5
"""Records without which there is no verdict."""
_MOST = 0.8
"""The share of them that must show it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Something to be said about a run.

    Attributes:
        level: how bad it is.
        name: of the rule.
        text: what is wrong, the number, and what to do.
    """

    level: Level
    name: str
    text: str


class Watch:
    """Reads the training records of one run as they come."""

    def __init__(self) -> None:
        self._recent = {name: deque[float](maxlen=LAST) for name in _WATCHED}
        self._greatest_variance = 0.0
        self._looks = 0
        self._anything_to_learn = False
        self.decided_early = False
        """Whether the policy had stopped exploring before half of the run."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in the next record of metrics.jsonl; kinds other than "train" and figures that are text are passed over.

        A record need not have every figure.
        """
        if record.get("kind") != "train":
            return
        for name, values in self._recent.items():
            value = record.get(name)
            if isinstance(value, int | float) and (name == _NORM or not math.isnan(value)):
                values.append(float(value))
        variances = self.values(_VARIANCE)
        if len(variances) >= _ENOUGH:
            self._greatest_variance = max(self._greatest_variance, statistics.median(variances))
        shares = self.values("entropy_share")[-_ENOUGH:]
        if len(shares) == _ENOUGH and max(shares) < _DECIDED and self.latest("progress") < 0.5:
            self.decided_early = True
        if "reward_deviation" in record and "termination_share" in record:
            self._looks += 1
            if record["reward_deviation"] != 0.0 or record["termination_share"] != 0.0:
                self._anything_to_learn = True

    def verdicts(self) -> list[Verdict]:
        """What is to be said now; hints only where there is no warning."""
        if self._looks >= LAST and not self._anything_to_learn:
            return [_NOTHING_TO_LEARN]
        found = [Verdict(level=rule.level, name=rule.name, text=text) for rule in RULES if (text := rule.apply(self))]
        warnings = [verdict for verdict in found if verdict.level == "warning"]
        return warnings or found

    def latest(self, name: str) -> float:
        """The newest value of a figure; 0 if it was never seen."""
        values = self._recent[name]
        return values[-1] if values else 0.0

    def values(self, name: str) -> tuple[float, ...]:
        """The last values of a figure, at most `LAST`."""
        return tuple(self._recent[name])

    @property
    def returns_vary(self) -> bool:
        """Whether returns differ within a batch by more than a trace of what they once differed by."""
        values = self.values(_VARIANCE)
        return len(values) >= _ENOUGH and statistics.median(values) > _TRACE * self._greatest_variance


def verdicts(history: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """What is to be said at the end of a history of records, oldest first, as in metrics.jsonl."""
    watch = Watch()
    for record in history:
        watch.add(record)
    return watch.verdicts()


def verdict_line(found: Iterable[Verdict]) -> str:
    """The warnings in one line; empty without any."""
    return " | ".join(verdict.text for verdict in found if verdict.level == "warning")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One row of the table.

    Attributes:
        name: of the verdict.
        level: of the verdict.
        figure: which of the records it looks at.
        wrong: which values of it are wrong.
        text: of the verdict; `{value}` stands for the median of the wrong values, `{times}` for 1 / value.
        only_if: what else must hold.
        enough: records that must show it, at least.
        most: the share of the last records that must show it.
    """

    name: str
    level: Level
    figure: str
    wrong: Callable[[float], bool]
    text: str
    only_if: Callable[[Watch], bool] | None = None
    enough: int = _ENOUGH
    most: float = _MOST

    def apply(self, watch: Watch) -> str | None:
        """The verdict's text, if it is one."""
        values = watch.values(self.figure)
        wrong = [value for value in values if self.wrong(value)]
        if len(wrong) < max(self.enough, self.most * len(values)):
            return None
        if self.only_if is not None and not self.only_if(watch):
            return None
        value = statistics.median(wrong)
        times = f"{1.0 / value:,.0f}" if value > 1e-3 else "over 1,000"
        return self.text.format(value=value, times=times)


_NORM = "gradient_norm"
_VARIANCE = "variance/reward_to_go"
_DECIDED = 0.02
"""The share of the greatest entropy below which a policy explores no more."""
_TRACE = 0.02
"""Returns whose variance fell to this share of the run's greatest hold nothing for a critic to explain."""


RULES: tuple[Rule, ...] = (
    Rule(
        name="gradient not finite",
        level="warning",
        figure=_NORM,
        wrong=lambda value: not math.isfinite(value),
        text="gradients are not finite: optimiser steps are skipped; lower the learning rate, and look for infinite or "
        "huge rewards and observations (policy.normalize_observation, policy.normalize_reward)",
        enough=2,
        most=0.0,
    ),
    Rule(
        name="ratio not 1",
        level="warning",
        figure="first_ratio_error",
        wrong=lambda value: value > 1e-2,
        text="acting and learning disagree: before the first step of an update the ratio is off 1 by {value:.2g}; the "
        "log-prob that is learnt from is not that of the distribution that acted (noise in the network, a normaliser "
        "or parameters that changed in between, another action than the one taken)",
    ),
    Rule(
        name="policy jumps",
        level="warning",
        figure="kl",
        wrong=lambda value: value > 0.05,
        text="the policy jumps: each update moves it by a KL of {value:.2g}, where 0.001 to 0.05 is usual; lower the "
        "learning rate or the number of epochs, or set target_kl",
        most=0.5,
    ),
    Rule(
        name="dead gradient",
        level="warning",
        figure="dead_gradient_share",
        wrong=lambda value: value > 0.3,
        text="{value:.0%} of the batch has no gradient: the steps are clipped or their advantage is exactly 0; lower "
        "the learning rate or the number of epochs, or widen the clip",
        only_if=lambda watch: watch.latest("dead_gradient_share") - watch.latest("zero_advantage_groups") > 0.3,
    ),
    Rule(
        name="few steps count",
        level="warning",
        figure="effective_sample_size",
        wrong=lambda value: value < 0.5,
        text="a few steps carry the update: the ratios leave {value:.0%} of the batch as effective sample size; fewer "
        "epochs or a lower learning rate keep the policy nearer to the one that acted",
    ),
    Rule(
        name="critic explains nothing",
        level="warning",
        figure="explained_variance",
        wrong=lambda value: value < 0.05,
        text="the critic explains nothing: explained variance {value:.2f}; give it more or larger steps "
        "(learning rate, epochs, updates), normalise rewards, or train without a critic",
        only_if=lambda watch: watch.returns_vary and watch.latest("progress") > 0.2,
        enough=8,
    ),
    Rule(
        name="exploration over",
        level="warning",
        figure="entropy_share",
        wrong=lambda value: value < _DECIDED,
        text="the policy stopped exploring before half of the run: its entropy is {value:.1%} of that of blind choice; "
        "set or raise entropy_coefficient, or lower the learning rate",
        only_if=lambda watch: watch.decided_early,
    ),
    Rule(
        name="groups without advantage",
        level="warning",
        figure="zero_advantage_groups",
        wrong=lambda value: value > 0.8,
        text="{value:.0%} of the groups teach nothing: all their members are rewarded alike; take prompts that are "
        "neither always nor never solved, or larger groups",
    ),
    Rule(
        name="chosen answers lost",
        level="hint",
        figure="chosen_log_ratio",
        wrong=lambda value: value < -1.0,
        text="chosen answers have a log-prob {value:.1f} beside that of the reference: pairs can be told apart ever "
        "better while the policy gets worse; hold its accuracy against that of the start, add nll_coefficient, or "
        "lower the learning rate",
    ),
    Rule(
        name="batch too small",
        level="hint",
        figure="gradient_snr",
        wrong=lambda value: value < 0.1,
        text="the batch is too small: the noise scale of the gradient is {times} times the steps of an update; collect "
        "more steps per update, or lower the learning rate",
        only_if=lambda watch: watch.returns_vary,
    ),
    Rule(
        name="batch too large",
        level="hint",
        figure="gradient_snr",
        wrong=lambda value: value > 50.0,
        text="the batch is larger than it need be: {value:.0f} times the steps at which signal and noise are equal; "
        "fewer steps per update would learn faster for the same experience",
        only_if=lambda watch: watch.returns_vary,
    ),
)
"""Every rule with its threshold, the most basic trouble first."""

_NOTHING_TO_LEARN = Verdict(
    level="warning",
    name="nothing to learn",
    text="there is nothing to learn from: in every batch looked at all rewards were equal and nothing terminated; "
    "check the reward, or explore more until something is found",
)
_WATCHED = ("progress", _VARIANCE, *dict.fromkeys(rule.figure for rule in RULES))

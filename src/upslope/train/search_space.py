"""Which settings of a recipe are searched, and among which values: `optimizer.learning_rate=1e-5..1e-2:log`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from upslope.errors import UsageError

if TYPE_CHECKING:
    from upslope.train.session import AnyRun

_LOG = ":log"
_OF_ALGORITHMS = {
    "clip": "0.1..0.4",
    "gae_lambda": "0.8..1.0",
    "entropy_coefficient": "1e-5..0.1:log",
    "beta": "0.01..1.0:log",
}
"""What is searched of an algorithm that has such a setting, if nothing else is said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Numbers between two others.

    Attributes:
        name: of the setting, with dots.
        low, high: the first and the last value.
        log: whether each factor, and not each difference, is as likely as another.
        whole: only whole numbers.
    """

    name: str
    low: float
    high: float
    log: bool
    whole: bool

    def suggest(self, trial: Any) -> str:
        """A value of a trial of Optuna, as it is written on the command line."""
        if self.whole:
            return str(trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log))
        return f"{trial.suggest_float(self.name, self.low, self.high, log=self.log):.6g}"

    def ends(self) -> tuple[str, ...]:
        """The values at the ends."""
        return (str(int(self.low)), str(int(self.high))) if self.whole else (f"{self.low:.6g}", f"{self.high:.6g}")

    def written(self) -> str:
        """The text that `searched` reads it from."""
        low, high = (int(self.low), int(self.high)) if self.whole else (self.low, self.high)
        return f"{self.name}={low}..{high}{_LOG if self.log else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of some values.

    Attributes:
        name: of the setting, with dots.
        values: as they are written on the command line.
    """

    name: str
    values: tuple[str, ...]

    def suggest(self, trial: Any) -> str:
        """A value of a trial of Optuna, as it is written on the command line."""
        return trial.suggest_categorical(self.name, list(self.values))

    def ends(self) -> tuple[str, ...]:
        """All of them."""
        return self.values

    def written(self) -> str:
        """The text that `searched` reads it from."""
        return f"{self.name}={','.join(self.values)}"


Searched: TypeAlias = Range | Choice
"""A setting that is searched."""


def searched(text: str) -> Searched:
    """`setting=low..high`, `setting=low..high:log` or `setting=a,b,c`.

    Raises:
        UsageError: it is none of these, or has no more than one value.
    """
    name, equals, values = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    if not name or not equals:
        raise UsageError(
            f"{text!r} says nothing to search: write setting=low..high, setting=low..high:log or setting=a,b,c, as in "
            "algorithm.gamma=0.9..0.999"
        )
    if ".." not in values:
        choices = tuple(dict.fromkeys(value.strip() for value in values.split(",")))
        if len(choices) < 2 or "" in choices:
            raise UsageError(f"{text!r} leaves no choice: give two values or more, as in rollout.steps=32,64,128")
        return Choice(name=name, values=choices)
    log = values.endswith(_LOG)
    ends = values.removesuffix(_LOG).split("..")
    try:
        low, high = (float(end) for end in ends)
    except ValueError:
        raise UsageError(f"{text!r}: a range has two numbers, as in 1e-5..1e-2:log") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (log and low <= 0.0):
        raise UsageError(
            f"{text!r}: a range goes from a smaller number to a larger one{', both above 0' if log else ''}; got "
            f"{low:g} and {high:g}"
        )
    whole = all(end.strip().lstrip("-").isdecimal() for end in ends)
    return Range(name=name, low=low, high=high, log=log, whole=whole)


def usual_space(run: AnyRun) -> tuple[Searched, ...]:
    """What is searched of a recipe if nothing is said: the learning rate a factor 10 about the recipe's own, the usual
    settings of its algorithm as far as it has them, and half and twice the steps of a rollout.

    Args:
        run: the recipe's configuration.
    """
    rate = run.optimizer.learning_rate
    space: list[Searched] = []
    if rate > 0.0:
        space.append(searched(f"optimizer.learning_rate={rate / 10.0:.3g}..{rate * 10.0:.3g}:log"))
    fields = {field.name for field in dataclasses.fields(run.algorithm)}
    for name, values in _OF_ALGORITHMS.items():
        if name in fields and isinstance(getattr(run.algorithm, name), float):
            space.append(searched(f"algorithm.{name}={values}"))
    rollout = getattr(run, "rollout", None)
    steps = getattr(rollout, "steps", None)
    rows = getattr(rollout, "row_steps", None) or 1
    if isinstance(steps, int) and steps > 1 and steps // 2 % rows == 0:
        space.append(searched(f"rollout.steps={steps // 2},{steps},{steps * 2}"))
    return tuple(space)


def as_settings(values: Sequence[tuple[str, str]]) -> list[str]:
    """Names and values as words of the command line; True and False become flags, a value of several words stays so."""
    words: list[str] = []
    for name, value in values:
        place, dot, last = name.rpartition(".")
        if value == "True":
            words.append(f"--{name}")
        elif value == "False":
            words.append(f"--{place}{dot}no_{last}")
        else:
            words += [f"--{name}", *value.split()]
    return words

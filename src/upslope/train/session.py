"""What the loop asks of a run in memory, whatever it trains: agents or language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from upslope.train.config import Run
from upslope.train.language.config import LanguageRun
from upslope.train.run_directory import RunDirectory
from upslope.trajectory import Tree

AnyRun: TypeAlias = Run | LanguageRun
"""The configuration of either kind of run."""


class ResumeError(RuntimeError):
    """A checkpoint that does not fit the run that wants to go on from it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Which figures of an update are shown while a run goes on.

    Attributes:
        shown: heading, metric and format, in their order.
        spoken: the metrics among them that a line of plain text has.
        unit: what the run counts its length in.
    """

    shown: tuple[tuple[str, str, str], ...]
    spoken: tuple[str, ...]
    unit: str


class Session(Protocol):
    """Everything of one run that moves, one update at a time, and as a tree that a checkpoint can hold."""

    @property
    def run(self) -> AnyRun:
        """The configuration, resolved."""
        ...

    @property
    def policy(self) -> Any:
        """What is trained, as it now stands."""
        ...

    @property
    def update(self) -> int:
        """Updates since the start of the run."""
        ...

    @property
    def steps(self) -> int:
        """How far the run is, in what `run.steps` counts."""
        ...

    @property
    def episodes(self) -> int:
        """Episodes that came to an end, or sequences learnt from."""
        ...

    @property
    def figures(self) -> Figures:
        """What is shown of an update."""
        ...

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """Errors of the outside world, after which what was learnt is still good and is saved."""
        ...

    def open(self, directory: RunDirectory, tell: Callable[[str], None], *, resumed: bool) -> None:
        """The run begins, or goes on after `load_state` if there was a checkpoint.

        Args:
            directory: where the session keeps files of its own, if it has any.
            tell: says something to the user.
            resumed: whether the run directory was there before.
        """
        ...

    def advance(self) -> dict[str, float]:
        """One update: collect and learn.

        Returns:
            Its metrics; `collect_seconds` and `learn_seconds` are among them.
        """
        ...

    def logged(self) -> None:
        """A line of metrics was written after the last update."""
        ...

    def state(self, *, collector: bool = True) -> Tree:
        """All of it, for a checkpoint.

        Args:
            collector: whether where experience comes from is part of it; not after it failed, so that it is made anew.
        """
        ...

    def load_state(self, tree: Tree) -> None:
        """Go on from `state()`.

        Raises:
            ResumeError: if it does not fit this run.
        """
        ...

    def save_policy(self, path: Path) -> None:
        """Write the policy as a folder, replacing an older one at one stroke.

        Raises:
            CheckpointError: if it cannot be written; the older one is untouched then.
        """
        ...

    def resume_command(self, directory: Path) -> list[str]:
        """The words of the command that goes on with the run."""
        ...

    def close(self) -> None:
        """Give back environments and processes."""
        ...


class Report(Protocol):
    """How good a policy was."""

    @property
    def score(self) -> float:
        """What the best policy has most of."""
        ...

    def record(self) -> Mapping[str, float | int]:
        """As metrics.jsonl keeps it."""
        ...


class Evaluator(Protocol):
    """Judges the policy of a run, drawing from streams of its own."""

    @property
    def times(self) -> int:
        """How often the policy is judged during the run, evenly spread."""
        ...

    @property
    def first(self) -> bool:
        """Whether the policy is judged before the first update, too."""
        ...

    @property
    def last(self) -> bool:
        """Whether it is judged at the end."""
        ...

    def evaluate(self, policy: Any, *, index: int, final: bool) -> Report:
        """Judge it.

        Args:
            policy: as it stands; left as it is.
            index: which evaluation of the run this is; decides what is drawn.
            final: whether it is the one at the end.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...

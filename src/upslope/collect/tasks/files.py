"""Tasks from data: JSON lines, CSV, Parquet, folders that `datasets` saved, and rows that a program holds."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, TypeAlias

from upslope.collect.rewards.functions import exact_match, last_number, math_verify
from upslope.collect.rewards.protocol import Reward, RewardFunction
from upslope.collect.tasks.generated import is_held_out
from upslope.collect.tasks.protocol import Example, Task
from upslope.collect.tasks.records import Records, Row, open_records
from upslope.collect.tasks.rows import RowFormat, texts
from upslope.errors import UsageError

BUILT_IN: Final[Mapping[str, tuple[RewardFunction, bool]]] = {
    "exact_match": (exact_match, True),
    "last_number": (last_number, True),
    "math_verify": (math_verify, False),
}
"""Reward functions by name, and whether they may be called inline: without a deadline."""

_logger = logging.getLogger(__name__)
_MOST_CHARACTERS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Examples from files or folders of saved datasets."""

    training: Path
    """A .jsonl, .ndjson, .json (one object per line), .csv, .parquet or .arrow file, or a folder saved by datasets."""
    held_out: Path | None = None
    """Data never trained on; None holds out a tenth of the training data, chosen by a hash of the prompt."""
    train_on_held_out: bool = False
    """Say so if `held_out` is to be the training data itself."""
    format: RowFormat = field(default_factory=RowFormat)
    """Which columns hold what."""
    rewards: tuple[str, ...] = ()
    """exact_match, last_number or math_verify (which read the column `answer`), path/to/file.py:function, or the
    address of an HTTP endpoint. None where data alone is learnt from and judged by: demonstrations, pairs."""
    weights: tuple[float, ...] = ()
    """Of the rewards, one each; none for 1 each."""
    correct: str | None = None
    """Name of the reward that is 1 for a right answer; None for the first."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion."""
    characters: bool = False
    """Collect the characters that occur, for a character tokenizer built here."""

    def __post_init__(self) -> None:
        """Refuse settings that go nowhere; a path may be given as text."""
        object.__setattr__(self, "training", Path(self.training))
        if self.held_out is not None:
            object.__setattr__(self, "held_out", Path(self.held_out))
        if self.held_out is not None and not self.train_on_held_out and self.held_out == self.training:
            raise ValueError(
                f"{str(self.training)!r} is given both to train on and to judge by: leave held_out away to hold out a "
                "tenth of it, or set train_on_held_out to True"
            )
        named_rewards(self.rewards, self.weights, self.correct)

    def build(self, seed: int) -> Task:
        """The task; files are read through once and checked. The seed decides nothing here.

        Raises:
            UsageError: naming file and line of what cannot be read, or if the two are one file under two names.
        """
        if self.held_out is not None and not self.train_on_held_out and _same_file(self.held_out, self.training):
            raise UsageError(
                f"{str(self.training)!r} and {str(self.held_out)!r} are the same file: leave held_out away, or set "
                "train_on_held_out to True"
            )
        rewards, correct = named_rewards(self.rewards, self.weights, self.correct)
        characters: set[str] | None = set() if self.characters else None
        check = _Check(self.format, characters)
        both = _split(self.training, check) if self.held_out is None else _two(self.training, self.held_out, check)
        return Task(
            name=self.training.stem,
            training=both[0],
            held_out=both[1],
            rewards=rewards,
            correct=correct,
            alphabet=None if characters is None else "".join(sorted(characters)),
            stop=self.stop,
        )


def task_from_rows(
    training: Iterable[Row],
    held_out: Iterable[Row],
    *,
    format: RowFormat | None = None,
    rewards: Sequence[Reward],
    correct: str | None = None,
    name: str = "rows",
    stop: tuple[str, ...] = (),
) -> Task:
    """A task from rows that a program holds: lists of mappings, a `datasets.Dataset`, a generator that ends.

    Args:
        training: mappings from column to value; they are gone through once and kept in memory.
        held_out: the same, to judge by.
        format: which columns hold what; None for prompts in the column "prompt" and nothing else.
        rewards: what a completion is worth; none where data alone is learnt from and judged by.
        correct: name of the reward that is 1 for a right answer; None for the first.
        name: as shown.
        stop: strings that end a completion.

    Raises:
        UsageError: naming the row that does not have the format, if there are no rows, or none of the rewards is
            `correct`.
    """
    if correct is not None and correct not in [reward.name for reward in rewards]:
        raise UsageError(f"one of the rewards must be {correct!r}")
    chosen = RowFormat() if format is None else format
    parts: list[tuple[Example, ...]] = []
    for part, rows in (("training", training), ("held_out", held_out)):
        parts.append(tuple(_example(chosen, row, f"{part} row {number}") for number, row in enumerate(rows)))
        if not parts[-1]:
            raise UsageError(f"{part} holds no rows")
    return Task(
        name=name,
        training=parts[0],
        held_out=parts[1],
        rewards=tuple(rewards),
        correct=_first_name(rewards) if correct is None else correct,
        stop=stop,
    )


def named_rewards(
    rewards: Sequence[str], weights: Sequence[float], correct: str | None
) -> tuple[tuple[Reward, ...], str]:
    """Rewards from names, paths and addresses, and the name of the one that counts as right.

    Raises:
        ValueError: if a name is unknown or comes twice, or weights do not fit.
    """
    if weights and len(weights) != len(rewards):
        raise ValueError(f"weights are one per reward: expected {len(rewards)}, got {len(weights)}")
    made = tuple(_reward(text, weight) for text, weight in zip(rewards, weights or (1.0,) * len(rewards), strict=True))
    names = [reward.name for reward in made]
    if len(set(names)) < len(names):
        raise ValueError(f"two rewards have one name: {', '.join(names)}")
    if correct is not None and correct not in names:
        raise ValueError(f"correct must name one of the rewards {', '.join(names) or '(none)'}, got {correct!r}")
    return made, _first_name(made) if correct is None else correct


def _first_name(rewards: Sequence[Reward]) -> str:
    """What counts as right where nothing else is said; empty where nothing is scored."""
    return rewards[0].name if rewards else ""


def _reward(text: str, weight: float) -> Reward:
    if text in BUILT_IN:
        function, inline = BUILT_IN[text]
        return Reward(name=text, function=function, weight=weight, inline=inline)
    if text.startswith(("http://", "https://")):
        return Reward(name=text.split("://", 1)[1].rstrip("/"), function=text, weight=weight)
    if ":" in text:
        return Reward(name=text.rpartition(":")[2], function=text, weight=weight)
    raise ValueError(
        f"there is no reward {text!r}: expected {', '.join(BUILT_IN)}, path/to/file.py:function or an http address"
    )


class RowExamples:
    """Some rows of a file as examples.

    Args:
        records: the rows.
        format: which columns hold what.
        chosen: indices of the rows; None for all.
    """

    def __init__(self, records: Records, format: RowFormat, chosen: Sequence[int] | None = None) -> None:
        self._records = records
        self._format = format
        self._chosen: Sequence[int] = range(len(records)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int, /) -> Example:
        if not 0 <= index < len(self._chosen):
            raise IndexError(f"there are {len(self._chosen)} examples, got index {index}")
        return self._format.example(self._records[self._chosen[index]])


_Parts: TypeAlias = tuple[RowExamples, RowExamples]


class _Check:
    """Goes over every row as a file is opened: the format, and the characters that occur.

    Args:
        format: which columns hold what.
        characters: collects those that occur; None for no matter which.
    """

    def __init__(self, format: RowFormat, characters: set[str] | None) -> None:
        self.format = format
        self.characters = characters

    def __call__(self, row: Row, where: str) -> str:
        """A text that rows with equal prompts share."""
        example = _example(self.format, row, where)
        if self.characters is not None:
            self.characters.update(*texts(example))
            if len(self.characters) > _MOST_CHARACTERS:
                raise UsageError(
                    f"{where}: more than {_MOST_CHARACTERS} different characters: set characters to False and give a "
                    "model with a tokenizer"
                )
        return repr(example.prompt)


def _two(training: Path, held_out: Path, check: _Check) -> _Parts:
    prompts: set[bytes] = set()
    repeated = 0

    def collect(row: Row, where: str) -> None:
        prompts.add(_hash(check(row, where)))

    def compare(row: Row, where: str) -> None:
        nonlocal repeated
        repeated += _hash(check(row, where)) in prompts

    judged = open_records(held_out, collect)
    trained = open_records(training, compare)
    if repeated:
        _logger.warning(
            "%d of %d prompts in %s are in %s, too: accuracy is partly measured on what was trained on",
            repeated,
            len(trained),
            training,
            held_out,
        )
    return RowExamples(trained, check.format), RowExamples(judged, check.format)


def _split(path: Path, check: _Check) -> _Parts:
    parts = array("Q"), array("Q")

    def choose(row: Row, where: str) -> None:
        parts[is_held_out(check(row, where))].append(len(parts[0]) + len(parts[1]))

    records = open_records(path, choose)
    if not parts[0] or not parts[1]:
        raise UsageError(
            f"{path} has too few different prompts to hold some out (a tenth, by a hash of the prompt): give held_out"
        )
    return RowExamples(records, check.format, parts[0]), RowExamples(records, check.format, parts[1])


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


def _example(format: RowFormat, row: Any, where: str) -> Example:
    if not isinstance(row, Mapping):
        raise UsageError(f"{where}: expected a mapping from columns to values, got a {type(row).__name__}")
    try:
        return format.example(row)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)

"""A pool of worker processes that score completions; what fails there is an outcome, never a number."""

from __future__ import annotations

import inspect
import math
import multiprocessing.util
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import TracebackType
from typing import Any

from upslope.collect.dialogue import Dialogue
from upslope.collect.rewards.calling import Accepted, call
from upslope.collect.rewards.dispatch import Batch, Dispatcher, check_columns
from upslope.collect.rewards.http import OUTAGE, check_address
from upslope.collect.rewards.processes import PATIENCE, end_workers, main_module_of, refuse_in_worker
from upslope.collect.rewards.protocol import Columns, Failed, NotApplicable, Outcome, Reply, Reward, Scores
from upslope.collect.rewards.splitting import score_in_parts
from upslope.errors import UsageError

LOAD_DEADLINE = 120.0
"""Seconds that a worker may take to start and to import a reward function, apart from its calls."""

RESERVED = ("prompts", "completions")

TURNS = "turns"
"""The argument with the policy's turns and the replies between them."""

REPLYING = "(replies)"
"""What the dialogue's function is called among the others."""


class RewardPool:
    """Scores completions with several reward functions, each call in a worker process with a hard deadline.

    A function is called by name, as TRL calls it: `function(prompts=[...], completions=[...], column=[...])` with
    lists of one length; the columns are those of the data, and a function without `**columns` gets only those that it
    names. Prompts and completions are plain text, as TRL gives them for prompts that are not conversational: a
    function that wants lists of messages must read the text instead. It returns one number or None ("not applicable")
    per completion, or is an `async def` that does.

    It should judge each completion by itself: a batch is split among the workers, and a call that raises, hangs or
    dies is tried again in up to eight parts, down to single completions, so that only those fail on which it does
    (`upslope.collect.rewards.splitting`). For that each function has the time of ten calls of the longest kind per
    batch (`upslope.collect.rewards.dispatch.RETRIES`); what is left then fails with its part. A call that returns
    another number of scores fails for all its completions: which score belongs to which is not known, and where one
    completion is asked about alone the number may be right by chance. An address that cannot be reached, or is
    overloaded, is asked again for `outage` seconds.

    Before each call in a worker Python's `random` is seeded from the completions, and strings hash alike in all
    workers. A file should import at its top what it needs: that counts as loading, which has a deadline of its own.
    What functions print goes to standard error. Inline functions run here, without a deadline.

    Args:
        rewards: the parts; at least one, with names of their own.
        workers: how many processes at most; they start with the first call and are used again.
        deadline: seconds that one call may take; a worker that takes longer is killed.
        load_deadline: seconds that starting a worker and importing a function may take.
        outage: seconds for which an address that does not serve is asked again, beside the deadline.
        dialogue: what answers the policy's turns, called in the same way; None where nothing does.

    Raises:
        UsageError: if a reward or the dialogue cannot be used as given.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        workers: int,
        deadline: float,
        load_deadline: float = LOAD_DEADLINE,
        outage: float = OUTAGE,
        dialogue: Dialogue | None = None,
    ) -> None:
        refuse_in_worker()
        if workers < 1:
            raise UsageError(f"workers must be at least 1, got {workers}")
        for name, seconds in (("deadline", deadline), ("load_deadline", load_deadline)):
            if not 0 < seconds < math.inf:
                raise UsageError(f"{name} must be a positive number of seconds, got {seconds}")
        if not 0 <= outage < math.inf:
            raise UsageError(f"outage must be a number of seconds of at least 0, got {outage}")
        self.rewards = tuple(rewards)
        check_rewards(self.rewards)
        given: dict[str, tuple[str, Callable[..., Any] | str, bool]] = {
            r.name: (f"reward {r.name!r}", r.function, r.inline) for r in self.rewards
        }
        if dialogue is not None:
            given[REPLYING] = "what answers the policy's turns", dialogue.reply, dialogue.inline
        self._inline = {name: _inline(what, function) for name, (what, function, inline) in given.items() if inline}
        packed = {name: _sendable(what, function) for name, (what, function, inline) in given.items() if not inline}
        self._replies = dialogue is not None
        self._deadline = deadline
        self._lock = threading.Lock()
        self._dispatcher = Dispatcher(
            functions={name: function for name, (function, _) in packed.items()},
            count=workers,
            deadline=deadline,
            load_deadline=load_deadline,
            outage=outage,
            main_module=main_module_of([data for _, data in packed.values()]),
            replying=REPLYING if REPLYING in packed else None,
        )
        processes = self._dispatcher.workers
        self._finalizer = multiprocessing.util.Finalize(self, end_workers, args=(processes,), exitpriority=100)

    def score(self, prompts: Sequence[str], completions: Sequence[str], columns: Columns) -> Scores:
        """What these completions are worth.

        Args:
            prompts: `[n]` texts.
            completions: `[n]` texts.
            columns: `[n]` mappings, what else the data says about each; a missing value is None.

        Returns:
            Per completion `total = sum_k weight_k score_k` over the parts that apply, None if one failed or none
            applies; and all parts.

        Raises:
            ValueError: if the lengths differ.
            UsageError: if a function needs a column that the data does not have, or cannot be loaded at all.
        """
        batch = _batch(prompts, completions, columns)
        with self._lock:
            parts = {r.name: self._call_inline(r.name, f"reward {r.name!r}", batch) for r in self.rewards if r.inline}
            if len(parts) < len(self.rewards):
                parts.update(self._dispatcher.score(batch))
        ordered = {reward.name: tuple(parts[reward.name]) for reward in self.rewards}
        return Scores(total=totals(self.rewards, ordered, len(completions)), parts=ordered)

    def reply(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        turns: Sequence[Sequence[str]],
        columns: Columns,
    ) -> list[Reply]:
        """What the dialogue answers in these conversations.

        Args:
            prompts: `[n]` texts.
            completions: `[n]` texts, everything after the prompt so far.
            turns: `[n]` lists, the same as the policy's turns and the replies between them.
            columns: `[n]` mappings, as in `score`.

        Returns:
            Per conversation a text, "not applicable" where it is over, or why the call failed.

        Raises:
            ValueError: if the lengths differ, or the pool was made without a dialogue.
            UsageError: as `score`.
        """
        if not self._replies:
            raise ValueError("this pool was made without a dialogue: RewardPool(..., dialogue=task.dialogue)")
        if len(turns) != len(prompts):
            raise ValueError(f"got the turns of {len(turns)} conversations for {len(prompts)} prompts")
        batch = _batch(prompts, completions, columns)
        if TURNS in batch.columns:
            raise UsageError(f"the data has a column {TURNS!r}, as what answers the policy gets its turns; rename it")
        batch = replace(batch, columns={**batch.columns, TURNS: [list(said) for said in turns]})
        with self._lock:
            if REPLYING in self._inline:
                return self._call_inline(REPLYING, "what answers the policy's turns", batch)
            return self._dispatcher.reply(batch)

    def _call_inline(self, name: str, what: str, batch: Batch) -> list[Any]:
        function, accepted = self._inline[name]
        check_columns(what, accepted, batch.columns)

        def attempt(rows: range) -> list[Any]:
            part = {column: [values[row] for row in rows] for column, values in batch.columns.items()}
            chosen = [batch.prompts[row] for row in rows], [batch.completions[row] for row in rows]
            return call(function, accepted, *chosen, part, texts=name == REPLYING)

        return score_in_parts(attempt, len(batch.completions), budget=self._deadline)

    def close(self) -> None:
        """End all workers; another call of `score` would start new ones."""
        end_workers(self._dispatcher.workers, PATIENCE)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_rewards(rewards: Sequence[Reward]) -> None:
    """Refuse what cannot be summed.

    Raises:
        UsageError: if there is none, two have one name, or a weight is not finite.
    """
    names = [reward.name for reward in rewards]
    if not names:
        raise UsageError("give at least one reward")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"rewards must have names of their own, got {', '.join(twice)} more than once")
    for reward in rewards:
        if not math.isfinite(reward.weight):
            raise UsageError(f"the weight of reward {reward.name!r} must be a finite number, got {reward.weight}")
        if not isinstance(reward.function, str) and not callable(reward.function):
            raise UsageError(
                f"reward {reward.name!r} is {type(reward.function).__name__}; give a function, "
                "path/to/file.py:function or an http:// address"
            )


def _inline(what: str, function: Callable[..., Any] | str) -> tuple[Callable[..., Any], Accepted]:
    if isinstance(function, str) or inspect.iscoroutinefunction(function):
        raise UsageError(f"{what} is inline: give a plain function, or leave inline out")
    try:
        return function, Accepted.of(function)
    except ValueError as error:
        raise UsageError(f"{what}: {error}") from error


def _sendable(what: str, function: Callable[..., Any] | str) -> tuple[Any, bytes]:
    """What a worker is told, so that it finds the function, and the same as bytes."""
    if isinstance(function, str):
        return _place(what, function), b""
    try:
        return function, bytes(ForkingPickler.dumps(function))
    except Exception as error:
        raise UsageError(
            f"{what} cannot be sent to a worker process: {error}. Lambdas and functions within "
            "functions cannot; put it into a file and give path/to/file.py:function"
        ) from error


def _place(what: str, given: str) -> str:
    if "://" in given:
        check_address(given)
        return given
    file, colon, function = given.rpartition(":")
    if not (colon and file and function):
        raise UsageError(f"{what} is {given!r}; give path/to/file.py:function or an http:// address")
    if not Path(file).is_file():
        raise UsageError(f"{what}: there is no file {file!r}")
    return f"{Path(file).resolve()}:{function}"


def _batch(prompts: Sequence[str], completions: Sequence[str], columns: Columns) -> Batch:
    if not len(prompts) == len(completions) == len(columns):
        raise ValueError(
            "prompts, completions and columns must have one length, got "
            f"{len(prompts)}, {len(completions)} and {len(columns)}"
        )
    return Batch(prompts=prompts, completions=completions, columns=transpose(columns))


def transpose(columns: Columns) -> dict[str, list[Any]]:
    """The columns by name, None where a line has no value.

    Raises:
        UsageError: if a column has the name of an argument that every reward function may have.
    """
    names = dict.fromkeys(name for line in columns for name in line)
    for name in RESERVED:
        if name in names:
            raise UsageError(f"the data has a column {name!r}, as reward functions' own argument is called; rename it")
    return {name: [line.get(name) for line in columns] for name in names}


def totals(rewards: Sequence[Reward], parts: Mapping[str, Sequence[Outcome]], count: int) -> tuple[float | None, ...]:
    """Per completion the weighted sum of the scores that apply; None where a part failed or none applies."""
    return tuple(_total([(reward.weight, parts[reward.name][row]) for reward in rewards]) for row in range(count))


def _total(weighted: Sequence[tuple[float, Outcome]]) -> float | None:
    scores = [weight * outcome for weight, outcome in weighted if not isinstance(outcome, Failed | NotApplicable)]
    if not scores or any(isinstance(outcome, Failed) for _, outcome in weighted):
        return None
    return math.fsum(scores)

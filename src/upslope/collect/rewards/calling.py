"""One call of a reward function, and what became of it. Standard library only: worker processes import this."""

from __future__ import annotations

import asyncio
import inspect
import math
import random
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, SupportsFloat

from upslope.collect.rewards.protocol import NOT_APPLICABLE, Failed, Outcome, Reply

LONGEST_REASON = 500
_NOT_SCORES = (str, bytes, Mapping)
_INDEXED = ("string indices must be integers", "string index out of range")
_TEXTS = "; completions and prompts are texts here, of messages too: take completion, not completion[0]['content']"


class CallError(Exception):
    """A call that gave no scores at all.

    Attributes:
        divisible: whether the same call with fewer completions may succeed.
    """

    def __init__(self, reason: str, *, divisible: bool = True) -> None:
        super().__init__(shorten(reason))
        self.divisible = divisible


class IndivisibleError(Exception):
    """Raised by a reward function that cannot score anything now: fewer completions would not help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """The arguments that a reward function takes by name.

    Attributes:
        names: those it names; None if it takes all, as `**columns`.
        required: those without a default.
    """

    names: frozenset[str] | None
    required: frozenset[str]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Accepted:
        """What a function takes.

        Raises:
            ValueError: if it has an argument that cannot be given by name.
        """
        names, required, everything = set[str](), set[str](), False
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                everything = True
            elif parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
                raise ValueError(
                    f"its argument {parameter.name!r} cannot be given by name; a reward function is called as "
                    "f(prompts=..., completions=..., column=...)"
                )
            elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                names.add(parameter.name)
                if parameter.default is parameter.empty:
                    required.add(parameter.name)
        return cls(names=None if everything else frozenset(names), required=frozenset(required))

    def choose(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """Those of the columns that it takes."""
        return {name: values for name, values in columns.items() if self.names is None or name in self.names}

    def missing(self, columns: Iterable[str]) -> list[str]:
        """What it cannot do without and does not get."""
        return sorted(self.required - {"prompts", "completions", *columns})


def call(
    function: Callable[..., Any],
    accepted: Accepted,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    *,
    texts: bool,
    runner: asyncio.Runner | None = None,
) -> list[Any]:
    """Call a reward function once and judge what it returns.

    Args:
        function: called as `function(prompts=..., completions=..., **columns)` with the arguments it accepts.
        accepted: the arguments that it accepts.
        prompts: `[n]`.
        completions: `[n]`.
        columns: by name `[n]` values.
        texts: whether it returns replies instead of scores.
        runner: the event loop for a function that returns an awaitable; one of its own if None.

    Returns:
        One outcome per completion, or one reply.

    Raises:
        CallError: if the function raised, or returned anything but `n` scores or replies.
    """
    arguments = accepted.choose({**columns, "prompts": list(prompts), "completions": list(completions)})
    try:
        returned = function(**arguments)
        if inspect.isawaitable(returned):
            returned = _finish(returned, runner)
        return judge(returned, len(completions), texts=texts)
    except CallError:
        raise
    except IndivisibleError as error:
        raise CallError(str(error), divisible=False) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reason = f"it raised {describe(error)}"
        if any(part in reason for part in _INDEXED):
            reason = f"{shorten(reason, LONGEST_REASON - len(_TEXTS))}{_TEXTS}"
        raise CallError(reason) from error


def _finish(awaitable: Any, runner: asyncio.Runner | None) -> Any:
    async def wait() -> Any:
        return await awaitable

    if runner is not None:
        return runner.run(wait())
    with asyncio.Runner() as own:
        return own.run(wait())


def judge(returned: Any, count: int, *, texts: bool) -> list[Any]:
    """What was returned as one outcome per completion, or one reply.

    Raises:
        CallError: if it is not a sequence; or, indivisible, if it has another length: a function that always returns
            one score, say, would seem to be right where it is asked about a single completion.
    """
    wanted = "replies" if texts else "scores"
    if isinstance(returned, _NOT_SCORES) or not isinstance(returned, Iterable):
        raise CallError(f"it returned {_kind(returned)} instead of a list of {count} {wanted}")
    answers = list(islice(returned, count + 1))
    if len(answers) != count:
        found = "more" if len(answers) > count else str(len(answers))
        raise CallError(f"it returned {found} {wanted} for {count} completions", divisible=False)
    return [judge_reply(answer) if texts else judge_score(answer) for answer in answers]


def judge_reply(reply: Any) -> Reply:
    """One reply: a text, or None where there is nothing to say; anything else has failed."""
    if reply is None:
        return NOT_APPLICABLE
    return reply if isinstance(reply, str) else Failed(f"it returned {_kind(reply)} instead of a text or None")


def judge_score(score: Any) -> Outcome:
    """One score as an outcome: None is "not applicable"; what is no finite number has failed."""
    if score is None:
        return NOT_APPLICABLE
    if not isinstance(score, SupportsFloat):
        return Failed(f"it returned {_kind(score)} instead of a number or None")
    try:
        value = float(score)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        return Failed(shorten(f"it returned {_kind(score)} that is no number: {error}"))
    return value if math.isfinite(value) else Failed(f"it returned {value}")


def _kind(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def describe(error: BaseException) -> str:
    """The error in one line, with the last place in the user's own code."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 (an error that cannot say what it is)
        text = ""
    return shorten(f"{type(error).__name__}{': ' if text else ''}{shorten(text, 300)}{_place(error.__traceback__)}")


def _place(trace: TracebackType | None) -> str:
    frames = [frame for frame in traceback.extract_tb(trace) if frame.filename != __file__]
    own = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    if not frames:
        return ""
    frame = (own or frames)[-1]
    return f" ({frame.filename}:{frame.lineno}, in {frame.name}: {shorten(frame.line or '', 100)})"


def shorten(text: str, limit: int = LONGEST_REASON) -> str:
    """At most so many characters, in one line."""
    text = " ".join(text[: 4 * limit].split())
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def seed_from(completions: Sequence[str]) -> None:
    """Random numbers of a function then depend on what it scores, and not on which worker does."""
    random.seed("\0".join(completions))

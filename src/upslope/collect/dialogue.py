"""What answers the policy's turns: a tool, a game, anything that writes text."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

ReplyFunction: TypeAlias = Callable[..., "Sequence[str | None] | Awaitable[Sequence[str | None]]"]
"""`function(prompts, completions, turns, **columns) -> list of text or None`, plain or async."""


TOOL: Final = "tool"
"""The role of replies under a chat template, where a task does not say another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialogue:
    """What a task answers when the policy has ended a turn, by an end token or a stop string of the task.

    `reply` is called as reward functions are, with lists of one length and only those arguments that it names:
    `prompts` (texts), `completions` (everything after the prompt so far), `turns` (the same as lists of texts: the
    policy's first turn, the reply to it, ..., the policy's last turn) and the columns of the data. It returns a text
    for each conversation, which is appended as it is, or None: the conversation is over. It keeps no state between
    calls: all that was said is in its arguments, calls are divided among processes, and one that fails is tried again
    in parts. What it raises on, or does not return from in time, is a failed sample and never a text.

    Attributes:
        reply: a function, or `path/to/file.py:function`.
        turns: most turns of the policy; a conversation that would need more is truncated.
        role: of the replies, where a chat template renders them.
        inline: called in this process, without a deadline: for the library's own functions that cannot hang.
    """

    reply: ReplyFunction | str
    turns: int
    role: str = TOOL
    inline: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        if self.turns < 1:
            raise ValueError(f"turns must be at least 1, got {self.turns}")
        if isinstance(self.reply, str) and "://" in self.reply:
            raise ValueError(f"reply is a function or path/to/file.py:function, got {self.reply!r}")

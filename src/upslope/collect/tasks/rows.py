"""Which columns of a data row are the prompt, the answer and the rest, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from upslope.collect.tasks.protocol import Example, Message

PLACE: Final = "{prompt}"
"""Where a template holds the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFormat:
    """Which columns hold what. Reward functions get every other column by its name, and the `answer`."""

    prompt: str = "prompt"
    """Column of the prompt: text, or a list of messages {"role": ..., "content": ...}. Of messages that end with the
    assistant's, the prompt is what stands before its first turn; the rest is the completion, in which all turns of the
    assistant are learnt and the others only read."""
    completion: str | None = None
    """Column of the answer to learn from (of a pair: the chosen one): text, or one message of the assistant."""
    rejected: str | None = None
    """Column of a pair's worse answer. Where there is no column of prompts and both answers are whole conversations,
    the prompt is the messages that they share, and each goes on with one message of the assistant."""
    label: str | None = None
    """Column that tells good answers (true, 1) from bad ones (false, 0), where they do not come in pairs."""
    answer: str | None = None
    """Column of the right answer, which reward functions get as `answer`."""
    answer_mark: str | None = None
    """The right answer is what follows the last of these marks in its column: #### in GSM8K. None takes all of it."""
    template: str = PLACE
    """What a plain prompt is set into, at {prompt}."""
    chat: bool = False
    """Give a plain prompt to the tokenizer's chat template as the user's message."""
    system: str | None = None
    """A system message before it (with `chat`)."""

    def __post_init__(self) -> None:
        """Refuse settings that go nowhere."""
        if PLACE not in self.template:
            raise ValueError(f"template must hold {PLACE}, got {self.template!r}")
        if self.system is not None and not self.chat:
            raise ValueError("a system message needs the chat template: set chat to True")
        if self.answer_mark is not None and (self.answer is None or not self.answer_mark):
            raise ValueError("answer_mark is a text in the column that `answer` names: set both")
        for name in ("rejected", "label"):
            if getattr(self, name) is not None and self.completion is None:
                raise ValueError(f"{name} needs the other answer, too: set completion")
        if self.rejected is not None and self.label is not None:
            raise ValueError("answers come in pairs (rejected) or one by one (label): set one of the two")

    def example(self, row: Mapping[str, Any]) -> Example:
        """The example that a row holds.

        Raises:
            ValueError: naming the column that is missing or holds something else.
        """
        if self.rejected is not None and self.prompt not in row:
            return self.example({**row, **self._parted(row)})
        prompt, said = self._prompt(_column(row, self.prompt))
        if said and self.completion is not None:
            raise ValueError(
                f"column {self.prompt!r} ends with the assistant's message, and there is a completion, too"
            )
        completion = "".join(content for _, content in said) if said else None
        columns = {
            name: value for name, value in row.items() if name not in (self.prompt, self.completion, self.rejected)
        }
        if self.answer is not None:
            columns["answer"] = self._answer(_column(row, self.answer))
        if self.label is not None:
            columns["label"] = _label(_column(row, self.label), self.label)
        return Example(
            prompt=prompt,
            completion=completion if self.completion is None else _text(_column(row, self.completion), self.completion),
            rejected=None if self.rejected is None else _text(_column(row, self.rejected), self.rejected),
            columns=columns,
            turns=tuple(content for _, content in said) if len(said) > 1 else None,
            roles=tuple(role for role, _ in said[1::2]) if len(said) > 1 else None,
        )

    def _prompt(self, value: Any) -> tuple[str | tuple[Message, ...], list[tuple[str, str]]]:
        """The prompt, and what follows it where its messages end with the assistant's: turn by turn."""
        if isinstance(value, str):
            text = self.template.replace(PLACE, value)
            if not text:
                raise ValueError(
                    f"column {self.prompt!r} is empty: the policy needs something to read before it chooses; begin "
                    "such prompts with a word, a newline or the name of the tokenizer's begin token (<s>, say)"
                )
            if not self.chat:
                return text, []
            before = [] if self.system is None else [Message(role="system", content=self.system)]
            return (*before, Message(role="user", content=text)), []
        turns = _turns(value, self.prompt)
        roles = [role for role, _ in turns]
        first = roles.index("assistant") if roles[-1] == "assistant" else len(turns)
        if not first:
            raise ValueError(f"column {self.prompt!r} holds an answer and no prompt before it")
        for number, role in enumerate(roles[first:]):
            if (role == "assistant") != (number % 2 == 0):
                raise ValueError(
                    f"column {self.prompt!r}: from the assistant's first message on, its messages and others take "
                    f"turns; got {', '.join(roles)}: join messages that follow one another into one"
                )
        return tuple(Message(role=role, content=content) for role, content in turns[:first]), turns[first:]

    def _parted(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of prompt and answers, of a pair of conversations with a shared beginning."""
        assert self.completion is not None
        assert self.rejected is not None
        names = (self.completion, self.rejected)
        pair = [_column(row, name) for name in names]
        if any(isinstance(value, str) for value in pair):
            raise ValueError(
                f"there is no column {self.prompt!r}, and {self.completion!r} and {self.rejected!r} are text: only "
                "conversations as lists of messages can be split where they part; write the prompt into a column of "
                "its own, or name its column (format.prompt)"
            )
        turns = [_turns(value, name) for name, value in zip(names, pair, strict=True)]
        shared = 0
        while shared + 1 < min(map(len, turns)) and turns[0][shared] == turns[1][shared]:
            shared += 1
        if not shared:
            raise ValueError(
                f"there is no column {self.prompt!r}, and {self.completion!r} and {self.rejected!r} have no first "
                "message in common: name the prompt's column (format.prompt)"
            )
        for name, each in zip(names, turns, strict=True):
            if len(each) != shared + 1 or each[-1][0] != "assistant":
                raise ValueError(
                    f"column {name!r} must go on with one message of the assistant after the {shared} messages that "
                    f"both answers share, got {', '.join(role for role, _ in each[shared:])}"
                )
        return {self.prompt: pair[0][:shared], **{name: each[-1][1] for name, each in zip(names, turns, strict=True)}}

    def _answer(self, value: Any) -> Any:
        if self.answer_mark is None:
            return value
        if not isinstance(value, str) or self.answer_mark not in value:
            raise ValueError(f"column {self.answer!r} must hold the mark {self.answer_mark!r}, got {_short(value)}")
        return value.rpartition(self.answer_mark)[2].strip()


def texts(example: Example) -> list[str]:
    """All that is written in an example."""
    prompt = example.prompt
    parts = [prompt] if isinstance(prompt, str) else [str(text) for message in prompt for text in message.values()]
    return [*parts, *(answer for answer in (example.completion, example.rejected) if answer is not None)]


def _column(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise ValueError(f"there is no column {name!r}; there are {', '.join(map(repr, row))}")
    return row[name]


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    turns = _turns(value, name)
    if len(turns) != 1 or turns[0][0] != "assistant":
        raise ValueError(f"column {name!r} must be text or one message of the assistant, got {_short(value)}")
    return turns[0][1]


def _turns(value: Any, name: str) -> list[tuple[str, str]]:
    """Who says what, turn by turn."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"column {name!r} must be text or a list of messages, got {_short(value)}")
    turns: list[tuple[str, str]] = []
    for message in value:
        plain = isinstance(message, Mapping) and set(message) == {"role", "content"}
        if not plain or not all(isinstance(part, str) for part in message.values()):
            raise ValueError(f'column {name!r}: a message has "role" and "content", both text; got {_short(message)}')
        turns.append((message["role"], message["content"]))
    return turns


_LABELS: Final[Mapping[Any, bool]] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


def _label(value: Any, name: str) -> bool:
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, str | bool | int | float) or key not in _LABELS:
        raise ValueError(f"column {name!r} must be true or false (or 1 or 0), got {_short(value)}")
    return _LABELS[key]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

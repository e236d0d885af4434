"""What a task is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

from upslope.collect.dialogue import Dialogue
from upslope.collect.rewards.protocol import Reward


class Message(TypedDict, total=False):
    """One turn of a conversation, as chat templates read it."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One line of data.

    Attributes:
        prompt: plain text, or messages for a chat template.
        completion: an answer to learn from (demonstrations, the chosen one of a pair); None where there is none.
        rejected: the worse answer of a pair; None where there is none.
        columns: whatever else the line holds; reward functions get it by name.
        turns: `completion` as a conversation: the policy's first turn, the reply to it, ..., the policy's last turn;
            joined they are the completion. None where it is a single turn. Replies are read and not learnt.
        roles: of the replies in `turns`, for the chat template; None for that of the task's dialogue.
    """

    prompt: str | tuple[Message, ...]
    completion: str | None = None
    rejected: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    turns: tuple[str, ...] | None = None
    roles: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse turns that are not those of the completion, and roles of no replies."""
        if self.turns is not None and (len(self.turns) % 2 == 0 or "".join(self.turns) != self.completion):
            raise ValueError(
                "turns are the policy's, the reply's, ..., the policy's and joined the completion, got "
                f"{len(self.turns)} turns {self.turns} of the completion {self.completion!r}"
            )
        if self.roles is not None and len(self.roles) != len((self.turns or ())[1::2]):
            raise ValueError(f"roles are one for each reply in turns, got {self.roles} for {self.turns}")


class Examples(Protocol):
    """Examples by index: item i is the same whenever it is asked for."""

    def __len__(self) -> int:
        """How many there are; a very large number where they are made on demand."""
        ...

    def __getitem__(self, index: int, /) -> Example:
        """The example at an index from 0 on."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Prompts to train on, prompts to judge by, and what their answers are worth.

    Attributes:
        name: as shown.
        training: examples to learn from.
        held_out: examples never trained on.
        rewards: what a completion is worth: the weighted sum of these.
        correct: the name of the reward that is 1 for a right answer: accuracy is its mean.
        alphabet: every character that texts may hold, for a character tokenizer; None where a tokenizer is given.
        stop: strings that end a completion, or a turn of it.
        dialogue: answers the policy's turns; None where a completion is a single turn.
    """

    name: str
    training: Examples
    held_out: Examples
    rewards: tuple[Reward, ...]
    correct: str
    alphabet: str | None = None
    stop: tuple[str, ...] = ()
    dialogue: Dialogue | None = None


class TaskConfig(Protocol):
    """A frozen dataclass of settings that builds a task."""

    def build(self, seed: int) -> Task:
        """The task; `seed` decides what is generated."""
        ...


Texts = Sequence[str]

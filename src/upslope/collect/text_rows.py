"""Prompts and answers as tokens, and tokens as the rows of a `Trajectory`.

One sequence per row, filled from the left. For the prompt (5, 6) and the answer (7, 8):

| position | 0 | 1 | 2 |
|---|---|---|---|
| `observation`: token read | 5 | 6 | 7 |
| `action`: token that follows | 6 | 7 | 8 |
| `mask`: the policy chose it | no | yes | yes |
| `time` | 0 | 0 | 1 |
| `reward` | 0 | 0 | r |

Positions after a row's end hold the end token in `observation` and `action` and nothing else. Tokens are what is
learnt from; text is only a view of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from upslope.collect.tasks.protocol import Example, Message
from upslope.errors import UsageError
from upslope.policies.language.tokenizer import Tokenizer
from upslope.trajectory import Trajectory

Tokens: TypeAlias = tuple[int, ...]

_REASONED = "</think>"
"""What ends the reasoning within a turn, where there is some."""

_ANSWER = "an answer stands here"
"""For the assistant's words where the chat template is rendered for what it writes after them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRow:
    """One sequence.

    Attributes:
        prompt: tokens that were given, at least one.
        answer: what followed, at least one token; the last one is chosen.
        chosen: per token of the answer, whether the policy chose it (False: a tool's output); None for all of them.
        log_prob: per token of the answer under the distribution that drew it; None where nobody sampled: NaN then.
        reward: of the whole sequence; finite.
        ended: whether the last token ended it; False: a limit cut it.
        hidden: learn nothing from it: no position is marked as chosen.
        prompt_chosen: learn the prompt's tokens, too, as if the policy had chosen all but the first.
    """

    prompt: Tokens
    answer: Tokens
    chosen: tuple[bool, ...] | None = None
    log_prob: tuple[float, ...] | None = None
    reward: float = 0.0
    ended: bool = True
    hidden: bool = False
    prompt_chosen: bool = False

    def __post_init__(self) -> None:
        """Refuse pieces that do not fit each other."""
        if not self.prompt or not self.answer:
            raise ValueError(
                f"a row needs a token to read and one to choose, got {len(self.prompt)} prompt tokens and "
                f"{len(self.answer)} answer tokens"
            )
        for name, given in (("chosen", self.chosen), ("log_prob", self.log_prob)):
            if given is not None and len(given) != len(self.answer):
                raise ValueError(f"{name} has {len(given)} entries for an answer of {len(self.answer)} tokens")
        if self.chosen is not None and not self.chosen[-1]:
            raise ValueError("a row ends with its last chosen token: leave out what follows it")


def build_rows(
    rows: Sequence[TokenRow], *, end_token: int, group: Sequence[int] | None = None, version: int = 0
) -> Trajectory:
    """The trajectory of some sequences, [B, T] with T one less than the tokens of the longest.

    Args:
        rows: at least one.
        end_token: what stands after a row's end.
        group: per row, the label of those that share a prompt; None for no groups.
        version: the update that produced the policy that chose.

    Raises:
        ValueError: if there are no rows, a group label is missing, or a reward is not finite in float32.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    lengths = [len(row.prompt) + len(row.answer) for row in rows]
    count, width = len(rows), max(lengths)
    sequence = np.full((count, width), end_token, dtype=np.int64)
    chosen = np.zeros((count, width), dtype=bool)
    log_prob = np.zeros((count, width), dtype=np.float32)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        start = len(row.prompt)
        sequence[index, :start] = row.prompt
        sequence[index, start:length] = row.answer
        if row.hidden:
            continue
        chosen[index, 1:start] = row.prompt_chosen
        chosen[index, start:length] = True if row.chosen is None else row.chosen
        log_prob[index, 1:length] = np.nan
        if row.log_prob is not None:
            log_prob[index, start:length] = row.log_prob
    last = np.asarray(lengths) - 2
    place = np.arange(count)
    ended = np.asarray([row.ended for row in rows])
    observation, mask = sequence[:, :-1].copy(), chosen[:, 1:]
    observation[np.arange(width - 1) > last[:, None]] = end_token
    at_end = np.zeros((count, width - 1), dtype=bool)
    at_end[place, last] = True
    reward = np.zeros((count, width - 1), dtype=np.float32)
    with np.errstate(over="ignore"):
        reward[place, last] = [row.reward for row in rows]
    if not np.isfinite(reward).all():
        bad = int(np.flatnonzero(~np.isfinite(reward).all(axis=1))[0])
        raise ValueError(f"the reward of row {bad} is {rows[bad].reward}: every row needs a finite one")
    cut = place[~ended]
    return Trajectory(
        observation=torch.from_numpy(observation),
        action=torch.from_numpy(sequence[:, 1:].copy()),
        reward=torch.from_numpy(reward),
        terminated=torch.from_numpy(at_end & ended[:, None]),
        truncated=torch.from_numpy(at_end & ~ended[:, None]),
        mask=torch.from_numpy(mask.copy()),
        behaviour_log_prob=torch.from_numpy(np.where(mask, log_prob[:, 1:], np.float32(0.0))),
        time=torch.from_numpy(np.where(mask, mask.cumsum(axis=1) - 1, 0)),
        final_observation=torch.from_numpy(sequence[cut, last[cut] + 1]),
        final_index=torch.from_numpy(cut * (width - 1) + last[cut]),
        group=_labels(group, count),
        policy_version=version,
    )


def _labels(group: Sequence[int] | None, count: int) -> Tensor | None:
    if group is None:
        return None
    if len(group) != count:
        raise ValueError(f"{count} rows have {len(group)} group labels: give one for each")
    return torch.tensor(list(group), dtype=torch.int64)


def prompt_tokens(tokenizer: Tokenizer, example: Example, where: str) -> Tokens:
    """What the policy reads before it chooses: plain text encoded, or messages through the chat template.

    Args:
        tokenizer: whose tokens.
        example: whose prompt.
        where: its name, for the error.

    Raises:
        UsageError: if the tokenizer cannot write it down, it has no tokens, or the chat template drops a turn.
    """
    prompt = example.prompt
    with naming(where):
        tokens = tuple(tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else _rendered(tokenizer, prompt))
    if not tokens:
        raise UsageError(
            f"{where} has an empty prompt: the policy needs at least one token to read before it chooses; begin such "
            "prompts with a word, a newline or the tokenizer's begin token"
        )
    return tokens


def _rendered(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Messages through the chat template, every turn of them.

    Reasoning in earlier turns of the assistant, which some templates take out, may be missing: it is only read.
    """
    text = tokenizer.render_text(messages)
    for number, turn in enumerate(messages, start=1):
        content = turn.get("content")
        if isinstance(content, str) and content.split(_REASONED)[-1].strip() not in text:
            raise UsageError(
                f"the chat template drops or rewrites turn {number} ({turn.get('role')}): {content[:60]!r} is not in "
                f"{text[:200]!r}. Use a template that keeps every turn, or leave such turns out of the data"
            )
    return tokenizer.encode(text)


def answer_end(tokenizer: Tokenizer, prompt: str | tuple[Message, ...], where: str) -> int:
    """The token that ends an answer to a prompt: the one that the chat template writes after the assistant's words.

    For plain prompts, and for templates that write words or nothing there, it is the tokenizer's end token.

    Args:
        tokenizer: with the template.
        prompt: of the answer.
        where: its name, for errors.

    Raises:
        UsageError: if the template ends turns with a token that ends no completion, or leaves out the assistant's turn.
    """
    if isinstance(prompt, str):
        return tokenizer.end_token
    with naming(where):
        text = tokenizer.render_text([*prompt, Message(role="assistant", content=_ANSWER)], generation_prompt=False)
    _, shown, after = text.rpartition(_ANSWER)
    if not shown:
        raise UsageError(
            f"{where}: the chat template leaves out what the assistant says: it made {text[-200:]!r} of a conversation "
            "that ends with an answer. Use a template that keeps every turn"
        )
    names = {**tokenizer.backend.get_added_vocab(), **{tokenizer.pieces([token])[0]: token for token in tokenizer.end}}
    found = max((name for name in names if name and after.lstrip().startswith(name)), key=len, default=None)
    if found is None:
        return tokenizer.end_token
    if names[found] not in tokenizer.end:
        ends = ", ".join(map(repr, tokenizer.pieces(sorted(tokenizer.end))))
        raise UsageError(
            f"{where}: the chat template ends the assistant's turn with {found!r}, and completions end with {ends}: "
            f"what is learnt here would never end a turn. Set model.end_token to {found!r} (the others still end "
            "completions where the model's configuration names them)"
        )
    return names[found]


def answer_tokens(tokenizer: Tokenizer, text: str, where: str, *, ending: int) -> Tokens:
    """An answer to learn from, with an end token after it (once: not where the text ends with one already).

    Args:
        tokenizer: of the policy.
        text: of the answer.
        where: its name, for errors.
        ending: the end token, of `answer_end`.

    Raises:
        UsageError: if the tokenizer cannot write it down, or it goes on after an end token: no completion could.
    """
    with naming(where):
        tokens = tuple(tokenizer.encode(text))
    if tokens and tokens[-1] in tokenizer.end:
        tokens, ending = tokens[:-1], tokens[-1]
    inside = [place for place, token in enumerate(tokens) if token in tokenizer.end]
    if inside:
        name = tokenizer.pieces([tokens[inside[0]]])[0]
        raise UsageError(
            f"{where}: its answer goes on after the end token {name!r} (token {inside[0]} of the answer), "
            "which no completion can do: cut the answer there, or take that text out"
        )
    return (*tokens, ending)


def completion_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """A completion as text, without the end token where it has one."""
    ended = bool(tokens) and tokens[-1] in tokenizer.end
    return tokenizer.decode(list(tokens[:-1] if ended else tokens))


def check_length(row: TokenRow, context: int, where: str) -> None:
    """Refuse a row that the model cannot read; its last token is only chosen, never read.

    Raises:
        UsageError: naming the example.
    """
    needed = len(row.prompt) + len(row.answer) - 1
    if needed > context:
        raise UsageError(
            f"{where} has a prompt of {len(row.prompt)} tokens and an answer of {len(row.answer)}, and the model reads "
            f"at most {context}: leave it out, shorten it, or take a model with a longer context"
        )


def preview(trajectory: Trajectory, row: int, tokenizer: Tokenizer) -> str:
    """One row as people read it: its text, with every token that the policy chose in brackets, and its end.

    Args:
        trajectory: of language.
        row: which.
        tokenizer: that wrote it.
    """
    observation = trajectory.observation
    assert isinstance(observation, Tensor)
    ends = (trajectory.terminated[row] | trajectory.truncated[row]).nonzero().squeeze(-1)
    length = int(ends[-1]) + 1
    tokens = [int(observation[row, 0]), *trajectory.action[row, :length].tolist()]
    chosen = [False, *trajectory.mask[row, :length].tolist()]
    text = "".join(_shown(tokenizer, tokens, chosen))
    how = "ended" if bool(trajectory.terminated[row, length - 1]) else "cut by the limit"
    reward = float(trajectory.reward[row].sum())
    return (
        f"{len(tokens)} tokens, {sum(chosen)} of them learnt [in brackets], the others only read; {how}; "
        f"reward {reward:g}\n{text}"
    )


def _shown(tokenizer: Tokenizer, tokens: list[int], chosen: list[bool]) -> list[str]:
    """The pieces of a preview: runs that were given, decoded at once, and chosen tokens one by one."""
    shown: list[str] = []
    for learnt, run in groupby(zip(chosen, tokens, strict=True), key=lambda pair: pair[0]):
        ids = [token for _, token in run]
        if learnt:
            shown += [f"[{_visible(piece)}]" for piece in tokenizer.pieces(ids)]
        else:
            shown.append(_visible(tokenizer.decode(ids, special=True)))
    return shown


def _visible(text: str) -> str:
    """Text with its line breaks and tabs written out."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Say which example it was that could not be written down."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error

"""Conversations: the policy's turns and the replies to them, as tokens that are only ever appended.

The policy's tokens stay as it drew them. A reply is encoded by itself and appended; nothing that stands is encoded
again. So what the learner reads is, token by token, what the engine read when it drew the next turn.

| | `4` | `*` | `7` | `=` | `[` | `4` | `*` | `7` | `]` | `2` | `8` | `;` | `2` | `8` | end |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
| who | prompt | | | | policy | | | | | reply | | | policy | | |
| `chosen` | | | | | yes | yes | yes | yes | yes | no | no | no | yes | yes | yes |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from upslope.collect.dialogue import TOOL, Dialogue
from upslope.collect.engines.protocol import Completion, Engine, Request
from upslope.collect.errors import NonFiniteError
from upslope.collect.rewards.protocol import Columns, Failed, NotApplicable, Reply
from upslope.collect.tasks.protocol import Example, Message, Task
from upslope.collect.text_rows import (
    TokenRow,
    Tokens,
    answer_end,
    answer_tokens,
    completion_text,
    naming,
    prompt_tokens,
)
from upslope.errors import UsageError
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.tokenizer import Tokenizer

_STAND_IN: Final = "<think>\nreasoning\n</think>\n\nanswer"
"""For the policy's turns where a chat template is rendered for the replies: templates that take reasoning out show."""


class Replier(Protocol):
    """Who answers the policy's turns: the reward pool, which calls the task's dialogue."""

    def reply(
        self, prompts: Sequence[str], completions: Sequence[str], turns: Sequence[Sequence[str]], columns: Columns
    ) -> list[Reply]:
        """A text to append, "not applicable" where the conversation is over, or why it failed."""
        ...


@dataclass(kw_only=True, slots=True)
class _Conversation:
    """One sample as it grows: tokens are appended to these lists and never changed."""

    example: Example
    prompt: Tokens
    text: str
    key: tuple[int, ...]
    tokens: list[int] = field(default_factory=list[int])
    log_prob: list[float] = field(default_factory=list[float])
    chosen: list[bool] = field(default_factory=list[bool])
    said: list[str] = field(default_factory=list[str])
    version: int | None = None
    ended: bool = False
    failed: str | None = None

    @property
    def turns(self) -> int:
        """Of the policy."""
        return (len(self.said) + 1) // 2

    def request(self) -> Request:
        """The next turn, from a stream of its own; the first has that of a completion without replies."""
        key = (*self.key, self.turns) if self.turns else self.key
        return Request(prompt=(*self.prompt, *self.tokens), key=key)

    def hear(self, turn: Completion, room: int, tokenizer: Tokenizer) -> None:
        """What the policy said, up to `room` tokens."""
        tokens = turn.tokens[:room]
        self.tokens += tokens
        self.log_prob += turn.log_prob[:room]
        self.chosen += [True] * len(tokens)
        self.said.append(completion_text(tokenizer, tokens))
        self.version = turn.version if self.version is None else min(self.version, turn.version)
        self.ended = turn.ended and len(tokens) == len(turn.tokens)

    def append(self, reply: str, tokens: Sequence[int]) -> None:
        """What was answered."""
        self.tokens += tokens
        self.log_prob += [math.nan] * len(tokens)
        self.chosen += [False] * len(tokens)
        self.said.append(reply)

    def completion(self) -> Completion:
        """As it stands."""
        assert self.version is not None
        return Completion(
            tokens=tuple(self.tokens),
            log_prob=tuple(self.log_prob),
            ended=self.ended,
            version=self.version,
            chosen=None if all(self.chosen) else tuple(self.chosen),
            turns=self.turns,
            failed=self.failed,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversations:
    """Holds conversations of the policy with what answers it.

    All that go on are given to the engine together, turn by turn, each with everything said so far as its prompt.

    Attributes:
        dialogue: how often and in which role the policy is answered.
        replier: calls the dialogue's function.
        tokenizer: of the policy.
        engine: draws turns.
        sampling: how.
        limit: most tokens after the prompt, replies included; a conversation that reaches it is truncated, and so is
            one with no room for a reply and a token after it.
        context: most tokens that the model reads.
        stop: strings that end a turn.
    """

    dialogue: Dialogue
    replier: Replier
    tokenizer: Tokenizer
    engine: Engine
    sampling: Sampling
    limit: int
    context: int
    stop: tuple[str, ...]

    def hold(self, examples: Sequence[Example], requests: Sequence[Request], texts: Sequence[str]) -> list[Completion]:
        """One conversation for each request, in their order.

        Args:
            examples: [n] what each is about.
            requests: [n] prompts and keys; turn k > 0 of a conversation is drawn by `(*key, k)`.
            texts: [n] the prompts as texts.

        Returns:
            All that followed the prompts, with `chosen` where replies stand between the policy's turns; `failed` where
            the dialogue's function raised, hung or returned what is no text.

        Raises:
            UsageError: if the chat template rewrites what was said, or the dialogue cannot be called at all.
            NonFiniteError: if the engine's log-probs are not finite.
        """
        every = [
            _Conversation(example=example, prompt=request.prompt, text=text, key=request.key)
            for example, request, text in zip(examples, requests, texts, strict=True)
        ]
        live = every
        while live:
            for part, limit in self._parts(live):
                self._draw(part, limit)
            live = self._answer([conversation for conversation in live if conversation.ended])
        return [conversation.completion() for conversation in every]

    def _parts(self, live: Sequence[_Conversation]) -> Iterator[tuple[list[_Conversation], int]]:
        """As few calls of the engine as the context allows: they have one limit each."""
        waiting = sorted(live, key=lambda each: len(each.tokens))
        while waiting:
            limit = self.limit - len(waiting[0].tokens)
            fits = [len(each.prompt) + len(each.tokens) + limit <= self.context for each in waiting]
            yield [each for each, fit in zip(waiting, fits, strict=True) if fit], limit
            waiting = [each for each, fit in zip(waiting, fits, strict=True) if not fit]

    def _draw(self, part: Sequence[_Conversation], limit: int) -> None:
        requests = [conversation.request() for conversation in part]
        drawn = self.engine.generate(requests, sampling=self.sampling, limit=limit, stop=self.stop)
        check_drawn(drawn, requests)
        for conversation, turn in zip(part, drawn, strict=True):
            conversation.hear(turn, self.limit - len(conversation.tokens), self.tokenizer)

    def _answer(self, asking: Sequence[_Conversation]) -> list[_Conversation]:
        """Append the replies; those conversations that go on."""
        if not asking:
            return []
        replies = self.replier.reply(
            [each.text for each in asking],
            [completion_text(self.tokenizer, each.tokens) for each in asking],
            [each.said for each in asking],
            [each.example.columns for each in asking],
        )
        if len(replies) != len(asking):
            raise ValueError(f"{len(asking)} conversations got {len(replies)} replies")
        return [each for each, reply in zip(asking, replies, strict=True) if self._goes_on(each, reply)]

    def _goes_on(self, conversation: _Conversation, reply: Reply) -> bool:
        if isinstance(reply, NotApplicable):
            return False
        if isinstance(reply, Failed):
            conversation.failed = reply.reason
            return False
        replies = [*conversation.said[1::2], reply]
        text = reply_text(self.tokenizer, conversation.example.prompt, replies, [self.dialogue.role] * len(replies))
        try:
            tokens = reply_tokens(self.tokenizer, text, conversation.tokens[-1])
        except UsageError as error:
            conversation.failed = f"its reply cannot be written: {error}"
            return False
        room = self.limit - len(conversation.tokens) - len(tokens)
        if room < 1 or conversation.turns == self.dialogue.turns:
            conversation.ended = False
            return False
        conversation.append(reply, tokens)
        return True


def reply_text(
    tokenizer: Tokenizer,
    prompt: str | tuple[Message, ...],
    replies: Sequence[str],
    roles: Sequence[str],
    *,
    stand_in: str = _STAND_IN,
) -> str:
    """What is appended for the last of some replies: itself, or what a chat template makes of it.

    For messages it is everything that the template writes after the policy's words up to where the policy goes on: the
    end of its turn, the reply's turn, the opening of its next one.

    Args:
        tokenizer: with the template.
        prompt: of the conversation; plain text takes replies as they are.
        replies: all so far.
        roles: of the replies.
        stand_in: for the policy's words, which are not encoded again.

    Raises:
        UsageError: if the template rewrites earlier turns, or refuses the conversation.
    """
    if isinstance(prompt, str):
        return replies[-1]
    history: list[Mapping[str, Any]] = [*prompt]
    before, after = "", ""
    for reply, role in zip(replies, roles, strict=True):
        before = tokenizer.render_text(history, generation_prompt=True) + stand_in
        history += [{"role": "assistant", "content": stand_in}, {"role": role, "content": reply}]
        after = tokenizer.render_text(history, generation_prompt=True)
        if not after.startswith(before):
            same = next((at for at, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), 0)
            raise UsageError(
                f"the chat template rewrites history: after a reply, {before[same : same + 60]!r} becomes "
                f"{after[same : same + 60]!r}. Tokens that were generated must stay: use a template that only appends "
                "(one that keeps reasoning in earlier turns)"
            )
    return after[len(before) :]


def reply_tokens(tokenizer: Tokenizer, text: str, last: int) -> Tokens:
    """The tokens of `reply_text`, encoded alone; an end token that already stands before it is not written twice.

    Raises:
        UsageError: if the tokenizer has no tokens for it.
    """
    if last in tokenizer.end and text.lstrip().startswith(tokenizer.pieces([last])[0]):
        return tuple(tokenizer.encode(text.lstrip()))[1:]
    return tuple(tokenizer.encode(text))


def check_template(tokenizer: Tokenizer, example: Example, role: str) -> None:
    """Refuse a chat template that does not only append, before anything is drawn; plain prompts pass.

    Args:
        tokenizer: with the template.
        example: whose messages begin the conversation that is tried.
        role: of the replies.

    Raises:
        UsageError: showing what the template rewrites or drops.
    """
    if isinstance(example.prompt, str):
        return
    words = str(example.prompt[-1].get("content"))
    turn, reply = {"role": "assistant", "content": words}, {"role": role, "content": words}
    tokenizer.check_appending([*example.prompt, turn, reply, turn, reply, turn])
    reply_text(tokenizer, example.prompt, [words, words], [role, role])


def role_of(task: Task) -> str:
    """In which a chat template shows replies of this task's examples."""
    return TOOL if task.dialogue is None else task.dialogue.role


def demonstration(tokenizer: Tokenizer, example: Example, where: str, *, role: str) -> TokenRow:
    """The row of an example's completion: the policy's turns chosen, replies between them not.

    Where messages begin it, every turn of the policy ends with the template's end of turn; else only the last one ends,
    with the end token.

    Args:
        tokenizer: of the policy.
        example: with a completion.
        where: its name, for errors.
        role: of replies under a chat template, where the example does not say.

    Raises:
        UsageError: if something cannot be written down, or the chat template rewrites or drops a turn.
    """
    prompt, completion = prompt_tokens(tokenizer, example, where), example.completion
    assert completion is not None
    ending = answer_end(tokenizer, example.prompt, where)
    if example.turns is None:
        return TokenRow(prompt=prompt, answer=answer_tokens(tokenizer, completion, where, ending=ending))
    tokens: list[int] = []
    chosen: list[bool] = []
    for number, text in enumerate(example.turns):
        if number % 2:
            added = _written_reply(tokenizer, example, number, where, role, tokens[-1])
        else:
            added = answer_tokens(tokenizer, text, f"{where}, turn {number // 2 + 1}", ending=ending)
            if number + 1 < len(example.turns) and isinstance(example.prompt, str):
                added = added[:-1]
        tokens += added
        chosen += [number % 2 == 0] * len(added)
    return TokenRow(prompt=prompt, answer=tuple(tokens), chosen=tuple(chosen))


def _written_reply(tokenizer: Tokenizer, example: Example, number: int, where: str, role: str, last: int) -> Tokens:
    """The tokens of a demonstrated reply, which stands at `number` of the example's turns, after the token `last`."""
    turns = example.turns
    assert turns is not None
    replies = turns[1 : number + 1 : 2]
    roles = [role] * len(replies) if example.roles is None else example.roles[: len(replies)]
    reasoned = any("</think>" in turn for turn in turns[::2])
    try:
        text = reply_text(tokenizer, example.prompt, replies, roles, stand_in=_STAND_IN if reasoned else "answer")
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    if replies[-1].strip() not in text:
        raise UsageError(
            f"{where}: the chat template drops or rewrites what the {roles[-1]} says: {replies[-1][:60]!r} is not in "
            f"{text[:200]!r}. Use a template that keeps every turn, or leave such turns out of the data"
        )
    with naming(where):
        return reply_tokens(tokenizer, text, last)


def check_drawn(completions: Sequence[Completion], requests: Sequence[Request]) -> None:
    """Refuse what an engine must not bring.

    Raises:
        ValueError: if completions or log-probs are missing.
        NonFiniteError: if a log-prob is not finite.
    """
    if len(completions) != len(requests):
        raise ValueError(f"the engine brought {len(completions)} completions for {len(requests)} requests")
    for completion, request in zip(completions, requests, strict=True):
        if not completion.tokens or len(completion.tokens) != len(completion.log_prob):
            raise ValueError(
                f"the engine brought {len(completion.tokens)} tokens with {len(completion.log_prob)} log-probs for "
                f"sample {request.key}: every completion has at least one token, and one log-prob for each"
            )
        if not all(map(math.isfinite, completion.log_prob)):
            place = next(at for at, value in enumerate(completion.log_prob) if not math.isfinite(value))
            raise NonFiniteError(
                f"token {place} of sample {request.key} was drawn with a log-prob of {completion.log_prob[place]}: the "
                "policy's weights may have stopped being numbers (lower the learning rate, clip gradients), or the "
                "engine gives log-probs of another distribution than the one it draws from"
            )

"""Text to token ids and back: what a language policy reads and writes.

Token ids are the truth from the prompt to the loss; text is a view of them. Nothing here adds a token that was not
asked for, cuts a text, or normalises it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, final

from upslope.errors import UsageError
from upslope.policies.language.library import quietly
from upslope.policies.language.pretrained import find_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|end|>"
"""The end token of the tokenizers that are made here."""


@final
class Tokenizer:
    """A fast tokenizer of transformers with its end tokens.

    Args:
        backend: the tokenizer. It is set never to cut and never to pad.
        end_token: its name for the token that ends a completion; None for the tokenizer's own.
        more_ends: ids of further tokens that end a completion (`eos_token_id` of a generation config).

    Attributes:
        backend: the tokenizer of transformers.
        end: ids of all tokens that end a completion.
        end_token: the one of them that is appended to demonstrations.
        size: ids are 0 .. size-1.
        begin: ids the tokenizer wants before every plain text (a BOS token), none for most.

    Raises:
        UsageError: if it is not a fast tokenizer, has no end token, or an id stands for none of its tokens.
    """

    def __init__(
        self, backend: PreTrainedTokenizerFast, *, end_token: str | None = None, more_ends: Iterable[int] = ()
    ) -> None:
        if not backend.is_fast:
            raise UsageError(
                f"{type(backend).__name__} is no fast tokenizer: convert it to a folder with a tokenizer.json "
                "(AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...))"
            )
        self.backend = backend
        self._fast = backend.backend_tokenizer
        self._fast.no_truncation()
        self._fast.no_padding()
        self.size = len(backend)
        further = tuple(more_ends)
        self.end_token = _end_token(backend, end_token, further)
        self.end = frozenset({self.end_token, *further})
        outside = sorted(token for token in self.end if not 0 <= token < self.size)
        if outside:
            raise UsageError(
                f"the end tokens {outside} are no tokens of a tokenizer of {self.size}: correct eos_token_id in the "
                "model's generation_config.json or config.json"
            )
        if backend.eos_token_id != self.end_token:
            backend.eos_token = str(backend.convert_ids_to_tokens(self.end_token))
        self._special = tuple(sorted(map(str, backend.all_special_tokens), key=len, reverse=True))
        self._alphabet = _alphabet(self._fast)
        self.begin = _begin(self._fast, self._alphabet)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: nothing about a tokenizer changes."""
        return self

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing added before or after it; names of special tokens within it become those.

        Raises:
            UsageError: if the tokenizer has one token per character and none for one of these.
        """
        if self._alphabet is not None:
            self._refuse_unknown(text)
        return self._fast.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a plain text that begins a sequence: `begin` and `encode(text)`; `begin` never stands twice.

        Raises:
            UsageError: as `encode`.
        """
        ids = self.encode(text)
        return ids if tuple(ids[: len(self.begin)]) == self.begin else [*self.begin, *ids]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ids.

        Args:
            ids: tokens.
            special: write special tokens (ends among them) by name; False leaves them out.
        """
        return self._fast.decode(list(ids), skip_special_tokens=not special)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of every id on its own, special tokens by name: for showing, since pieces of characters are lost."""
        return [self.decode([token], special=True) for token in ids]

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return self.backend.chat_template is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generation_prompt: bool = True,
    ) -> list[int]:
        """The ids of a conversation under the chat template.

        Args:
            messages: turns with `role` and `content`.
            tools: descriptions of tools as JSON schemas, for templates that show them.
            generation_prompt: end with what opens the assistant's next turn.

        Raises:
            UsageError: if there is no chat template, or it refuses these messages.
        """
        return self.encode(self.render_text(messages, tools=tools, generation_prompt=generation_prompt))

    def render_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generation_prompt: bool = True,
    ) -> str:
        """The text that `render` encodes.

        Raises:
            UsageError: as `render`.
        """
        if not self.chats:
            raise UsageError(
                "these prompts are messages and the tokenizer has no chat template: give prompts as plain text, or put "
                "a chat_template.jinja into the model's folder"
            )
        from jinja2 import TemplateError

        try:
            return str(
                self.backend.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=None if tools is None else [dict(tool) for tool in tools],
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                )
            )
        except TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise UsageError(f"the chat template refuses a conversation of ({roles}): {error}") from error

    def check_appending(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """See that a conversation only ever grows: what is once rendered stays as it is, token by token.

        For every k, the ids of the first k turns begin the ids of the first k+1, with the opening of the assistant's
        turn where that one follows; and every turn's text stands in what it added. Templates that cut old turns, take
        the reasoning out of them or leave out a role do not pass: tokens the policy chose would change afterwards.

        Args:
            messages: a conversation as it will come up, with every role in it.
            tools: as in `render`.

        Raises:
            UsageError: if the template rewrites or drops something; it shows where.
        """
        first = next((index for index, turn in enumerate(messages) if turn["role"] not in ("system", "developer")), 0)
        whole = self.render(messages[: first + 1], tools=tools, generation_prompt=False)
        self._check_shown(messages[: first + 1], whole)
        for count in range(first + 1, len(messages)):
            turn = messages[count]
            before = self.render(messages[:count], tools=tools, generation_prompt=turn["role"] == "assistant")
            after = self.render(messages[: count + 1], tools=tools, generation_prompt=False)
            if after[: len(whole)] != whole:
                self._refuse_rewriting(f"turn {count + 1} ({turn['role']})", whole, after)
            if after[: len(before)] != before:
                self._refuse_rewriting(f"turn {count + 1} ({turn['role']}) after the prompt for it", before, after)
            self._check_shown([turn], after[len(before) :])
            whole = after

    def save(self, path: Path) -> None:
        """Write the tokenizer's files into a folder; `transformers.AutoTokenizer.from_pretrained` reads them."""
        with quietly():
            self.backend.save_pretrained(str(path))

    def files(self) -> dict[str, bytes]:
        """What `save` writes, by name."""
        with TemporaryDirectory() as folder:
            self.save(Path(folder))
            return {entry.name: entry.read_bytes() for entry in sorted(Path(folder).iterdir())}

    def _refuse_unknown(self, text: str) -> None:
        assert self._alphabet is not None
        if self._alphabet.issuperset(text):
            return
        for name in self._special:
            text = text.replace(name, "")
        unknown = sorted(set(text) - self._alphabet)
        if unknown:
            raise UsageError(
                f"the tokenizer has no token for {', '.join(map(repr, unknown[:10]))} in {_shortened(text)!r}; it "
                f"knows {''.join(sorted(self._alphabet))!r}: use those, or add to the task's alphabet before training"
            )

    def _check_shown(self, turns: Sequence[Mapping[str, Any]], added: list[int]) -> None:
        text = self.decode(added, special=True)
        for turn in turns:
            content = turn.get("content")
            if isinstance(content, str) and content.strip() not in text:
                raise UsageError(
                    f"the chat template drops or rewrites what the {turn['role']} says: {_shortened(content)!r} became "
                    f"{_shortened(text)!r}. Use a template that keeps every turn as it is"
                )

    def _refuse_rewriting(self, where: str, before: list[int], after: list[int]) -> None:
        same = next((place for place, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), None)
        place = min(len(before), len(after)) if same is None else same
        was = self.decode(before[place : place + 16], special=True)
        now = self.decode(after[place : place + 16], special=True)
        raise UsageError(
            f"the chat template rewrites history: with {where}, token {place} on, {was!r} becomes {now!r}. Tokens that "
            "were generated must stay: use a template that only appends (one that keeps reasoning in earlier turns)"
        )


def character_tokenizer(alphabet: str) -> Tokenizer:
    """One token per character, and an end token with id 0; texts come back exactly.

    Args:
        alphabet: the characters (code points); each counts once and gets its id, from 1 on, in this order.

    Raises:
        UsageError: if there are none.
    """
    characters = list(dict.fromkeys(alphabet))
    if not characters:
        raise UsageError("the alphabet is empty: give the characters that the task's texts are made of")
    with quietly():
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Fast

        ids = {END: 0, **{character: place for place, character in enumerate(characters, start=1)}}
        fast = Fast(models.WordLevel(vocab=ids, unk_token="<|none|>"))
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        fast.decoder = decoders.Fuse()
        return Tokenizer(_wrapped(fast))


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Byte-level byte-pair encoding learnt from texts: any text has tokens and comes back exactly; the end token is 0.

    Args:
        texts: what to learn merges from.
        size: most tokens; fewer if the texts have no more pairs to merge. At least 257, the bytes and the end.

    Raises:
        UsageError: if `size` is too small.
    """
    if size < 257:
        raise UsageError(f"a byte-level tokenizer has at least 257 tokens (256 bytes and the end), got size={size}")
    with quietly():
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models, pre_tokenizers, trainers

        fast = Fast(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        fast.train_from_iterator(texts, trainer)
        return Tokenizer(_wrapped(fast))


def load_tokenizer(source: str | Path, *, end_token: str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or hub name, with all end tokens its model's configuration names.

    Args:
        source: a folder, a run directory (its policy's), or a hub name.
        end_token: the token that ends a completion, by name; None for the tokenizer's own.

    Raises:
        UsageError: if it cannot be loaded, or has no end token.
    """
    with quietly():
        from transformers import AutoTokenizer

        folder = find_folder(source)
        name, local = str(folder or source), folder is not None
        try:
            backend = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            place = f"folder {folder}" if local else f"hub name {str(source)!r} (there is no folder of that name)"
            raise UsageError(f"no tokenizer could be loaded from the {place}: {_first_line(error)}") from error
        for how_it_was_loaded in ("is_local", "local_files_only"):
            backend.init_kwargs.pop(how_it_was_loaded, None)
        return Tokenizer(backend, end_token=end_token, more_ends=_configured_ends(name, local=local))


def _configured_ends(source: str, *, local: bool) -> tuple[int, ...]:
    """`eos_token_id` of the generation config, else of the config; a number or a list."""
    from transformers.utils.hub import cached_file

    for name in ("generation_config.json", "config.json"):
        path = cached_file(source, name, local_files_only=local, _raise_exceptions_for_missing_entries=False)
        if path is None:
            continue
        match json.loads(Path(path).read_text("utf-8")):
            case {"eos_token_id": list(found)}:
                return tuple(int(token) for token in found)
            case {"eos_token_id": int(found)}:
                return (found,)
    return ()


def _wrapped(fast: Any) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def _end_token(backend: PreTrainedTokenizerFast, name: str | None, more: tuple[int, ...]) -> int:
    if name is not None:
        found = backend.get_vocab()
        if name not in found:
            raise UsageError(f"end_token={name!r} is no token of the tokenizer: give one of its tokens by name")
        return found[name]
    own = backend.eos_token_id
    if isinstance(own, int):
        return own
    if more:
        return more[0]
    raise UsageError(
        "the tokenizer has no end token, so no completion would ever end: set model.end_token to the name of one of "
        "its tokens, or eos_token in the folder's tokenizer_config.json"
    )


def _alphabet(fast: Any) -> frozenset[str] | None:
    """The characters of a tokenizer that has one token per character and nothing for others; None for any other."""
    from tokenizers.models import WordLevel

    if not isinstance(fast.model, WordLevel):
        return None
    special = {token.content for token in fast.get_added_tokens_decoder().values()}
    known = {token for token in fast.get_vocab() if token not in special}
    unknown = fast.model.unk_token
    lone = all(len(token) == 1 for token in known) and fast.token_to_id(unknown) is None
    return frozenset(known) if lone else None


def _begin(fast: Any, alphabet: frozenset[str] | None) -> tuple[int, ...]:
    """What the tokenizer's own post-processing puts before a text."""
    text = "a" if alphabet is None else min(alphabet)
    plain = fast.encode(text, add_special_tokens=False).ids
    full = fast.encode(text, add_special_tokens=True).ids
    for place in reversed(range(len(full) - len(plain) + 1)):
        if full[place : place + len(plain)] == plain:
            return tuple(full[:place])
    return ()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:40]} ... {text[-35:]}"

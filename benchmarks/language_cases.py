"""The work that both sides of `language.py` do, and how a step is asked for; only the standard library is needed."""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

ALPHABET = "0123456789+-*=() ?.,:abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ!#$%&_"
"""79 characters: with the end token the vocabulary has 80."""
WIDTH = 10
"""Tokens of a prompt."""
LEARNING_RATE = 1e-5
MAX_NORM = 1.0
EXAMPLES = 512
BETA = 0.1
"""Of DPO."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Llama with tied embeddings."""

    width: int
    layers: int
    heads: int
    inner: int


SIZES = {
    "s": Size(width=128, layers=4, heads=4, inner=344),
    "m": Size(width=320, layers=6, heads=5, inner=1280),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one step learns from.

    Attributes:
        method: which loss.
        prompts: per step; in sft and dpo each has one demonstration or pair.
        group: completions per prompt.
        limit: most tokens of a completion, its end token among them.
        ragged: grpo: the end token ends a completion; sft: lengths are uniform from 2 to the limit. Otherwise every
            completion has `limit` tokens.
    """

    method: Literal["grpo", "dpo", "sft"]
    prompts: int
    group: int = 1
    limit: int
    ragged: bool = False


CASES = {
    "grpo-32": Case(method="grpo", prompts=8, group=8, limit=32),
    "grpo-128": Case(method="grpo", prompts=8, group=8, limit=128),
    "grpo-ragged-128": Case(method="grpo", prompts=8, group=8, limit=128, ragged=True),
    "dpo-32": Case(method="dpo", prompts=32, limit=32),
    "sft-32": Case(method="sft", prompts=64, limit=32),
    "sft-ragged-128": Case(method="sft", prompts=64, limit=128, ragged=True),
}


def examples(case: Case, count: int) -> list[dict[str, str]]:
    """Prompts of `WIDTH` characters, with answers where the method learns from given ones."""
    draw = random.Random(0)
    rows: list[dict[str, str]] = []
    for _ in range(count):
        row = {"prompt": f"{draw.randint(100, 999)}+{draw.randint(100, 999)}=".rjust(WIDTH)}
        if case.method == "dpo":
            row |= {"chosen": _answer(draw, case), "rejected": _answer(draw, case)}
        elif case.method == "sft":
            row["completion"] = _answer(draw, case)
        rows.append(row)
    return rows


def _answer(draw: random.Random, case: Case) -> str:
    """One character less than the case says: the end token follows."""
    length = draw.randint(2, case.limit) if case.ragged else case.limit
    return "".join(draw.choice("0123456789") for _ in range(length - 1))


def digits(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Share of digits: cheap, and not constant for a random model."""
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


class Parts:
    """CPU seconds of this process by the name of a part, since the last `clear`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def clear(self) -> None:
        self.seconds.clear()

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Put a clock on a method of an object."""
        function = getattr(owner, method)

        def timed(*given: Any, **named: Any) -> Any:
            begun = time.process_time()
            try:
                return function(*given, **named)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - begun

        setattr(owner, method, timed)


def asked() -> bool:
    """Wait until `language.py` asks for a step; False when it wants no more."""
    return sys.stdin.readline().strip() == "step"


def answer(**record: Any) -> None:
    print("RESULT " + json.dumps(record), flush=True)

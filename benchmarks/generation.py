"""Generation alone: the embedded engine and transformers' `generate`, alternately in one process, in CPU seconds.

One thread, float32, a Llama of 0.8 million parameters (width 128, 4 blocks, 4 heads, 64 tokens), 64 completions of
10-token prompts side by side. The engine's time holds all that a call needs, the copy of the weights (`update`) too.
`transformers` samples without log-probs, with its dynamic cache. The floor is what the matrix products with weights
take on their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from upslope.collect.engines.protocol import Request
from upslope.collect.engines.torch import TorchEngine
from upslope.policies.language.config import LanguageModelConfig, ModelShape
from upslope.policies.language.model import build_policy
from upslope.policies.language.policy import LanguagePolicy
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.tokenizer import character_tokenizer

ALPHABET = "0123456789+-*=() ?.,:abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP"
SLOTS, WIDTH = 64, 10


@dataclass(frozen=True, kw_only=True)
class Case:
    """How many prompts, completions of each, tokens; and whether the end token ends a completion."""

    prompts: int
    group: int
    limit: int
    ends: bool


CASES = {
    "full-32": Case(prompts=64, group=1, limit=32, ends=False),
    "full-128": Case(prompts=64, group=1, limit=128, ends=False),
    "groups-32": Case(prompts=8, group=8, limit=32, ends=False),
    "ends-128": Case(prompts=64, group=1, limit=128, ends=True),
    "queue-128": Case(prompts=256, group=1, limit=128, ends=True),
}


def make_policy() -> LanguagePolicy:
    shape = ModelShape(architecture="llama", width=128, layers=4, heads=4, inner=344, positions=512)
    policy = build_policy(
        LanguageModelConfig(shape=shape), tokenizer=character_tokenizer(ALPHABET), seed=0, sampling=Sampling()
    )
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(0.25)  # pyright: ignore[reportCallIssue]
    return policy


def ours(policy: LanguagePolicy, case: Case, prompts: torch.Tensor) -> Callable[[], int]:
    requests = [
        Request(prompt=tuple(prompt), key=(number, sample))
        for number, prompt in enumerate(prompts.tolist())
        for sample in range(case.group)
    ]
    engine = TorchEngine(policy, seed=0, slots=SLOTS)
    ends = policy.tokenizer.end if case.ends else frozenset()
    version = 0

    def run() -> int:
        nonlocal version
        policy.tokenizer.end = ends
        version += 1
        engine.update(version)
        completions = engine.generate(requests, sampling=Sampling(), limit=case.limit)
        return sum(len(completion.tokens) for completion in completions)

    return run


def theirs(policy: LanguagePolicy, case: Case, prompts: torch.Tensor) -> Callable[[], int]:
    model: Any = policy.model
    end = policy.tokenizer.end_token

    def run() -> int:
        model.generation_config.eos_token_id = end if case.ends else None
        model.generation_config.pad_token_id = end
        count = 0
        for part in prompts.split(SLOTS // case.group):
            rows = model.generate(
                part,
                attention_mask=torch.ones_like(part),
                max_new_tokens=case.limit,
                do_sample=True,
                top_k=0,
                num_return_sequences=case.group,
            )
            drawn = rows[:, WIDTH:]
            ended = (drawn == end).cumsum(-1)
            count += int((ended - (drawn == end).long() == 0).sum()) if case.ends else drawn.numel()
        return count

    return run


def floor(policy: LanguagePolicy, case: Case) -> Callable[[], int]:
    """The products with weights of all steps of a full batch, one after the other, and nothing else."""
    weights = [p.detach().t().contiguous() for p in policy.model.parameters() if p.ndim == 2]
    inputs = {len(weight): torch.randn(SLOTS, len(weight)) for weight in weights}
    steps = case.limit * case.prompts * case.group // SLOTS

    @torch.inference_mode()
    def run() -> int:
        for _ in range(steps):
            for weight in weights:
                torch.mm(inputs[len(weight)], weight)
        return steps * SLOTS

    return run


def measure(run: Callable[[], int]) -> tuple[float, int]:
    begin = time.process_time()
    tokens = run()
    return time.process_time() - begin, tokens


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--core", type=int, help="pin the process to this core")
    parser.add_argument("--out", type=Path, help="write every run as JSON lines")
    options = parser.parse_args()
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    torch.set_num_threads(1)
    policy = make_policy()
    ends = policy.tokenizer.end
    records: list[dict[str, Any]] = []
    print("| case | upslope, CPU s | tokens / CPU s | transformers, CPU s | tokens / CPU s | ratio | floor, CPU s |")
    print("|---|---|---|---|---|---|---|")
    for name in options.cases:
        case = CASES[name]
        policy.tokenizer.end = ends
        draw = torch.Generator().manual_seed(1)
        prompts = torch.randint(1, policy.tokenizer.size, (case.prompts, WIDTH), generator=draw)
        sides = {
            "upslope": ours(policy, case, prompts),
            "transformers": theirs(policy, case, prompts),
            "floor": floor(policy, case),
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for repetition in range(options.repetitions + 1):
            for side, run in sides.items():
                spent, tokens = measure(run)
                if repetition:
                    seconds[side].append(spent)
                    rates[side].append(tokens / spent)
                    records.append({"case": name, "side": side, "cpu_seconds": spent, "tokens": tokens})
        rate = {side: statistics.median(values) for side, values in rates.items()}
        ratio = rate["upslope"] / rate["transformers"]
        print(
            f"| {name} | {spread(seconds['upslope'])} | {rate['upslope']:,.0f} | {spread(seconds['transformers'])} "
            f"| {rate['transformers']:,.0f} | {ratio:.2f} | {spread(seconds['floor'])} |",
            flush=True,
        )
    if options.out is not None:
        options.out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()

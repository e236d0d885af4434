"""upslope and TRL take the same steps of language training, alternately: CPU seconds per step, and the ratio.

Both sides live in processes of their own, pinned to one core with one thread. They load the same weights and take one
step each in turn, so that what else the machine does meets both alike. Where lengths are drawn, seconds are divided by
the tokens learnt from before they are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from language_cases import ALPHABET, CASES, SIZES, WIDTH, Case, Size
from upslope.policies.language.config import LanguageModelConfig, ModelShape
from upslope.policies.language.folder import save_language_policy
from upslope.policies.language.model import build_policy
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.tokenizer import character_tokenizer

HERE = Path(__file__).parent
EMBEDDING_SCALE = 0.25
"""Makes the first distributions nearly uniform."""


class Side:
    """A process that takes a step when it is asked to."""

    def __init__(self, python: str, script: str, case: str, folder: str, core: int) -> None:
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._command = [python, script, case, folder]
        self._errors = Path(folder).parent / f"{script}-{case}.txt"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                self._command,
                cwd=HERE,
                env={**os.environ, **single},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )

    def step(self) -> dict[str, float]:
        """Its record of the next step."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith("RESULT "):
                    return json.loads(line.removeprefix("RESULT "))
        except BrokenPipeError:
            pass
        raise SystemExit(f"{' '.join(self._command)} gave no result:\n{self._errors.read_text()}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def save_model(size: Size, folder: str) -> int:
    """Write a random model with nearly uniform distributions; how many parameters it has.

    The end token's row of the tied embeddings is 0 and so is its logit: it has a probability of about 1 / 82 in every
    step, and ends completions after 65 of at most 128 tokens in the mean.
    """
    shape = ModelShape(width=size.width, layers=size.layers, heads=size.heads, inner=size.inner, positions=512)
    policy = build_policy(
        LanguageModelConfig(shape=shape), tokenizer=character_tokenizer(ALPHABET), seed=0, sampling=Sampling()
    )
    with torch.no_grad():
        weight: Any = policy.model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
        weight.mul_(EMBEDDING_SCALE)
        weight[policy.tokenizer.end_token] = 0.0
    save_language_policy(policy, folder)
    return sum(parameter.numel() for parameter in policy.parameters())


def least_operations(case: Case, size: Size, tokens: float) -> dict[str, float]:
    """Floating-point operations of the matrix products that a step cannot do without, by part.

    Each prompt is read once when generating and once when learning, and nothing is padded. A backward pass counts as
    two forward passes; DPO reads its rows with the reference, too. For ragged rows, attention is that of rows of the
    mean length, a little less than theirs.

    Args:
        case: of the work.
        size: of the model.
        tokens: learnt from in a step.
    """
    answers = case.prompts * (2 if case.method == "dpo" else case.group)
    length = tokens / answers
    per_token = size.layers * 2 * (4 * size.width**2 + 3 * size.width * size.inner)
    per_pair = size.layers * 4 * size.width
    positions = case.prompts * WIDTH + answers * (length - 1)
    pairs = case.prompts * WIDTH * (WIDTH + 1) / 2 + answers * (length - 1) * (WIDTH + length / 2)
    vocabulary = len(ALPHABET) + 1
    forward = positions * per_token + pairs * per_pair + tokens * 2 * size.width * vocabulary
    parts = {"learn": forward * (4 if case.method == "dpo" else 3)}
    if case.method == "grpo":
        parts["generate"] = forward
    return {**parts, "step": sum(parts.values())}


def alternate(case: str, folder: str, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The records of both sides, after the warm-up."""
    peer = str(Path(options.trl_python).absolute())
    sides = {
        "upslope": Side(sys.executable, "upslope_language_side.py", case, folder, options.core),
        "trl": Side(peer, "trl_side.py", case, folder, options.core),
    }
    records: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    try:
        for _ in range(options.warm_up + options.steps):
            for name, side in sides.items():
                records[name].append(side.step())
    finally:
        for side in sides.values():
            side.close()
    return {name: of_side[options.warm_up :] for name, of_side in records.items()}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def median(records: list[dict[str, float]], name: str) -> float:
    return statistics.median(record.get(name, 0.0) for record in records)


def _per_token(record: dict[str, float]) -> float:
    return record["step"] / record["tokens"]


def summarise(name: str, size: Size, records: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """What the tables show of one case."""
    case = CASES[name]
    ours, theirs = records["upslope"], records["trl"]
    tokens = {side: statistics.mean(record["tokens"] for record in of_side) for side, of_side in records.items()}
    rate = median(ours, "machine")
    operations = least_operations(case, size, tokens["upslope"])
    answers = case.prompts * (2 if case.method == "dpo" else case.group)
    each: dict[str, Any] = {}
    for side, of_side in records.items():
        each[side] = {
            "seconds": {part: median(of_side, part) for part in ("step", "generate", "reward", "learn")},
            "range": [min(record["step"] for record in of_side), max(record["step"] for record in of_side)],
            "mean_length": tokens[side] / answers,
            "microseconds_per_token": 1e6 * statistics.median(map(_per_token, of_side)),
        }
    floor = {part: number / rate for part, number in operations.items()}
    return {
        "sides": each,
        "ratio": each["trl"]["microseconds_per_token"] / each["upslope"]["microseconds_per_token"],
        "ratios": sorted(_per_token(b) / _per_token(a) for a, b in zip(ours, theirs, strict=True)),
        "gigaflops": rate / 1e9,
        "least_seconds": floor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl-python", required=True, help="an interpreter that has TRL")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=5, help="of each side per case")
    parser.add_argument("--warm-up", type=int, default=2, help="first steps of each side that are not counted")
    parser.add_argument("--core", type=int, default=0, help="which core to pin every process to")
    parser.add_argument("--out", type=Path, help="write summaries and every step as JSON")
    options = parser.parse_args()
    print(
        "| model, case | upslope, CPU s | TRL, CPU s | ratio per token | mean lengths | parts: upslope; TRL | floor |"
    )
    print("|---|---|---|---|---|---|---|")
    found: list[dict[str, Any]] = []
    with TemporaryDirectory() as place:
        for letter in options.sizes:
            folder = str(Path(place) / letter)
            parameters = save_model(SIZES[letter], folder)
            for name in options.cases:
                records = alternate(name, folder, options)
                summary = summarise(name, SIZES[letter], records)
                found.append({"size": letter, "parameters": parameters, "case": name, **summary, "steps": records})
                print(_line(letter, name, records, summary), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _line(letter: str, name: str, records: dict[str, list[dict[str, float]]], summary: dict[str, Any]) -> str:
    times = [spread([record["step"] for record in of_side]) for of_side in records.values()]
    low, high = summary["ratios"][0], summary["ratios"][-1]
    lengths = ", ".join(f"{side['mean_length']:.1f}" for side in summary["sides"].values())
    parts = "; ".join(_parts(side["seconds"]) for side in summary["sides"].values())
    ratio = f"{summary['ratio']:.2f} ({low:.2f}-{high:.2f})"
    floor = f"{_parts(summary['least_seconds'])} at {summary['gigaflops']:.0f} GFLOP/s"
    return f"| {letter}, {name} | {times[0]} | {times[1]} | {ratio} | {lengths} | {parts} | {floor} |"


def _parts(seconds: dict[str, float]) -> str:
    return ", ".join(f"{part} {seconds[part]:.3f}" for part in ("generate", "reward", "learn") if seconds.get(part))


if __name__ == "__main__":
    main()

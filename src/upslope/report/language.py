"""What there is to say of a language model's run: how good it was before and after, what it writes, how to load it."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from upslope.train.language import LanguageRun
from upslope.train.language.samples_file import read_samples
from upslope.train.log import Value, read_metrics

_SHOWN = 64
"""Characters of a completion that are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageFigure:
    """A figure of an evaluation.

    Attributes:
        name: in metrics.jsonl; a pattern, whose group goes into `words`.
        words: what it is; {} is the group.
        form: how it is written.
        trouble: shown only where it is not 0.
    """

    name: str
    words: str
    form: str = ".3f"
    trouble: bool = False


FIGURES = (
    LanguageFigure(name="greedy_accuracy", words="accuracy, likeliest completion"),
    LanguageFigure(name="sampled_accuracy", words="accuracy, drawn completions"),
    LanguageFigure(name=r"pass@(\d+)", words="pass@{}"),
    LanguageFigure(name="greedy_score", words="score, likeliest completion"),
    LanguageFigure(name="sampled_score", words="score, drawn completions"),
    LanguageFigure(name=r"greedy/(.+)", words="{}, likeliest completion"),
    LanguageFigure(name=r"sampled/(.+)", words="{}, drawn completions"),
    LanguageFigure(name="greedy_length", words="tokens, likeliest completion", form=".1f"),
    LanguageFigure(name="sampled_length", words="tokens, drawn completions", form=".1f"),
    LanguageFigure(name="greedy_truncated", words="cut off, likeliest completion", trouble=True),
    LanguageFigure(name="sampled_truncated", words="cut off, drawn completions", trouble=True),
    LanguageFigure(
        name="greedy_failed", words="completions on which a reward failed, likeliest", form=".0f", trouble=True
    ),
    LanguageFigure(
        name="sampled_failed", words="completions on which a reward failed, drawn", form=".0f", trouble=True
    ),
    LanguageFigure(name="nll", words="negative log-likelihood per token"),
    LanguageFigure(name="pair_accuracy", words="pairs judged right"),
)
"""In the order in which they are shown."""


def evaluations(directory: Path) -> list[dict[str, Value]]:
    """The evaluation records of a run, the first one first; none where nothing was written yet."""
    path = directory / "metrics.jsonl"
    return evaluations_among(read_metrics(path)) if path.is_file() else []


def evaluations_among(records: Sequence[dict[str, Value]]) -> list[dict[str, Value]]:
    """Those records of a run that are evaluations.

    If one of them has a score, so do all: what others call accuracy, as all their values lay in [0, 1], is one, too.
    """
    judged = [record for record in records if record.get("kind") == "evaluation"]
    return [_as_score(record) for record in judged] if any("greedy_score" in record for record in judged) else judged


def _as_score(record: dict[str, Value]) -> dict[str, Value]:
    kept = {name: value for name, value in record.items() if not name.startswith("pass@")}
    return {re.sub(r"^(greedy|sampled)_accuracy$", r"\1_score", name): value for name, value in kept.items()}


def evaluation_rows(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, tuple[float, ...]]]:
    """What the figures are called, how they are written, and their values in each record; NaN where one has none.

    The part of the reward that accuracy is the mean of is not shown a second time.
    """
    names = list(dict.fromkeys(name for record in records for name in record))
    again = part_of_accuracy(records)
    for figure in FIGURES:
        for name in names:
            found = re.fullmatch(figure.name, name)
            if found is None or name in (f"greedy/{again}", f"sampled/{again}"):
                continue
            values = tuple(float(record.get(name, math.nan)) for record in records)
            if not (figure.trouble and not any(values)):
                yield figure.words.format(*found.groups()), figure.form, values


def part_of_accuracy(records: Sequence[Mapping[str, Any]]) -> str | None:
    """The part that accuracy (or the score) is the mean of: the first that equals it throughout; None without one."""
    names = dict.fromkeys(name for record in records for name in record)
    for name in names:
        way, _, part = name.partition("/")
        if way == "greedy" and all(
            record.get(f"{way}/{part}") in (record.get(f"{way}_accuracy"), record.get(f"{way}_score"))
            for record in records
            for way in ("greedy", "sampled")
        ):
            return part
    return None


def before_and_after(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """Two evaluations of a run and what lies between them."""
    prompts = after.get("prompts", after.get("pairs"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("" if prompts is None else f"on {int(prompts):,} held-out examples")
    for heading in ("before", "after", "difference"):
        table.add_column(heading, justify="right", no_wrap=True, style="bold" if heading == "after" else "")
    for words, form, (first, last) in evaluation_rows((before, after)):
        table.add_row(words, _written(first, form), _written(last, form), _written(last - first, f"+{form}"))
    return table


def language_evaluation_table(figures: Mapping[str, Any]) -> Table:
    """One evaluation."""
    prompts = figures.get("prompts", figures.get("pairs"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("figure" if prompts is None else f"on {int(prompts):,} held-out examples")
    table.add_column("value", justify="right", no_wrap=True, style="bold")
    for words, form, (value,) in evaluation_rows((figures,)):
        table.add_row(words, _written(value, form))
    return table


def samples_table(path: Path, *, most: int = 4) -> Table | None:
    """What the policy answered at the first evaluation and at the latest, side by side; None where nothing was kept.

    Args:
        path: of samples.json.
        most: prompts.
    """
    kept = read_samples(path) if path.is_file() else []
    if len(kept) < 2:
        return None
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("prompt", "before", "worth", "after", "worth"):
        worth = heading == "worth"
        table.add_column(heading, justify="right" if worth else "left", no_wrap=worth, overflow="fold")
    earlier = {one["example"]: one for one in kept[0]["samples"]}
    for one in kept[-1]["samples"][:most]:
        first = earlier.get(one["example"])
        before = [Text("-"), Text("-")] if first is None else _answer(first)
        table.add_row(Text(shortened(one["prompt"])), *before, *_answer(one))
    return table


def loading_lines(folder: Path) -> tuple[str, str]:
    """The two lines of transformers that load a policy folder."""
    return (
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
    )


def of_language(directory: Path) -> list[RenderableType]:
    """How good a run's policy was before and after, and what it writes."""
    parts: list[RenderableType] = []
    records = evaluations(directory)
    if records:
        parts.append(Padding(before_and_after(records[0], records[-1]), (1, 0, 0, 2)))
    samples = samples_table(directory / "samples.json")
    if samples is not None:
        parts.append(Padding(samples, (1, 0, 0, 2)))
    return parts


def made_by_language(shown: Path) -> list[tuple[str, str]]:
    """What lies where in a run directory.

    Args:
        shown: the directory as the user would write it.
    """
    return [
        (str(shown), "settings, metrics, completions.jsonl, samples.json, checkpoints, TensorBoard events"),
        (str(shown / "policy"), "the policy at the end, as a Hugging Face folder"),
        (str(shown / "best"), "the policy that was best in evaluation, likewise"),
        (str(shown / "start"), "the policy it began with, likewise"),
    ]


def use_of_language(directory: Path, run: LanguageRun, shown: Path) -> list[tuple[str, str]]:
    """What to do with a policy: let it write, load it elsewhere.

    Args:
        directory: of the run.
        run: its configuration.
        shown: the directory as the user would write it.
    """
    model, tokenizer = loading_lines(shown / "policy")
    write = ("let it write", f"upslope sample {shlex.quote(str(shown))} --prompt {_prompt(directory)} -n 4")
    return [
        *([] if run.judges_pairs else [write]),
        ("use it in Python", f'policy = upslope.load_language("{shown / "policy"}")'),
        ("or elsewhere", "from transformers import AutoModelForCausalLM, AutoTokenizer"),
        ("", model),
        ("", tokenizer),
    ]


def shortened(text: str) -> str:
    """On one line, and cut where it is long."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


def _prompt(directory: Path) -> str:
    """A held-out prompt, as a word of the shell; a placeholder where there is none that is short."""
    path = directory / "samples.json"
    kept = read_samples(path) if path.is_file() else []
    prompts = [one["prompt"] for evaluation in kept[-1:] for one in evaluation["samples"]]
    short = [prompt for prompt in prompts if len(prompt) <= _SHOWN and prompt.isprintable() and "<|" not in prompt]
    return f'"{short[0]}"' if short and not set('"$`\\!') & set(short[0]) else '"..."'


def _answer(sample: Mapping[str, Any]) -> list[Text]:
    """A completion, and what it is worth."""
    total = sample["total"]
    worth = Text("failed", style="yellow")
    if total is not None:
        worth = Text(f"{total:g}", style="green" if total > 0.0 else "red")
    return [Text(shortened(sample["completion"])), worth]


def _written(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)

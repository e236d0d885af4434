"""What the metrics of a run say about its learning: figures over the run, and verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from upslope.diagnostics import Verdict, Watch
from upslope.errors import UsageError
from upslope.train.log import read_metrics
from upslope.train.run_directory import RunDirectory

_PARTS = ("first third", "middle third", "last third")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure of a run.

    Attributes:
        name: in metrics.jsonl.
        form: how it is written.
        meaning: in words.
        relative_to: another figure that it is divided by, record by record.
    """

    name: str
    form: str
    meaning: str
    relative_to: str | None = None

    @property
    def heading(self) -> str:
        """What the table calls it."""
        return self.name if self.relative_to is None else f"{self.name} / {self.relative_to.rpartition('/')[2]}"


_PSI = "variance/psi"
FIGURES = (
    Figure(name="episode_return", form=",.1f", meaning="mean raw return of the last 100 training episodes"),
    Figure(name="reward", form=".3f", meaning="mean reward of the completions drawn in training"),
    Figure(name="accuracy", form=".1%", meaning="of these, right"),
    Figure(name="pair_accuracy", form=".1%", meaning="pairs whose chosen answer comes out better"),
    Figure(name="chosen_log_prob", form=".3f", meaning="of chosen answers; falling: they get less likely, too"),
    Figure(name="rejected_log_prob", form=".3f", meaning="of rejected answers"),
    Figure(name="nll", form=".4f", meaning="negative log-likelihood per token of what is learnt from"),
    Figure(name="length", form=",.1f", meaning="mean tokens of a completion"),
    Figure(name="truncated", form=".1%", meaning="completions that the length limit cut"),
    Figure(name="failed", form=",.0f", meaning="completions on which a reward failed; they leave their group"),
    Figure(name="live_groups", form=".1%", meaning="groups whose completions are not all worth the same"),
    Figure(
        name="explained_variance",
        form=".2f",
        meaning="1: the critic explains its targets; 0: no better than a constant",
    ),
    Figure(name="entropy_share", form=".1%", meaning="entropy of the policy, as a share of blind choice"),
    Figure(name="entropy", form=".3f", meaning="how undecided the policy is"),
    Figure(name="kl", form=".2g", meaning="how far an update moves the policy (k3 estimate of KL(old || new))"),
    Figure(
        name="first_ratio_error",
        form=".1g",
        meaning="largest |ratio - 1| before the first step of an update; must be 0 to rounding",
    ),
    Figure(name="mismatch", form=".1g", meaning="largest |log-prob of the learner - of the sampler| per token"),
    Figure(name="reference_kl", form=".3g", meaning="distance from the reference policy, per token"),
    Figure(
        name="effective_sample_size", form=".1%", meaning="share of the batch that the ratios of the last pass leave"
    ),
    Figure(name="clip_share_positive", form=".1%", meaning="of steps with A > 0, clipped above"),
    Figure(name="clip_share_negative", form=".1%", meaning="of steps with A < 0, clipped below"),
    Figure(name="dead_gradient_share", form=".1%", meaning="steps whose log-prob gets no gradient: clipped, or A = 0"),
    Figure(name="zero_advantage_groups", form=".1%", meaning="groups whose members are all rewarded alike"),
    Figure(name="gradient_norm", form=".3g", meaning="before clipping"),
    Figure(
        name="gradient_snr",
        form=".2g",
        meaning="signal to noise of the actor's gradient for the steps of one update; about 0: drowned",
    ),
    Figure(name="noise_scale", form=",.0f", meaning="steps at which signal and noise are equal (simple noise scale)"),
    Figure(name=_PSI, form=".3g", meaning="variance of the Psi_t in use; those below relative to it"),
    Figure(name="variance/total_reward", form=".2f", meaning="total reward", relative_to=_PSI),
    Figure(
        name="variance/reward_to_go",
        form=".2f",
        meaning="reward to go, bootstrapped where there is a critic",
        relative_to=_PSI,
    ),
    Figure(name="variance/baselined", form=".2f", meaning="reward to go minus V", relative_to=_PSI),
    Figure(name="variance/td_residual", form=".2f", meaning="TD residual (leans on the critic)", relative_to=_PSI),
    Figure(name="variance/gae", form=".2f", meaning="GAE with lambda 0.95", relative_to=_PSI),
    Figure(name="reward_deviation", form=".3g", meaning="spread of the rewards within a batch"),
    Figure(name="termination_share", form=".2%", meaning="steps that ended in a terminal state"),
)
_FIGURE_NAMES = tuple(dict.fromkeys(("progress", *(figure.name for figure in FIGURES))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """A run judged by its metrics.

    Attributes:
        directory: of the run.
        records: training records read.
        figures: by heading, medians over the first, the middle and the last third; NaN where nothing was measured.
        verdicts: at the end of the records.
        past: names of warnings that hold no longer, with the first and the last step they held at.
    """

    directory: Path
    records: int
    figures: Mapping[str, tuple[float, ...]]
    verdicts: Sequence[Verdict]
    past: Sequence[tuple[str, int, int]]

    def tree(self) -> dict[str, Any]:
        """For JSON; what was not measured is None, what is infinite is text."""
        return {
            "run": str(self.directory),
            "records": self.records,
            "figures": {
                name: {part: _plain(value) for part, value in zip(_PARTS, values, strict=True)}
                for name, values in self.figures.items()
            },
            "verdicts": [{"level": v.level, "name": v.name, "text": v.text} for v in self.verdicts],
            "past_warnings": [{"name": name, "from": first, "to": last} for name, first, last in self.past],
        }


def diagnose(directory: Path) -> Diagnosis:
    """Read the metrics of a run, one that is still going included.

    Raises:
        RunDirectoryError: there is no run there.
        UsageError: it has no training record yet, or a record that is none of ours; the message names the line.
    """
    run = RunDirectory.view(directory)
    records = _training_records(run.metrics_path) if run.metrics_path.is_file() else []
    if not records:
        raise UsageError(
            f"{directory} has no training record in {run.metrics_path.name} yet: wait until the run has taken "
            "log.every_steps steps (updates of a language model)"
        )
    thirds = _thirds(records)
    figures = {
        figure.heading: tuple(_median(figure, part) for part in thirds)
        for figure in FIGURES
        if any(figure.name in record for record in records)
    }
    watch, said = Watch(), dict[str, tuple[int, int]]()
    for record in records:
        watch.add(record)
        step = int(record["step"])
        for verdict in watch.verdicts():
            if verdict.level == "warning":
                said[verdict.name] = (said.get(verdict.name, (step, step))[0], step)
    found = watch.verdicts()
    now = {verdict.name for verdict in found}
    past = [(name, *steps) for name, steps in said.items() if name not in now]
    return Diagnosis(directory=directory, records=len(records), figures=figures, verdicts=found, past=past)


def diagnosis_page(diagnosis: Diagnosis) -> RenderableType:
    """The table, what each figure means, and the verdicts."""
    table = Table(box=None, pad_edge=False, header_style="dim", caption_justify="left")
    table.add_column("figure", style="cyan", no_wrap=True)
    for part in _PARTS:
        table.add_column(part.removesuffix(" third"), justify="right", no_wrap=True)
    table.add_column("what it means", style="dim")
    for figure in FIGURES:
        if (values := diagnosis.figures.get(figure.heading)) is not None:
            written = ["-" if math.isnan(value) else format(value, figure.form) for value in values]
            table.add_row(Text(figure.heading), *written, Text(figure.meaning))
    note = f"medians over the first, the middle and the last third of {diagnosis.records} records"
    lines: list[RenderableType] = [table, Text(note, style="dim"), Text("")]
    for verdict in diagnosis.verdicts:
        style = "bold yellow" if verdict.level == "warning" else "bold"
        lines.append(Text.assemble((f"{verdict.level}: ", style), verdict.text))
    if not diagnosis.verdicts:
        lines.append(Text("nothing wrong in the last records", style="green"))
    for name, first, last in diagnosis.past:
        lines.append(Text(f"earlier, from step {first:,} to {last:,}: {name}", style="dim"))
    return Group(*lines)


def _training_records(path: Path) -> list[Mapping[str, Any]]:
    records: list[Mapping[str, Any]] = []
    for line, record in enumerate(read_metrics(path), start=1):
        if not isinstance(record.get("kind"), str):
            raise UsageError(f'{path}, line {line}, does not say its "kind": the file is damaged; delete that line')
        if record["kind"] != "train":
            continue
        for name in ("step", *_FIGURE_NAMES):
            value = record.get(name, math.nan if name != "step" else None)
            if isinstance(value, bool) or not isinstance(value, int if name == "step" else int | float):
                raise UsageError(
                    f"{path}, line {line}: {name!r} is {value!r}, not a {'whole ' if name == 'step' else ''}number: "
                    "the file is damaged; correct or delete that line"
                )
        records.append(record)
    return records


def _thirds(records: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    count = len(records)
    return [records[count * part // 3 : count * (part + 1) // 3] for part in range(3)]


def _median(figure: Figure, records: Sequence[Mapping[str, Any]]) -> float:
    """The median of what was measured."""
    values: list[float] = []
    for record in records:
        if figure.name not in record:
            continue
        value = float(record[figure.name])
        if figure.relative_to is not None:
            base = float(record.get(figure.relative_to, math.nan))
            value = value / base if base else math.nan
        if not math.isnan(value):
            values.append(value)
    return statistics.median(values) if values else math.nan


def _plain(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")

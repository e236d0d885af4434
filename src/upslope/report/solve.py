"""A solved problem in words and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from upslope.errors import UsageError
from upslope.exact import Ascent
from upslope.report.compare import Comparison, compare
from upslope.report.curve import check_format, draw_group
from upslope.report.optimum import Solved, problem_of
from upslope.report.style import COLOURS, STYLE, need_matplotlib

LEARNER_METRIC = "stochastic_mean"
"""Of a learner: J is that of the policy as it acts, not of its most likely actions."""
_STATES = 24
"""As many states are shown."""
_CERTAIN = 1e-3
"""An action with less probability than this is left out."""


def solved_in_words(solved: Solved) -> list[RenderableType]:
    """What the problem is, the iterations, the optimum and its policy, for a terminal."""
    return [_heading(solved), Text(""), _iterations(solved), Text(""), _ascents(solved), Text(""), *_best(solved)]


def learner_curves(solved: Solved, directories: Sequence[Path]) -> Comparison:
    """The evaluations of runs on this problem, by the policy as it acts.

    Raises:
        UsageError: a run learns somewhere else, or as `compare` does.
    """
    comparison = compare(directories, metric=LEARNER_METRIC)
    for group in comparison.groups:
        for run in group.runs:
            if problem_of(run.settings) != solved.named.name:
                where = run.settings["environment"]["id"]
                raise UsageError(
                    f"{run.directory} learns on {where}, not on problem/{solved.named.name}: give runs on that problem"
                )
    return comparison


def learner_in_words(solved: Solved, comparison: Comparison) -> RenderableType:
    """How near the learners came, in the return that an evaluation measures."""
    best = solved.measured(solved.optimum.policy)
    table = Table(box=None, pad_edge=False, header_style="dim", title="learners", title_justify="left")
    table.title_style = "bold"
    table.add_column("runs")
    for heading in ("seeds", "steps", "return at the end", "of the best policy", "short of it"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in comparison.groups:
        table.add_row(
            group.label,
            str(len(group.runs)),
            f"{max(int(run.steps[-1]) for run in group.runs):,}",
            f"{group.final_mean:,.4g}",
            f"{best:,.4g}",
            f"{best - group.final_mean:,.3g}",
        )
    return table


def draw_solved(solved: Solved, path: Path, comparison: Comparison | None = None) -> Path:
    """Draw policy iteration and both gradient ascents against the optimum; with learners, these beside them.

    Alone, the height is J. With learners it is what their evaluations measure, the mean undiscounted return of an
    episode, for the exact policies too.

    Args:
        solved: the problem.
        path: where to save; its ending says how: .png, .svg or .pdf.
        comparison: of runs on the problem, as `learner_curves` makes it.

    Raises:
        UsageError: another ending.
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_format(path)
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    with rc_context(STYLE):
        wide = comparison is not None
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        panels = list(figure.subplots(1, 2 if wide else 1, sharey=True, squeeze=False)[0])
        best = solved.measured(solved.optimum.policy) if wide else solved.optimum.objective
        _draw_exact(panels[0], solved, measured=wide)
        for axes in panels:
            axes.axhline(
                best, color="black", linestyle="--", linewidth=1.2, label="optimum" if axes is panels[0] else None
            )
            axes.margins(x=0.02)
        panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_xlabel("iterations, exact")
        panels[0].set_title(f"problem/{solved.named.name}")
        average = solved.named.mdp.kind == "continuing"
        panels[0].set_ylabel("mean return of an episode" if wide else "average reward" if average else "J")
        if comparison is not None:
            for index, group in enumerate(comparison.groups):
                draw_group(panels[1], group, COLOURS[(index + 3) % len(COLOURS)])
            panels[1].set_xlabel("environment steps, learner")
            panels[1].set_xlim(left=0)
            panels[1].xaxis.set_major_formatter(EngFormatter(sep=""))
        _legend(figure, panels)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else {})
    return path


def solved_tree(solved: Solved) -> dict[str, Any]:
    """All of it for a JSON file."""
    named = solved.named
    return {
        "problem": named.name,
        "kind": named.mdp.kind,
        "gamma": named.mdp.gamma,
        "optimum": {
            "objective": solved.optimum.objective,
            "found_by": "policy iteration" if solved.optimum.search is None else "local search",
            "return_in_evaluation": solved.measured(solved.optimum.policy),
            "policy": solved.optimum.policy.tolist(),
        },
        "policy_iteration": [
            {
                "actions": one.actions.tolist(),
                "value": [None if value != value else value for value in one.value.tolist()],
                "objective": one.objective,
                "changed": one.changed,
            }
            for one in solved.iteration.iterations
        ],
        **{
            f"{ascent.direction}_ascent": {
                "objective": ascent.objective.tolist(),
                "largest_slope": ascent.slope.tolist(),
                "step_size": ascent.step_size.tolist(),
                "converged": ascent.converged,
                "policy": ascent.policy[-1].tolist(),
            }
            for ascent in (solved.plain, solved.natural)
        },
    }


def _draw_exact(axes: Any, solved: Solved, *, measured: bool) -> None:
    mdp = solved.named.mdp
    tables = [torch.nn.functional.one_hot(one.actions, mdp.actions).double() for one in solved.iteration.iterations]
    heights = (
        [solved.measured(table) for table in tables]
        if measured
        else [one.objective for one in solved.iteration.iterations]
    )
    axes.plot(
        range(len(heights)),
        heights,
        color=COLOURS[2],
        marker="o",
        markersize=4,
        label="policy iteration (sees the state)",
    )
    for colour, ascent in zip(COLOURS[:2], (solved.natural, solved.plain), strict=True):
        curve = [solved.measured(table) for table in ascent.policy] if measured else ascent.objective.tolist()
        axes.plot(range(len(curve)), curve, color=colour, linewidth=1.6, label=f"{_name(ascent)}")


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    entries = [entry for axes in panels for entry in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles, labels = [handle for handle, _ in entries], [label for _, label in entries]
    columns = 2 if max(map(len, labels)) < 48 else 1
    figure.set_figheight(figure.get_figheight() + 0.2 * (len(labels) + columns - 1) / columns)
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def _name(ascent: Ascent) -> str:
    return "gradient ascent" if ascent.direction == "plain" else "natural gradient ascent"


def _heading(solved: Solved) -> Text:
    named, mdp = solved.named, solved.named.mdp
    goal = "average reward" if mdp.kind == "continuing" else f"gamma {mdp.gamma:g}"
    limit = "" if named.limit is None else f", episodes cut after {named.limit} steps"
    return Text.assemble(
        (named.name, "bold green"),
        f"  {named.summary}\n",
        (f"{mdp.states} states, {mdp.actions} actions, {goal}{limit}", "dim"),
    )


def _iterations(solved: Solved) -> Table:
    table = _table("policy iteration")
    for heading in ("iteration", _goal(solved), "states that change"):
        table.add_column(heading, justify="right")
    for number, one in enumerate(solved.iteration.iterations):
        table.add_row(str(number), f"{one.objective:.10g}", str(one.changed) if one.changed else "none: optimal")
    return table


def _ascents(solved: Solved) -> Table:
    table = _table("gradient ascent, exact")
    for heading in ("step", f"{_goal(solved)}, plain", "natural"):
        table.add_column(heading, justify="right")
    longest = max(len(solved.plain.objective), len(solved.natural.objective))
    shown = [step for step in _spread() if step < longest - 1]
    for step in [*shown, longest - 1]:
        table.add_row(str(step), *(_at(ascent, step) for ascent in (solved.plain, solved.natural)))
    return table


def _spread() -> list[int]:
    return [0, *(factor * 10**power for power in range(6) for factor in (1, 2, 5))]


def _at(ascent: Ascent, step: int) -> str:
    """J after that step; of an ascent that is over, J at its end and when that was."""
    last = len(ascent.objective) - 1
    if step < last or (step == last and not ascent.converged):
        return f"{float(ascent.objective[step]):.10g}"
    ending = "converged" if ascent.converged else "ended"
    return f"{float(ascent.objective[-1]):.10g} ({ending} at {last})"


def _best(solved: Solved) -> list[RenderableType]:
    found, goal = solved.optimum, _goal(solved)
    lines: list[RenderableType] = []
    if found.search is None:
        lines.append(Text.assemble(("the best policy: ", "bold"), f"{goal} = {found.objective:.10g}, proven"))
    else:
        reached = sorted((float(ascent.objective[-1]) for ascent in found.search.ascents), reverse=True)
        lines.append(
            Text.assemble(
                ("the best policy of what is seen: ", "bold"),
                f"{goal} = {found.objective:.10g}, by local search from {len(reached)} policies (they came to "
                f"{reached[0]:.6g} to {reached[-1]:.6g}), which proves nothing; who sees the state has "
                f"{solved.iteration.best.objective:.10g}",
            )
        )
    measured = solved.measured(found.policy)
    lines.append(Text(f"an evaluation of it would measure a mean return of {measured:.10g}", style="dim"))
    return [*lines, Text(""), _policy(solved)]


def _policy(solved: Solved) -> RenderableType:
    """The actions of the best policy, by state, or by what is seen."""
    mdp, found = solved.named.mdp, solved.optimum
    going = (~mdp.terminal).nonzero().squeeze(-1)
    table = _table("the best policy" if found.search is None else "the best policy, by what is seen")
    by_state = found.search is None
    table.add_column("state" if by_state else "seen", justify="right")
    table.add_column("action")
    if by_state:
        table.add_column("v", justify="right")
    rows: dict[str, list[str]] = {}
    for state in going.tolist():
        label = str(state) if by_state else str(mdp.observation[state].tolist())
        value = [f"{float(solved.iteration.best.value[state]):.6g}"] if by_state else []
        rows.setdefault(label, [label, _actions(found.policy[state].numpy()), *value])
    for row in list(rows.values())[:_STATES]:
        table.add_row(*row)
    if len(rows) > _STATES:
        table.caption = f"and {len(rows) - _STATES} more: --json FILE has all"
    return table


def _actions(probability: np.ndarray) -> str:
    likely = [(action, share) for action, share in enumerate(probability) if share > _CERTAIN]
    if len(likely) == 1:
        return str(likely[0][0])
    return ", ".join(f"{action} with {share:.4f}" for action, share in likely)


def _goal(solved: Solved) -> str:
    return "average reward" if solved.named.mdp.kind == "continuing" else "J"


def _table(title: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", title=title, title_justify="left")
    table.title_style = "bold"
    return table

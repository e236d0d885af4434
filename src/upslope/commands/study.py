"""A search with Optuna whose trials are runs in processes of their own, kept in a file of JSON lines.

A trial is the recipe with values for the searched settings, trained from one seed or several; its value is the mean
final evaluation of these runs. Trials that are worse half-way than the median of the others are given up. One that
fails is recorded as failed. The study goes on after whatever ended it: a trial that was under way goes on from its
checkpoints, under a new number.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from upslope.errors import UsageError
from upslope.report.compare import DEFAULT_METRIC, LANGUAGE_METRICS, LESS_IS_BETTER
from upslope.train.language import LanguageRun
from upslope.train.many import Ended, Job, Pool, Stop, Watched, heed
from upslope.train.run_directory import RunDirectory, RunDirectoryError
from upslope.train.search_space import Searched, as_settings
from upslope.train.session import AnyRun

JOURNAL = "journal.jsonl"
"""Where Optuna keeps the study."""
TRIALS = "trials"
"""Where the runs are."""
PLACE, ERROR, RESUMES, VALUES, METRIC = "place", "error", "resumes", "values", "metric"
"""What is noted about a trial, or the study."""
_STARTUP = 10
"""Trials drawn blindly before the others are learnt from, and fewest before one is given up: half as many."""
_PATIENCE = 60.0
"""Seconds for which a run of an earlier session is waited for, which saves itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is searched, and how.

    Attributes:
        recipe: its name.
        run: its configuration, with the settings.
        settings: of every trial.
        space: what is searched.
        seeds: of every trial.
        trials: how many are to have ended in all.
        jobs: processes side by side.
        prune: whether trials are given up half-way.
        metric: what they are judged by; None for what runs of that kind usually are.
        seed: of the search.
    """

    recipe: str
    run: AnyRun
    settings: tuple[str, ...]
    space: tuple[Searched, ...]
    seeds: tuple[int, ...]
    trials: int
    jobs: int
    prune: bool
    metric: str | None
    seed: int


@dataclass(slots=True)
class _Open:
    """A trial under way."""

    trial: optuna.Trial
    place: str
    values: dict[str, str]
    waiting: list[int]
    watched: dict[int, Watched]
    judged: dict[int, dict[int, float]] = field(default_factory=dict[int, dict[int, float]])
    final: dict[int, float] = field(default_factory=dict[int, float])
    figures: set[str] = field(default_factory=set[str])
    running: set[int] = field(default_factory=set[int])
    reported: int = 0
    given_up: bool = False
    error: str = ""

    @property
    def over(self) -> bool:
        return not self.running and (not self.waiting or self.given_up or bool(self.error))


class Study:
    """The study of one directory, which is locked.

    Args:
        directory: of the study.
        plan: what is searched.
        tell: says something to the user.
    """

    def __init__(self, directory: Path, plan: Plan, tell: Callable[[str], None]) -> None:
        self.directory, self.plan, self.tell = directory, plan, tell
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = directory.resolve() / JOURNAL
        _mend(path)
        storage = JournalStorage(JournalFileBackend(str(path)))
        names = optuna.get_all_study_names(storage)
        before = len(optuna.load_study(study_name=names[0], storage=storage).trials) if names else 0
        self.study = optuna.create_study(
            study_name=directory.name,
            storage=storage,
            direction="maximize",
            sampler=optuna.samplers.TPESampler(n_startup_trials=_STARTUP, seed=plan.seed + before),
            pruner=_pruner(plan),
            load_if_exists=True,
        )
        if plan.metric is not None:
            self.study.set_user_attr(METRIC, plan.metric)
        self._open: list[_Open] = []
        self._take_up()

    @property
    def metric(self) -> str | None:
        """What trials are judged by; None as long as none was."""
        return self.study.user_attrs.get(METRIC)

    @property
    def sign(self) -> float:
        """-1 where less is better: Optuna maximises."""
        return -1.0 if self.metric in LESS_IS_BETTER else 1.0

    def ended(self) -> list[FrozenTrial]:
        """Trials that count: finished, given up or failed, but not those that were interrupted."""
        over = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        taken_up = {one.user_attrs.get(RESUMES) for one in self.study.get_trials()}
        return [one for one in self.study.get_trials(states=over) if one.number not in taken_up]

    def complete(self) -> list[FrozenTrial]:
        """Trials that came to their end, best first."""
        found = self.study.get_trials(states=(TrialState.COMPLETE,))
        return sorted(found, key=lambda one: -(one.value if one.value is not None else -math.inf))

    def search(self, stop: Stop) -> None:
        """Run trials until there are enough, or the user wants an end; those under way can then be taken up again."""
        with Pool(self.plan.jobs) as pool:
            while not stop.asked:
                self._begin(pool)
                if not self._open:
                    return
                heed(pool, stop)
                for ended in pool.ended():
                    self._note(ended)
                for one in self._open:
                    self._look(one, pool)
                for one in [one for one in self._open if one.over]:
                    self._close(one)
                if not pool.running:
                    time.sleep(0.01)
            while pool.running:
                heed(pool, stop)
                pool.ended()

    def _take_up(self) -> None:
        """What was under way when an earlier session ended goes on as a new trial with the same values and runs."""
        for one in self.study.get_trials(states=(TrialState.RUNNING,)):
            place = one.user_attrs.get(PLACE, f"trial-{one.number}")
            self.study.enqueue_trial(one.params, user_attrs={PLACE: place, RESUMES: one.number})
            self.study.tell(one.number, state=TrialState.FAIL)
            self.tell(f"trial {one.number} was interrupted and goes on")

    def _begin(self, pool: Pool) -> None:
        """Fill what room there is, first with seeds of trials that have begun."""
        while pool.free:
            waiting = next((one for one in self._open if one.waiting and not one.given_up and not one.error), None)
            if waiting is None:
                if len(self.ended()) + len(self._open) >= self.plan.trials:
                    return
                waiting = self._ask()
            seed = waiting.waiting.pop(0)
            waiting.running.add(seed)
            pool.start(self._job(waiting, seed))

    def _ask(self) -> _Open:
        trial = self.study.ask()
        values = {part.name: part.suggest(trial) for part in self.plan.space}
        place = trial.user_attrs.get(PLACE, f"trial-{trial.number}")
        trial.set_user_attr(PLACE, place)
        trial.set_user_attr(VALUES, values)
        root = self.directory / TRIALS
        watched = {seed: Watched(root / f"{place}-seed{seed}" / "metrics.jsonl") for seed in self.plan.seeds}
        one = _Open(trial=trial, place=place, values=values, waiting=list(self.plan.seeds), watched=watched)
        self._open.append(one)
        return one

    def _job(self, one: _Open, seed: int) -> Job:
        """Train the seed of a trial, or go on with it where it has begun."""
        root, name = self.directory / TRIALS, f"{one.place}-seed{seed}"
        label = f"{one.trial.number} {seed}"
        if (root / name / "config.json").is_file():
            _wait_until_free(root / name)
            own = type(self.plan.run.algorithm).__module__.startswith("upslope.")
            words = ("resume", str(root / name), *(() if own else ("--recipe", self.plan.recipe)))
            return Job(name=label, arguments=words, directory=root / name)
        (root / name).mkdir(parents=True, exist_ok=True)
        found = as_settings(list(one.values.items()))
        where = ("--seed", str(seed), "--name", name, "--directory", str(root))
        words = ("train", self.plan.recipe, *self.plan.settings, *found, *where)
        return Job(name=label, arguments=words, directory=root / name)

    def _note(self, ended: Ended) -> None:
        """A process is over."""
        number, seed = map(int, ended.job.name.split())
        one = next(one for one in self._open if one.trial.number == number)
        one.running.discard(seed)
        if ended.finished:
            self._read(one, seed)
            if one.judged.get(seed):
                one.final[seed] = one.judged[seed][max(one.judged[seed])]
            else:
                one.error = _unjudged(seed, self.metric, one.figures)
        elif not one.given_up and not one.error:
            cause = f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
            one.error = f"seed {seed}: {ended.last_words() or cause}"

    def _read(self, one: _Open, seed: int) -> None:
        """New evaluations of one seed."""
        for record in one.watched[seed].new():
            if record.get("kind") == "evaluation":
                metric = self.metric or self._decide(record)
                one.figures |= {name for name, figure in record.items() if isinstance(figure, float)}
                value = record.get(metric)
                if isinstance(value, float | int):
                    one.judged.setdefault(seed, {})[int(record["step"])] = self.sign * float(value)

    def _decide(self, record: dict[str, Any]) -> str:
        """What trials are judged by, from the first evaluation there is."""
        if not isinstance(self.plan.run, LanguageRun):
            metric = DEFAULT_METRIC
        else:
            metric = next((name for name in LANGUAGE_METRICS if name in record), LANGUAGE_METRICS[0])
        self.study.set_user_attr(METRIC, metric)
        return metric

    def _look(self, one: _Open, pool: Pool) -> None:
        """Read what a trial's runs have written; report what all of them have, and give it up if that is too bad."""
        for seed in one.running:
            self._read(one, seed)
        if one.error:
            for seed in one.running:
                pool.stop(f"{one.trial.number} {seed}")
        judged = [list(one.judged.get(seed, {}).values()) for seed in self.plan.seeds]
        known = min(len(values) for values in judged)
        while one.reported < known and not one.given_up and not one.error:
            value = sum(values[one.reported] for values in judged) / len(judged)
            if math.isnan(value):
                one.error = f"evaluation {one.reported} of it is not a number"
                return
            one.trial.report(value, one.reported)
            one.reported += 1
            if one.running and one.trial.should_prune():
                one.given_up = True
        if one.given_up:
            for seed in one.running:
                pool.stop(f"{one.trial.number} {seed}")

    def _close(self, one: _Open) -> None:
        """Tell Optuna, and the user, how a trial ended."""
        self._open.remove(one)
        number, shown = one.trial.number, ", ".join(f"{name}={value}" for name, value in one.values.items())
        if one.error:
            one.trial.set_user_attr(ERROR, one.error)
            self.study.tell(one.trial, state=TrialState.FAIL)
            self.tell(f"trial {number} failed: {one.error}  ({shown})")
        elif one.given_up:
            self.study.tell(one.trial, state=TrialState.PRUNED)
            self.tell(f"trial {number} given up after evaluation {one.reported}  ({shown})")
        else:
            value = sum(one.final.values()) / len(one.final)
            self.study.tell(one.trial, value)
            best = self.study.best_trial
            assert best.value is not None
            self.tell(
                f"trial {number}: {self.sign * value:,.4g}  (best {self.sign * best.value:,.4g}, trial {best.number})"
                f"  {shown}"
            )


def importances(study: Study) -> dict[str, float]:
    """The share of each setting in what makes a trial one of the best; empty where too few came to their end.

    Args:
        study: which.
    """
    complete = study.complete()
    values = {one.value for one in complete}
    if len(complete) < 4 or len(values) < 2:
        return {}
    return optuna.importance.get_param_importances(
        study.study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
    )


def shares(found: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """The importances of the settings that are searched, largest first."""
    return {name: found[name] for name in sorted(found, key=lambda name: -found[name]) if name in names}


def _unjudged(seed: int, metric: str | None, figures: set[str]) -> str:
    """Why nothing is known of a seed that came to its end."""
    if not figures:
        return f"seed {seed} was never evaluated: set evaluation.times or evaluation.final_episodes"
    return f"no evaluation of seed {seed} has the figure {metric!r}: name one of {', '.join(sorted(figures))}"


def _pruner(plan: Plan) -> optuna.pruners.BasePruner:
    if not plan.prune:
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=_STARTUP // 2, n_warmup_steps=1)


def _mend(path: Path) -> None:
    """After a kill: no lock is left, and the journal ends with a whole line."""
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if not path.is_file():
        return
    with path.open("r+b") as file:
        written = file.read()
        whole = written.rfind(b"\n") + 1
        if whole < len(written):
            file.truncate(whole)
            os.fsync(file.fileno())


def _wait_until_free(directory: Path) -> None:
    """A run that an earlier session left behind saves itself and ends; that takes a moment.

    Raises:
        UsageError: it takes much longer.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            RunDirectory.open(directory).close()
        except RunDirectoryError as error:
            if time.monotonic() > until:
                raise UsageError(str(error)) from error
            time.sleep(0.2)
        else:
            return

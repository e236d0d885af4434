"""A language model in training: everything that moves, one update at a time, and as a tree that a checkpoint holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from upslope.algorithms import KTO
from upslope.algorithms.protocol import Now, scheduled
from upslope.collect.completions import CompletionCollector
from upslope.collect.demonstrations import DemonstrationCollector
from upslope.collect.errors import NonFiniteError
from upslope.collect.experience import CompletionConfig, DemonstrationConfig
from upslope.collect.pairs import PairCollector
from upslope.collect.text_rows import preview
from upslope.diagnostics import Meter
from upslope.errors import UsageError
from upslope.streams import LateStream, Purpose
from upslope.train.language.completions_file import CompletionsFile
from upslope.train.language.config import LanguageRun
from upslope.train.language.frozen import PAIRS, Frozen, check_hashes, engine_of, on_device
from upslope.train.language.shown import figures_of
from upslope.train.manifest import CheckpointError
from upslope.train.optimizer import FlatOptimizer, NonFiniteGradientError
from upslope.train.run_directory import RunDirectory
from upslope.train.saving import save
from upslope.train.session import ResumeError
from upslope.train.step import learn
from upslope.trajectory import Tree

if TYPE_CHECKING:
    from upslope.policies.language.policy import LanguagePolicy

LanguageCollector: TypeAlias = CompletionCollector | DemonstrationCollector | PairCollector

_OF_SAMPLED = ("kl", "first_ratio_error", "effective_sample_size", "mismatch")
"""Figures that compare with the policy that sampled: of data that nobody sampled there are none."""


class LanguageSession:
    """Policy, optimiser, collector and counters of one run; a `Session`.

    Args:
        run: the configuration, resolved.
        frozen: what the run begins with; its rewards are closed with the session.
    """

    failures = (UsageError, NonFiniteError, NonFiniteGradientError)

    def __init__(self, run: LanguageRun, frozen: Frozen) -> None:
        self.run = run
        self.frozen = frozen
        self.policy: LanguagePolicy = frozen.policy
        self.figures = figures_of(run)
        self.optimizer = FlatOptimizer(self.policy, run.optimizer)
        self.meter = Meter(_actor_gradient(self.policy, self.optimizer)) if run.log.diagnose_every else None
        self.collector = _collector(run, frozen)
        self.algorithm = run.algorithm
        self.algorithm_state = self.algorithm.initial_state()
        self.update = 0
        self.episodes = 0
        self._before = self.collector.snapshot()
        self._completions: CompletionsFile | None = None
        self._completions_end = 0
        self._advantage: Tensor | None = None
        self._tell: Callable[[str], None] = lambda text: None

    @property
    def steps(self) -> int:
        """Updates taken: what the length of such a run is counted in."""
        return self.update

    @property
    def progress(self) -> float:
        """The share of the run's updates already taken."""
        return min(self.update / self.run.steps, 1.0)

    def open(self, directory: RunDirectory, tell: Callable[[str], None], *, resumed: bool) -> None:
        """Open the file of completions."""
        self._tell = tell
        if self.run.log.completions and isinstance(self.collector, CompletionCollector):
            at = self._completions_end if resumed else None
            self._completions = CompletionsFile(directory.completions_path, resume_at=at)

    def advance(self) -> dict[str, float]:
        """One update: collect and learn."""
        run, policy = self.run, self.policy
        self._before = self.collector.snapshot()
        start = time.perf_counter()
        trajectory = on_device(run.device, self.collector.collect(policy, self.update))
        collected = time.perf_counter()
        if self.update == 0:
            self._tell("the first sequence: " + preview(trajectory, 0, policy.tokenizer))
        learning_rate = scheduled(run.optimizer.schedule, run.optimizer.learning_rate, self.progress)
        if self.meter is not None:
            self.meter.look(closely=self.update % run.log.diagnose_every == 0)
        begun = time.perf_counter()
        learned = learn(
            policy,
            self.algorithm,
            self.optimizer,
            trajectory,
            now=Now(progress=self.progress, state=self.algorithm_state),
            learning_rate=learning_rate,
            generator=LateStream(run.seed, Purpose.SHUFFLE, 0, self.update),
            meter=self.meter,
            reference=self.frozen.reference,
        )
        self._advantage = learned.advantage
        self.algorithm_state = learned.state
        self.update += 1
        self.episodes += len(trajectory.mask)
        metrics = {**learned.metrics, **{f"state/{name}": number for name, number in learned.state.items()}}
        if not isinstance(self.collector, CompletionCollector):
            metrics = {name: value for name, value in metrics.items() if name not in _OF_SAMPLED}
        metrics |= self.collector.metrics()
        metrics["learning_rate"], metrics["progress"] = learning_rate, self.progress
        metrics["collect_seconds"] = collected - start
        metrics["learn_seconds"] = time.perf_counter() - begun
        tokens = metrics["generated_tokens"] if "generated_tokens" in metrics else float(trajectory.mask.sum())
        metrics["tokens_per_second"] = tokens / max(metrics["collect_seconds"] + metrics["learn_seconds"], 1e-9)
        return metrics

    def logged(self) -> None:
        """Keep some completions of the update whose metrics were written."""
        if self._completions is None or not isinstance(self.collector, CompletionCollector):
            return
        collected = self.collector.last
        if collected is not None and collected.update == self.update - 1:
            lines = collected.lines(self.policy.tokenizer, self._advantage)
            self._completions.write(islice(lines, self.run.log.completions))

    def state(self, *, collector: bool = True) -> Tree:
        """All of it; of a collector that failed, as it stood before the update that did not come about.

        Raises:
            CheckpointError: if weights are not finite: older checkpoints, which can be gone on from, stay.
        """
        self._check_weights()
        return {
            "update": self.update,
            "episodes": self.episodes,
            "frozen": dict(self.frozen.hashes),
            "algorithm": dict(self.algorithm_state),
            "trainable": {name: parameter.detach() for name, parameter in self._trainable().items()},
            "optimizer": self.optimizer.state(),
            "meter": None if self.meter is None else self.meter.state(),
            "collector": self.collector.snapshot() if collector else self._before,
            "completions": self._completions_end if self._completions is None else self._completions.cursor(),
        }

    def load_state(self, tree: Tree) -> None:
        """Go on from `state()`.

        Raises:
            ResumeError: if the frozen policies, the model or the data are not those of the checkpoint.
        """
        check_hashes(self.frozen.hashes, tree["frozen"])
        trainable, saved = self._trainable(), tree["trainable"]
        if {name: value.shape for name, value in trainable.items()} != {name: v.shape for name, v in saved.items()}:
            raise ResumeError("the checkpoint's model is not the one configured: resume without changing the model")
        for name, parameter in trainable.items():
            parameter.data.copy_(saved[name])
        self.optimizer.load_state(tree["optimizer"])
        if self.meter is not None and tree["meter"] is not None:
            self.meter.load_state(tree["meter"])
        self.algorithm_state = dict(tree["algorithm"])
        self.update, self.episodes = tree["update"], tree["episodes"]
        self._completions_end = tree["completions"]
        try:
            self.collector.restore(tree["collector"])
        except ValueError as error:
            raise ResumeError(str(error)) from error

    def _trainable(self) -> dict[str, Any]:
        """What training moves; everything else is as it was at the start."""
        return {name: value for name, value in self.policy.named_parameters() if value.requires_grad}

    def _check_weights(self) -> None:
        if not bool(torch.isfinite(self.optimizer.flat).all()):
            raise CheckpointError(
                "the model's weights are NaN or infinite: training has diverged. Start a new run from the last good "
                "policy (start_from) with a lower learning rate"
            )

    def save_policy(self, path: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        save(self.policy, path)

    def resume_command(self, directory: Path) -> list[str]:
        """The words of the command that goes on with the run."""
        return ["upslope", "resume", str(directory)]

    def close(self) -> None:
        """End the rewards' processes and close the file of completions."""
        self.collector.close()
        if self.frozen.rewards is not None:
            self.frozen.rewards.close()
        if self._completions is not None:
            self._completions.close()


def _collector(run: LanguageRun, frozen: Frozen) -> LanguageCollector:
    task, tokenizer, experience = frozen.task, frozen.policy.tokenizer, run.experience
    context = frozen.policy.context
    if isinstance(experience, DemonstrationConfig):
        labelled = isinstance(run.algorithm, KTO)
        return DemonstrationCollector(task, tokenizer, experience, seed=run.seed, context=context, labelled=labelled)
    if isinstance(experience, CompletionConfig):
        if frozen.rewards is None:
            raise UsageError(
                f"{type(run.algorithm).__name__} learns from rewards, and the task {task.name!r} has none: give rewards"
            )
        engine = engine_of(frozen.policy, run.seed, experience.slots)
        return CompletionCollector(task, tokenizer, engine, frozen.rewards, experience, seed=run.seed, context=context)
    pairs = frozen.pairs[PAIRS] if experience.drawn is not None else task.training
    return PairCollector(pairs, tokenizer, experience, seed=run.seed, context=context)


def _actor_gradient(policy: LanguagePolicy, optimizer: FlatOptimizer) -> Tensor:
    """The gradient of all but the value head, which stands at an end of the flat buffer."""
    if policy.value_head is None:
        return optimizer.gradient
    head = {id(parameter) for parameter in policy.value_head.parameters()}
    start = end = position = 0
    for parameter in policy.parameters():
        if parameter.requires_grad:
            if id(parameter) not in head:
                start, end = (start if end else position), position + parameter.numel()
            position += parameter.numel()
    return optimizer.gradient[start:end]

"""The configuration of a run that trains a language model: frozen settings whose defaults stand here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from upslope.algorithms import (
    A2C,
    GRPO,
    KTO,
    NPG,
    PPO,
    RLOO,
    SFT,
    TRPO,
    ImportanceSampled,
    Preference,
    Reinforce,
    RewardModel,
    VTraceActorCritic,
)
from upslope.collect.experience import CompletionConfig, DemonstrationConfig, PairConfig
from upslope.collect.rewards.http import OUTAGE
from upslope.collect.tasks.arithmetic import Addition, ThinkOrBlurt
from upslope.collect.tasks.calculator import Calculator
from upslope.collect.tasks.countdown import Countdown
from upslope.collect.tasks.files import Files
from upslope.collect.tasks.gym import ReasoningGym
from upslope.collect.tasks.protocol import Task
from upslope.policies.language.config import LanguageModelConfig
from upslope.train.config import CheckpointConfig, LogConfig, OptimizerConfig
from upslope.train.settings import START as START
from upslope.train.settings import at_least, check_choices, check_gamma, check_natural, check_numbers, check_threads


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenTask:
    """What stands for a task that was passed as an object, which no file can hold."""

    name: str
    """As the task calls itself."""

    def build(self, seed: int) -> Task:
        """There is nothing to build it from.

        Raises:
            ValueError: always, with what to do.
        """
        raise ValueError(f"the task {self.name!r} was passed as an object: pass it again, task=... in Python")


TaskSettings: TypeAlias = Addition | ThinkOrBlurt | Countdown | Calculator | ReasoningGym | Files | GivenTask
"""The tasks a configuration file may name."""

LanguageAlgorithm: TypeAlias = (
    Reinforce
    | A2C
    | RLOO
    | GRPO
    | PPO
    | TRPO
    | NPG
    | VTraceActorCritic
    | ImportanceSampled
    | SFT
    | Preference
    | KTO
    | RewardModel
)
"""The algorithms a language model may be trained by in a configuration file."""

_LEARNS_FROM: Final[dict[type[Any], tuple[type[Any], ...]]] = {
    Reinforce: (CompletionConfig,),
    A2C: (CompletionConfig,),
    RLOO: (CompletionConfig,),
    GRPO: (CompletionConfig,),
    PPO: (CompletionConfig,),
    TRPO: (CompletionConfig,),
    NPG: (CompletionConfig,),
    VTraceActorCritic: (CompletionConfig,),
    ImportanceSampled: (CompletionConfig,),
    SFT: (DemonstrationConfig,),
    Preference: (PairConfig,),
    KTO: (PairConfig, DemonstrationConfig),
    RewardModel: (PairConfig,),
}

Experience: TypeAlias = CompletionConfig | DemonstrationConfig | PairConfig
"""What an update sees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """How reward functions are called."""

    workers: int = 2
    """Processes that call them; functions of the library's own that cannot hang are called without one."""
    deadline: float = 10.0
    """Seconds a call may take; one that takes longer is ended, and its completions have failed."""

    outage: float = OUTAGE
    """Seconds beside the deadline for which an HTTP endpoint that cannot be reached, or is overloaded, is asked again;
    an update in which all rewards fail ends the run, which can be resumed."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        at_least(1, workers=self.workers)
        check_numbers(self)
        if not self.outage >= 0.0:
            raise ValueError(f"outage is a number of seconds of at least 0, got {self.outage}")
        if not self.deadline > 0.0:
            raise ValueError(f"deadline is a number of seconds above 0, got {self.deadline}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageEvaluationConfig:
    """Evaluation on held-out prompts: the likeliest completion, and several that are drawn."""

    times: int = 10
    """How often during the run, evenly spread, after once before the first update and beside once at the end; 0 for
    never."""
    updates_between: int = 20
    """Fewest updates between two during the run, so that a short trial run is not mostly judged: one of 50 updates is
    judged at most twice on its way, however large `times` is."""
    prompts: int = 256
    """Held-out prompts, the first ones; all if there are fewer. Pairs or demonstrations, where these are judged."""
    samples: int = 4
    """Completions drawn per prompt, beside the likeliest."""
    pass_at: tuple[int, ...] = (4,)
    """Each k of pass@k: how likely one of k drawn completions is right; at most `samples`."""
    limit: int = 256
    """Most tokens of a completion, where training draws none."""
    shown: int = 4
    """Completions kept in samples.json, before and after."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        at_least(0, times=self.times, shown=self.shown)
        at_least(1, updates_between=self.updates_between, prompts=self.prompts, samples=self.samples, limit=self.limit)
        if any(not 1 <= k <= self.samples for k in self.pass_at):
            raise ValueError(
                f"pass@k is estimated from the {self.samples} samples of a prompt: each k of pass_at lies between 1 "
                f"and samples, got {self.pass_at}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageLogConfig(LogConfig):
    """Where metrics go besides metrics.jsonl; steps are updates here."""

    every_steps: int = 1
    """One line of metrics per this many updates."""
    diagnose_every: int = 5
    """Look closely at one update in this many; 0 for never."""
    completions: int = 4
    """Sequences of each logged update that completions.jsonl keeps, with rewards, advantages and log-probs; 0 for
    none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageRun:
    """Everything that decides a run that trains a language model."""

    recipe: str = "custom"
    """Which recipe this came from; names the run directory."""
    start_from: str | None = None
    """The policy to begin with: a policy folder, a run directory, or the name of a recipe, whose result is taken; None
    for `model.source`, or a model built anew."""
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    """The model; with `start_from` its source and shape are that policy's."""
    task: TaskSettings
    """Prompts, answers and rewards."""
    experience: Experience = field(default_factory=CompletionConfig)
    """What an update sees: completions of the policy's own, demonstrations, or pairs."""
    algorithm: LanguageAlgorithm
    """What learns."""
    reference: str | None = None
    """The frozen policy that the algorithm stays close to, where it does: "start", a policy folder or a run directory;
    None where the algorithm has none."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How parameters move."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    """How reward functions are called."""
    evaluation: LanguageEvaluationConfig = field(default_factory=LanguageEvaluationConfig)
    """How the policy is judged."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What survives."""
    log: LanguageLogConfig = field(default_factory=LanguageLogConfig)
    """What is seen."""
    steps: int = 100
    """Updates of the whole run."""
    seed: int = 1
    """Decides every random number of the run."""
    threads: int = 2
    """CPU threads of this process."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model lies."""
    name: str | None = None
    """Name of the run directory; None makes one from recipe and seed."""
    directory: Path = Path("runs")
    """Where run directories are made."""

    def __post_init__(self) -> None:
        """Refuse combinations that have no meaning."""
        at_least(1, steps=self.steps)
        check_threads(self.threads)
        at_least(0, seed=self.seed, diagnose_every=self.log.diagnose_every, completions=self.log.completions)
        at_least(1, every_steps=self.log.every_steps)
        check_gamma(self.algorithm.gamma)
        check_numbers(self.algorithm)
        check_numbers(self.optimizer)
        own = (self.algorithm,) if type(self.algorithm) in get_args(LanguageAlgorithm) else ()
        for part in (self, self.model, self.optimizer, *own):
            check_choices(part)
        check_natural(self)
        check_combination(self)

    @property
    def judges_pairs(self) -> bool:
        """Whether a reward model is trained: it is judged by pairs and writes nothing."""
        return isinstance(self.algorithm, RewardModel)


def check_combination(run: LanguageRun) -> None:
    """Refuse settings that are each in order and mean nothing together.

    Raises:
        ValueError: with what to set instead.
    """
    _check_start(run)
    name, passes, experience = type(run.algorithm).__name__, run.algorithm.passes, run.experience
    fitting = _LEARNS_FROM[type(run.algorithm)] if type(run.algorithm) in _LEARNS_FROM else (type(experience),)
    if type(experience) not in fitting:
        raise ValueError(
            f"{name} learns from other experience: set experience to {' or '.join(kind.__name__ for kind in fitting)}, "
            f"got {type(experience).__name__}"
        )
    if passes.groups and isinstance(experience, CompletionConfig) and experience.group < 2:
        raise ValueError(
            f"{name} compares the completions of a prompt with each other, and experience.group={experience.group} "
            "makes no groups: set it to at least 2 (8, say)"
        )
    if passes.critic and not run.model.value_head:
        raise ValueError(f"{name} needs a critic: set model.value_head to True")
    if run.model.value_head and not passes.critic:
        raise ValueError(f"{name} as configured has no critic: set model.value_head to False")
    if passes.reference != "none" and run.reference is None:
        raise ValueError(
            f"{name} measures how far the policy is from a frozen reference: set reference to {START!r}, or to a folder"
        )
    if passes.reference == "none" and run.reference is not None:
        raise ValueError(f"{name} as configured has no reference: set reference to None, or a KL coefficient above 0")
    if passes.minibatches > (count := _sets(experience)):
        raise ValueError(
            f"an update of {count} rows (or pairs) cannot be cut into {passes.minibatches} minibatches: collect more "
            "per update, or lower algorithm.minibatches"
        )


def _sets(experience: Experience) -> int:
    """Rows of an update, or pairs."""
    if isinstance(experience, CompletionConfig):
        return experience.prompts * experience.group
    return experience.rows if isinstance(experience, DemonstrationConfig) else experience.pairs


def _check_start(run: LanguageRun) -> None:
    if run.start_from is not None and run.model.source is not None:
        raise ValueError(
            f"a run begins with one policy: start_from={run.start_from!r} or model.source={run.model.source!r}, not "
            "both"
        )

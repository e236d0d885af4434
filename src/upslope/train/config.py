"""The one configuration of a run: frozen dataclasses whose defaults stand here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from upslope.algorithms import (
    A2C,
    GRPO,
    KTO,
    NPG,
    PPO,
    RLOO,
    SFT,
    TRPO,
    ActorCriticLambda,
    AverageReward,
    ImportanceSampled,
    OneStepActorCritic,
    Preference,
    Reinforce,
    TDLambda,
    VTraceActorCritic,
)
from upslope.algorithms.protocol import ScheduleName
from upslope.collect import EnvironmentConfig
from upslope.collect.given_data import RecordedConfig, SegmentPairsConfig
from upslope.collect.groups import GroupStart
from upslope.policies import ActorCriticConfig
from upslope.train.settings import (
    at_least,
    check_beginning,
    check_choices,
    check_endless,
    check_gamma,
    check_natural,
    check_numbers,
    check_threads,
)

AlgorithmConfig: TypeAlias = (
    PPO
    | A2C
    | OneStepActorCritic
    | Reinforce
    | GRPO
    | RLOO
    | SFT
    | Preference
    | KTO
    | ActorCriticLambda
    | TDLambda
    | AverageReward
    | TRPO
    | NPG
    | VTraceActorCritic
    | ImportanceSampled
)
"""The algorithms a configuration file may name. A new algorithm is one file and its name in this line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """How much experience one update sees: fragments of `steps`, or whole `episodes`."""

    steps: int | None = 128
    """Steps per environment and update; None when whole episodes are collected."""
    episodes: int | None = None
    """Whole episodes per update, over all environments; None when fragments are collected."""
    row_steps: int | None = None
    """Cut the steps of an environment into rows of so many, each begun with the memory carried there; None for one."""
    group_size: int | None = None
    """Episodes that begin alike and are compared with each other (GRPO, RLOO); None for no groups."""
    group_start: GroupStart = "seed"
    """How they come to begin alike: reset with one seed, or given the state of one environment."""
    lag: int = 0
    """How many updates older than the policy that learns the one that acts is: its parameters and normaliser statistics
    of then; 0 for the one that learns."""
    behaviour: str | None = None
    """Another policy that acts throughout: a policy folder or a run directory; None for the one that learns."""
    batches: int = 1
    """Rollouts learnt from together: those of the last so many updates, each with the log-probs of who acted."""

    def __post_init__(self) -> None:
        """Exactly one of the two lengths, and one who acts."""
        at_least(0, lag=self.lag)
        at_least(1, batches=self.batches)
        if self.behaviour is not None and self.lag:
            raise ValueError(f"the policy {self.behaviour!r} acts throughout and grows no older: set lag to 0")
        if (self.steps is None) == (self.episodes is None):
            raise ValueError("a rollout is either `steps` per environment or whole `episodes`: set one, the other None")
        if (self.steps or self.episodes or 0) < 1:
            raise ValueError(f"a rollout needs at least one step or episode, got {self.steps or self.episodes}")
        if self.row_steps is not None and (self.steps is None or self.row_steps < 1 or self.steps % self.row_steps):
            raise ValueError(
                f"rows divide the steps of an update: set rollout.steps to a multiple of "
                f"rollout.row_steps={self.row_steps}, got {self.steps}"
            )
        check_choices(self)
        if self.group_size is None:
            return
        if self.episodes is None or self.group_size < 2 or self.episodes % self.group_size:
            raise ValueError(
                f"a group is of 2 whole episodes at least, and episodes are made of whole groups: got "
                f"group_size={self.group_size} and episodes={self.episodes}; set rollout.episodes to a multiple of it"
            )


Rollout: TypeAlias = RolloutConfig | RecordedConfig | SegmentPairsConfig
"""What an update sees: what the policy does itself, recorded demonstrations, or pairs of segments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The optimiser, its learning rate over the run, and gradient clipping."""

    kind: Literal["adam", "adamw", "rmsprop", "sgd"] = "adam"
    """Which optimiser; adamw is adam with weight decay."""
    learning_rate: float = 3e-4
    """At the start of the run."""
    schedule: ScheduleName = "constant"
    """How the learning rate moves over the run."""
    epsilon: float = 1e-5
    """Added to the denominator by adam, adamw and rmsprop (PyTorch's own default would be 1e-8)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    weight_decay: float = 0.0
    """Of adamw: each step first multiplies every parameter by 1 - learning_rate * weight_decay."""
    decay: float = 0.99
    """RMSprop's decay rate of the squared gradient."""
    momentum: float = 0.0
    """Of sgd."""
    max_gradient_norm: float | None = 0.5
    """Scale the whole gradient down to this norm; None never does."""
    micro_batches: int = 1
    """Split each optimiser step into this many parts to save memory; the gradient stays the same."""
    max_skipped: int = 10
    """Stop the run after this many optimiser steps in a row were skipped for a gradient that is not finite."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        at_least(0, learning_rate=self.learning_rate, epsilon=self.epsilon, momentum=self.momentum)
        at_least(0, weight_decay=self.weight_decay)
        if self.weight_decay and self.kind != "adamw":
            raise ValueError(f"weight_decay is adamw's: set kind to 'adamw', or weight_decay to 0 with {self.kind!r}")
        at_least(1, micro_batches=self.micro_batches, max_skipped=self.max_skipped)
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0.0:
            raise ValueError(
                f"max_gradient_norm must be positive, or None for no clipping; got {self.max_gradient_norm}"
            )
        if not all(0.0 <= decay < 1.0 for decay in (*self.betas, self.decay)):
            raise ValueError(f"betas and decay are at least 0 and below 1, got {self.betas} and {self.decay}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Evaluation on separate environments with raw rewards, both sampling and taking the mode."""

    times: int = 10
    """How often during the run, evenly spread by updates; 0 for never. The end of a run always evaluates."""
    episodes: int = 10
    """Episodes each time, for each of the two ways to act."""
    final_episodes: int = 20
    """Episodes at the end of the run."""
    environments: int = 10
    """Evaluation environments side by side, never more than episodes."""
    horizon: int = 1000
    """Steps of an episode of evaluation where the task itself need not end; its average reward is reported with it."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        at_least(0, times=self.times, final_episodes=self.final_episodes)
        at_least(1, episodes=self.episodes, environments=self.environments, horizon=self.horizon)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When to save, and how much to keep."""

    times: int = 10
    """Checkpoints during the run, evenly spread by updates; 0 for none but the last."""
    keep: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        at_least(0, times=self.times)
        at_least(1, keep=self.keep)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl, which is always written."""

    every_steps: int = 2000
    """One line of metrics per this many environment steps (or per update, if that is more)."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    wandb: bool = False
    """Mirror the metrics to Weights & Biases (needs `pip install 'upslope[wandb]'`)."""
    wandb_project: str = "upslope"
    """The W&B project."""
    progress: bool = True
    """Show live progress in the terminal."""
    diagnose_every: int = 2000
    """Look closely at one update per this many environment steps (or at each, if it takes more); 0 for never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapingConfig:
    """What is added to the rewards that an agent learns from: scale x (g Phi(s') - Phi(s))."""

    potential: str
    """Phi: path/to/file.py:function of observations [M, ...], which returns [M] numbers; or a policy folder or run
    directory, whose critic's value it is."""
    scale: float = 1.0
    """Multiplier of Phi."""

    @property
    def by_function(self) -> bool:
        """Whether Phi is a function of the user's own, rather than a policy's value."""
        return ".py:" in self.potential


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything that decides a run."""

    recipe: str = "custom"
    """Which recipe this came from; names the run directory."""
    start_from: str | None = None
    """The policy to begin with: a policy folder, a run directory, or the name of a recipe, whose result is taken: its
    weights and the statistics of its normalisers; None for weights made anew."""
    environment: EnvironmentConfig
    """Where experience comes from."""
    policy: ActorCriticConfig = field(default_factory=ActorCriticConfig)
    """What acts and values."""
    algorithm: AlgorithmConfig = field(default_factory=PPO)
    """What learns."""
    reference: str | None = None
    """The frozen policy that the algorithm stays close to, where it does: "start" for the one the run begins with, a
    policy folder or a run directory; None takes "start" wherever one is needed."""
    shaping: ShapingConfig | None = None
    """Potential-based shaping of the rewards that are learnt from; those that are logged stay as they are."""
    critic_first: int = 0
    """Updates at the beginning in which the critic alone moves: worth some where start_from has none, or another's."""
    rollout: Rollout = field(default_factory=RolloutConfig)
    """What one update sees, and how much of it."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How parameters move."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How the policy is judged."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What survives."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is seen."""
    steps: int = 100_000
    """Environment steps of the whole run, over all environments; `1e6` may be written."""
    seed: int = 1
    """Decides every random number of the run."""
    threads: int = 1
    """CPU threads of one process; small networks are fastest with one."""
    name: str | None = None
    """Name of the run directory; None makes one from recipe and seed."""
    directory: Path = Path("runs")
    """Where run directories are made."""

    @property
    def acting(self) -> RolloutConfig:
        """How the policy acts; where it learns from given data, with nothing in it that would have another act."""
        return self.rollout if isinstance(self.rollout, RolloutConfig) else RolloutConfig()

    @property
    def weighs_recorded(self) -> bool:
        """Whether recorded episodes are weighted by the log-probs of who acted in them, and not imitated."""
        return isinstance(self.rollout, RecordedConfig) and self.algorithm.target.gradient != "given_data"

    def __post_init__(self) -> None:
        """Refuse combinations that have no meaning."""
        at_least(1, steps=self.steps)
        check_threads(self.threads)
        at_least(0, seed=self.seed, every_steps=self.log.every_steps, diagnose_every=self.log.diagnose_every)
        check_beginning(self)
        check_endless(self)
        check_natural(self)
        check_gamma(self.algorithm.gamma)
        check_numbers(self.algorithm)
        check_numbers(self.optimizer)
        own = (self.algorithm,) if type(self.algorithm) in get_args(AlgorithmConfig) else ()
        for part in (self.environment, self.policy, self.optimizer, *own):
            check_choices(part)
        check_experience(self)
        if self.algorithm.passes.critic and not self.policy.critic:
            raise ValueError(f"{type(self.algorithm).__name__} needs a critic: set policy.critic to True")


def check_experience(run: Run) -> None:
    """Refuse what an algorithm cannot learn from.

    Raises:
        ValueError: with what to set instead.
    """
    name, passes, rollout = type(run.algorithm).__name__, run.algorithm.passes, run.rollout
    given = run.algorithm.target.gradient == "given_data"
    if isinstance(rollout, RolloutConfig):
        _check_acting(run, rollout)
        return
    if run.weighs_recorded and passes.proximal == "advantage":
        _check_weighed(run)
        return
    paired = passes.together > 1 or isinstance(run.algorithm, KTO)
    wanted = SegmentPairsConfig if paired else RecordedConfig
    if not given:
        raise ValueError(
            f"{name} learns from what the policy does itself: set rollout to a RolloutConfig, or take SFT (for "
            "demonstrations), Preference (for pairs), or ImportanceSampled or VTraceActorCritic (for recorded episodes "
            "with the log-probabilities of who acted)"
        )
    if not isinstance(rollout, wanted):
        raise ValueError(f"{name} learns from other data: set rollout to a {wanted.__name__}")
    if run.policy.normalize_reward:
        raise ValueError(f"{name} learns from given data and scales no rewards: set policy.normalize_reward to False")
    rows = rollout.pairs * 2 if isinstance(rollout, SegmentPairsConfig) else rollout.rows
    if passes.minibatches > rows // passes.together:
        raise ValueError(
            f"an update of {rows} rows cannot be cut into {passes.minibatches} minibatches of {passes.together} rows "
            "or more: take more per update, or lower algorithm.minibatches"
        )


def _check_weighed(run: Run) -> None:
    name, rollout = type(run.algorithm).__name__, run.rollout
    assert isinstance(rollout, RecordedConfig)
    if rollout.length is not None and (run.algorithm.passes.whole_episodes or run.policy.memory is not None):
        who = name if run.algorithm.passes.whole_episodes else "a policy with a memory"
        raise ValueError(f"{who} needs whole episodes of another policy: set rollout.length to None")
    if run.policy.normalize_reward:
        raise ValueError("normalize_reward follows environments step by step: set policy.normalize_reward to False")


def _check_acting(run: Run, rollout: RolloutConfig) -> None:
    name, passes = type(run.algorithm).__name__, run.algorithm.passes
    if run.algorithm.target.gradient == "given_data":
        raise ValueError(
            f"{name} learns from given data: set rollout to a RecordedConfig (SFT) or a SegmentPairsConfig (Preference "
            "and KTO)"
        )
    if passes.groups and rollout.group_size is None:
        raise ValueError(
            f"{name} compares episodes that begin alike: set rollout.group_size (8, say), rollout.episodes to a "
            "multiple of it and rollout.steps to None"
        )
    if rollout.group_size is not None and run.environment.count % rollout.group_size:
        raise ValueError(
            f"environments are begun in groups: set environment.count to a multiple of "
            f"rollout.group_size={rollout.group_size}, got {run.environment.count}"
        )
    if rollout.group_size is not None and (rollout.episodes or 0) % run.environment.count:
        raise ValueError(
            f"each of {run.environment.count} environments plays as many episodes in groups: set rollout.episodes to a "
            f"multiple of environment.count, got {rollout.episodes}"
        )
    if passes.whole_episodes and rollout.episodes is None:
        raise ValueError(f"{name} needs whole episodes: set rollout.episodes (16, say) and rollout.steps to None")
    if run.policy.normalize_reward and rollout.steps is None:
        raise ValueError("normalize_reward follows each environment step by step: set rollout.steps, not episodes")

"""What one update of a language model sees: frozen settings whose defaults stand here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field

from upslope.policies.language.sampling import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlongPenalty:
    """DAPO's soft punishment of length: 0 up to `limit - buffer` tokens, then down to `-penalty` at the limit."""

    buffer: int = 16
    """Tokens before the limit over which the penalty grows."""
    penalty: float = 1.0
    """At the limit; added to the reward as a part of its own."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        if self.buffer < 1 or not self.penalty > 0.0:
            raise ValueError(f"buffer and penalty must be positive, got {self.buffer} and {self.penalty}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionConfig:
    """Completions of the policy's own, several per prompt, scored by the task's rewards."""

    prompts: int = 32
    """Prompts per update."""
    group: int = 8
    """Completions per prompt; those of one prompt are a group. 1 makes no groups."""
    limit: int = 256
    """Most tokens of a completion; one that has not ended by then is truncated."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are drawn; the learner's log-probs are of the same distribution."""
    refill: int = 0
    """Dynamic sampling (DAPO): up to this many more rounds of prompts replace groups whose rewards are all equal."""
    mask_truncated: bool = False
    """Learn nothing from truncated completions; their rewards still count in their group's baseline."""
    overlong: OverlongPenalty | None = None
    """Punish length before the limit is reached."""
    slots: int = 256
    """Completions generated side by side; a finished one gives its slot to the next."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        for name in ("prompts", "group", "limit", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.refill < 0:
            raise ValueError(f"refill must be at least 0, got {self.refill}")
        if self.refill and self.group < 2:
            raise ValueError("refill replaces groups without spread: set group to at least 2")
        if self.sampling.greedy:
            raise ValueError(
                "a temperature of 0 draws the same completion again and again: nothing can be learnt from it"
            )
        if self.overlong is not None and self.overlong.buffer > self.limit:
            raise ValueError(f"overlong.buffer must be at most limit={self.limit}, got {self.overlong.buffer}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemonstrationConfig:
    """Answers to learn from: the task's examples that hold a completion."""

    rows: int = 64
    """Sequences per update."""
    completion_only: bool = True
    """Learn the answers alone; False learns the prompts, too."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PairConfig:
    """A chosen and a rejected answer to the same prompt: from the data, or drawn from the starting policy."""

    pairs: int = 64
    """Per update."""
    drawn: int | None = None
    """Make this many pairs before the first update, of a best and a worst completion of the starting policy under the
    task's rewards; None takes those of the data."""
    group: int = 8
    """Completions per prompt that a pair is drawn from."""
    limit: int = 256
    """Most tokens of a drawn completion."""
    sampling: Sampling = field(default_factory=Sampling)
    """How they are drawn."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        if self.pairs < 1 or self.group < 2 or self.limit < 1 or (self.drawn is not None and self.drawn < 1):
            raise ValueError(
                "pairs, limit and drawn must be at least 1 and group at least 2, got "
                f"{self.pairs}, {self.limit}, {self.drawn} and {self.group}"
            )

"""What an update sees of data that was given and not sampled: frozen settings whose defaults stand here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

SegmentReturn: TypeAlias = Literal["segment", "to_go"]
"""The rewards by which one segment is preferred: those within it, or those to the end of its episode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedConfig:
    """Episodes that were recorded in a file (`upslope record`): to imitate, or to weigh by who acted in them."""

    file: Path
    """Of trajectories."""
    rows: int = 16
    """Rows per update, in a new order each time all were seen."""
    length: int | None = None
    """Cut episodes into rows of at most this many steps; None takes them whole."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        if self.rows < 1 or (self.length is not None and self.length < 1):
            raise ValueError(f"rows and length must be at least 1, got {self.rows} and {self.length}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentPairsConfig:
    """Pairs of segments of equal length, one preferred to the other."""

    file: Path | None = None
    """Recorded episodes to take segments from; None lets the policy that the run begins with play them first."""
    preferences: Path | None = None
    """Preferences somebody stated (JSON lines); None prefers the segment with the higher return."""
    episodes: int = 100
    """Without a file: how many are played before the first update."""
    drawn: int = 1000
    """Pairs to draw and label by return, before the first update."""
    length: int = 32
    """Steps of a drawn segment."""
    by: SegmentReturn = "to_go"
    """The return that decides: of the segment itself, or from its first step to the end of its episode."""
    pairs: int = 64
    """Pairs per update, in a new order each time all were seen."""

    def __post_init__(self) -> None:
        """Refuse numbers that have no meaning."""
        for name in ("episodes", "drawn", "length", "pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.preferences is not None and self.file is None:
            raise ValueError("preferences speak of recorded episodes: set rollout.file to those, too")
        if self.by not in ("segment", "to_go"):
            raise ValueError(f"by must be 'segment' or 'to_go', got {self.by!r}")

"""Slips that somebody could make, and who should see them."""

from __future__ import annotations

from harness import Mutant
from mutants_algorithms import ALGORITHMS
from mutants_estimators import ESTIMATORS
from mutants_groups import GROUPED
from mutants_masks import MASKS
from mutants_memory import MEMORIES
from mutants_natural import NATURAL
from mutants_objectives import OBJECTIVES
from mutants_off_policy import OFF_POLICY
from mutants_sequences import SEQUENCES
from mutants_shaping import FINE_TUNING
from mutants_traces import TRACE_MUTANTS

MUTANTS: tuple[Mutant, ...] = (
    *ESTIMATORS,
    *OBJECTIVES,
    *ALGORITHMS,
    *GROUPED,
    *MASKS,
    *MEMORIES,
    *NATURAL,
    *OFF_POLICY,
    *SEQUENCES,
    *FINE_TUNING,
    *TRACE_MUTANTS,
)

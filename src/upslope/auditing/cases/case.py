"""One row of the verification table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from upslope.auditing.report import AuditReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One thing that is declared of an exported estimator or algorithm, and how to measure it.

    Attributes:
        subject: the exported name, such as "gae" or "PPO".
        setting: what tells this case from others of the subject, such as "lambda 0.5, perturbed critic".
        run: measures it; the report's `declared` is "unbiased" or "biased".
    """

    subject: str
    setting: str
    run: Callable[[], AuditReport]

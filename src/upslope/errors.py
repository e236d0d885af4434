"""The error for what a user asked for, apart from what goes wrong while it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """What was asked for cannot be done; the text says why, and what to ask for instead."""


class OffPolicyError(UsageError):
    """The data of another policy says too little about the one that learns."""


@contextmanager
def checking_usage() -> Iterator[None]:
    """Around what only checks and prepares what was asked for: a plain ValueError in here is a `UsageError`."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise UsageError(str(error)) from error

"""The error for what a user asked for, apart from what goes wrong while it is done."""

from __future__ import annotations


class UsageError(ValueError):
    """What was asked for cannot be done; the text says why, and what to ask for instead."""

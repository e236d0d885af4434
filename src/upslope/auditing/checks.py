"""What a user asks of an audit, refused in words where it makes no sense."""

from __future__ import annotations

import inspect
from typing import Any, get_args

from upslope.algorithms import Algorithm, Target
from upslope.auditing.declared import Circumstances
from upslope.auditing.setting import Behaviour, Critic, Unit
from upslope.auditing.tokens import Network
from upslope.errors import UsageError
from upslope.exact import TOKEN_PROBLEMS


def checked_algorithm(algorithm: Any) -> Algorithm:
    """An algorithm that can be audited.

    Raises:
        UsageError: if this is none, if it follows no return, or if its discount is none.
    """
    if isinstance(algorithm, type):
        name = algorithm.__name__
        raise UsageError(f"{name} is a class: audit one of its objects, such as {name}(gamma=0.9)")
    if isinstance(algorithm, str):
        raise UsageError(
            f"{algorithm!r} is a name: give the algorithm itself, such as upslope.Reinforce(gamma=0.9); names are for "
            "the command `upslope audit`"
        )
    if inspect.isroutine(algorithm):
        raise UsageError(f"{algorithm.__name__} is a function: audit a loss with upslope.audit_loss")
    if not isinstance(getattr(algorithm, "target", None), Target):
        raise UsageError(
            f"a {type(algorithm).__name__} declares no target, so that it is no algorithm to audit: give it a property "
            "`target` that returns an upslope.algorithms.Target, or audit a plain loss with upslope.audit_loss"
        )
    found: Algorithm = algorithm
    if found.target.gradient == "given_data":
        raise UsageError(
            f"{type(algorithm).__name__} learns from given data and follows no gradient of a return: its rows in the "
            "verification table hold it against the gradient of its own loss"
        )
    if found.target.gradient == "prediction":
        raise UsageError(
            f"{type(algorithm).__name__} learns values and leaves the policy as it is: its rows in the verification "
            "table hold the critic's update against the exact one"
        )
    if not 0.0 <= found.gamma <= 1.0:
        raise UsageError(f"gamma is a discount from 0 to 1, got {found.gamma}: set the algorithm's gamma within that")
    return found


def check_numbers(samples: int | None, rows: int, row_steps: int, seed: int) -> None:
    """Refuse numbers that are too small."""
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be at least 1, got {samples}: leave it out to weight every batch there is")
    for name, number, least in (("rows", rows, 1), ("row_steps", row_steps, 1), ("seed", seed, 0)):
        if number < least:
            raise UsageError(f"{name} must be at least {least}, got {number}")


def check_circumstances(given: Circumstances) -> None:
    """Refuse circumstances that nobody knows."""
    for name, value, values in (
        ("critic", given.critic, get_args(Critic)),
        ("behaviour", given.behaviour, get_args(Behaviour)),
        ("unit", given.unit, (*get_args(Unit), None)),
    ):
        if value not in values:
            raise UsageError(f"{name} must be {' or '.join(map(repr, values))}; got {value!r}")
    if given.limit is not None and given.limit < 1:
        raise UsageError(f"limit must be at least 1 step, got {given.limit}: leave it out for the problem's own limit")


def check_on_states(algorithm: Algorithm, size: int | None, groups: int, network: Network) -> None:
    """Refuse, on a problem with states, what only completions have."""
    name = type(algorithm).__name__
    if algorithm.passes.reference != "none":
        raise UsageError(f"only completion problems have a reference: audit this {name} on {', '.join(TOKEN_PROBLEMS)}")
    if size is not None and not algorithm.passes.groups:
        raise UsageError(f"size is for what compares a group, and {name} sees single episodes: leave it out")
    if groups != 1:
        raise UsageError("groups are of completions: leave the number out")
    if network != "table":
        raise UsageError(f"network says what completes prompts: leave it out, or audit on {', '.join(TOKEN_PROBLEMS)}")

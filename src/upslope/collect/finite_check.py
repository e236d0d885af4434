"""NaN and infinity are refused where they first turn up, with environment, step, what and value."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from upslope.collect.errors import NonFiniteError
from upslope.collect.rollout import Rollout
from upslope.trajectory import ObservationArrays, map_observation

_OF_THE_POLICY = (
    "The policy has diverged: lower the learning rate, clip gradients, or normalise observations and rewards"
)
_OF_THE_ENVIRONMENT = "The environment gave it: `upslope check-env` tries the environment on its own"


def refuse_unfinite_rollout(rollout: Rollout, update: int) -> None:
    """Refuse NaN and infinity in what was written down, naming the first of them.

    Args:
        rollout: up to the last position filled.
        update: that it is of.

    Raises:
        NonFiniteError: with environment, step, what and value.
    """
    filled = rollout.filled
    faults: list[tuple[int, int, int, str]] = []
    _find(faults, 0, "observation", map_observation(lambda a: a[:, :filled], rollout.observation))
    _find(faults, 1, "action", rollout.action[:, :filled])
    _find(faults, 2, "reward", rollout.reward[:, :filled])
    position, environment, final = rollout.joined_ends()
    for row in _unfinite(final):
        found: list[tuple[int, int, int, str]] = []
        _find(found, 3, "final observation", map_observation(lambda a, row=row: a[row, None, None], final))
        faults.append((int(position[row]), 3, int(environment[row]), found[0][3]))
    for row in _unfinite(rollout.last) if rollout.last is not None else ():
        found = []
        _find(found, 3, "observation", map_observation(lambda a, row=row: a[row, None, None], rollout.last))
        faults.append((filled, 3, int(row), found[0][3]))
    if not faults:
        return
    first, kind, where, text = min(faults)
    remedy = _OF_THE_POLICY if kind == 1 else _OF_THE_ENVIRONMENT
    raise NonFiniteError(f"environment {where}, step {first} of update {update}: {text}. {remedy}")


def refuse_unfinite_step(what: str, arrays: ObservationArrays, step: int) -> None:
    """Refuse NaN and infinity in what one step of evaluation brought.

    Args:
        what: "observation", "action" or "reward".
        arrays: [N, ...].
        step: of the evaluation.

    Raises:
        NonFiniteError: with environment, step, what and value.
    """
    for name, array in _named(arrays):
        if array.dtype.kind != "f" or np.isfinite(array).all():
            continue
        flat = array.reshape(len(array), -1)
        index, element = (int(k) for k in np.argwhere(~np.isfinite(flat))[0])
        remedy = _OF_THE_POLICY if what == "action" else _OF_THE_ENVIRONMENT
        raise NonFiniteError(
            f"evaluation environment {index}, step {step}: {_described(what, name, flat[index], element)}. {remedy}"
        )


def _named(arrays: ObservationArrays) -> Iterable[tuple[str, np.ndarray]]:
    return arrays.items() if isinstance(arrays, dict) else [("", arrays)]


def _described(what: str, name: str, values: np.ndarray, element: int) -> str:
    label = f"{what} {name!r}" if name else what
    where = f" (element {element})" if len(values) > 1 else ""
    return f"the {label} is {values[element]}{where}"


def _finite(array: np.ndarray) -> np.ndarray:
    """Which values are finite as float32."""
    if array.dtype == np.float32:
        return np.isfinite(array)
    with np.errstate(over="ignore"):
        return np.isfinite(array.astype(np.float32))


def _unfinite(arrays: ObservationArrays) -> np.ndarray:
    """Rows with a value that is not finite."""
    rows: list[np.ndarray] = []
    for _, array in _named(arrays):
        finite = np.isfinite(array) if array.dtype.kind == "f" else None
        if finite is not None and not finite.all():
            rows.append(np.flatnonzero(~finite.all(axis=tuple(range(1, array.ndim)))))
    return np.unique(np.concatenate(rows)) if rows else np.zeros(0, dtype=np.int64)


def _find(faults: list[tuple[int, int, int, str]], kind: int, what: str, arrays: ObservationArrays) -> None:
    """Append (position, kind, environment, text) of the first value that is not finite as float32."""
    for name, array in _named(arrays):
        if array.dtype.kind != "f":
            continue
        finite = _finite(array)
        if finite.all():
            continue
        flat = finite.reshape(*array.shape[:2], -1)
        position = int(np.argmin(flat.all(axis=(0, 2))))
        environment = int(np.argmin(flat[:, position].all(axis=1)))
        element = int(np.argmin(flat[environment, position]))
        values = array.reshape(flat.shape)[environment, position]
        faults.append((position, kind, environment, _described(what, name, values, element)))

"""Observations as users hold them: single or batched, nested in dicts and tuples, with the environment's offsets."""

from __future__ import annotations

from typing import Any

import numpy as np

from upslope.policies.masking import has_valid
from upslope.spaces import (
    ACTION_MASK,
    ActionMask,
    Box,
    Composite,
    Discrete,
    MultiDiscrete,
    ObservationLeaf,
    Space,
    masked_sizes,
)
from upslope.trajectory import ObservationArrays


def read_observation(space: Space, observation: Any) -> tuple[ObservationArrays, bool]:
    """Arrays with a leading dimension in our own words, and whether the observation was a single one.

    Args:
        space: what the policy sees.
        observation: of one environment or of several, as they give it; the entries of nested dicts and tuples are
            named by their path, "a/b".

    Raises:
        ValueError: if an entry is missing, its shape does not fit, or it is not finite.
    """
    if not isinstance(space, Composite):
        return _leaf(space, "the observation", observation)
    entries = _flattened(observation)
    wanted = [name for name, _ in space.entries]
    if masked_sizes(space) is not None and ACTION_MASK not in entries:
        raise ValueError(
            "this policy was trained with masks of valid actions, and got none: pass "
            'act(observation, action_mask=info["action_mask"])'
        )
    if set(entries) != set(wanted):
        raise ValueError(f"the observation must have the entries {sorted(wanted)}, got {sorted(entries)}")
    arrays: dict[str, np.ndarray] = {}
    singles: dict[str, bool] = {}
    for name, leaf in space.entries:
        arrays[name], singles[name] = _leaf(leaf, f"the observation's entry {name!r}", entries[name])
    if len(set(singles.values())) != 1 or len({len(array) for array in arrays.values()}) != 1:
        shapes = {name: np.shape(entries[name]) for name in wanted}
        raise ValueError(f"the observation's entries must be all single or batches of one size, got shapes {shapes}")
    return arrays, all(singles.values())


def _flattened(observation: Any, path: str = "") -> dict[str, Any]:
    if isinstance(observation, dict):
        pairs = [(str(key), entry) for key, entry in observation.items()]
    elif isinstance(observation, tuple):
        pairs = [(str(position), entry) for position, entry in enumerate(observation)]
    else:
        return {path: observation}
    entries: dict[str, Any] = {}
    for name, entry in pairs:
        entries.update(_flattened(entry, f"{path}/{name}" if path else name))
    return entries


def _leaf(leaf: ObservationLeaf, what: str, observation: Any) -> tuple[np.ndarray, bool]:
    array = np.asarray(observation)
    shape = leaf_shape(leaf)
    single = array.shape == shape
    if not (single or array.shape[1:] == shape) or (array.ndim == 0 and not single):
        if isinstance(leaf, Box) or array.size != int(np.prod(shape)):
            raise ValueError(
                f"{what} must have shape {shape}, or {('N', *shape)} for a batch, got {array.shape}".replace("'N'", "N")
            )
        single = True
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what} must hold numbers, got {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{what} is not finite: {array[~np.isfinite(array)][0]}; look for the cause in the environment"
        )
    array = array.reshape(1, *shape) if single else array
    if isinstance(leaf, Box):
        return array.astype(leaf.dtype, copy=False), single
    if isinstance(leaf, ActionMask):
        mask = array.astype(bool)
        if not all(has_valid(row, leaf.sizes) for row in mask):
            raise ValueError(f"{what} leaves no valid action: {observation}")
        return mask, single
    array = array.astype(np.int64)
    if isinstance(leaf, Discrete | MultiDiscrete):
        array = array - np.array(leaf.start)
        if bool(((array < 0) | (array >= np.array(_choices(leaf)))).any()):
            raise ValueError(f"{what} lies outside its space {leaf}: {observation}")
    return array, single


def leaf_shape(leaf: ObservationLeaf) -> tuple[int, ...]:
    """The shape of one observation of a leaf."""
    if isinstance(leaf, Box):
        return leaf.shape
    if isinstance(leaf, Discrete):
        return ()
    if isinstance(leaf, ActionMask):
        return (sum(leaf.sizes),)
    return (len(leaf.choices) if isinstance(leaf, MultiDiscrete) else leaf.n,)


def _choices(leaf: Discrete | MultiDiscrete) -> int | tuple[int, ...]:
    return leaf.n if isinstance(leaf, Discrete) else leaf.choices

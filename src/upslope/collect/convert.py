"""Gymnasium's spaces and observations become ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from upslope.collect.errors import UnsupportedSpaceError
from upslope.collect.masks import MaskSpace
from upslope.spaces import (
    ActionMask,
    Box,
    Composite,
    Discrete,
    Leaf,
    MultiBinary,
    MultiDiscrete,
    ObservationLeaf,
    Space,
)
from upslope.trajectory import ObservationArrays, map_observation


def convert_action_space(space: gymnasium.Space[Any]) -> Leaf:
    """What a policy may do, in our words.

    Raises:
        UnsupportedSpaceError: for anything but Discrete, MultiDiscrete, MultiBinary (one-dimensional) and real Box.
    """
    match space:
        case gymnasium.spaces.Discrete() | gymnasium.spaces.Box() | gymnasium.spaces.MultiDiscrete():
            leaf = _leaf(space, "the action space")
        case gymnasium.spaces.MultiBinary():
            leaf = _leaf(space, "the action space")
        case _:
            raise UnsupportedSpaceError(
                f"cannot act in the space {space}: actions are Discrete, MultiDiscrete, MultiBinary or Box. Wrap the "
                "environment with gymnasium.wrappers.TransformAction so that it takes one of those (several choices at "
                "once are a MultiDiscrete, several numbers a Box)"
            )
    if isinstance(leaf, Box) and not np.issubdtype(np.dtype(leaf.dtype), np.floating):
        raise UnsupportedSpaceError(
            f"cannot act in the integer box {space}: declare it as a MultiDiscrete (one choice per element), or wrap "
            "the environment with gymnasium.wrappers.TransformAction to take a real Box"
        )
    if isinstance(space, gymnasium.spaces.MultiDiscrete | gymnasium.spaces.MultiBinary) and len(space.shape) != 1:
        raise UnsupportedSpaceError(
            f"cannot act in {space}: choices come in one dimension. Wrap the environment with "
            "gymnasium.wrappers.TransformAction and reshape the flat action there"
        )
    return leaf


def action_dtype(space: gymnasium.Space[Any]) -> np.dtype[Any]:
    """The number type the environment wants its actions in."""
    assert space.dtype is not None
    return np.dtype(space.dtype)


def action_cast(space: gymnasium.Space[Any]) -> Callable[[np.ndarray], np.ndarray]:
    """A function that gives actions, [N, ...], the number type the environment wants, without leaving its space.

    Policies act in float32, and the float32 next to a float64 bound may lie beyond it: such boxes are clipped.
    """
    dtype = action_dtype(space)
    if not isinstance(space, gymnasium.spaces.Box) or dtype != np.float64:
        return lambda action: action.astype(dtype, copy=False)
    low, high = space.low, space.high
    with np.errstate(over="ignore"):
        exact = all(np.array_equal(bound, bound.astype(np.float32)) for bound in (low, high))
    if exact:
        return lambda action: action.astype(dtype, copy=False)
    return lambda action: np.minimum(np.maximum(action, low, dtype=dtype), high)


def _bound(values: np.ndarray) -> float | tuple[float, ...]:
    flat = values.astype(np.float64).reshape(-1)
    if flat.size and (flat == flat[0]).all():
        return float(flat[0])
    return tuple(flat.tolist())


def _leaf(space: gymnasium.Space[Any], where: str) -> Leaf:
    match space:
        case gymnasium.spaces.Box():
            kind = np.dtype(space.dtype).kind
            if kind not in "fiu":
                raise UnsupportedSpaceError(
                    f"{where} is a box of {space.dtype}; boxes are real or integer. Declare it as a MultiBinary, or "
                    "convert it with gymnasium.wrappers.DtypeObservation"
                )
            dtype = "float32" if kind == "f" else str(np.dtype(space.dtype))
            return Box(tuple(space.shape), _bound(space.low), _bound(space.high), dtype)
        case gymnasium.spaces.Discrete():
            return Discrete(int(space.n), int(space.start))
        case gymnasium.spaces.MultiDiscrete():
            choices, start = space.nvec.reshape(-1), space.start.reshape(-1)
            return MultiDiscrete(tuple(map(int, choices)), tuple(map(int, start)))
        case gymnasium.spaces.MultiBinary():
            return MultiBinary(int(np.prod(space.shape)))
        case _:
            raise UnsupportedSpaceError(
                f"{where} is a {type(space).__name__} space ({space}), which has no fixed array form: observations are "
                "Box, Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple of these. Wrap the environment with "
                "gymnasium.wrappers.TransformObservation to give arrays of a fixed shape, or drop the entry with "
                "gymnasium.wrappers.FilterObservation"
            )


@dataclass(frozen=True, slots=True)
class _Entry:
    """One leaf of an observation: where it lies and what array it becomes."""

    name: str
    path: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: np.ndarray
    shifted: bool
    direct: bool

    def find(self, observation: Any) -> Any:
        for key in self.path:
            observation = observation[key]
        return observation

    def convert(self, observation: Any, leading: tuple[int, ...]) -> np.ndarray:
        array = np.asarray(self.find(observation))
        if array.size != int(np.prod(leading + self.shape)):
            label = f"the entry {self.name!r} of the observation" if self.name else "the observation"
            raise ValueError(
                f"{label} has shape {array.shape}, but its space says {leading + self.shape}. Correct the "
                "environment's observation_space or what its reset() and step() return"
            )
        array = array.reshape(leading + self.shape)
        return (array - self.offset if self.shifted else array).astype(self.dtype, copy=False)


def _entries(space: gymnasium.Space[Any], name: str, path: tuple[Any, ...]) -> list[tuple[_Entry, ObservationLeaf]]:
    children: list[tuple[str, Any, gymnasium.Space[Any]]]
    match space:
        case gymnasium.spaces.Dict():
            children = [(str(key), key, child) for key, child in space.spaces.items()]
        case gymnasium.spaces.Tuple():
            children = [(str(position), position, child) for position, child in enumerate(space.spaces)]
        case MaskSpace():
            mask = ActionMask(space.sizes)
            return [(_entry(mask, name, path, tuple(space.shape)), mask)]
        case _:
            leaf = _leaf(space, f"the observation's entry {name!r}" if name else "the observation space")
            return [(_entry(leaf, name, path, tuple(space.shape or ())), leaf)]
    if not children:
        raise UnsupportedSpaceError(f"{space} has no entries: there is nothing for a policy to see")
    result: list[tuple[_Entry, ObservationLeaf]] = []
    for label, key, child in children:
        result += _entries(child, f"{name}/{label}" if name else label, (*path, key))
    return result


def _entry(leaf: ObservationLeaf, name: str, path: tuple[Any, ...], theirs: tuple[int, ...]) -> _Entry:
    shape, dtype, offset = (), np.dtype(np.int64), np.zeros((), np.int64)
    match leaf:
        case Box():
            shape, dtype = leaf.shape, np.dtype(leaf.dtype)
        case Discrete():
            offset = np.array(leaf.start)
        case MultiDiscrete():
            shape, offset = (len(leaf.choices),), np.array(leaf.start, dtype=np.int64)
        case MultiBinary():
            shape, dtype = (leaf.n,), np.dtype(np.int8)
        case ActionMask():
            shape, dtype = (sum(leaf.sizes),), np.dtype(bool)
    return _Entry(name, path, shape, dtype, offset, bool(offset.any()), theirs == shape)


class ObservationLayout:
    """How observations of one space become arrays of ours.

    Dict and Tuple are flattened: the entry "b" of "a" is called "a/b". Real boxes are seen as float32, whatever width
    the environment computes in; integer boxes keep their type.

    Args:
        space: of one environment.

    Attributes:
        space: the same in our words.

    Raises:
        UnsupportedSpaceError: for a Text, Graph, Sequence or OneOf space, and for an empty or clashing Dict.
    """

    def __init__(self, space: gymnasium.Space[Any]) -> None:
        pairs = _entries(space, "", ())
        self._entries = [entry for entry, _ in pairs]
        self.composite = isinstance(space, gymnasium.spaces.Dict | gymnasium.spaces.Tuple)
        names = [entry.name for entry in self._entries]
        if len(set(names)) != len(names):
            raise UnsupportedSpaceError(
                f"two entries of the observation space flatten to one name: {names}. Rename the keys that contain '/'"
            )
        alone = pairs[0][1]
        self.space: Space = (
            Composite(tuple((entry.name, leaf) for entry, leaf in pairs))
            if self.composite or isinstance(alone, ActionMask)
            else alone
        )

    def sizes(self) -> list[tuple[str, tuple[int, ...], np.dtype[Any]]]:
        """Name, shape and type of each array of one observation."""
        return [(entry.name, entry.shape, entry.dtype) for entry in self._entries]

    def allocate(self, *leading: int) -> ObservationArrays:
        """Zeros for observations with these leading dimensions."""
        arrays = {entry.name: np.zeros(leading + entry.shape, entry.dtype) for entry in self._entries}
        return arrays if self.composite else arrays[""]

    def check(self, observation: Any) -> None:
        """Refuse an observation whose shape is not what its space says.

        Raises:
            ValueError: naming the entry.
        """
        for entry in self._entries:
            entry.convert(observation, ())

    def writer(self, arrays: ObservationArrays) -> Callable[[int, Any], None]:
        """A function that writes one environment's observation into row `index` of these arrays."""
        if isinstance(arrays, np.ndarray) and self._entries[0].direct and not self._entries[0].shifted:
            return arrays.__setitem__
        rows = [arrays] if isinstance(arrays, np.ndarray) else list(arrays.values())
        targets = list(zip(self._entries, rows, strict=True))

        def write(index: int, observation: Any) -> None:
            for entry, array in targets:
                simple = entry.direct and not entry.shifted
                array[index] = entry.find(observation) if simple else entry.convert(observation, ())

        return write

    def batch(self, observation: Any, count: int) -> ObservationArrays:
        """A batched observation of a vector environment as our arrays, [count, ...]."""
        arrays = {entry.name: entry.convert(observation, (count,)) for entry in self._entries}
        return arrays if self.composite else arrays[""]


def copy_arrays(observation: ObservationArrays) -> ObservationArrays:
    """An observation of its own memory."""
    return map_observation(np.copy, observation)

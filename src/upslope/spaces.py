"""What a policy may see and do, in our own words, so that no room but `collect` needs to know Gymnasium.

A leaf space is one array per step; a `Composite` is several named leaves (a Dict or Tuple, flattened: the entry
"b" of the entry "a" is called "a/b", the second element of a Tuple "1").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Box:
    """Real or integer numbers within bounds.

    Attributes:
        shape: of one element, for example `(4,)` or `(84, 84, 4)`.
        low: lower bound: one float for all elements, or one per element (flattened, row-major).
        high: upper bound, likewise.
        dtype: NumPy's name of the number type, `"float32"` or `"uint8"` for example.
    """

    shape: tuple[int, ...]
    low: float | tuple[float, ...]
    high: float | tuple[float, ...]
    dtype: str = "float32"

    @property
    def is_image(self) -> bool:
        """Whether this looks like an image: three dimensions of unsigned bytes."""
        return len(self.shape) == 3 and self.dtype == "uint8"


@dataclass(frozen=True, slots=True)
class Discrete:
    """One of `n` choices. Inside the house they are 0 .. n-1; `start` is added at the door."""

    n: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class MultiDiscrete:
    """Several choices at once: the i-th is one of `choices[i]`; `start[i]` is added at the door."""

    choices: tuple[int, ...]
    start: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MultiBinary:
    """`n` independent bits."""

    n: int


Leaf: TypeAlias = Box | Discrete | MultiDiscrete | MultiBinary
"""What an action may be."""


@dataclass(frozen=True, slots=True)
class ActionMask:
    """Which actions are valid: one bool per choice, the choices of a MultiDiscrete one after the other.

    It is an entry of what a policy sees, called `ACTION_MASK`, and no input of its networks: an action whose entry is
    False has probability 0.

    Attributes:
        sizes: how many choices there are: `(n,)` for a Discrete of n, `choices` for a MultiDiscrete.
    """

    sizes: tuple[int, ...]


ACTION_MASK = "action_mask"
"""The name of the entry that holds the mask."""
OBSERVATION = "observation"
"""The name of the entry that holds what is seen, where that is one leaf and a mask was added to it."""

ObservationLeaf: TypeAlias = Leaf | ActionMask
"""What an entry of an observation may be."""


@dataclass(frozen=True, slots=True)
class Composite:
    """Several named leaves, in a fixed order."""

    entries: tuple[tuple[str, ObservationLeaf], ...]


Space: TypeAlias = Leaf | Composite

_LEAVES: dict[str, type[ObservationLeaf]] = {
    "Box": Box,
    "Discrete": Discrete,
    "MultiDiscrete": MultiDiscrete,
    "MultiBinary": MultiBinary,
    "ActionMask": ActionMask,
}


def masked_sizes(space: Space) -> tuple[int, ...] | None:
    """The sizes of the mask among the entries of a space, or None if there is none."""
    leaf = dict(space.entries).get(ACTION_MASK) if isinstance(space, Composite) else None
    return leaf.sizes if isinstance(leaf, ActionMask) else None


def without_mask(space: Space) -> Space:
    """What the networks see of a space: all but the mask; an entry `OBSERVATION` that is left alone, by itself."""
    if masked_sizes(space) is None or not isinstance(space, Composite):
        return space
    entries = tuple((name, leaf) for name, leaf in space.entries if name != ACTION_MASK)
    name, leaf = entries[0]
    return (
        leaf if len(entries) == 1 and name == OBSERVATION and not isinstance(leaf, ActionMask) else Composite(entries)
    )


def space_to_tree(space: Space | ActionMask) -> dict[str, object]:
    """The space as plain nested dicts, for a configuration file."""
    if isinstance(space, Composite):
        return {"kind": "Composite", "entries": {name: space_to_tree(leaf) for name, leaf in space.entries}}
    fields: dict[str, object] = {name: getattr(space, name) for name in space.__dataclass_fields__}
    return {"kind": type(space).__name__, **fields}


def space_from_tree(tree: Mapping[str, object]) -> Space:
    """The inverse of `space_to_tree`; lists stand for tuples.

    Raises:
        ValueError: if the tree describes no known space.
    """
    fields = dict(tree)
    kind = fields.pop("kind", None)
    if kind == "Composite":
        entries = fields.get("entries")
        if not isinstance(entries, Mapping):
            raise ValueError("a Composite space needs a mapping called 'entries'")
        return Composite(tuple((str(name), _leaf_from_tree(leaf)) for name, leaf in entries.items()))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    leaf = _leaf_from_tree(tree)
    if isinstance(leaf, ActionMask):
        raise ValueError("an ActionMask is an entry of a Composite space, beside what is seen")
    return leaf


def _leaf_from_tree(tree: object) -> ObservationLeaf:
    if not isinstance(tree, Mapping):
        raise ValueError(f"a space is described by a mapping, got {type(tree).__name__}")
    fields: dict[str, object] = {str(k): tuple(v) if isinstance(v, list) else v for k, v in tree.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    kind = fields.pop("kind", None)
    if kind not in _LEAVES:
        raise ValueError(f"unknown kind of space {kind!r}; known: {', '.join(_LEAVES)}, Composite")
    leaf = _LEAVES[str(kind)]
    if set(fields) != set(leaf.__dataclass_fields__):
        raise ValueError(f"a {kind} space has the fields {sorted(leaf.__dataclass_fields__)}, got {sorted(fields)}")
    return leaf(**fields)  # pyright: ignore[reportArgumentType]

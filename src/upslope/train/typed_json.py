"""Nested Python values as JSON and named tensors: what goes in comes out with its types, and no code is run.

JSON alone loses what a resumed run needs: tuples, integers above 2^53, the last bits of a float, integer keys,
arrays. Each is written as an object with one key that starts with `$`:

| value                          | written as                                   |
|--------------------------------|----------------------------------------------|
| None, bool, str, small int     | itself                                       |
| int beyond 2^53                | `{"$int": "0x..."}`                          |
| float                          | `{"$float": "0x1.8p+1"}`, `nan`, `inf`, `-inf` |
| list                           | an array                                     |
| tuple                          | `{"$tuple": [...]}`                          |
| dict with plain string keys    | an object                                    |
| dict with int or `$...` keys   | `{"$dict": [[key, value], ...]}`             |
| tensor, array                  | `{"$tensor": name}`, `{"$array": name}`      |
"""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from upslope.train.manifest import JSON_LIMIT, CheckpointError, damaged, parse_json
from upslope.train.tensor_file import TORCH_DTYPES

Leaf: TypeAlias = bool | int | float | str | torch.Tensor | np.ndarray[Any, Any] | None
Tree: TypeAlias = "Leaf | Sequence[Tree] | Mapping[str, Tree] | Mapping[int, Tree]"

DEPTH_LIMIT = 64
_EXACT = 2**53
_INTEGER = re.compile(r"-?0x[0-9a-f]+")
_FLOAT = re.compile(r"nan|-?inf|-?0x[01]\.[0-9a-f]+p[+-][0-9]{1,4}")
_ARRAY_CODES = ("?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8")
_ARRAY_DTYPES = tuple(np.dtype(f"={code}") for code in _ARRAY_CODES)


def encode_tree(tree: Tree, *, readable: bool = False) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Turn a tree into JSON and the tensors it refers to by name.

    Names are the places in the tree, as JSON pointers (`/policy/trunk.0.weight`). The same tensor at two places
    (tied weights) is stored once and comes back as one tensor; other views of one storage come back separate.

    Args:
        tree: None, bool, int, float, str, tensors and arrays in dicts (str or int keys), lists and tuples.
        readable: write finite floats in decimal (the shortest that reads back exactly) instead of hexadecimal.

    Raises:
        CheckpointError: a value of another type, or a tree too deep or too large, named by its place.
    """
    encoder = _Encoder(readable=readable)
    document = encoder.encode(tree, "", 0)
    raw = json.dumps(document, indent=1 if readable else None, allow_nan=False).encode("ascii")
    if len(raw) > JSON_LIMIT:
        raise CheckpointError(
            f"the values outside tensors take {len(raw)} bytes of JSON, more than the limit of {JSON_LIMIT}: "
            f"keep long sequences of numbers in tensors or arrays"
        )
    return raw, encoder.tensors


def decode_tree(raw: bytes, tensors: Mapping[str, torch.Tensor], path: Path) -> Any:
    """Read back what `encode_tree` wrote; `path` names the file in errors.

    Raises:
        CheckpointError: the JSON is not what `encode_tree` writes, or refers to other tensors than there are.
    """
    decoder = _Decoder(tensors=tensors, path=path)
    tree = decoder.decode(parse_json(raw, path), 0)
    if unused := set(tensors) - decoder.used:
        raise damaged(path, f"does not mention the tensor {min(unused)!r} that is stored beside it")
    return tree


@dataclass(kw_only=True)
class _Encoder:
    readable: bool
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[tuple[object, ...], str] = field(default_factory=dict)

    def encode(self, value: Tree, place: str, depth: int) -> Any:
        if depth > DEPTH_LIMIT:
            raise _unsupported(place, f"is nested more than {DEPTH_LIMIT} levels deep (or contains itself)")
        if value is None or type(value) in (bool, str):
            return value
        if type(value) is int:
            return value if abs(value) <= _EXACT else {"$int": hex(value)}
        if type(value) is float:
            return value if self.readable and math.isfinite(value) else {"$float": value.hex()}
        if type(value) is list:
            return self._encode_items(value, place, depth)
        if type(value) is tuple:
            return {"$tuple": self._encode_items(value, place, depth)}
        if type(value) in (dict, OrderedDict):
            assert isinstance(value, Mapping)
            return self._encode_mapping(value, place, depth)
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            assert isinstance(value, torch.Tensor)
            return {"$tensor": self._encode_tensor(value, place)}
        if type(value) is np.ndarray:
            return {"$array": self._encode_array(value, place)}
        raise _unsupported(
            place,
            f"has the type {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold; "
            f"turn it into dicts, lists, tuples, None, bool, int, float, str, tensors or arrays",
        )

    def _encode_items(self, items: Sequence[Tree], place: str, depth: int) -> list[Any]:
        return [self.encode(item, f"{place}/{index}", depth + 1) for index, item in enumerate(items)]

    def _encode_mapping(self, items: Mapping[Any, Tree], place: str, depth: int) -> Any:
        if strange := [key for key in items if type(key) not in (str, int)]:
            raise _unsupported(place, f"has the key {strange[0]!r}; keys must be str or int")
        encoded = [[key, self.encode(item, f"{place}/{_token(key)}", depth + 1)] for key, item in items.items()]
        if all(type(key) is str and not key.startswith("$") for key in items):
            return dict(encoded)
        return {"$dict": [[self.encode(key, place, depth + 1), item] for key, item in encoded]}

    def _encode_tensor(self, tensor: torch.Tensor, place: str) -> str:
        if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.dtype not in TORCH_DTYPES:
            raise _unsupported(
                place,
                f"is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}; only dense tensors of "
                f"{', '.join(map(str, TORCH_DTYPES))} can be stored",
            )
        shape, stride = tuple(tensor.shape), tensor.stride()
        return self._name(place, tensor, ("tensor", tensor.data_ptr(), tensor.device, tensor.dtype, shape, stride))

    def _encode_array(self, array: np.ndarray[Any, Any], place: str) -> str:
        if array.dtype not in _ARRAY_DTYPES:
            raise _unsupported(
                place,
                f"is an array of {array.dtype!r}; only {', '.join(map(str, _ARRAY_DTYPES))} in the byte order "
                f"of the machine can be stored",
            )
        copy = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True))
        return self._name(place, copy, ("array", array.ctypes.data, array.dtype, array.shape, array.strides))

    def _name(self, place: str, tensor: torch.Tensor, identity: tuple[object, ...]) -> str:
        name = self.names.setdefault(identity, place) if tensor.numel() else place
        self.tensors.setdefault(name, tensor)
        return name


def _token(key: str | int) -> str:
    """One step of a JSON pointer in ASCII; integer keys are marked so that 1 and "1" differ."""
    if isinstance(key, int):
        return f"#{key:d}" if abs(key) <= _EXACT else f"#{hex(key)}"
    escaped = key.replace("~", "~0").replace("/", "~1").replace("#", "~2")
    return json.dumps(escaped)[1:-1]


def _unsupported(place: str, fault: str) -> CheckpointError:
    return CheckpointError(f"{place or 'the whole state'} {fault}")


@dataclass(kw_only=True)
class _Decoder:
    tensors: Mapping[str, torch.Tensor]
    path: Path
    used: set[str] = field(default_factory=set)
    arrays: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def decode(self, node: Any, depth: int) -> Any:
        if depth > DEPTH_LIMIT:
            raise damaged(self.path, f"is nested more than {DEPTH_LIMIT} levels deep")
        if isinstance(node, list):
            return [self.decode(item, depth + 1) for item in node]
        if isinstance(node, dict):
            if any(key.startswith("$") for key in node):
                return self._decode_tagged(node, depth)
            return {key: self.decode(item, depth + 1) for key, item in node.items()}
        if type(node) is int and abs(node) > _EXACT:
            raise damaged(self.path, "holds an integer beyond 2^53 that is not written as text")
        return node

    def _decode_tagged(self, node: dict[str, Any], depth: int) -> Any:
        match node:
            case {"$int": str(text)} if len(node) == 1 and _INTEGER.fullmatch(text):
                return int(text, 16)
            case {"$float": str(text)} if len(node) == 1 and _FLOAT.fullmatch(text):
                return self._float(text)
            case {"$tuple": list(items)} if len(node) == 1:
                return tuple(self.decode(item, depth + 1) for item in items)
            case {"$dict": list(pairs)} if len(node) == 1:
                return self._decode_pairs(pairs, depth)
            case {"$tensor": str(name)} if len(node) == 1:
                return self._tensor(name)
            case {"$array": str(name)} if len(node) == 1:
                return self._array(name)
        raise damaged(self.path, f"holds an object {sorted(node)} that no upslope writes")

    def _float(self, text: str) -> float:
        try:
            return float.fromhex(text)
        except OverflowError as fault:
            raise damaged(self.path, f"holds {text}, which is no float") from fault

    def _decode_pairs(self, pairs: list[Any], depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2):
                raise damaged(self.path, "holds a dict whose entries are not pairs")
            key = self.decode(pair[0], depth + 1)
            if type(key) not in (str, int) or key in found:
                raise damaged(self.path, "holds a dict with a key that is twice there or neither str nor int")
            found[key] = self.decode(pair[1], depth + 1)
        return found

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise damaged(self.path, f"refers to the tensor {name!r}, which is not stored beside it")
        self.used.add(name)
        return self.tensors[name]

    def _array(self, name: str) -> np.ndarray[Any, Any]:
        tensor = self._tensor(name)
        if tensor.dtype == torch.bfloat16:
            raise damaged(self.path, f"asks for {name!r} as an array, but it is a tensor of bfloat16")
        return self.arrays.setdefault(name, tensor.numpy())

"""Named tensors as the bytes of a safetensors file, with checks of our own around the library."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from upslope.train.manifest import JSON_LIMIT, CheckpointError, damaged, parse_json

TORCH_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.uint32,
    torch.int32,
    torch.float32,
    torch.uint64,
    torch.int64,
    torch.float64,
    torch.complex64,
)
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_METADATA = "__metadata__"


def pack_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of a safetensors file with these tensors: detached, on the CPU, contiguous, sharing nothing.

    Raises:
        CheckpointError: a name or a data type that the file cannot hold.
    """
    separate: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if name == _METADATA or name != name.encode("utf-8", "replace").decode("utf-8"):
            raise CheckpointError(f"{name!r} cannot be the name of a tensor: rename it")
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{name!r} is not a tensor of a type that can be stored: convert it")
        plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    raw = safetensors.torch.save(separate, metadata={"format": "pt"})
    if int.from_bytes(raw[:8], "little") > JSON_LIMIT:
        raise CheckpointError(f"{len(separate)} tensors have names too long to store: use fewer or shorter names")
    return raw


def unpack_tensors(raw: bytes, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU; `path` names the file in errors.

    The header is bounded and checked before anything is allocated: no duplicate names, known data types, sizes
    that follow from the shapes, tensors side by side that fill the file exactly.

    Raises:
        CheckpointError: the bytes are not such a file.
    """
    _check_header(raw, path)
    try:
        tensors = safetensors.torch.load(raw)
    except safetensors.SafetensorError as fault:
        raise damaged(path, f"is not a safetensors file ({fault})") from fault
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise damaged(path, f"holds other values than true and false in {name!r}")
    return tensors


def _check_header(raw: bytes, path: Path) -> None:
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > len(raw) - 8:
        raise damaged(path, "is not a safetensors file (its header is longer than the file)")
    header = parse_json(raw[8 : 8 + min(size, JSON_LIMIT + 1)], path)
    if not isinstance(header, dict):
        raise damaged(path, "is not a safetensors file (its header is no object)")
    header.pop(_METADATA, None)
    spans = sorted(_span(entry, name, path) for name, entry in header.items())
    end = 0
    for start, stop in spans:
        if start != end:
            raise damaged(path, "holds tensors that overlap or leave gaps")
        end = stop
    if end != len(raw) - 8 - size:
        raise damaged(path, "holds more or fewer bytes than its tensors need")


def _span(entry: Any, name: str, path: Path) -> tuple[int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]}:
            known = dtype in _ITEM_BYTES and all(type(length) is int and length >= 0 for length in shape)
            fits = 0 <= start <= stop and len(shape) <= 64 and len(entry) == 3
            indexable = known and fits and 8 * prod(max(length, 1) for length in shape) < 2**63
            if indexable and stop - start == prod(shape) * _ITEM_BYTES[dtype]:
                return start, stop
    raise damaged(path, f"gives an impossible type, shape or place for the tensor {name!r}")

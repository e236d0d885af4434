"""A name for weights that is the same wherever the same weights lie."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def content_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights, in the order of their names; 64 hex digits.

    Equal for equal weights wherever they lie; another one if one bit of one weight differs.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().to("cpu").contiguous()
        digest.update(f"{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
        digest.update(memoryview(plain.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()

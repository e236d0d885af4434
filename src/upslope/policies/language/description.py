"""What upslope notes beside the weights of a language policy: how it samples, and the hash of what was written."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from upslope.errors import UsageError
from upslope.policies.content import content_hash as content_hash
from upslope.policies.language.sampling import Sampling

DESCRIPTION = "upslope.json"
VALUE_HEAD = "value_head.safetensors"
FORMAT = "upslope-language-policy"
FORMAT_VERSION = 1
_LIMIT = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """The content of `upslope.json`.

    Attributes:
        content_hash: of the whole model's weights, see `content_hash`.
        value_head: whether `value_head.safetensors` stands beside.
        precision: the policy's.
        sampling: the policy's.
    """

    content_hash: str
    value_head: bool
    precision: Literal["float32", "bfloat16"]
    sampling: Sampling

    def pack(self) -> bytes:
        """As the bytes of the file."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "upslope": metadata.version("upslope"),
            **asdict(self),
        }
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode("ascii")


def read_description(folder: Path) -> Description | None:
    """What stands beside the weights in a folder; None in one that upslope did not write.

    Raises:
        UsageError: the file is damaged, or of a newer format.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _LIMIT:
            raise ValueError(f"it has more than {_LIMIT} bytes")
        return _parse(json.loads(path.read_text("utf-8")), path)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is not what upslope wrote ({error}): take another copy of the folder") from error


def _parse(content: Any, path: Path) -> Description:
    match content:
        case {"format": "upslope-language-policy", "format_version": int(version)} if version > FORMAT_VERSION:
            raise UsageError(f"{path} has format {version}, this upslope reads up to {FORMAT_VERSION}: upgrade upslope")
        case {
            "format": "upslope-language-policy",
            "format_version": 1,
            "content_hash": str(digest),
            "value_head": bool(value_head),
            "precision": "float32" | "bfloat16" as precision,
            "sampling": dict(sampling),
        }:
            return Description(
                content_hash=digest, value_head=value_head, precision=precision, sampling=Sampling(**sampling)
            )
    raise ValueError("entries are missing or of another type")

"""`samples.json`: the same prompts as the policy answered them at the first evaluation and at the latest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upslope.errors import UsageError
from upslope.train.language.evaluate import ShownCompletion
from upslope.train.storage import write_file_atomically


class SamplesFile:
    """Keeps the completions of the first evaluation and of the latest one.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self, index: int, shown: Sequence[ShownCompletion]) -> None:
        """Those of the evaluation after `index` updates; the first ones stay."""
        latest = {
            "update": index,
            "samples": [
                {
                    "example": one.example,
                    "prompt": one.prompt,
                    "completion": one.completion,
                    "total": one.total,
                }
                for one in shown
            ],
        }
        first = read_samples(self._path)[:1] if index and self._path.exists() else []
        content = {"evaluations": [*first, latest]}
        write_file_atomically(self._path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The evaluations of a samples file, the first one first; each has "update" and "samples".

    Raises:
        UsageError: if it is no such file.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        evaluations = content["evaluations"]
        if all(isinstance(one["update"], int) and isinstance(one["samples"], list) for one in evaluations):
            return evaluations
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} holds no samples ({error}): delete it") from error
    raise UsageError(f"{path} holds no samples: delete it")

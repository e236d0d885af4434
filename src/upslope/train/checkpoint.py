"""Checkpoints and policy folders: safetensors, typed JSON and a manifest, written whole or not at all.

A checkpoint is a directory `step-000000060/` with `tensors.safetensors`, `state.json` and `MANIFEST.json`, a
policy folder one with `model.safetensors`, `config.json` and `MANIFEST.json`. Reading them never runs code.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upslope.train.manifest import CheckpointError, FolderKind, damaged
from upslope.train.storage import (
    carries_manifest,
    prepare,
    publish_folder,
    read_current_folder,
    read_folder,
    retire_folder,
    write_file_atomically,
)
from upslope.train.tensor_file import pack_tensors, unpack_tensors
from upslope.train.typed_json import Tree, decode_tree, encode_tree

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Tree",
    "latest_checkpoint",
    "load_checkpoint",
    "load_policy_folder",
    "save_checkpoint",
    "save_policy_folder",
    "write_file_atomically",
]

_CHECKPOINT = FolderKind(format="upslope-checkpoint", files=frozenset({"state.json", "tensors.safetensors"}))
_POLICY = FolderKind(format="upslope-policy", files=frozenset({"config.json", "model.safetensors"}))
_STEP = re.compile(r"(\.previous-)?step-([0-9]{9,18})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint: the step it was saved at, the state as it was given, where it lies."""

    step: int
    state: Any
    path: Path


def save_checkpoint(
    directory: Path, step: int, state: Tree, *, keep: int | None, uncounted: Collection[Path] = ()
) -> Path:
    """Write `state` as `directory/step-000000060`, durably, and delete the oldest beyond `keep`.

    Args:
        directory: where the checkpoints of one run lie; made if it is missing. One writer at a time.
        step: the number that orders checkpoints, at least 0. The same number again replaces what is there.
        state: what to store, see `encode_tree`; tensors come back on the CPU without gradients.
        keep: how many checkpoints stay, the one just written among them; None keeps all. Only directories that
            carry our manifest and hold nothing else count and go.
        uncounted: checkpoints known to be of no use, found damaged say: they take no place among those kept, and stay.

    Raises:
        CheckpointError: a value that cannot be stored, or the file system refused. Older checkpoints are
            untouched and nothing half-written is left.
    """
    if type(step) is not int or not 0 <= step < 10**18:
        raise ValueError(f"step must be an int of at least 0 and below 10^18, got {step!r}")
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be None (all) or at least 1, got {keep}")
    document, tensors = encode_tree(state)
    path = directory / f"step-{step:09d}"
    files = {"tensors.safetensors": pack_tensors(tensors), "state.json": document}
    prepare(directory, _CHECKPOINT, lambda name: _STEP.fullmatch(name) is not None)
    publish_folder(path, _CHECKPOINT, files, step=step)
    _rotate(directory, path, keep, uncounted)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read the checkpoint at `path`, after its sizes, hashes, names and structure are found to be right.

    Raises:
        CheckpointError: it is damaged, incomplete, of a newer format, or no checkpoint; names file and remedy.
    """
    folder = read_folder(path, _CHECKPOINT)
    named = _STEP.fullmatch(path.name)
    if folder.step is None or (named and int(named[2]) != folder.step):
        raise damaged(path / "MANIFEST.json", f"is for step {folder.step}, unlike the name of its directory")
    tensors = unpack_tensors(folder.files["tensors.safetensors"], path / "tensors.safetensors")
    state = decode_tree(folder.files["state.json"], tensors, path / "state.json")
    return Checkpoint(step=folder.step, state=state, path=path)


def latest_checkpoint(directory: Path, *, on_damaged: Callable[[Path, CheckpointError], None]) -> Checkpoint | None:
    """The newest checkpoint in `directory` that is whole, or None; each damaged one met is told and skipped."""
    if not directory.is_dir():
        if directory.exists():
            raise CheckpointError(
                f"{directory} is no directory, so there are no checkpoints in it: bring it back, or move it"
            )
        return None
    for _, path in sorted(_candidates(directory), key=lambda found: (found[0], found[1].name), reverse=True):
        try:
            return load_checkpoint(path)
        except CheckpointError as fault:
            on_damaged(path, fault)
    return None


def save_policy_folder(path: Path, tensors: Mapping[str, torch.Tensor], config: Tree) -> None:
    """Write weights and configuration as the folder `path`, replacing the one that is there at one stroke.

    Args:
        path: the folder, for example `runs/NAME/policy`.
        tensors: weights and buffers by name, as in `state_dict()`.
        config: whatever rebuilds the policy, without tensors or arrays.

    Raises:
        CheckpointError: something cannot be stored, the file system refused, or `path` holds files that were
            not written here. The old folder is untouched.
    """
    document, inside = encode_tree(config, readable=True)
    if inside:
        raise CheckpointError(f"the config holds a tensor or array at {min(inside)}: put it among the tensors")
    files = {"model.safetensors": pack_tensors(tensors), "config.json": document}
    prepare(path.parent, _POLICY, lambda name: name == path.name)
    publish_folder(path, _POLICY, files, step=None)


def load_policy_folder(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Read weights (by name, on the CPU) and configuration of a policy folder, verified like a checkpoint.

    Raises:
        CheckpointError: it is damaged, incomplete, of a newer format, or no policy folder.
    """
    place = path.resolve()
    folder = read_current_folder(place, _POLICY)
    tensors = unpack_tensors(folder.files["model.safetensors"], place / "model.safetensors")
    return tensors, decode_tree(folder.files["config.json"], {}, place / "config.json")


def _candidates(directory: Path) -> list[tuple[int, Path]]:
    found = [(match, path) for path in directory.iterdir() if (match := _STEP.fullmatch(path.name))]
    return [
        (int(match[2]), path)
        for match, path in found
        if match[2] == f"{int(match[2]):09d}" and (match[1] is None or path.is_dir())
    ]


def _rotate(directory: Path, newest: Path, keep: int | None, uncounted: Collection[Path]) -> None:
    if keep is None:
        return
    others = [
        (step, path)
        for step, path in _candidates(directory)
        if path != newest
        and path not in uncounted
        and path.name.startswith("step-")
        and carries_manifest(path, _CHECKPOINT, step)
    ]
    for _, path in sorted(others, reverse=True)[keep - 1 :]:
        try:
            retire_folder(path, _CHECKPOINT)
        except CheckpointError as fault:
            raise CheckpointError(f"{newest} was saved, but an older checkpoint was not removed: {fault}") from fault

"""Trajectories in a file: a safetensors file whose metadata say, as JSON, what its tensors are. No code is run.

The tensors are the fields of a `Trajectory`, those of named observations as `observation/NAME`. The JSON holds format
and version, the spaces, the version of the policy, what the recorder said about it, and the SHA-256 of all that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from upslope.errors import UsageError
from upslope.policies.config import saved_space
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
    space_to_tree,
)
from upslope.trajectory import Observation, Trajectory
from upslope.typed_tree import read_fields

_FORMAT, _VERSION, _KEY = "upslope-trajectories", 1, "upslope"
_HEADER_LIMIT = 1 << 26
_LARGEST = 1 << 28
_FLAGS = ("terminated", "truncated", "mask")
_NUMBERS = ("reward", "behaviour_log_prob")
_STEPWISE = ("action", *_NUMBERS, *_FLAGS, "time")
_OPTIONAL = ("group", "reference_log_prob", "proximal_log_prob")
_NAMED = ("observation", "final_observation", "memory")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Trajectories with all that is needed to learn from them.

    Attributes:
        trajectory: what happened.
        observation_space: what the policy saw.
        action_space: what it could do.
        about: where it comes from, in words, for people.
    """

    trajectory: Trajectory
    observation_space: Space
    action_space: Leaf
    about: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    format: str
    version: int
    policy_version: int
    observation_space: dict[str, Any]
    action_space: dict[str, Any]
    about: dict[str, str]
    sha256: str


def write_recording(recording: Recording, path: str | Path) -> None:
    """Write a file that `read_recording` reads; an older one at that place is replaced at one stroke.

    Raises:
        OSError: if it cannot be written; the older one is untouched then.
    """
    path, tensors = Path(path), _tensors(recording.trajectory)
    header = _Header(
        format=_FORMAT,
        version=_VERSION,
        policy_version=recording.trajectory.policy_version,
        observation_space=space_to_tree(recording.observation_space),
        action_space=space_to_tree(recording.action_space),
        about=dict(recording.about),
        sha256="",
    )
    header = replace(header, sha256=_checksum(header, tensors))
    raw = safetensors.torch.save(tensors, metadata={_KEY: json.dumps(asdict(header))})
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def read_recording(path: str | Path) -> Recording:
    """The trajectories of a file.

    Raises:
        UsageError: if there is no such file, or it is damaged, of another kind or of a later version.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(
            f"there is no file {path}: make one of a trained policy with `upslope record RUN --out {path}`, or with "
            "upslope.collect.trajectory_file.write_recording"
        ) from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder: give a file that `upslope record` has written") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    header = _header(raw, path)
    try:
        tensors = safetensors.torch.load(raw)
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if _checksum(header, tensors) != header.sha256:
        raise _damaged(path, "it does not hold what it was written with (the SHA-256 differs)")
    try:
        observation_space = saved_space(header.observation_space, "observation_space", _LARGEST)
        action_space = saved_space(header.action_space, "action_space", _LARGEST)
        if isinstance(action_space, Composite):
            raise ValueError("the action space is a Composite, and a policy's is one leaf")
        trajectory = _trajectory(tensors, header.policy_version)
        _check(trajectory, observation_space, action_space)
        trajectory = replace(
            trajectory,
            observation=_in_order(trajectory.observation, observation_space),
            final_observation=_in_order(trajectory.final_observation, observation_space),
        )
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return Recording(
        trajectory=trajectory, observation_space=observation_space, action_space=action_space, about=header.about
    )


def _damaged(path: Path, what: str) -> UsageError:
    return UsageError(f"{path} is damaged or no file of trajectories: {what}. Record it anew, or take it from a copy")


def _header(raw: bytes, path: Path) -> _Header:
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > min(len(raw) - 8, _HEADER_LIMIT):
        raise _damaged(path, "it does not begin as a safetensors file")
    try:
        outer = json.loads(raw[8 : 8 + size])
        metadata = outer["__metadata__"][_KEY]
        tree = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read ({error})") from error
    except (KeyError, TypeError):
        raise _damaged(path, "it is no safetensors file that upslope wrote") from None
    if isinstance(tree, dict) and tree.get("format") == _FORMAT and tree.get("version") != _VERSION:
        raise UsageError(
            f"{path} is of version {tree.get('version')!r} and this upslope reads version {_VERSION}: read it with the "
            "version that wrote it, or record it anew"
        )
    try:
        header: _Header = read_fields(_Header, tree if isinstance(tree, dict) else {}, "the header")
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if header.format != _FORMAT:
        raise _damaged(path, f"its format is {header.format!r}")
    return header


def _tensors(trajectory: Trajectory) -> dict[str, Tensor]:
    """Every field by name, each with memory of its own."""
    found: dict[str, Tensor] = {name: getattr(trajectory, name) for name in (*_STEPWISE, "final_index")}
    found |= {name: getattr(trajectory, name) for name in _OPTIONAL if getattr(trajectory, name) is not None}
    for name in _NAMED:
        entry: Observation | None = getattr(trajectory, name)
        if isinstance(entry, dict):
            found |= {f"{name}/{key}": tensor for key, tensor in entry.items()}
        elif entry is not None:
            found[name] = entry
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}


def _checksum(header: _Header, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what the header says and of the tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(asdict(replace(header, sha256=""))).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _trajectory(tensors: Mapping[str, Tensor], version: int) -> Trajectory:
    needed = {*_STEPWISE, "final_index"}
    named = {name: _named(tensors, name) for name in _NAMED}
    unknown = {name for name in tensors if name.split("/")[0] not in (*needed, *_OPTIONAL, *_NAMED)}
    missing = (needed - set(tensors)) | {name for name in _NAMED[:2] if named[name] is None}
    if unknown or missing:
        raise ValueError(f"the tensors {sorted(unknown)} are unknown and {sorted(missing)} are missing")
    fields: dict[str, Any] = {name: tensors[name] for name in (*needed, *_OPTIONAL) if name in tensors}
    return Trajectory(policy_version=version, **fields, **cast("dict[str, Any]", named))


def _named(tensors: Mapping[str, Tensor], name: str) -> Observation | None:
    if name in tensors:
        return tensors[name]
    prefix = f"{name}/"
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)} or None


def _in_order(observation: Observation, space: Space) -> Observation:
    """The entries as the space has them."""
    if isinstance(observation, dict) and isinstance(space, Composite):
        return {name: observation[name] for name, _ in space.entries}
    return observation


def _check(trajectory: Trajectory, observation_space: Space, action_space: Leaf) -> None:
    """Refuse shapes and types that are none of a trajectory in these spaces.

    Raises:
        ValueError: naming the field.
    """
    reward, index = trajectory.reward, trajectory.final_index
    if reward.dim() != 2 or reward.numel() == 0:
        raise ValueError(f"reward must have the shape [rows, positions], got {tuple(reward.shape)}")
    shape = tuple(reward.shape)
    for name in (*_NUMBERS, *_FLAGS, "time", "reference_log_prob", "proximal_log_prob"):
        tensor: Tensor | None = getattr(trajectory, name)
        kind = "bool" if name in _FLAGS else "int64" if name == "time" else "float"
        right = tensor is None or (f"torch.{kind}" in str(tensor.dtype) and tuple(tensor.shape) == shape)
        if not right:
            assert tensor is not None
            raise ValueError(f"{name} must be {kind} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    _check_leaf("action", trajectory.action, action_space, shape, flat=True)
    group = trajectory.group
    if group is not None and (group.dtype != torch.int64 or tuple(group.shape) != shape[:1]):
        raise ValueError(f"group must be int64 [rows], got {group.dtype} {tuple(group.shape)}")
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError("final_index must be int64 [ends]")
    if len(index) and not (int(index[0]) >= 0 and int(index[-1]) < reward.numel() and bool((index.diff() > 0).all())):
        raise ValueError("final_index must rise within the trajectory's positions")
    for name, lead in (("observation", shape), ("final_observation", tuple(index.shape))):
        entry: Observation = getattr(trajectory, name)
        leaves = (
            dict(observation_space.entries) if isinstance(observation_space, Composite) else {"": observation_space}
        )
        tensors = entry if isinstance(entry, dict) else {"": entry}
        if set(tensors) != set(leaves):
            raise ValueError(f"the entries of {name} are not those of the observation space")
        for key, tensor in tensors.items():
            leaf = leaves[key]
            assert not isinstance(leaf, Composite)
            _check_leaf(f"{name} {key}".strip(), tensor, leaf, lead)


def _check_leaf(name: str, tensor: Tensor, leaf: ObservationLeaf, lead: tuple[int, ...], *, flat: bool = False) -> None:
    """Refuse another shape than the leaf's, and choices that there are not."""
    if isinstance(leaf, Box):
        own = (math.prod(leaf.shape),) if flat else leaf.shape
    elif isinstance(leaf, Discrete):
        own = ()
    elif isinstance(leaf, MultiDiscrete):
        own = (len(leaf.choices),)
    elif isinstance(leaf, MultiBinary):
        own = (leaf.n,)
    else:
        assert isinstance(leaf, ActionMask)
        own = (sum(leaf.sizes),)
    if tuple(tensor.shape) != (*lead, *own):
        raise ValueError(f"{name} must have the shape {(*lead, *own)}, got {tuple(tensor.shape)}")
    if isinstance(leaf, ActionMask) and tensor.dtype != torch.bool:
        raise ValueError(f"{name} must be bool, got {tensor.dtype}")
    if isinstance(leaf, Discrete | MultiDiscrete) and tensor.numel():
        most = torch.tensor(leaf.n if isinstance(leaf, Discrete) else leaf.choices)
        if tensor.is_floating_point() or bool((tensor < 0).any()) or bool((tensor >= most).any()):
            raise ValueError(f"{name} must be whole numbers from 0 to below {most.tolist()}")

"""A policy as a folder: weights, normalisers and configuration; read without running code."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from upslope.policies import ActorCritic
from upslope.train.checkpoint import load_policy_folder, save_policy_folder


def save(policy: ActorCritic, path: str | Path) -> None:
    """Write a policy folder; an older one at that place is replaced at one stroke.

    Raises:
        CheckpointError: if it cannot be written; the older one is untouched then.
    """
    tensors = {name: tensor.detach() for name, tensor in policy.state_dict().items()}
    save_policy_folder(Path(path), tensors, policy.config_tree())


def load(path: str | Path, *, encoder: nn.Module | None = None) -> ActorCritic:
    """Read a policy folder, ready to act: `load("runs/x/policy").act(observation)`.

    Args:
        path: a policy folder, or a run directory (its latest policy is taken).
        encoder: a fresh module of the same kind, if the policy was made with an encoder of the user's own.

    Raises:
        CheckpointError: if the folder is missing, damaged, or no policy folder.
        ValueError: if its weights do not fit its configuration.
    """
    place = Path(path)
    if (place / "policy").is_dir():
        place = place / "policy"
    tensors, tree = load_policy_folder(place)
    return ActorCritic.from_tree(tree, tensors, encoder=encoder)

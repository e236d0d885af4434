"""A policy as a folder: what an agent or a language model is loaded from, without running code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from upslope.errors import UsageError
from upslope.policies import ActorCritic
from upslope.train.checkpoint import load_policy_folder, save_policy_folder
from upslope.train.manifest import FolderKind
from upslope.train.storage import prepare, publish_folder

if TYPE_CHECKING:
    from upslope.policies.language.policy import LanguagePolicy

_DESCRIPTION = "upslope.json"
LANGUAGE_POLICY = FolderKind(
    format="upslope-language-policy",
    files=frozenset({"config.json", "tokenizer.json", _DESCRIPTION}),
    more=re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(json|safetensors|jinja|txt|model)"),
)


def save(policy: ActorCritic | LanguagePolicy, path: str | Path) -> None:
    """Write a policy folder; an older one at that place is replaced at one stroke.

    An agent's holds weights, normalisers and configuration, a language model's is a folder that
    `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Raises:
        CheckpointError: if it cannot be written; the older one is untouched then.
    """
    if isinstance(policy, ActorCritic):
        tensors = {name: tensor.detach() for name, tensor in policy.state_dict().items()}
        save_policy_folder(Path(path), tensors, policy.config_tree())
        return
    from upslope.policies.language.folder import language_policy_files

    place = Path(path)
    files = language_policy_files(policy)
    prepare(place.parent, LANGUAGE_POLICY, lambda name: name == place.name)
    publish_folder(place, LANGUAGE_POLICY, files, step=None)


def load(path: str | Path, *, encoder: nn.Module | None = None) -> ActorCritic:
    """Read an agent's policy folder, ready to act: `load("runs/x/policy").act(observation)`.

    Args:
        path: a policy folder, or a run directory (its latest policy is taken).
        encoder: a fresh module of the same kind, if the policy was made with an encoder of the user's own.

    Raises:
        CheckpointError: if the folder is missing, damaged, or no policy folder.
        UsageError: if it is a language model's, which `load_language` reads.
        ValueError: if its weights do not fit its configuration.
    """
    place = _policy_folder(path)
    if (place / _DESCRIPTION).is_file():
        raise UsageError(f"{place} is the folder of a language model: upslope.load_language({str(path)!r}) reads it")
    tensors, tree = load_policy_folder(place)
    return ActorCritic.from_tree(tree, tensors, encoder=encoder)


def load_language(path: str | Path) -> LanguagePolicy:
    """Read a language model's policy folder, or any Hugging Face folder of a causal language model.

    Args:
        path: the folder, or a run directory (its latest policy is taken).

    Raises:
        UsageError: if there is no such folder, or it is damaged or not whole.
    """
    from upslope.policies.language.folder import load_language_policy

    return load_language_policy(_policy_folder(path))


def _policy_folder(path: str | Path) -> Path:
    place = Path(path)
    return place / "policy" if (place / "policy").is_dir() else place

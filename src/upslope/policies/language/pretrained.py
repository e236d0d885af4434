"""Weights that somebody saved: found, checked and loaded through transformers, and never silently random."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from upslope.errors import UsageError
from upslope.policies.language.description import VALUE_HEAD, Description, content_hash
from upslope.policies.language.library import quietly

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = logging.getLogger(__name__)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_folder(source: str | Path) -> Path | None:
    """The folder that a source names: itself, or the `policy` of a run directory; None for what can be a hub name.

    Raises:
        UsageError: it is neither.
    """
    place = Path(source).expanduser()
    if not place.is_dir():
        if _HUB_NAME.fullmatch(str(source)) is None:
            raise UsageError(f"there is no folder {source}: give the folder of a model, a run directory or a hub name")
        return None
    return place / "policy" if (place / "policy").is_dir() else place


def load_model(source: str | Path) -> PreTrainedModel:
    """The causal language model of a folder or hub name, in float32, without dropout.

    Args:
        source: a folder, or a hub name.

    Raises:
        UsageError: there is nothing to load, it is not in safetensors, it is incomplete, quantised or of an
            architecture that transformers cannot build; the text says what to do.
    """
    folder = find_folder(source)
    if folder is not None:
        _check_files(folder)
    name = str(source) if folder is None else str(folder)
    with quietly():
        from transformers import AutoConfig, AutoModelForCausalLM

        local = folder is not None
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
            _without_dropout(config)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=local,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise UsageError(_refusal(source, folder, error)) from error
    model, info = loaded
    _check_keys(name, info)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def read_value_head(folder: Path, description: Description | None) -> dict[str, Tensor] | None:
    """The critic that stands beside the weights; None where there is none.

    Raises:
        UsageError: it should be there and is not, or it is damaged.
    """
    path = folder / VALUE_HEAD
    if not path.is_file():
        if description is not None and description.value_head:
            raise UsageError(f"{path} is missing though the folder was written with it: take another copy")
        return None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path} is not a safetensors file ({error}): take another copy of the folder") from error


def check_content(folder: Path, model: nn.Module, description: Description | None) -> None:
    """Loaded weights are those that were written, where upslope wrote them.

    Raises:
        UsageError: they are not.
    """
    if description is not None and content_hash(model) != description.content_hash:
        raise UsageError(
            f"the weights in {folder} are not those that were written with its upslope.json: take another copy, or "
            "delete upslope.json if you changed the weights on purpose"
        )


def _check_files(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"{folder} holds a LoRA adapter of peft: merge it into its model first (PeftModel.merge_and_unload, then "
            "save_pretrained into a new folder), and give that folder"
        )
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json: give a folder as transformers' save_pretrained writes it")
    if any((folder / name).is_file() for name in _WEIGHTS):
        return
    pickled = sorted(entry.name for pattern in _PICKLES for entry in folder.glob(pattern))
    if pickled:
        raise UsageError(
            f"{folder} holds its weights as pickle ({', '.join(pickled)}), which can run code when it is read: convert "
            "them to safetensors where you trust them (AutoModelForCausalLM.from_pretrained(folder).save_pretrained"
            "(new_folder)), and give the new folder"
        )
    raise UsageError(
        f"{folder} has no weights ({' or '.join(_WEIGHTS)}): a model from there would be random. Copy the weights into "
        "it, or leave out model.source to build model.shape"
    )


def _without_dropout(config: Any) -> None:
    settings = vars(config)
    if "quantization_config" in settings and settings["quantization_config"] is not None:
        raise ValueError("its weights are quantised and cannot be trained: take a version that is not")
    for name, value in list(settings.items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def _check_keys(name: str, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing or info["error_msgs"]:
        raise UsageError(
            f"the weights of {name} are incomplete: {_listed(missing)} would be random {info['error_msgs'] or ''}. Is "
            "config.json that of these weights (tie_word_embeddings among it)?"
        )
    if info["unexpected_keys"]:
        _logger.warning(
            "%s holds weights that its model does not use: %s", name, _listed(sorted(info["unexpected_keys"]))
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _refusal(source: str | Path, folder: Path | None, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    reason = " ".join(line.strip() for line in lines[:2]) if lines else type(error).__name__
    if folder is not None:
        return f"no model could be loaded from {folder}: {reason}"
    return (
        f"{str(source)!r} is no folder here, and as a hub name it could not be loaded: {reason} Give the path of a "
        "folder, or a hub name while the hub can be reached (or is in transformers' cache)"
    )

"""A language policy as a Hugging Face folder, which `AutoModelForCausalLM.from_pretrained` loads.

| file | what it holds |
|---|---|
| `model.safetensors` (in shards if very large), `config.json`, `generation_config.json` | the model, adapters merged |
| `tokenizer.json`, `tokenizer_config.json`, ... | the tokenizer, as transformers writes it |
| `value_head.safetensors` | the critic, if there is one |
| `lora.safetensors`, `lora.json` | the adapters on their own, if there are any, in peft's format |
| `upslope.json` | sampling, precision and the hash of the weights |

The adapters do not have peft's own file names, under which transformers would apply them a second time.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from upslope.errors import UsageError
from upslope.policies.language.config import LanguageModelConfig
from upslope.policies.language.description import DESCRIPTION, VALUE_HEAD, Description, content_hash, read_description
from upslope.policies.language.library import quietly
from upslope.policies.language.model import build_policy
from upslope.policies.language.policy import LanguagePolicy
from upslope.policies.language.pretrained import find_folder
from upslope.policies.language.reference import merged_copy
from upslope.policies.language.sampling import Sampling

LORA = "lora.safetensors"
LORA_CONFIG = "lora.json"


def save_language_policy(policy: LanguagePolicy, path: str | Path) -> None:
    """Write a policy into a folder that is empty or not there yet; whoever replaces an older one does it by renaming.

    Raises:
        UsageError: if the folder holds something.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: save into a new folder")
    model = merged_copy(policy.model)
    with quietly():
        model.save_pretrained(str(folder), safe_serialization=True)
    policy.tokenizer.save(folder)
    if policy.value_head is not None:
        save_file(_plain(policy.value_head.state_dict()), folder / VALUE_HEAD)
    _save_adapters(policy.model, folder)
    description = Description(
        content_hash=content_hash(model),
        value_head=policy.value_head is not None,
        precision=policy.precision,
        sampling=policy.sampling,
    )
    (folder / DESCRIPTION).write_bytes(description.pack())


def language_policy_files(policy: LanguagePolicy) -> dict[str, bytes]:
    """What `save_language_policy` writes, by name: for a writer that publishes folders at one stroke."""
    with TemporaryDirectory() as folder:
        save_language_policy(policy, folder)
        return {entry.name: entry.read_bytes() for entry in sorted(Path(folder).iterdir())}


def load_language_policy(
    path: str | Path,
    *,
    sampling: Sampling | None = None,
    precision: Literal["float32", "bfloat16"] | None = None,
    device: str | torch.device = "cpu",
) -> LanguagePolicy:
    """Read a policy, ready to complete prompts: `load_language_policy("runs/x")`.

    Weights are checked against the hash that was written with them; no code is run. Adapters come back merged.

    Args:
        path: a folder of `save_language_policy`, any other Hugging Face folder of a causal language model, or a run
            directory (its policy is taken).
        sampling: how tokens are drawn; None for what was written with it, plain sampling in a foreign folder.
        precision: what it computes in; None for what was written with it, float32 in a foreign folder.
        device: where it computes.

    Raises:
        UsageError: if there is no such folder, or it is damaged or not whole.
    """
    folder = find_folder(path)
    if folder is None:
        raise UsageError(f"{path} is no folder: give a run directory or the folder of a language policy")
    found = read_description(folder)
    written = "float32" if found is None else found.precision
    config = LanguageModelConfig(
        source=str(folder),
        value_head=found is not None and found.value_head,
        precision=written if precision is None else precision,
    )
    if sampling is None:
        sampling = Sampling() if found is None else found.sampling
    return build_policy(config, tokenizer=None, seed=0, sampling=sampling, device=device)


def _save_adapters(model: nn.Module, folder: Path) -> None:
    with quietly():
        import peft

        if not isinstance(model, peft.PeftModel):
            return
        tensors: dict[str, Tensor] = peft.get_peft_model_state_dict(model)
    config: dict[str, Any] = model.peft_config[str(model.active_adapter)].to_dict()
    config["base_model_name_or_path"] = None
    save_file(_plain(tensors), folder / LORA)
    (folder / LORA_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True, default=_jsonable) + "\n", "utf-8")


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no storage: parameters may be views into one buffer."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value)
    return str(value)

"""Settings in, language policy out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upslope.errors import UsageError
from upslope.policies.language.config import LanguageModelConfig, LoraConfig
from upslope.policies.language.description import Description, read_description
from upslope.policies.language.library import quietly
from upslope.policies.language.policy import LanguagePolicy
from upslope.policies.language.pretrained import check_content, find_folder, load_model, read_value_head
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.shapes import build_model
from upslope.policies.language.tokenizer import Tokenizer, load_tokenizer
from upslope.streams import Purpose, derived_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_policy(
    config: LanguageModelConfig,
    *,
    tokenizer: Tokenizer | None,
    seed: int,
    sampling: Sampling,
    device: str | torch.device = "cpu",
) -> LanguagePolicy:
    """Load or build the model that settings name, with a critic and adapters where they ask for them.

    A critic starts at 0, unless one stands beside the weights in the source's folder. Adapters start without effect.

    Args:
        config: what to load or build.
        tokenizer: for a model that is built here; None takes the source's own.
        seed: of the run: initial weights and adapters are derived from it.
        sampling: how its tokens are drawn.
        device: where it computes.

    Raises:
        UsageError: the source cannot be loaded or is not whole, or settings do not fit each other.
        ModuleNotFoundError: a package of the extra `language` is not installed.
    """
    folder, description = None, None
    if config.source is None:
        if tokenizer is None:
            raise UsageError("a model that is built here needs a tokenizer: give one, or name model.source")
        model = build_model(config.shape, tokenizer, seed)
    else:
        folder = find_folder(config.source)
        description = None if folder is None else read_description(folder)
        if tokenizer is None:
            tokenizer = load_tokenizer(folder or config.source, end_token=config.end_token)
        model = load_model(config.source)
        if folder is not None:
            check_content(folder, model, description)
    _check_vocabulary(model, tokenizer)
    _set_ends(model, tokenizer)
    whole: Any = model if config.lora is None else _with_adapters(model, config.lora, seed)
    policy = LanguagePolicy(
        whole.to(device),
        tokenizer,
        sampling=sampling,
        value_head=config.value_head,
        precision=config.precision,
        checkpoint_activations=config.checkpoint_activations,
    )
    if folder is not None and policy.value_head is not None:
        _load_value_head(policy.value_head, folder, description)
    return policy.to(device)


def _load_value_head(head: torch.nn.Linear, folder: Path, description: Description | None) -> None:
    tensors = read_value_head(folder, description)
    if tensors is None:
        return
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise UsageError(f"the value head in {folder} has {found} where the model needs {expected}")
    head.load_state_dict(tensors)


def _check_vocabulary(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if rows < tokenizer.size:
        raise UsageError(
            f"the tokenizer has {tokenizer.size} tokens and the model embeddings for {rows}: give the tokenizer that "
            "belongs to the model"
        )


def _set_ends(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """What `generate` of transformers goes by; and a token that could be padding gets its gradient like any other."""
    embeddings: Any = model.get_input_embeddings()
    embeddings.padding_idx = None
    generation = model.generation_config
    if generation is None:
        return
    ends = [tokenizer.end_token, *sorted(tokenizer.end - {tokenizer.end_token})]
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.end_token


def _with_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> Any:
    """The model with low-rank adapters; its own weights are frozen.

    Raises:
        UsageError: a target names no layer, or a number has no meaning.
    """
    if config.rank < 1 or not config.alpha > 0.0 or not config.targets:
        raise UsageError(
            f"lora needs a rank of at least 1, a positive alpha and at least one target, got {config.rank}, "
            f"{config.alpha} and {config.targets}"
        )
    with quietly(), torch.random.fork_rng(devices=[]):
        import peft

        torch.manual_seed(derived_seed(seed, Purpose.INITIALISATION, 1))
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # any number will do
            target_modules="all-linear" if config.targets == ("all-linear",) else list(config.targets),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        try:
            adapted: Any = peft.get_peft_model(model, settings)
        except ValueError as error:
            raise UsageError(f"lora.targets={config.targets} cannot get adapters: {error}") from error
        if isinstance(adapted.get_output_embeddings(), peft.tuners.lora.LoraLayer):
            raise UsageError(
                f"lora.targets={config.targets} puts an adapter on the output embeddings, whose weight is read without "
                "one: leave them out"
            )
        return adapted

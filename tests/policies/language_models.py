"""Small language policies for tests."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upslope.policies.language.config import LanguageModelConfig, ModelShape
from upslope.policies.language.model import build_policy
from upslope.policies.language.policy import LanguagePolicy
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.tokenizer import character_tokenizer

ARCHITECTURES = ("llama", "qwen3", "gemma", "gpt2")
ALPHABET = "0123456789+= "
TOKENS = torch.randint(14, (3, 9), generator=torch.Generator().manual_seed(1))


def small_shape(architecture: Any = "llama", **more: Any) -> ModelShape:
    return ModelShape(architecture=architecture, width=16, heads=2, inner=24, positions=32, **more)


def build(*, seed: int = 1, sampling: Sampling | None = None, **settings: Any) -> LanguagePolicy:
    """A policy of `settings`, of a small Llama shape where they name no model."""
    if "source" in settings:
        config = LanguageModelConfig(**{**settings, "source": str(settings["source"])})
        return build_policy(config, tokenizer=None, seed=seed, sampling=sampling or Sampling())
    config = LanguageModelConfig(**{"shape": small_shape(), **settings})
    return build_policy(config, tokenizer=character_tokenizer(ALPHABET), seed=seed, sampling=sampling or Sampling())


def logits(policy: LanguagePolicy) -> Tensor:
    with torch.no_grad():
        return policy.model(input_ids=TOKENS).logits


def save_foreign(path: Path, *, dtype: torch.dtype = torch.float32, **shape: Any) -> LanguagePolicy:
    """A folder as transformers itself writes it; the policy whose weights it has."""
    policy = build(shape=small_shape(**shape))
    policy.model.to(dtype).save_pretrained(path)
    policy.tokenizer.save(path)
    return policy

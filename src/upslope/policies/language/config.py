"""Which language model, and how it is trained: frozen settings whose defaults stand here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A model built here with random weights."""

    architecture: Literal["llama", "qwen3", "gemma", "gpt2"] = "llama"
    """Whose blocks."""
    width: int = 64
    """Of the residual stream."""
    layers: int = 2
    """Blocks."""
    heads: int = 4
    """Query heads of each attention."""
    key_value_heads: int | None = None
    """Key and value heads; None for as many as query heads."""
    inner: int = 256
    """Width within the feed-forward blocks."""
    positions: int = 512
    """The longest sequence it can read."""
    tied: bool = True
    """Whether input and output embeddings are one matrix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Train low-rank adapters and leave the model's own weights as they are (through peft)."""

    rank: int = 16
    """Of each adapter."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get one, or "all-linear"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModelConfig:
    """A causal language model: loaded from a folder or by its hub name, or built here."""

    source: str | None = None
    """A Hugging Face folder, a run directory, or a hub name; None builds `shape` and a tokenizer for the task."""
    shape: ModelShape = field(default_factory=ModelShape)
    """What is built where there is no source."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes in it (autocast); weights stay in float32."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass: less memory, about a third slower. Never touches generation."""
    end_token: str | None = None
    """The token that ends a completion, by name, where the source's tokenizer has none or another one is meant."""
    value_head: bool = False
    """A linear critic (for a reward model: the reward) on the last hidden states."""

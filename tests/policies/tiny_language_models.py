"""Language models of a few thousand parameters, of each architecture, with weights that make a difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upslope.policies.language.policy import LanguagePolicy
from upslope.policies.language.sampling import Sampling

VOCABULARY = 23
KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt2")


def tiny_model(
    kind: str, *, tied: bool = True, dtype: torch.dtype = torch.float32, layers: int = 2, **more: Any
) -> Any:
    """A transformers model; grouped key and value heads, and heads wider than D / H where that is possible."""
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 40,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    configs: dict[str, Any] = {
        "llama": lambda: transformers.LlamaConfig(**{**shared, **more}),
        "mistral": lambda: transformers.MistralConfig(**{**shared, "sliding_window": 5, **more}),
        "qwen2": lambda: transformers.Qwen2Config(**{**shared, **more}),
        "qwen3": lambda: transformers.Qwen3Config(**{**shared, "head_dim": 6, **more}),
        "gemma": lambda: transformers.GemmaConfig(**{**shared, "head_dim": 6, **more}),
        "gemma2": lambda: transformers.Gemma2Config(
            **{**shared, "head_dim": 6, "sliding_window": 5, "attn_logit_softcapping": None, **more}
        ),
        "gemma3": lambda: transformers.Gemma3TextConfig(**{**shared, "head_dim": 6, "sliding_window": 5, **more}),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=layers,
            n_head=4,
            n_positions=40,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=0,
            **more,
        ),
        "neox": lambda: transformers.GPTNeoXConfig(**{**shared, **more}),
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(configs[kind]())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def policy_on(
    model: Any,
    *,
    value_head: bool = False,
    sampling: Sampling | None = None,
    checkpoint_activations: bool = False,
    precision: Any = "float32",
) -> LanguagePolicy:
    """A policy with no tokenizer; its critic is not 0."""
    policy = LanguagePolicy(
        model,
        None,  # type: ignore[arg-type]
        sampling=sampling or Sampling(),
        value_head=value_head,
        precision=precision,
        checkpoint_activations=checkpoint_activations,
    )
    if policy.value_head is not None:
        with torch.no_grad():
            policy.value_head.weight.copy_(torch.linspace(-1.0, 1.0, policy.value_head.weight.numel()))
            policy.value_head.bias.fill_(0.3)
    return policy


def tiny_policy(
    kind: str = "llama",
    *,
    value_head: bool = False,
    sampling: Sampling | None = None,
    checkpoint_activations: bool = False,
    precision: Any = "float32",
    **more: Any,
) -> LanguagePolicy:
    """A policy on `tiny_model(kind, **more)`."""
    return policy_on(
        tiny_model(kind, **more),
        value_head=value_head,
        sampling=sampling,
        checkpoint_activations=checkpoint_activations,
        precision=precision,
    )


@dataclass(frozen=True)
class Rows:
    """Steps of a policy."""

    observation: Tensor
    action: Tensor
    mask: Tensor


def sample_rows(*, equal: bool = False, prompts: int = 2, group: int = 3, positions: int = 14, seed: int = 0) -> Rows:
    """Rows of `group` completions for each prompt, unequally long unless `equal`, hidden within and at the end."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    count = prompts * group
    tokens = numbers(VOCABULARY, count, positions + 1)
    mask = torch.zeros(count, positions, dtype=torch.bool)
    for prompt in range(prompts):
        width = 5 if equal else 3 + 2 * prompt
        tokens[prompt * group : (prompt + 1) * group, :width] = tokens[prompt * group, :width].clone()
        for row in range(prompt * group, (prompt + 1) * group):
            end = positions if equal else int(width + numbers(positions - width + 1, 1))
            mask[row, width - 1 : end] = True
            if not equal and end - width > 3:
                mask[row, width + 1] = False
    return Rows(observation=tokens[:, :-1], action=tokens[:, 1:], mask=mask)

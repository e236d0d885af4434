"""The parameters of a transformers causal language model as plain typed parts, to compute with them directly.

The parts hold the model's own parameters, not copies, so that training and loading move them. They say what one
block computes:

    x <- x + post(attention(norm(x)))
    x <- x + post(down(activation(gate(norm(x))) * up(norm(x))))        or down(activation(up(norm(x))))

with `post` mostly absent. Dropout is never applied.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from upslope.policies.language.parts import ACTIVATIONS, ActivationName, Layer, Linear, LowRank, Norm, Rotary

_ACTIVATION_CLASSES: dict[str, ActivationName] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
}

_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of what is read."""


class UnsupportedArchitectureError(ValueError):
    """A model that has no typed parts here; it runs through transformers' own forward pass instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """All of a causal language model.

    Attributes:
        model_type: transformers' name.
        token_embedding: [V, D].
        embedding_scale: multiplies token embeddings: sqrt(D) in Gemma, else 1.
        position_embedding: [P, D] learned positions, or None.
        layers: the blocks.
        norm: after the last block.
        head: to the logits.
        tied: whether the head's weight is `token_embedding`.
        heads: H, of queries.
        key_value_heads: of keys and values; each serves H / key_value_heads query heads that stand together.
        head_size: S.
        context: the most positions it can read.
        logit_softcap: c, where logits are c tanh(logits / c), or None.
    """

    model_type: str
    token_embedding: Tensor
    embedding_scale: float
    position_embedding: Tensor | None
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear
    tied: bool
    heads: int
    key_value_heads: int
    head_size: int
    context: int
    logit_softcap: float | None

    @classmethod
    def of(cls, model: nn.Module) -> Architecture:
        """The parts of a transformers causal language model, possibly with LoRA adapters of peft.

        Raises:
            UnsupportedArchitectureError: it is of another architecture, or uses something that has no part here.
        """
        whole: Any = _without_peft(model)
        model_type = str(whole.config.model_type)
        if model_type == "gpt2":
            return _gpt2(whole)
        if model_type in _FAMILIES:
            return _llama_like(whole, model_type)
        known = ", ".join(["gpt2", *_FAMILIES])
        raise UnsupportedArchitectureError(f"the architecture {model_type!r} has no parts here; those that do: {known}")

    def embed(self, token: Tensor, position: Tensor) -> Tensor:
        """The stream before the first block, [..., D], of tokens [...] at positions [...]."""
        stream = embedding(token, self.token_embedding)
        if self.embedding_scale != 1.0:
            stream = stream * self.embedding_scale
        if self.position_embedding is not None:
            stream = stream + embedding(position, self.position_embedding)
        return stream

    def attention_inputs(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., H, S], keys and values [..., key_value_heads, S], not yet rotated.

        Args:
            layer: one of `layers`.
            x: [..., D], after `attention_norm`.
        """
        if len(layer.query_key_value) == 1:
            sizes = [self.heads * self.head_size, *[self.key_value_heads * self.head_size] * 2]
            query, key, value = layer.query_key_value[0](x).split(sizes, dim=-1)
        else:
            query, key, value = (projection(x) for projection in layer.query_key_value)
        query, key, value = (part.unflatten(-1, (-1, self.head_size)) for part in (query, key, value))
        if layer.query_norm is not None:
            query = layer.query_norm(query)
        if layer.key_norm is not None:
            key = layer.key_norm(key)
        return query, key, value

    def finish(self, layer: Layer, stream: Tensor, mixed: Tensor) -> Tensor:
        """The stream [..., D] after the block, from the one before it and what attention's heads put out [..., H*S]."""
        attended = layer.out(mixed)
        if layer.post_attention_norm is not None:
            attended = layer.post_attention_norm(attended)
        stream = stream + attended
        x = layer.feed_forward_norm(stream)
        activation = ACTIVATIONS[layer.activation]
        inner = activation(layer.up(x)) if layer.gate is None else activation(layer.gate(x)) * layer.up(x)
        fed = layer.down(inner)
        if layer.post_feed_forward_norm is not None:
            fed = layer.post_feed_forward_norm(fed)
        return stream + fed

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] from the last hidden states [..., D], which `norm` has seen."""
        logits = self.head(hidden)
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """How an architecture departs from Llama."""

    norm_offset: float = 0.0
    scaled_embedding: bool = False
    head_norms: bool = False
    post_norms: bool = False
    window: Literal["none", "model", "layer"] = "none"


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(window="model"),
    "qwen2": _Family(window="layer"),
    "qwen3": _Family(window="layer", head_norms=True),
    "gemma": _Family(norm_offset=1.0, scaled_embedding=True),
    "gemma2": _Family(norm_offset=1.0, scaled_embedding=True, post_norms=True, window="layer"),
    "gemma3_text": _Family(norm_offset=1.0, scaled_embedding=True, head_norms=True, post_norms=True, window="layer"),
}


def _without_peft(model: nn.Module) -> nn.Module:
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    whole: Any = model
    if whole.active_peft_config.is_prompt_learning:
        raise UnsupportedArchitectureError("learned prompts have no parts here, only LoRA adapters do")
    return whole.get_base_model()


def _llama_like(whole: Any, model_type: str) -> Architecture:
    family, config, body = _FAMILIES[model_type], whole.config, whole.model
    softcap = config.final_logit_softcapping if model_type in ("gemma2", "gemma3_text") else None
    first = body.layers[0].self_attn
    embedded = body.embed_tokens
    return Architecture(
        model_type=model_type,
        token_embedding=_plain_weight(embedded),
        embedding_scale=float(embedded.embed_scale) if family.scaled_embedding else 1.0,
        position_embedding=None,
        layers=tuple(_llama_layer(layer, body, config, family) for layer in body.layers),
        norm=_rms_norm(body.norm, family),
        head=_linear(whole.lm_head),
        tied=whole.lm_head.weight is embedded.weight,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_size=first.head_dim,
        context=config.max_position_embeddings,
        logit_softcap=softcap,
    )


def _llama_layer(layer: Any, body: Any, config: Any, family: _Family) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    if config.model_type in ("gemma2", "gemma3_text"):
        if attention.attn_logit_softcapping is not None:
            raise UnsupportedArchitectureError("soft caps on attention scores have no part here")
        if not attention.is_causal:
            raise UnsupportedArchitectureError("attention in both directions has no part here")
    window = None
    if family.window == "model":
        window = config.sliding_window
    elif family.window == "layer":
        window = attention.sliding_window
    return Layer(
        attention_norm=_rms_norm(layer.input_layernorm, family),
        query_key_value=(_linear(attention.q_proj), _linear(attention.k_proj), _linear(attention.v_proj)),
        query_norm=_rms_norm(attention.q_norm, family) if family.head_norms else None,
        key_norm=_rms_norm(attention.k_norm, family) if family.head_norms else None,
        rotary=_rotary(body.rotary_emb, attention),
        attention_scale=float(attention.scaling),
        window=window,
        out=_linear(attention.o_proj),
        post_attention_norm=_rms_norm(layer.post_attention_layernorm, family) if family.post_norms else None,
        feed_forward_norm=_rms_norm(
            layer.pre_feedforward_layernorm if family.post_norms else layer.post_attention_layernorm, family
        ),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        activation=_activation(mlp.act_fn),
        post_feed_forward_norm=_rms_norm(layer.post_feedforward_layernorm, family) if family.post_norms else None,
    )


def _rotary(module: Any, attention: Any) -> Rotary:
    """Gemma 3 has one set of frequencies for each kind of layer, in buffers named after it."""
    kind = module.rope_type
    prefix = ""
    if isinstance(kind, dict):
        kind, prefix = kind[attention.layer_type], f"{attention.layer_type}_"
    if kind not in _FIXED_ROTARY:
        raise UnsupportedArchitectureError(f"rotary embeddings of type {kind!r} depend on the length and have no part")
    frequency = getattr(module, f"{prefix}inv_freq")
    if 2 * len(frequency) != attention.head_dim:
        raise UnsupportedArchitectureError("rotary embeddings of only a part of each head have no part here")
    return Rotary(
        frequency=frequency.detach().float().clone(), scale=float(getattr(module, f"{prefix}attention_scaling"))
    )


def _gpt2(whole: Any) -> Architecture:
    config, body = whole.config, whole.transformer
    if config.add_cross_attention:
        raise UnsupportedArchitectureError("cross-attention has no part here")
    return Architecture(
        model_type="gpt2",
        token_embedding=_plain_weight(body.wte),
        embedding_scale=1.0,
        position_embedding=_plain_weight(body.wpe),
        layers=tuple(_gpt2_layer(block) for block in body.h),
        norm=_layer_norm(body.ln_f),
        head=_linear(whole.lm_head),
        tied=whole.lm_head.weight is body.wte.weight,
        heads=config.n_head,
        key_value_heads=config.n_head,
        head_size=config.n_embd // config.n_head,
        context=config.n_positions,
        logit_softcap=None,
    )


def _gpt2_layer(block: Any) -> Layer:
    return Layer(
        attention_norm=_layer_norm(block.ln_1),
        query_key_value=(_linear(block.attn.c_attn),),
        query_norm=None,
        key_norm=None,
        rotary=None,
        attention_scale=float(block.attn.scaling),
        window=None,
        out=_linear(block.attn.c_proj),
        post_attention_norm=None,
        feed_forward_norm=_layer_norm(block.ln_2),
        gate=None,
        up=_linear(block.mlp.c_fc),
        down=_linear(block.mlp.c_proj),
        activation=_activation(block.mlp.act),
        post_feed_forward_norm=None,
    )


def _activation(module: nn.Module) -> ActivationName:
    name = type(module).__name__
    if name not in _ACTIVATION_CLASSES:
        raise UnsupportedArchitectureError(f"the activation {name} has no part here")
    return _ACTIVATION_CLASSES[name]


def _plain_weight(module: Any) -> Tensor:
    """Of an embedding; adapters on embeddings have no part."""
    if not isinstance(module, nn.Embedding):
        raise UnsupportedArchitectureError(f"an embedding of type {type(module).__name__} has no part here")
    return module.weight


def _rms_norm(module: Any, family: _Family) -> Norm:
    epsilon = module.eps if family.norm_offset else module.variance_epsilon
    return Norm(kind="rms", weight=module.weight, epsilon=float(epsilon), offset=family.norm_offset)


def _layer_norm(module: nn.LayerNorm) -> Norm:
    return Norm(kind="layer", weight=module.weight, bias=module.bias, epsilon=module.eps)


def _linear(module: Any) -> Linear:
    lora = sys.modules.get("peft.tuners.lora")
    if lora is not None and isinstance(module, lora.LoraLayer):
        return _adapted(module)
    if type(module) is nn.Linear:
        return Linear(stored=module.weight, bias=module.bias)
    if type(module).__name__ == "Conv1D":
        return Linear(stored=module.weight, bias=module.bias, transposed=True)
    raise UnsupportedArchitectureError(f"a layer of type {type(module).__name__} has no part here")


def _adapted(module: Any) -> Linear:
    """A layer with LoRA adapters of peft."""
    base = _linear(module.get_base_layer())
    if module.merged or module.disable_adapters:
        raise UnsupportedArchitectureError("merged or disabled adapters have no part here: merge and unload them")
    adapters: list[LowRank] = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        inner, outer = module.lora_A[name], module.lora_B[name]
        dropped = not isinstance(module.lora_dropout[name], nn.Identity)
        if dropped or name in module.lora_variant or outer.bias is not None:
            raise UnsupportedArchitectureError("LoRA with dropout, a bias or of another variant has no part here")
        adapters.append(LowRank(inner=inner.weight, outer=outer.weight, scale=float(module.scaling[name])))
    return Linear(stored=base.stored, bias=base.bias, transposed=base.transposed, low_rank=tuple(adapters))

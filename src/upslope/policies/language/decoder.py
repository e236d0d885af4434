"""Last hidden states of packed rows, differentiable: computed on a model's parts, or by transformers itself."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from upslope.errors import UsageError
from upslope.policies.language.architecture import Architecture
from upslope.policies.language.packing import Layout
from upslope.policies.language.parts import Layer, rotate


class Body(Protocol):
    """From tokens to last hidden states."""

    def hidden(self, layout: Layout, wanted: Tensor) -> Tensor:
        """Last hidden states [M, D] of the packed tokens numbered `wanted` [M]."""
        ...


@final
class Decoder:
    """A model's blocks on packed tokens: nothing is computed for padding, nothing twice for shared beginnings.

    Args:
        architecture: its parts.
        checkpoint_activations: keep only what stands between blocks, and compute a block again in the backward pass.
    """

    def __init__(self, architecture: Architecture, *, checkpoint_activations: bool) -> None:
        self.architecture = architecture
        self.checkpoint_activations = checkpoint_activations

    def hidden(self, layout: Layout, wanted: Tensor) -> Tensor:
        """Last hidden states [M, D] of the packed tokens numbered `wanted` [M]."""
        architecture = self.architecture
        stream = architecture.embed(layout.token, layout.position)
        for layer in architecture.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                stream = checkpoint(self._block, layer, stream, layout, use_reentrant=False)
            else:
                stream = self._block(layer, stream, layout)
        return architecture.norm(stream.index_select(0, wanted))

    def _block(self, layer: Layer, stream: Tensor, layout: Layout) -> Tensor:
        architecture = self.architecture
        query, key, value = architecture.attention_inputs(layer, layer.attention_norm(stream))
        if layer.rotary is not None:
            cosine, sine = layer.rotary.cosine_sine(layout.position, stream.dtype)
            cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
            query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        mixed = attention(query, key, value.to(query.dtype), layout, scale=layer.attention_scale, window=layer.window)
        return architecture.finish(layer, stream, mixed)


def attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float, window: int | None) -> Tensor:
    """Causal attention within rows, [N, H * S], in plain torch operations.

    Behind a row's end stands token 0, which no position of the row can see.

    Args:
        query: [N, H, S] of packed tokens.
        key, value: [N, K, S], K a divisor of H.
        layout: whose rows.
        scale: multiplies products.
        window: a position sees itself and `window - 1` before it; None for all before it.
    """
    rows, longest = layout.index.shape

    def unpacked(x: Tensor) -> Tensor:
        table = x if layout.plain else x.index_select(0, layout.index.flatten())
        return table.view(rows, longest, *x.shape[1:]).transpose(1, 2)

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mask = None
    if window is not None and window < longest:
        place = torch.arange(longest, device=query.device)
        mask = (place.unsqueeze(-1) >= place) & (place.unsqueeze(-1) - place < window)
    mixed = scaled_dot_product_attention(
        unpacked(query), unpacked(key), unpacked(value), attn_mask=mask, is_causal=mask is None, scale=scale
    )
    mixed = mixed.transpose(1, 2).flatten(2).flatten(0, 1)
    return mixed if layout.plain else mixed.index_select(0, layout.back)


@final
class HuggingFaceBody:
    """transformers' own forward pass on padded rows, for models that have no parts in `Architecture`.

    Args:
        model: a causal language model, possibly with adapters.
        checkpoint_activations: ask the model to compute activations again in the backward pass.
    """

    def __init__(self, model: nn.Module, *, checkpoint_activations: bool) -> None:
        self._model = model
        self._recomputed = _checkpointed_layers(model) if checkpoint_activations else []

    def hidden(self, layout: Layout, wanted: Tensor) -> Tensor:
        """Last hidden states [M, D] of the packed tokens numbered `wanted` [M]."""
        body = causal_model(self._model).base_model
        rows, longest = layout.index.shape
        place = torch.arange(longest, device=layout.index.device)
        inside = place < layout.length.unsqueeze(-1)
        self._recompute(True)
        try:
            output = body(input_ids=layout.token[layout.index], attention_mask=inside.long(), use_cache=False)
        finally:
            self._recompute(False)
        flat = output.last_hidden_state.reshape(rows * longest, -1)
        return flat.index_select(0, layout.back[wanted])

    def _recompute(self, on: bool) -> None:
        """Only here, never while tokens are generated; the layer's flag, not that of the dropout within it."""
        for layer in self._recomputed:
            layer.gradient_checkpointing, layer.training = on, on


def _checkpointed_layers(model: nn.Module) -> list[Any]:
    """Layers of transformers that can be computed again, told how."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(
            f"{type(model).__name__} cannot compute activations again: set checkpoint_activations to False"
        )
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return layers


def causal_model(model: nn.Module) -> Any:
    """The causal language model within a model of peft, or the model itself."""
    whole: Any = model
    return whole.get_base_model() if type(model).__module__.startswith("peft.") else whole

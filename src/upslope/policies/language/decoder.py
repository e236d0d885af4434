"""Last hidden states of packed rows, differentiable: computed on a model's parts, or by transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from upslope.errors import UsageError
from upslope.policies.language.architecture import Architecture
from upslope.policies.language.attention import attention, packed_attention, wide_enough
from upslope.policies.language.blocks import can_finish, can_project, direct, finish, project
from upslope.policies.language.packing import Layout
from upslope.policies.language.parts import Layer, Rotary, rotate


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
        angles = _Angles(layout, stream.dtype)
        *layers, last = architecture.layers
        for layer in layers:
            stream = self._checkpointed(self._block, layer, stream, layout, angles, None)
        return architecture.norm(self._checkpointed(self._block, last, stream, layout, angles, wanted))

    def _checkpointed(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(function, *arguments, use_reentrant=False))
        return function(*arguments)

    def _block(self, layer: Layer, stream: Tensor, layout: Layout, angles: _Angles, wanted: Tensor | None) -> Tensor:
        """The stream after a block, of all packed tokens or only of those numbered `wanted`."""
        heads, others = self.architecture.heads, self.architecture.key_value_heads
        projected = self._projected(layer, stream, angles)
        if wide_enough(layer.window, layout) and direct(projected):
            mixed = packed_attention(projected, layout, heads=heads, others=others, scale=layer.attention_scale)
        else:
            query, key, value = projected.unflatten(-1, (heads + 2 * others, -1)).split([heads, others, others], dim=1)
            mixed = attention(query, key, value, layout, scale=layer.attention_scale, window=layer.window)
        if wanted is not None:
            stream, mixed = stream.index_select(0, wanted), mixed.index_select(0, wanted)
        if can_finish(layer) and direct(stream):
            return finish(layer, stream, mixed)
        return self.architecture.finish(layer, stream, mixed)

    def _projected(self, layer: Layer, stream: Tensor, angles: _Angles) -> Tensor:
        """Queries, keys and values of all packed tokens, [N, (H + 2K) S]; queries and keys rotated."""
        architecture = self.architecture
        turns = None if layer.rotary is None else angles.of(layer.rotary)
        if can_project(layer) and direct(stream):
            return project(layer, stream, architecture.heads + architecture.key_value_heads, turns)
        query, key, value = architecture.attention_inputs(layer, layer.attention_norm(stream))
        if turns is not None:
            cosine, sine = turns[0].unsqueeze(1), turns[1].unsqueeze(1)
            query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        return torch.cat((query, key, value.to(query.dtype)), dim=1).flatten(1)


class _Angles:
    """Cosines and sines of packed positions, once for all layers with the same frequencies."""

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        self._layout, self._dtype = layout, dtype
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """[N, S/2] each."""
        if id(rotary) not in self._found:
            self._found[id(rotary)] = self._new(rotary)
        return self._found[id(rotary)]

    def _new(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        longest = self._layout.index.shape[1]
        place = torch.arange(longest, device=self._layout.position.device)
        cosine, sine = rotary.cosine_sine(place, self._dtype)
        return cosine.index_select(0, self._layout.position), sine.index_select(0, self._layout.position)


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

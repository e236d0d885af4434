"""Causal attention within packed rows."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from upslope.policies.language.packing import Bucket, Layout, Run

_aten = torch.ops.aten


def wide_enough(window: int | None, layout: Layout) -> bool:
    """Whether no row is longer than the window, so that it hides nothing."""
    return window is None or window >= layout.index.shape[1]


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


def packed_attention(projected: Tensor, layout: Layout, *, heads: int, others: int, scale: float) -> Tensor:
    """The same as `attention` without a window, [N, H * S], on the CPU's own kernel, run by run or bucket by bucket.

    Args:
        projected: [N, (H + 2K) S] queries, keys and values of packed tokens in a row.
        layout: whose rows.
        heads: H.
        others: K.
        scale: multiplies products.
    """
    function = _BucketAttention if layout.buckets else _PackedAttention
    return cast(Tensor, function.apply(projected, layout, heads, others, scale))


class _BucketAttention(Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, layout: Layout, heads: int, others: int, scale: float) -> Tensor:
        size = projected.shape[1] // (heads + 2 * others)
        mixed = projected.new_empty(len(projected), heads * size)
        saved: list[Tensor] = []
        for bucket in layout.buckets:
            query, key, value = _whole(projected, bucket, heads, others)
            output, sum_ = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)
            flat = output.transpose(1, 2).reshape(-1, heads * size)
            mixed.index_copy_(0, bucket.number, flat.index_select(0, bucket.place))
            saved += [output, sum_]
        ctx.save_for_backward(projected, *saved)
        ctx.settings = layout, heads, others, scale
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        projected, *saved = ctx.saved_tensors
        layout, heads, others, scale = ctx.settings
        if torch.is_grad_enabled():
            return _differentiable(ctx, projected, gradients[0])
        whole = torch.zeros_like(projected)
        for number, bucket in enumerate(layout.buckets):
            output, sum_ = saved[2 * number : 2 * number + 2]
            flat = projected.new_zeros(bucket.index.numel(), gradients[0].shape[1])
            flat.index_copy_(0, bucket.place, gradients[0].index_select(0, bucket.number))
            gradient = flat.view(*bucket.index.shape, heads, -1).transpose(1, 2)
            parts = _whole(projected, bucket, heads, others)
            found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, *parts, output, sum_, 0.0, True, scale=scale
            )
            to_query, to_key, to_value = (part.transpose(1, 2) for part in found)
            more = (_joined(to_query, heads), _joined(to_key, others), _joined(to_value, others))
            whole.index_add_(0, bucket.index.flatten(), torch.cat(more, dim=1))
        return whole, None, None, None, None


def _whole(projected: Tensor, bucket: Bucket, heads: int, others: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [r, H, length, S] of a bucket's rows."""
    rows = projected.index_select(0, bucket.index.flatten()).view(*bucket.index.shape, heads + 2 * others, -1)
    query, key, value = rows.split([heads, others, others], dim=2)
    if heads != others:
        key, value = (part.repeat_interleave(heads // others, dim=2) for part in (key, value))
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class _PackedAttention(Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, layout: Layout, heads: int, others: int, scale: float) -> Tensor:
        size = projected.shape[1] // (heads + 2 * others)
        mixed = projected.new_empty(len(projected), heads * size)
        sums: list[Tensor] = []
        for run in layout.runs:
            query, key, value = _views(projected, run, heads, others)
            output, sum_ = _aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, run.index is None, attn_mask=_mask(run, projected), scale=scale
            )
            _rows(mixed, run).view(run.rows, run.own, heads, size).copy_(output.transpose(1, 2))
            sums.append(sum_)
        ctx.save_for_backward(projected, mixed, *sums)
        ctx.settings = layout, heads, others, scale
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        projected, mixed, *sums = ctx.saved_tensors
        layout, heads, others, scale = ctx.settings
        if torch.is_grad_enabled():
            return _differentiable(ctx, projected, gradients[0])
        size = mixed.shape[1] // heads
        gradient = gradients[0].contiguous()
        whole = torch.empty_like(projected)
        if not layout.plain:
            whole[:, heads * size :] = 0.0
        for run, sum_ in zip(layout.runs, sums, strict=True):
            shape = (run.rows, run.own, heads, size)
            query, key, value = _views(projected, run, heads, others)
            found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _rows(gradient, run).view(shape).transpose(1, 2),
                *(query, key, value, _rows(mixed, run).view(shape).transpose(1, 2), sum_),
                *(0.0, run.index is None),
                attn_mask=_mask(run, projected),
                scale=scale,
            )
            to_query, to_key, to_value = (part.transpose(1, 2) for part in found)
            rows = _rows(whole, run)
            rows[:, : heads * size].view(shape).copy_(to_query)
            to_key, to_value = _joined(to_key, others), _joined(to_value, others)
            if layout.plain:
                rows[:, heads * size : -others * size], rows[:, -others * size :] = to_key, to_value
                continue
            more = torch.cat((to_key, to_value), dim=1)
            if run.index is None:
                rows[:, heads * size :] += more
            else:
                whole[:, heads * size :].index_add_(0, run.index.flatten(), more)
        return whole, None, None, None, None


def _rows(packed: Tensor, run: Run) -> Tensor:
    """A run's own tokens."""
    return packed[run.start : run.start + run.rows * run.own]


def _views(projected: Tensor, run: Run, heads: int, others: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [r, H, own, S] of a run's own tokens, keys and values [r, H, length, S] of all its tokens."""
    own = _rows(projected, run).view(run.rows, run.own, heads + 2 * others, -1)
    query = own[:, :, :heads].transpose(1, 2)
    if run.index is None:
        pairs = own[:, :, heads:]
    else:
        pairs = projected[:, heads * own.shape[-1] :].index_select(0, run.index.flatten())
        pairs = pairs.view(run.rows, run.length, 2 * others, -1)
    key, value = pairs[:, :, :others], pairs[:, :, others:]
    if heads != others:
        key, value = (part.repeat_interleave(heads // others, dim=2) for part in (key, value))
    return query, key.transpose(1, 2), value.transpose(1, 2)


def _mask(run: Run, like: Tensor) -> Tensor | None:
    """[1, 1, own, length] to add to scores where a run's queries are only the last of its rows' positions."""
    if run.index is None:
        return None
    mask = like.new_full((run.own, run.length), -torch.inf).triu_(run.length - run.own + 1)
    return mask.expand(1, 1, run.own, run.length)


def _joined(gradient: Tensor, others: int) -> Tensor:
    """[r, t, H, S] of heads summed over those that share keys and values: [r * t, K * S]."""
    rows, length, heads, size = gradient.shape
    if heads != others:
        gradient = gradient.view(rows, length, others, heads // others, size).sum(3)
    return gradient.reshape(rows * length, others * size)


def _differentiable(ctx: Any, projected: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass by plain operations, itself differentiable."""
    layout, heads, others, scale = ctx.settings
    parts = projected.unflatten(-1, (heads + 2 * others, -1)).split([heads, others, others], dim=1)
    with sdpa_kernel(SDPBackend.MATH):
        mixed = attention(parts[0], parts[1], parts[2], layout, scale=scale, window=None)
    (found,) = torch.autograd.grad(mixed, projected, gradient, create_graph=True)
    return found, None, None, None, None

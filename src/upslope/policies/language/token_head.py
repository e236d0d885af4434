"""Log-probabilities of tokens from hidden states, without ever holding all logits of a large vocabulary.

Logits [N, V] of 16 rows of 1024 tokens over 128k entries take 8 GiB in float32, their softmax and gradient as much
again. Here they exist for some rows at a time, forward and again backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import linear

from upslope.policies.language.sampling import Sampling

LARGEST_CHUNK = 2**24
"""Logits that exist at a time, at most (64 MiB in float32), unless one row has more."""
CACHED_CHUNK = 2**18
"""Logits at a time that stay in a core's cache; a chunk is as small as that where it still has enough rows."""
ENOUGH_ROWS = 128
"""For matrix products to be efficient."""
KEPT = 2**22
"""Up to so many log-probabilities are kept for the backward pass (16 MiB in float32) instead of computed again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Hidden states to the logits of the distribution that tokens are drawn from.

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        softcap: c, where logits are c tanh(logits / c), or None.
        sampling: temperature and truncation.
        dtype: what products are computed in (bfloat16 under mixed precision); sums over V never are.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    sampling: Sampling
    dtype: torch.dtype

    def detach(self) -> Head:
        """The same without gradient, and as it is now: a weight that is trained is copied, a frozen one is not."""
        bias = None if self.bias is None else _kept_as_is(self.bias)
        return replace(self, weight=_kept_as_is(self.weight), bias=bias)

    def log_policy(self, hidden: Tensor, action: Tensor | None) -> Tensor:
        """All log-probabilities [N, V] in plain torch operations: the meaning of everything here.

        Args:
            hidden: [N, D].
            action: [N] tokens that cannot be cut off by the truncation; None for no truncation at all.
        """
        logits = linear(hidden.to(self.dtype), self.weight.to(self.dtype))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.bias is not None:
            logits = logits + self.bias
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        sampling = self.sampling if action is not None else Sampling(temperature=self.sampling.temperature)
        return torch.log_softmax(sampling.logits(logits, action), dim=-1)


def token_log_prob(hidden: Tensor, action: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """l_n = log pi(a_n) and the entropy of each distribution, H_n = -sum_v pi(v) log pi(v); both [N].

    Args:
        hidden: [N, D] last hidden states.
        action: [N] tokens.
        head: from one to the other.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in _inputs(hidden, head)):
        return cast("tuple[Tensor, Tensor]", _TokenLogProb.apply(hidden, head.weight, head.bias, action, head))
    log_prob, entropy, _ = _forward(hidden, action, head, keep=False)
    return log_prob, entropy


def kl_divergence(hidden: Tensor, head: Head, other_hidden: Tensor, other_head: Head) -> Tensor:
    """KL(p_n || q_n) = sum_v p_n(v) log(p_n(v) / q_n(v)), exact, [N].

    Of the distributions before top-k and top-p: after a truncation the divergence is infinite wherever p keeps a token
    that q does not.

    Args:
        hidden: [N, D] of p.
        head: of p.
        other_hidden: [N, D'] of q.
        other_head: of q.
    """
    return cast(
        Tensor,
        _KL.apply(hidden, head.weight, head.bias, other_hidden, other_head.weight, other_head.bias, head, other_head),
    )


def _inputs(hidden: Tensor, head: Head) -> list[Tensor]:
    return [hidden, head.weight] if head.bias is None else [hidden, head.weight, head.bias]


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices of rows whose logits may exist together."""
    size = max(1, min(LARGEST_CHUNK // vocabulary, max(ENOUGH_ROWS, CACHED_CHUNK // vocabulary)))
    for start in range(0, rows, size):
        yield slice(start, start + size)


def _forward(hidden: Tensor, action: Tensor, head: Head, *, keep: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    head = _cast(head)
    kept, log_probs, entropies = [], [], []
    for part in _chunks(len(hidden), len(head.weight)):
        log_policy = head.log_policy(hidden[part], action[part])
        log_probs.append(log_policy.gather(-1, action[part].unsqueeze(-1)).squeeze(-1))
        entropies.append(-_times_log(log_policy.exp(), log_policy).sum(-1))
        if keep:
            kept.append(log_policy)
    if not log_probs:
        return hidden.new_zeros(0), hidden.new_zeros(0), []
    return torch.cat(log_probs), torch.cat(entropies), kept


def _times_log(probability: Tensor, log_policy: Tensor) -> Tensor:
    """p log p, 0 where p is 0."""
    return probability * log_policy.clamp(min=-1e4)


def _kept_as_is(parameter: Tensor) -> Tensor:
    return parameter.detach().clone() if parameter.requires_grad else parameter


def _cast(head: Head) -> Head:
    """With the weight in the dtype that products are computed in, once for all chunks."""
    return Head(
        weight=head.weight.to(head.dtype),
        bias=head.bias,
        softcap=head.softcap,
        sampling=head.sampling,
        dtype=head.dtype,
    )


class _Gradients:
    """Sums the gradients of hidden states, weight and bias over chunks, as far as they are wanted."""

    def __init__(self, hidden: Tensor, head: Head, wanted: tuple[bool, ...]) -> None:
        self.source, self.head = hidden, _cast(head)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(head.weight) if wanted[1] else None
        self.bias = torch.zeros_like(head.bias) if head.bias is not None and wanted[2] else None

    def add(self, part: slice, gradient: Tensor) -> None:
        """Of one chunk, from the gradient [n, V] of logits as they are drawn from; overwrites that."""
        head = self.head
        temperature = head.sampling.temperature
        if not head.sampling.greedy and temperature != 1.0:
            gradient.div_(temperature)
        if head.softcap is not None:
            gradient.mul_(_softcap_slope(head, self.source[part], head.softcap))
        if self.bias is not None:
            self.bias += gradient.sum(0)
        gradient = gradient.to(head.dtype)
        if self.hidden is not None:
            self.hidden[part] = gradient @ head.weight
        if self.weight is not None:
            source = self.source[part].to(head.dtype)
            if self.weight.dtype == head.dtype:
                self.weight.addmm_(gradient.t(), source)
            else:
                self.weight += gradient.t() @ source


def _softcap_slope(head: Head, hidden: Tensor, softcap: float) -> Tensor:
    """d (c tanh(z / c)) / dz = 1 - tanh(z / c)^2."""
    logits = linear(hidden.to(head.dtype), head.weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if head.bias is not None:
        logits = logits + head.bias
    return 1.0 - torch.tanh(logits / softcap).square()


class _TokenLogProb(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, action: Tensor, head: Head
    ) -> tuple[Tensor, Tensor]:
        keep = len(hidden) * len(weight) <= KEPT
        log_prob, entropy, kept = _forward(hidden, action, head, keep=keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, action, entropy, *kept)
        ctx.head = head
        return log_prob, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, _, action, entropy, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _twice(ctx, gradients)
        head: Head = ctx.head
        to_log_prob, to_entropy = gradients
        sums = _Gradients(hidden, head, ctx.needs_input_grad)
        if to_log_prob is None and to_entropy is None:
            return None, None, None, None, None
        cast_head = _cast(head)
        for number, part in enumerate(_chunks(len(hidden), len(weight))):
            log_policy = kept[number] if kept else cast_head.log_policy(hidden[part], action[part])
            probability = log_policy.exp()
            if to_log_prob is None:
                gradient = torch.zeros_like(probability)
            else:
                gradient = probability * -to_log_prob[part].unsqueeze(-1)
                gradient.scatter_add_(-1, action[part].unsqueeze(-1), to_log_prob[part].unsqueeze(-1))
            if to_entropy is not None:
                slope = _times_log(probability, log_policy).add_(probability * entropy[part].unsqueeze(-1))
                gradient.sub_(slope.mul_(to_entropy[part].unsqueeze(-1)))
            sums.add(part, gradient)
        return sums.hidden, sums.weight, sums.bias, None, None


def _twice(ctx: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The backward pass in plain operations, itself differentiable."""
    hidden, weight, bias, action, *_ = ctx.saved_tensors
    head = replace(ctx.head, weight=weight, bias=bias)
    log_policy = head.log_policy(hidden, action)
    outputs = (
        log_policy.gather(-1, action.unsqueeze(-1)).squeeze(-1),
        -_times_log(log_policy.exp(), log_policy).sum(-1),
    )
    given = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
    return (*_plain_gradients((hidden, weight, bias), given, ctx.needs_input_grad[:3]), None, None)


def _plain_gradients(
    inputs: tuple[Tensor | None, ...], given: list[tuple[Tensor, Tensor]], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    leaves = [x for x, needed in zip(inputs, wanted, strict=True) if needed and x is not None]
    if not given or not leaves:
        return (None,) * len(inputs)
    found = iter(
        torch.autograd.grad([g[0] for g in given], leaves, [g[1] for g in given], create_graph=True, allow_unused=True)
    )
    return tuple(next(found) if needed and x is not None else None for x, needed in zip(inputs, wanted, strict=True))


def _kl_twice(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass of a KL divergence in plain operations, itself differentiable."""
    hidden, weight, bias, other_hidden, other_weight, other_bias, _ = ctx.saved_tensors
    head, other = ctx.heads
    log_p = replace(head, weight=weight, bias=bias).log_policy(hidden, None)
    log_q = replace(other, weight=other_weight, bias=other_bias).log_policy(other_hidden, None)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    inputs = (hidden, weight, bias, other_hidden, other_weight, other_bias)
    return (*_plain_gradients(inputs, [(divergence, gradient)], ctx.needs_input_grad[:6]), None, None)


class _KL(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        other_hidden: Tensor,
        other_weight: Tensor,
        other_bias: Tensor | None,
        head: Head,
        other_head: Head,
    ) -> Tensor:
        p, q = _cast(head), _cast(other_head)
        parts = [torch.zeros(0, dtype=hidden.dtype, device=hidden.device)]
        for part in _chunks(len(hidden), len(weight)):
            log_p, log_q = p.log_policy(hidden[part], None), q.log_policy(other_hidden[part], None)
            parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
        divergence = torch.cat(parts) if len(parts) == 1 else torch.cat(parts[1:])
        ctx.save_for_backward(hidden, weight, bias, other_hidden, other_weight, other_bias, divergence)
        ctx.heads = head, other_head
        return divergence

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, _, other_hidden, _, _, divergence = ctx.saved_tensors
        head, other_head = ctx.heads
        given, wanted = gradients[0], ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _kl_twice(ctx, given)
        p, q = _cast(head), _cast(other_head)
        mine = _Gradients(hidden, head, wanted[:3])
        theirs = _Gradients(other_hidden, other_head, wanted[3:6])
        for part in _chunks(len(hidden), len(weight)):
            log_p, log_q = p.log_policy(hidden[part], None), q.log_policy(other_hidden[part], None)
            probability, scale = log_p.exp(), given[part].unsqueeze(-1)
            if any(wanted[:3]):
                slope = probability * (log_p - log_q - divergence[part].unsqueeze(-1)) * scale
                mine.add(part, slope)
            if any(wanted[3:6]):
                theirs.add(part, (log_q.exp() - probability) * scale)
        return mine.hidden, mine.weight, mine.bias, theirs.hidden, theirs.weight, theirs.bias, None, None

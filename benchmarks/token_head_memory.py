"""Peak memory of the token head: 16 rows of 1024 tokens over a vocabulary of 128k, forward and backward.

    python benchmarks/token_head_memory.py

All logits in float32 would take 8 GiB, and log-softmax and its gradient as much again each. The bar is 1.5 GiB beyond
inputs and the gradients asked for. Fails where it is passed.
"""

from __future__ import annotations

import resource

import torch

from upslope.policies.language.sampling import Sampling
from upslope.policies.language.token_head import Head, token_log_prob

ROWS, TOKENS, VOCABULARY, WIDTH = 16, 1024, 128 * 1024, 64
BAR = 1.5


def peak() -> float:
    """GiB of resident memory at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS * TOKENS, WIDTH, generator=generator, requires_grad=True)
    weight = (0.1 * torch.randn(VOCABULARY, WIDTH, generator=generator)).requires_grad_()
    action = torch.randint(VOCABULARY, (ROWS * TOKENS,), generator=generator)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    before = peak()
    head = Head(weight=weight, bias=None, softcap=None, sampling=Sampling(), dtype=torch.float32)
    log_prob, entropy = token_log_prob(hidden, action, head)
    (log_prob.sum() + 0.01 * entropy.sum()).backward()
    extra = peak() - before
    logits = ROWS * TOKENS * VOCABULARY * 4 / 2**30
    print(f"extra peak memory {extra:.2f} GiB (bar {BAR} GiB); all logits would take {logits:.1f} GiB")
    if extra > BAR:
        raise SystemExit(f"the bar of {BAR} GiB is passed")


if __name__ == "__main__":
    main()

"""Generation for architectures without typed parts: transformers' own cache, prompts of one length at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from upslope.collect.engines.drawing import draw
from upslope.collect.engines.protocol import Request
from upslope.collect.engines.sequences import Drawn, Ending
from upslope.policies.language.policy import LanguagePolicy
from upslope.policies.language.sampling import Sampling


@torch.inference_mode()
def generate_in_waves(
    policy: LanguagePolicy,
    requests: Sequence[Request],
    drawn: Sequence[Drawn],
    *,
    sampling: Sampling,
    ending: Ending,
    slots: int,
) -> None:
    """Complete all requests; a wave holds prompts of one length, so that nothing is padded, and shrinks as rows end.

    Args:
        policy: whose model.
        requests: what to complete.
        drawn: what is filled in, in the order of the requests.
        sampling: how tokens are drawn.
        ending: when completions are over.
        slots: most completions of a wave.

    Raises:
        TypeError: the model keeps no cache that rows can be taken out of.
    """
    by_length: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
        by_length.setdefault(len(request.prompt), []).append(number)
    for numbers in by_length.values():
        for begin in range(0, len(numbers), slots):
            members = numbers[begin : begin + slots]
            _wave(
                policy,
                [requests[number] for number in members],
                [drawn[number] for number in members],
                sampling,
                ending,
            )


def _wave(
    policy: LanguagePolicy, requests: list[Request], rows: list[Drawn], sampling: Sampling, ending: Ending
) -> None:
    """Distinct prompts are read once; their cached states are then repeated for each of their completions."""
    device = next(policy.model.parameters()).device
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(request.prompt for request in requests))}
    logits, cache = _forward(policy, torch.tensor(list(number), device=device), None)
    keep = torch.tensor([number[request.prompt] for request in requests], device=device)
    while True:
        cache.batch_select_indices(keep)
        uniform = torch.tensor(
            [0.0 if sampling.greedy else row.uniform[len(row.tokens)] for row in rows],
            dtype=torch.float64,
            device=device,
        )
        token, log_prob = draw(logits[keep], sampling, uniform)
        drawn = zip(rows, token.tolist(), log_prob.tolist(), strict=True)
        open_rows = [index for index, each in enumerate(drawn) if not ending.add(*each)]
        if not open_rows:
            return
        keep = torch.tensor(open_rows, device=device)
        rows = [rows[index] for index in open_rows]
        cache.batch_select_indices(keep)
        logits, cache = _forward(policy, token[keep].unsqueeze(1), cache)
        keep = torch.arange(len(rows), device=device)


def _forward(policy: LanguagePolicy, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    reduced = policy.precision == "bfloat16"
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=reduced):
        out: Any = policy.model(input_ids=tokens, past_key_values=cache, use_cache=True)
    cache = out.past_key_values
    if cache is None or not callable(getattr(cache, "batch_select_indices", None)):
        raise TypeError(
            f"{type(policy.model).__name__} keeps no cache of keys and values that rows can be taken out of, so it "
            "cannot generate here: use a decoder-only transformer"
        )
    return out.logits[:, -1].float() if reduced else out.logits[:, -1], cache

"""The batch of an update cut into minibatches and micro-batches, and the steps of it that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from upslope.algorithms.protocol import Passes
from upslope.errors import UsageError
from upslope.streams import Shuffler
from upslope.trajectory import Batch, map_observation


def chosen_steps(batch: Batch) -> Batch:
    """The chosen steps [M] of whole rows [B, T]: what was not chosen is no input of any network or loss."""
    steps = batch.mask.numel()
    if batch.memory is not None:
        batch = replace(batch, memory=None)
    flat = _map(batch, lambda tensor: tensor.reshape(steps, *tensor.shape[2:]))
    return flat if bool(flat.mask.all()) else select_units(flat, flat.mask.nonzero().squeeze(-1))


def cut_minibatches(batch: Batch, passes: Passes, generator: Shuffler) -> Iterator[Batch]:
    """Shuffle once per pass, then cut into parts whose sizes differ by one at most.

    Raises:
        UsageError: if there are fewer units than minibatches.
    """
    together = passes.together
    count, unit = batch.mask.shape[0] // together, "steps" if batch.mask.dim() == 1 else "rows"
    if passes.minibatches == 1:
        yield batch
        return
    if together > 1:
        unit = f"sets of {together} rows"
    if count < passes.minibatches:
        raise UsageError(
            f"{count} {unit} cannot be cut into {passes.minibatches} minibatches: collect more {unit} per update, or "
            "lower algorithm.minibatches"
        )
    order = torch.from_numpy(generator.permutation(count))
    if together > 1:
        order = (order.unsqueeze(-1) * together + torch.arange(together)).flatten()
    shuffled = select_units(batch, order)
    for part in range(passes.minibatches):
        yield _part(shuffled, part, passes.minibatches, together)


def micro_batches(batch: Batch, parts: int, together: int) -> Iterator[Batch]:
    """The micro-batches of an optimiser step that hold any chosen step."""
    parts = min(parts, batch.mask.shape[0] // together)
    for part in range(parts):
        piece = batch if parts == 1 else _micro_batch(batch, part, parts, together)
        if piece.mask.dim() == 1 or bool(piece.mask.any()):
            yield piece


def _micro_batch(batch: Batch, part: int, parts: int, together: int) -> Batch:
    piece = _part(batch, part, parts, together)
    return replace(piece, share=int(piece.mask.sum()) / int(batch.mask.sum()))


def _part(batch: Batch, part: int, parts: int, together: int) -> Batch:
    count = batch.mask.shape[0] // together
    return select_units(batch, slice(count * part // parts * together, count * (part + 1) // parts * together))


def select_units(batch: Batch, index: Tensor | slice) -> Batch:
    """Some rows of a batch, or steps where it holds steps."""
    chosen = _map(batch, lambda tensor: tensor[index])
    acting, reference = batch.behaviour_distribution, batch.reference_distribution
    if acting is None and reference is None:
        return chosen
    return replace(
        chosen,
        behaviour_distribution=None if acting is None else acting.select(index),
        reference_distribution=None if reference is None else reference.select(index),
    )


def _map(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    def maybe(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else function(tensor)

    return Batch(
        observation=map_observation(function, batch.observation),
        action=function(batch.action),
        mask=function(batch.mask),
        behaviour_log_prob=function(batch.behaviour_log_prob),
        advantage=function(batch.advantage),
        value_target=maybe(batch.value_target),
        behaviour_value=maybe(batch.behaviour_value),
        behaviour_distribution=batch.behaviour_distribution,
        weight=function(batch.weight),
        reference_log_prob=maybe(batch.reference_log_prob),
        reference_distribution=batch.reference_distribution,
        proximal_log_prob=maybe(batch.proximal_log_prob),
        reference_point=maybe(batch.reference_point),
        time=maybe(batch.time),
        memory=None if batch.memory is None else map_observation(function, batch.memory),
    )

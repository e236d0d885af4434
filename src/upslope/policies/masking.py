"""Invalid actions: the logits that a mask among the observations sets to minus infinity.

With valid actions V(s), pi(a|s) = exp(logit_a) 1[a in V(s)] / sum_{b in V(s)} exp(logit_b). An invalid action has
probability exactly 0, so that it is never sampled, adds nothing to entropy or KL divergence, and its logit gets no
gradient: grad log pi(a|s) = e_a - pi(.|s), which is 0 outside V(s). The mask depends on the state alone, so that the
policy gradient theorem holds for this policy as for any other (Huang and Ontanon 2020). As the mask is part of the
observation, what learns applies the mask under which the action was sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from upslope.spaces import ACTION_MASK, OBSERVATION, Composite, Discrete, MultiDiscrete, Space, masked_sizes
from upslope.trajectory import Observation, ObservationArrays


@dataclass(frozen=True, slots=True)
class Masking:
    """What a policy does about the mask among its observations; nothing, where there is none.

    A choice without any valid value masks nothing: padding and terminal states look like that, and nobody acts in
    them. Where a policy acts, the environments refuse such masks.

    Attributes:
        sizes: the choices per action dimension, or None where there is no mask.
        alone: whether what is left without the mask is the one entry `OBSERVATION`.
    """

    sizes: tuple[int, ...] | None
    alone: bool

    @classmethod
    def of(cls, observation_space: Space, action_space: Space) -> Masking:
        """For a policy of these spaces.

        Raises:
            ValueError: if the mask does not fit the actions.
        """
        sizes = masked_sizes(observation_space)
        if sizes is None or not isinstance(observation_space, Composite):
            return cls(None, False)
        expected = action_sizes(action_space)
        if sizes != expected:
            raise ValueError(
                f"a mask of the sizes {sizes} does not fit the actions {action_space}: masks are for Discrete and "
                "MultiDiscrete actions, one entry per choice"
            )
        names = [name for name, _ in observation_space.entries if name != ACTION_MASK]
        return cls(sizes, names == [OBSERVATION])

    def seen(self, observation: Any) -> Any:
        """What the networks see: the observation (tensors or arrays) without the mask."""
        if self.sizes is None:
            return observation
        if self.alone:
            return observation[OBSERVATION]
        return {name: entry for name, entry in observation.items() if name != ACTION_MASK}

    def apply(self, parameters: Tensor, observation: Observation) -> Tensor:
        """Logits [..., P] with -inf where the mask of the observation [..., *] says that an action is invalid."""
        if self.sizes is None:
            return parameters
        mask = cast("dict[str, Tensor]", observation)[ACTION_MASK]
        parts = [part | ~part.any(-1, keepdim=True) for part in mask.split(self.sizes, -1)]
        return parameters.masked_fill(~(parts[0] if len(parts) == 1 else torch.cat(parts, -1)), -torch.inf)

    def apply_arrays(self, parameters: np.ndarray, observation: ObservationArrays) -> np.ndarray:
        """The same for a rollout, [N, P], in place."""
        if self.sizes is None:
            return parameters
        mask = cast("dict[str, np.ndarray]", observation)[ACTION_MASK]
        begin = 0
        for size in self.sizes:
            part = mask[:, begin : begin + size]
            invalid = ~part
            invalid &= np.logical_or.reduce(part, axis=1, keepdims=True)
            np.copyto(parameters[:, begin : begin + size], -np.inf, where=invalid)
            begin += size
        return parameters


def action_sizes(action_space: Space) -> tuple[int, ...] | None:
    """How many choices each action dimension has; None for actions that are no choices."""
    match action_space:
        case Discrete():
            return (action_space.n,)
        case MultiDiscrete():
            return action_space.choices
        case _:
            return None


def join_mask(observation_space: Space, observation: Any, action_mask: Any) -> Any:
    """An observation as an environment gives it, together with the mask that came apart from it.

    Args:
        observation_space: with the mask among its entries.
        observation: a single one or a batch.
        action_mask: as in `read_mask`, of one observation or of each.

    Raises:
        ValueError: if the policy knows no masks.
    """
    sizes = masked_sizes(observation_space)
    if sizes is None:
        raise ValueError("this policy was made without action masks: leave action_mask out")
    batch = isinstance(action_mask, list | np.ndarray) and np.ndim(action_mask) == 2
    mask = np.stack([read_mask(row, sizes) for row in action_mask]) if batch else read_mask(action_mask, sizes)
    entries = cast("dict[str, Any]", observation) if isinstance(observation, dict) else {OBSERVATION: observation}
    return {**entries, ACTION_MASK: mask}


def read_mask(mask: Any, sizes: tuple[int, ...]) -> np.ndarray:
    """Bool [sum(sizes)] of a mask as environments give them.

    Args:
        mask: one array of 0 and 1 or of bool for all choices, one after the other; or a tuple of such arrays, one per
            choice (what `MultiDiscrete.sample` takes).
        sizes: the choices.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(mask, tuple):
        parts = cast("tuple[Any, ...]", mask)
        shapes = tuple(np.shape(part) for part in parts)
        if shapes != tuple((size,) for size in sizes):
            raise ValueError(
                f"an action mask in parts must have one array for each of the choices {sizes}, got arrays of the "
                f"shapes {shapes}"
            )
        mask = np.concatenate([np.asarray(part) for part in parts])
    array = np.asarray(mask)
    if array.shape != (sum(sizes),):
        raise ValueError(
            f"an action mask must have one entry for each of {sum(sizes)} choices, shape {(sum(sizes),)}, got shape "
            f"{array.shape}"
        )
    if array.dtype.kind == "b":
        return array
    if array.dtype.kind not in "iu" or not ((array == 0) | (array == 1)).all():
        raise ValueError(f"an action mask must hold bool, or whole numbers 0 and 1, got {array!r:.100}")
    return array.astype(bool)


def has_valid(mask: np.ndarray, sizes: tuple[int, ...]) -> bool:
    """Whether every choice of a mask [sum(sizes)] has a valid value."""
    if len(sizes) == 1:
        return bool(mask.any())
    starts = np.cumsum((0, *sizes[:-1]))
    return bool(np.logical_or.reduceat(mask, starts).all())

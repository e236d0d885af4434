"""Where a trajectory really goes on: ends of rows, and steps that the policy did not choose."""

import torch
from torch import Tensor

from upslope.estimators._checks import require_bool, require_same_shape


def with_last_cut(cut: Tensor) -> Tensor:
    """Return `cut` with the last step of every row cut as well."""
    ends = cut.clone()
    ends[..., -1] = True
    return ends


def skip_unchosen(mask: Tensor, discount: Tensor, next_value: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Return (cut, next_value) as the chosen steps see them once the unchosen ones are taken out.

    Each step looks ahead to the last skipped position after it, or to itself if none follows: the
    trajectory is cut for it if it is cut there, and its V' is the one there, 0 where `discount` is 0.
    """
    require_same_shape("cut", cut, ("mask", mask), ("discount", discount), ("next_value", next_value))
    require_bool("mask", mask)
    last = cut.shape[-1] - 1
    ends = with_last_cut(cut)
    stops = ends.clone()
    stops[..., :-1] |= mask[..., 1:]
    position = torch.arange(last + 1, device=cut.device).expand_as(cut)
    ahead = torch.where(stops, position, last).flip(-1).cummin(-1).values.flip(-1)
    reached = torch.where(discount.gather(-1, ahead) > 0, next_value.gather(-1, ahead), 0.0)
    return ends.gather(-1, ahead), reached


def chosen_first(mask: Tensor) -> Tensor:
    """Return the indices that bring the chosen steps of each row to its front, in their order."""
    return torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)

"""Shape and type checks shared by the estimators: cheap when they pass, explicit when they do not."""

import torch
from torch import Tensor


def require_same_shape(name: str, reference: Tensor, *others: tuple[str, Tensor]) -> None:
    """Raise ValueError unless every tensor of `others` has the shape of `reference`, `[..., T]`."""
    shape = reference.shape
    if not shape or not shape[-1]:
        raise ValueError(f"{name} must have shape [..., T] with time last and at least one step; got {tuple(shape)}")
    for other_name, other in others:
        if other.shape != shape:
            raise ValueError(f"{other_name} must have the shape of {name}, {tuple(shape)}; got {tuple(other.shape)}")


def require_bool(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` is boolean."""
    if tensor.dtype != torch.bool:
        raise ValueError(f"{name} must be a boolean tensor; got {tensor.dtype} (convert it with {name}.bool())")


def require_within(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie between {low} and {high}; got {value}")

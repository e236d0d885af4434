"""Curvature of the policy: natural gradient, trust region, eligibility traces. Vectors are flat, `[P]`."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors into one flat vector, `[P]`.

    >>> flatten([torch.ones(2), torch.zeros(1, 1)])
    tensor([1., 1., 0.])

    Args:
        tensors: at least one, of any shapes.
    """
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Split a flat vector into tensors shaped as those of `like`: the inverse of `flatten`.

    >>> unflatten(torch.arange(3.0), [torch.ones(2), torch.zeros(1, 1)])
    [tensor([0., 1.]), tensor([[2.]])]

    Args:
        vector: `[P]`.
        like: tensors with P elements together.

    Raises:
        ValueError: the number of elements differs.
    """
    sizes = [tensor.numel() for tensor in like]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"vector must have shape ({sum(sizes)},); got {tuple(vector.shape)}")
    parts = torch.split_with_sizes(vector, sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def fisher_vector_product(
    divergence: Callable[[], Tensor], parameters: Sequence[Tensor], *, damping: float = 0.0
) -> Callable[[Tensor], Tensor]:
    """Return v -> F v + damping * v, with F the Hessian of the mean KL(old || new) at new = old.

    F v = grad (grad KL . v): two backward passes and no matrix. Pearlmutter (1994); Schulman et al. (2015).

    >>> theta = torch.tensor([0.0, 0.0], requires_grad=True)
    >>> p = torch.tensor([0.5, 0.5])
    >>> matvec = fisher_vector_product(lambda: -(p * theta.log_softmax(-1)).sum(), [theta])
    >>> matvec(torch.tensor([1.0, 0.0]))
    tensor([ 0.2500, -0.2500])

    Args:
        divergence: returns the mean KL as a scalar, a function of the parameters; called once.
        parameters: leaf tensors with `requires_grad`; one it does not depend on counts as 0.
        damping: added to the diagonal, at least 0.

    Raises:
        ValueError: damping < 0 or the divergence is no scalar.
    """
    if damping < 0:
        raise ValueError(f"damping must be at least 0; got {damping}")
    with torch.enable_grad():
        mean = divergence()
        if mean.numel() != 1:
            raise ValueError(f"divergence must return one number, the mean KL; got shape {tuple(mean.shape)}")
        gradients = torch.autograd.grad(mean.reshape(()), parameters, create_graph=True, materialize_grads=True)
        gradient = flatten(gradients)

    def product(vector: Tensor) -> Tensor:
        parts = torch.autograd.grad(
            gradient, parameters, grad_outputs=vector, retain_graph=True, materialize_grads=True
        )
        return flatten(parts) + damping * vector

    return product


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor], b: Tensor, *, iterations: int = 10, tolerance: float = 1e-10
) -> Tensor:
    """Solve A x = b for a symmetric positive definite A, from x = 0. Hestenes & Stiefel (1952).

    Exact after as many iterations as A has distinct eigenvalues. It stops once |b - A x|^2 <= tolerance * |b|^2, or
    at a direction without positive curvature, with the best x so far.

    >>> matrix = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    >>> conjugate_gradient(matrix.mv, torch.tensor([2.0, 2.0]), iterations=2)
    tensor([1.0000, 0.5000])

    Args:
        matvec: v -> A v.
        b: `[P]`.
        iterations: at least 1.
        tolerance: relative, of the squared residual; at least 0.

    Raises:
        ValueError: b is not a vector, iterations < 1 or tolerance < 0.
    """
    if b.dim() != 1:
        raise ValueError(f"b must be a flat vector [P]; got shape {tuple(b.shape)}")
    if iterations < 1 or tolerance < 0:
        raise ValueError(f"iterations must be at least 1 and tolerance at least 0; got {iterations} and {tolerance}")
    x, residual = torch.zeros_like(b), b.detach().clone()
    direction = residual.clone()
    squared = float(residual.dot(residual))
    enough = tolerance * squared
    for _ in range(iterations):
        if squared <= enough:
            break
        image = matvec(direction).detach()
        curvature = float(direction.dot(image))
        if curvature <= 0.0:
            break
        step = squared / curvature
        x, residual = x + step * direction, residual - step * image
        previous, squared = squared, float(residual.dot(residual))
        direction = residual + (squared / previous) * direction
    return x


def trust_region_scale(direction: Tensor, image: Tensor, *, max_divergence: float) -> float:
    """Longest step along x whose quadratic KL stays within delta: sqrt(2 delta / x'Fx); 0 without curvature.

    >>> trust_region_scale(torch.tensor([2.0]), torch.tensor([1.0]), max_divergence=0.01)
    0.1

    Args:
        direction: `[P]`, x.
        image: `[P]`, F x.
        max_divergence: delta, positive.

    Raises:
        ValueError: delta <= 0.
    """
    if max_divergence <= 0:
        raise ValueError(f"max_divergence must be positive; got {max_divergence}")
    curvature = float(direction.detach().dot(image.detach()))
    return math.sqrt(2.0 * max_divergence / curvature) if curvature > 0.0 else 0.0


class LineSearch(NamedTuple):
    """Where a line search ended: the parameters, the fraction of the step taken (0.0 if refused), and there."""

    parameters: Tensor
    fraction: float
    objective: float
    divergence: float


def backtracking_line_search(
    evaluate: Callable[[Tensor], tuple[float, float]],
    start: Tensor,
    step: Tensor,
    *,
    objective: float,
    max_divergence: float,
    backtrack: float = 0.8,
    attempts: int = 10,
) -> LineSearch:
    """Shorten the step until it helps: the first of start + backtrack^j * step with a better objective and KL <= delta.

    If none of the attempts qualifies the result is `start` itself, bit for bit, with fraction 0. A NaN never
    qualifies. Schulman et al. (2015) appendix C.

    >>> found = backtracking_line_search(
    ...     lambda x: (-float(x - 1) ** 2, 0.0), torch.tensor([0.0]), torch.tensor([4.0]),
    ...     objective=-1.0, max_divergence=0.01, backtrack=0.5)
    >>> found.parameters, found.fraction
    (tensor([1.]), 0.25)

    Args:
        evaluate: parameters `[P]` -> (objective, mean KL(old || new)).
        start: `[P]`.
        step: `[P]`, the full step.
        objective: its value at `start`, to be exceeded.
        max_divergence: delta, positive.
        backtrack: factor between attempts, in (0, 1).
        attempts: at least 1.

    Raises:
        ValueError: a number is out of its range.
    """
    if not 0.0 < backtrack < 1.0:
        raise ValueError(f"backtrack must lie strictly between 0 and 1; got {backtrack}")
    if attempts < 1 or max_divergence <= 0:
        raise ValueError(
            f"attempts must be at least 1 and max_divergence positive; got {attempts} and {max_divergence}"
        )
    fraction = 1.0
    for _ in range(attempts):
        candidate = start + fraction * step
        reached, divergence = evaluate(candidate)
        if reached > objective and divergence <= max_divergence:
            return LineSearch(candidate, fraction, reached, divergence)
        fraction *= backtrack
    return LineSearch(start, 0.0, objective, 0.0)


def accumulate_trace(
    trace: Tensor,
    gradient: Tensor,
    *,
    decay: float,
    weight: float | Tensor = 1.0,
    restart: Tensor | None = None,
) -> Tensor:
    """Accumulating eligibility trace: z <- decay * z + I * grad, with z = 0 before the first step of a trajectory.

    decay is gamma * lambda (lambda alone in a continuing task). For the actor I is gamma^t, for the critic 1.
    Offline, the sum of delta_t z_t is the sum of (G^lambda_t - V_t) grad V_t. Sutton & Barto (2018) 12.2, 13.5.

    >>> accumulate_trace(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]), decay=0.5)
    tensor([1.5000, 1.0000])
    >>> accumulate_trace(torch.ones(2, 1), torch.ones(2, 1), decay=0.5, restart=torch.tensor([True, False]))
    tensor([[1.0000],
            [1.5000]])

    Args:
        trace: `[..., P]`, z.
        gradient: `[..., P]`, of log pi(a|s) or v(s).
        decay: in [0, 1].
        weight: I, a number or `[...]`.
        restart: `[...]`, boolean: this step is the first of its trajectory.

    Raises:
        ValueError: shapes differ, or decay is outside [0, 1].
    """
    if trace.shape != gradient.shape:
        raise ValueError(f"gradient must have the shape of trace, {tuple(trace.shape)}; got {tuple(gradient.shape)}")
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must lie between 0 and 1; got {decay}")
    if restart is not None:
        if restart.shape != trace.shape[:-1]:
            raise ValueError(
                f"restart must have shape {tuple(trace.shape[:-1])}, one per trace; got {tuple(restart.shape)}"
            )
        trace = trace.masked_fill(restart.unsqueeze(-1), 0.0)
    return decay * trace + (weight.unsqueeze(-1) if isinstance(weight, Tensor) else weight) * gradient

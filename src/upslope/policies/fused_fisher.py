"""Fisher-vector products of multilayer perceptrons in closed form, for the CPU.

    F v = sum_n w_n J_n' M_n J_n v

J_n is the Jacobian of one step's action parameters by the weights, M_n the Hessian of KL(old || new) by those
parameters at new = old, where its gradient is 0: this is the Hessian of the mean KL, as differentiating twice gives it
(`upslope.estimators.fisher_vector_product`), in one pass forward and one back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from upslope.policies.actor_critic import ActorCritic
from upslope.policies.distributions import HeadDistribution
from upslope.policies.fused import FUSED_ACTIVATIONS, activate, fusable
from upslope.policies.networks import MLP
from upslope.trajectory import Distribution, Policy, Steps


def closed_form_product(
    policy: Policy, batch: Steps, old: Distribution, parameters: Sequence[Tensor], *, steps: int
) -> Callable[[Tensor], Tensor] | None:
    """v -> F v for the mean over `steps` chosen steps, or None where there is no closed form.

    There is one for actors that are perceptrons with tanh or ReLU on features without parameters, on the CPU.

    Args:
        policy: at the parameters of `old`.
        batch: all of the chosen steps or a part of them.
        old: its distributions.
        parameters: what v is flat in; those of the actor.
        steps: chosen ones altogether.
    """
    if not isinstance(policy, ActorCritic) or policy.sequential or not isinstance(old, HeadDistribution):
        return None
    networks = (policy.actor,) if policy.torso is None else (policy.torso, policy.actor)
    if not (policy.vector_only and fusable(*parameters)):
        return None
    if any(network.activation not in FUSED_ACTIVATIONS for network in networks):
        return None
    tensors = [tensor for network in networks for tensor in network.tensors()]
    places = {id(parameter): number for number, parameter in enumerate(parameters)}
    if {id(tensor) for tensor in tensors} != places.keys():
        return None
    mask, features = batch.mask.flatten(), policy.features(batch)
    chosen = HeadDistribution(old.head, old.parameters.flatten(0, -2)[mask])
    jacobian = Jacobian(features[mask].detach().numpy(), networks)
    return _Product(jacobian, Metric(chosen, 1.0 / steps), [places[id(tensor)] for tensor in tensors], parameters)


@final
class _Product:
    """v -> F v, with the tensors of v in the order of the parameters."""

    def __init__(self, jacobian: Jacobian, metric: Metric, places: Sequence[int], parameters: Sequence[Tensor]) -> None:
        self._jacobian, self._metric, self._places = jacobian, metric, places
        self._sizes = [parameter.numel() for parameter in parameters]
        self._shapes = [tuple(parameter.shape) for parameter in parameters]

    def __call__(self, vector: Tensor) -> Tensor:
        parts = [
            part.numpy().reshape(shape)
            for part, shape in zip(vector.split_with_sizes(self._sizes), self._shapes, strict=True)
        ]
        change = self._jacobian.times([parts[place] for place in self._places])
        found = self._jacobian.transposed_times(self._metric.times(change))
        ordered: list[np.ndarray] = [found[0]] * len(found)
        for place, array in zip(self._places, found, strict=True):
            ordered[place] = array
        return torch.from_numpy(np.concatenate([array.ravel() for array in ordered]))


@final
class Metric:
    """M: the Hessian of w sum_n KL(old_n || new_n) by the parameters [M, P] of the new, at new = old.

    Args:
        old: [M] distributions.
        weight: w.
    """

    def __init__(self, old: HeadDistribution, weight: float) -> None:
        with torch.enable_grad():
            self._leaf = old.parameters.detach().clone().requires_grad_()
            divergence = weight * old.detach().kl(HeadDistribution(old.head, self._leaf)).sum()
            (self._gradient,) = torch.autograd.grad(divergence, self._leaf, create_graph=True)

    def times(self, change: np.ndarray) -> np.ndarray:
        """M u, [M, P] for u [M, P]."""
        (image,) = torch.autograd.grad(
            self._gradient, self._leaf, torch.from_numpy(change), retain_graph=True, materialize_grads=True
        )
        return image.numpy()


class _Layer(NamedTuple):
    """One affine layer at work.

    Attributes:
        source: [M, I] what goes in.
        weight: [O, I].
        slope: [M, O] of the activation behind it, or None for none.
    """

    source: np.ndarray
    weight: np.ndarray
    slope: np.ndarray | None


@final
class Jacobian:
    """J: of the outputs [M, P] of perceptrons, one after the other, by all their tensors, at given features [M, F]."""

    def __init__(self, features: np.ndarray, networks: Sequence[MLP]) -> None:
        self._ones = np.ones(len(features), dtype=features.dtype)
        self._layers: list[_Layer] = []
        self._constant = 0
        hidden = features
        for network in networks:
            layers, constant = network.layout.split([tensor.detach().numpy() for tensor in network.tensors()])
            for position in range(0, len(layers), 2):
                source, weight = hidden, layers[position]
                hidden = source @ weight.T + layers[position + 1]
                slope = None
                if network.layout.torso or position + 2 < len(layers):
                    activate(network.activation, hidden)
                    slope = _slope(network.activation, hidden)
                self._layers.append(_Layer(source, weight, slope))
            self._constant = 0 if constant is None else len(constant)

    def times(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """J v, [M, P], for v in the order of the networks' tensors."""
        change: np.ndarray | None = None
        for number, layer in enumerate(self._layers):
            raised = layer.source @ tensors[2 * number].T
            raised += tensors[2 * number + 1]
            if change is not None:
                raised += change @ layer.weight.T
            if layer.slope is not None:
                raised *= layer.slope
            change = raised
        assert change is not None
        if not self._constant:
            return change
        constant = np.broadcast_to(tensors[-1], (len(change), self._constant))
        return np.concatenate([change, constant], axis=1)

    def transposed_times(self, gradient: np.ndarray) -> list[np.ndarray]:
        """J' u, in the order of the networks' tensors, for u [M, P]."""
        found: list[np.ndarray] = []
        if self._constant:
            found.append(self._ones @ gradient[:, -self._constant :])
            gradient = gradient[:, : -self._constant]
        for number in range(len(self._layers) - 1, -1, -1):
            layer = self._layers[number]
            if layer.slope is not None:
                gradient = gradient * layer.slope
            found.append(self._ones @ gradient)
            found.append(gradient.T @ layer.source)
            if number:
                gradient = gradient @ layer.weight
        return found[::-1]


def _slope(activation: str, output: np.ndarray) -> np.ndarray:
    """Of the activation, from what came out of it."""
    return (output > 0.0).astype(output.dtype) if activation == "relu" else 1.0 - output * output

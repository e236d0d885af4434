"""A policy made lean for rollouts."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from upslope.policies.distributions import Head
from upslope.policies.masking import Masking
from upslope.policies.memory import PolicyMemory
from upslope.policies.networks import MLP, LeanMLP, encode_arrays
from upslope.policies.normalizer import ObservationNormalizer
from upslope.trajectory import ObservationArrays, map_observation


class ActorSampler:
    """NumPy in, NumPy out: the `Sampler` of an `ActorCritic`.

    Vectors go through NumPy alone, on views of the parameters and statistics where they lie; encoders with
    parameters run in torch. Valid while the parameters stay where they are, whatever their contents; on an
    accelerator it holds copies, valid until the next optimiser step.
    """

    def __init__(
        self,
        head: Head,
        encoder: nn.Module,
        torso: MLP | None,
        actor: MLP,
        normalizer: ObservationNormalizer | None,
        masking: Masking,
        memory: PolicyMemory | None,
        critic_encoder: nn.Module | None,
        *,
        vector_only: bool,
    ) -> None:
        self._head, self._encoder, self._vector_only = head, encoder, vector_only
        self._masking = masking
        self._normalize = None if normalizer is None else normalizer.lean()
        self._torso = None if torso is None else LeanMLP(torso)
        self._actor = LeanMLP(actor)
        self._device = self._actor.device
        self._memory = None if memory is None else memory.lean()
        self._critic_encoder = critic_encoder

    def begin(self, memory: ObservationArrays | None, environments: int) -> None:
        """Take up what was remembered, [N, ...], or begin with nothing; before the first action.

        Raises:
            ValueError: if the memory is of another policy, or of another number of environments.
        """
        if self._memory is not None:
            self._memory.begin(memory, environments)

    def restart(self, environments: np.ndarray) -> None:
        """Forget what belongs to the episodes of some environments, by index: they have ended."""
        if self._memory is not None:
            self._memory.restart(environments)

    @property
    def memory(self) -> ObservationArrays | None:
        """A copy of what is remembered, [N, ...]; None for nothing."""
        if self._memory is None:
            return None
        return {name: array.copy() for name, array in self._memory.arrays.items()}

    def noise(self, generator: np.random.Generator, steps: int, environments: int) -> np.ndarray:
        """All the randomness of a rollout, [steps, environments, ...], drawn at once."""
        return self._head.noise(generator, steps, environments)

    def sample(self, observation: ObservationArrays, noise: np.ndarray) -> np.ndarray:
        """One stored action per environment, [N] or [N, A], from that step's slice of the noise."""
        return self._head.sample(self.parameters(observation), noise)

    def mode(self, observation: ObservationArrays) -> np.ndarray:
        """The most likely stored action per environment."""
        return self._head.mode(self.parameters(observation))

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """Stored actions as the environment takes them."""
        return self._head.to_environment(action)

    def parameters(self, observation: ObservationArrays) -> np.ndarray:
        """[N, P]: parameters of the action distributions for observations [N, ...] as the environment gives them.

        With a memory, every call is a step.
        """
        if self._normalize is not None:
            observation = self._normalize(observation)
        seen = self._masking.seen(observation)
        if self._vector_only:
            features = encode_arrays(self._encoder, seen, self._actor.dtype)
        else:
            features = self._encoded(self._encoder, seen)
        if self._torso is not None:
            features = self._torso(features)
        if self._memory is not None:
            own = None if self._critic_encoder is None else self._encoded(self._critic_encoder, seen)
            features = self._memory.step(features, own)
        return self._masking.apply_arrays(self._actor(features), observation)

    def _encoded(self, encoder: nn.Module, observation: ObservationArrays) -> np.ndarray:
        with torch.no_grad():
            tensors = map_observation(lambda array: torch.as_tensor(array, device=self._device), observation)
            return encoder(tensors).cpu().numpy()

"""Actor and critic for control: observation -> distribution over actions, and value."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upslope.policies.config import ActorCriticConfig, build_head, config_to_tree, read_policy_tree
from upslope.policies.distributions import HeadDistribution
from upslope.policies.masking import Masking, join_mask
from upslope.policies.memory import CarriedMemory, PolicyMemory, build_memory, taken_up
from upslope.policies.networks import MLP, build_encoder, feature_count, forward_pair, is_vector_only
from upslope.policies.normalizer import ObservationNormalizer, RewardNormalizer
from upslope.policies.packing import Packing, join_observations
from upslope.policies.raw import read_observation
from upslope.policies.sampler import ActorSampler
from upslope.spaces import Space, space_to_tree
from upslope.trajectory import Evaluation, Observation, Steps, Trajectory, map_observation


class ActorCritic(nn.Module):
    """A policy for any space of `upslope.spaces`, with the critic and the normalisers that belong to it.

    An encoder of one's own is any `nn.Module` from observations [M, ...] to features [M, features] that says how
    many they are; it sees observations after normalisation:

        class Sines(nn.Module):
            features = 8

            def forward(self, observation):
                return torch.cat([observation.sin(), observation.cos()], dim=-1)

        policy = ActorCritic(space, actions, ActorCriticConfig(), generator=generator, encoder=Sines())

    The policy is in evaluation mode always, while it learns too: Dropout passes everything on and BatchNorm uses the
    statistics it came with. What acts is then exactly what learns (the ratio is 1 before the first step), and a seed
    decides the weights.

    Args:
        observation_space: what the policy sees.
        action_space: what it does; one leaf.
        config: everything else.
        generator: of the initial weights; the global generator is never touched. None leaves the built-in networks on
            PyTorch's meta device, without memory or values, for saved tensors to be put in.
        encoder: in place of the built-in one. Unless `config.shared`, the critic gets a copy of it.

    Raises:
        ValueError: if the action space has no distribution, or an image is too small for the encoder asked for.
    """

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        config: ActorCriticConfig,
        *,
        generator: torch.Generator | None,
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.observation_space, self.action_space, self.config = observation_space, action_space, config
        self.head = build_head(action_space, config)
        self.masking = Masking.of(observation_space, action_space)
        self.observation_normalizer = (
            ObservationNormalizer(observation_space, clip=config.observation_clip)
            if config.normalize_observation
            else None
        )
        self.reward_normalizer = RewardNormalizer(clip=config.reward_clip) if config.normalize_reward else None
        self._own_encoder = encoder is not None
        self._build_networks(encoder, generator)
        self.eval()

    def _build_networks(self, encoder: nn.Module | None, generator: torch.Generator | None) -> None:
        config, head = self.config, self.head
        gain = config.hidden_gain if config.orthogonal else None

        def make_encoder() -> nn.Module:
            return build_encoder(self.observation_space, config.encoder, config.image_layout, gain, generator)

        def make_mlp(inputs: int, hidden: tuple[int, ...], outputs: int | None, **output: Any) -> MLP:
            return MLP(inputs, hidden, outputs, activation=config.activation, gain=gain, generator=generator, **output)

        self.encoder = make_encoder() if encoder is None else encoder
        self.vector_only = is_vector_only(self.encoder)
        inputs = feature_count(self.encoder)
        self.torso = make_mlp(inputs, config.hidden, None) if config.shared and config.hidden else None
        inputs = inputs if self.torso is None else self.torso.features
        self.memory: PolicyMemory | None = None
        if config.memory is not None:
            self.memory = build_memory(config.memory, config, inputs, generator)
            inputs = self.memory.features
        hidden = () if config.shared else config.hidden
        self.actor = make_mlp(
            inputs,
            hidden,
            head.size - head.constant,
            output_gain=config.policy_gain if config.orthogonal else None,
            output_bias=head.initial,
            constant=head.constant,
        )
        self.critic_encoder: nn.Module | None = None
        self.critic: MLP | None = None
        if config.critic:
            one_memory = config.memory is not None and config.memory.shared
            if not (config.shared or self.vector_only or one_memory):
                self.critic_encoder = make_encoder() if encoder is None else copy.deepcopy(encoder)
            self.critic = make_mlp(inputs, hidden, 1, output_gain=config.value_gain if config.orthogonal else None)

    def train(self, mode: bool = True) -> ActorCritic:
        """Evaluation mode, whatever `mode` is: see the class."""
        del mode
        return super().train(False)

    # --- learning ----------------------------------------------------------------------------------------------------

    def log_prob(self, observation: Observation, action: Tensor) -> Tensor:
        """log pi(a|s), any leading shape; differentiable.

        With a memory the last leading dimension is time: each row is one episode from its start.
        """
        steps = self._steps(action)
        if self.memory is None:
            observation, action, _ = self._flat(observation, action)
            parameters = self.action_parameters(self._normalized(observation))
            return self.head.log_prob_and_entropy(parameters, action)[0].view(steps)
        lead = len(steps) - 1
        rows = map_observation(lambda t: t.reshape(-1, *t.shape[lead:]), observation)
        action = action.reshape(-1, *action.shape[lead:])
        packing = Packing.of(torch.ones(self._steps(action), dtype=torch.bool, device=action.device), None)
        parameters, _ = self._replayed(rows, packing, None, critic=False)
        log_prob, _ = self.head.log_prob_and_entropy(parameters, packing.take_tensor(action))
        return packing.put(log_prob).view(steps)

    def evaluate(self, steps: Steps) -> Evaluation:
        """log-prob, entropy, distribution and value, in one pass of the actor and one of the critic; differentiable.

        Args:
            steps: observations [..., *observation] and stored actions [...] or [..., A], any leading shape. With a
                memory they are rows [B, T], replayed from what was carried into them, and all that is found is 0 where
                nothing was chosen.
        """
        if self.memory is not None:
            return self._evaluate_rows(steps)
        observation, action, shape = self._flat(steps.observation, steps.action)
        parameters, value = self._outputs(self._normalized(observation))
        log_prob, entropy = self.head.log_prob_and_entropy(parameters, action)
        if len(shape) != 1:
            log_prob, entropy, parameters = log_prob.view(shape), entropy.view(shape), parameters.view(*shape, -1)
            value = None if value is None else value.view(shape)
        distribution = HeadDistribution(self.head, parameters)
        return Evaluation(log_prob=log_prob, entropy=entropy, distribution=distribution, value=value)

    def evaluate_with_next_value(self, trajectory: Trajectory) -> tuple[Evaluation, Tensor]:
        """`evaluate` of all steps, row after row [B * T], and V'_t [B, T] without gradient, in one pass.

        Raises:
            ValueError: if the policy has no critic, or a memory, which needs whole rows.
        """
        if self.memory is not None or self.critic is None:
            raise ValueError("one look is for a policy with a critic and without a memory: ask `values`, `evaluate`")
        observation, action, shape = self._flat(trajectory.observation, trajectory.action)
        together = self._normalized(join_observations(observation, trajectory.final_observation))
        parameters, value = self._outputs(together)
        assert value is not None
        count, seen = shape.numel(), value.detach()
        parameters, value = parameters.narrow(0, 0, count), value.narrow(0, 0, count)
        log_prob, entropy = self.head.log_prob_and_entropy(parameters, action)
        distribution = HeadDistribution(self.head, parameters)
        evaluation = Evaluation(log_prob=log_prob, entropy=entropy, distribution=distribution, value=value)
        return evaluation, trajectory.next_value(seen[:count].view(shape), seen[count:])

    def _evaluate_rows(self, steps: Steps) -> Evaluation:
        if steps.mask.dim() != 2:
            raise ValueError(
                "a policy with a memory is evaluated on whole rows [B, T], got steps of shape "
                f"{tuple(steps.mask.shape)}"
            )
        packing = Packing.of(steps.mask, steps.time)
        parameters, value = self._replayed(steps.observation, packing, steps.memory)
        log_prob, entropy = self.head.log_prob_and_entropy(parameters, packing.take_tensor(steps.action))
        return Evaluation(
            log_prob=packing.put(log_prob),
            entropy=packing.put(entropy),
            distribution=HeadDistribution(self.head, packing.put(parameters)),
            value=None if value is None else packing.put(value),
        )

    def _replayed(
        self, rows: Observation, packing: Packing, memory: Observation | None, *, critic: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Masked parameters [M, P] and values [M] at the chosen steps, packed."""
        assert self.memory is not None
        observation = self._normalized(packing.take(rows))
        features = self._shared_features(observation)
        critic = critic and self.critic is not None
        own = self.critic_encoder(self.masking.seen(observation)) if critic and self.critic_encoder else None
        features, own = self.memory.replay(features, own, packing, memory, critic=critic)
        parameters, value = self._heads(features, own, critic=critic)
        return self.masking.apply(parameters, observation), value

    @torch.no_grad()
    def values(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """V_t and V'_t, both [B, T], in one batched critic call over observations and final observations.

        With a memory, rows are replayed, and a final observation is seen with the memory of the step it followed.

        Raises:
            ValueError: if the policy has no critic.
        """
        if self.critic is None:
            raise ValueError("this policy has no critic: make it with ActorCriticConfig(critic=True)")
        count = trajectory.reward.numel()
        if self.memory is None:
            observation = map_observation(lambda t: t.reshape(-1, *t.shape[2:]), trajectory.observation)
            together = self._normalized(join_observations(observation, trajectory.final_observation))
            value = self.critic(self._critic_features(together)).view(-1)
            present = value[:count].view(trajectory.shape)
            return present, trajectory.next_value(present, value[count:])
        packing = Packing.of(trajectory.mask, trajectory.time)
        ends = packing.steps_at(trajectory.final_index)
        count = len(packing.place)
        together = self._normalized(
            join_observations(packing.take(trajectory.observation), trajectory.final_observation)
        )
        features = self._critic_features(together)
        features = self.memory.for_values(features[:count], packing, trajectory.memory, features[count:], ends)
        value = self.critic(features).view(-1)
        present = packing.put(value[:count])
        return present, trajectory.next_value(present, value[count:])

    def features(self, steps: Steps) -> Tensor:
        """[M, F] what the encoder makes of normalised observations: the input of torso or actor and critic."""
        observation, _, _ = self._flat(steps.observation, steps.action)
        return self.encoder(self.masking.seen(self._normalized(observation)))

    def observe(self, trajectory: Trajectory) -> None:
        """Let the observation normaliser, if there is one, see what was collected: after learning from it."""
        if self.observation_normalizer is not None:
            self.observation_normalizer.update(trajectory.observation, trajectory.mask)

    def action_parameters(self, observation: Observation) -> Tensor:
        """Parameters [M, P] of the action distributions, for normalised observations [M, ...]; masked."""
        return self.masking.apply(self.actor(self._shared_features(observation)), observation)

    def _shared_features(self, observation: Observation) -> Tensor:
        features = self.encoder(self.masking.seen(observation))
        return features if self.torso is None else self.torso(features)

    def _outputs(self, observation: Observation) -> tuple[Tensor, Tensor | None]:
        """Masked parameters [M, P] and values [M], for normalised observations."""
        features = self._shared_features(observation)
        own = None if self.critic_encoder is None else self._critic_features(observation)
        parameters, value = self._heads(features, own, critic=self.critic is not None)
        return self.masking.apply(parameters, observation), value

    def _heads(self, features: Tensor, for_critic: Tensor | None, *, critic: bool) -> tuple[Tensor, Tensor | None]:
        """Parameters [M, P] and values [M] from what stands before the heads; one pass where that is the same."""
        if not critic or self.critic is None:
            return self.actor(features), None
        if for_critic is None:
            parameters, value = forward_pair(self.actor, self.critic, features)
        else:
            parameters, value = self.actor(features), self.critic(for_critic)
        return parameters, value.view(-1)

    def _critic_features(self, observation: Observation) -> Tensor:
        if self.critic_encoder is None:
            return self._shared_features(observation)
        return self.critic_encoder(self.masking.seen(observation))

    def _normalized(self, observation: Observation) -> Observation:
        return observation if self.observation_normalizer is None else self.observation_normalizer(observation)

    def _steps(self, action: Tensor) -> torch.Size:
        return action.shape[: action.ndim - self.head.action_dimensions]

    def _flat(self, observation: Observation, action: Tensor) -> tuple[Observation, Tensor, torch.Size]:
        """[M, ...] of each, and the shape they had."""
        shape = self._steps(action)
        if len(shape) == 1:
            return observation, action, shape
        flat = map_observation(lambda t: t.reshape(-1, *t.shape[len(shape) :]), observation)
        return flat, action.reshape(-1, *action.shape[len(shape) :]), shape

    # --- acting ------------------------------------------------------------------------------------------------------

    @property
    def sequential(self) -> bool:
        """Whether there is a memory: without, each step stands on its own."""
        return self.memory is not None

    def sampler(self) -> ActorSampler:
        """A lean view for rollouts; take a new one per rollout."""
        return ActorSampler(
            self.head,
            self.encoder,
            self.torso,
            self.actor,
            self.observation_normalizer,
            self.masking,
            self.memory,
            self.critic_encoder,
            vector_only=self.vector_only,
        )

    def start(self) -> CarriedMemory:
        """What to hand to `act` at every step of an episode; a policy without memory carries nothing in it."""
        return CarriedMemory()

    def act(
        self,
        observation: Any,
        *,
        memory: CarriedMemory | None = None,
        action_mask: Any = None,
        deterministic: bool = True,
        generator: np.random.Generator | None = None,
    ) -> Any:
        """What to give to `env.step` for what `env.reset` or `env.step` gave.

        Args:
            observation: a single observation or a batch of them (a vector environment's), as Gymnasium has it: an
                array or a number, or dicts and tuples of them.
            memory: what the policy remembers, `start()` at an episode's start; it moves on with every call. Needed if
                the policy has a memory.
            action_mask: which actions are valid, if the policy was trained with masks: `info["action_mask"]` or what
                the environment's method gave, a row per observation for a batch. Left out where the observation
                already holds it, as those of `upslope.collect.make_environments` do.
            deterministic: the most likely action (the default), or else a sample.
            generator: of the sample; None takes fresh entropy from the system.

        Returns:
            An action in the environment's terms, or an array of them for a batch.

        Raises:
            ValueError: if the observation does not fit the observation space or is not finite; if a mask is missing,
                does not fit or leaves no valid action; if the memory is missing or of other environments.
        """
        if action_mask is not None:
            observation = join_mask(self.observation_space, observation, action_mask)
        arrays, single = read_observation(self.observation_space, observation)
        sampler = self.sampler()
        count = len(next(iter(arrays.values())) if isinstance(arrays, dict) else arrays)
        if self.memory is not None:
            sampler.begin(taken_up(memory, count), count)
        if deterministic:
            action = sampler.mode(arrays)
        else:
            noise = sampler.noise(generator or np.random.default_rng(), 1, count)
            action = sampler.sample(arrays, noise[0])
        if memory is not None:
            memory.arrays = sampler.memory
        action = sampler.to_environment(action)
        return action[0] if single else action

    # --- saving ------------------------------------------------------------------------------------------------------

    def config_tree(self) -> dict[str, Any]:
        """Everything but the tensors, as plain nested dicts: `from_tree` builds the same policy from it."""
        return {
            "observation_space": space_to_tree(self.observation_space),
            "action_space": space_to_tree(self.action_space),
            "config": config_to_tree(self.config),
            "own_encoder": type(self.encoder).__name__ if self._own_encoder else None,
        }

    @classmethod
    def from_tree(
        cls, tree: Mapping[str, Any], tensors: Mapping[str, Tensor], *, encoder: nn.Module | None = None
    ) -> ActorCritic:
        """The policy whose `config_tree()` and `state_dict()` these are; lists may stand for tuples.

        Nothing is initialised, and no memory is taken before names and shapes of all tensors are known to fit.

        Args:
            tree: of `config_tree`.
            tensors: of `state_dict`.
            encoder: a fresh module of the same class, if the policy was made with an encoder of the user's own.

        Raises:
            ValueError: naming the setting that is wrong, if the tree describes no policy; if an encoder is missing or
                too many; or if the tensors do not fit.
        """
        numbers = sum(tensor.numel() for tensor in tensors.values())
        described = read_policy_tree(tree, numbers, encoder_given=encoder is not None)
        with torch.device("meta"):
            policy = cls(*described, generator=None, encoder=encoder)
        own_types = {name: tensor.dtype for name, tensor in policy.state_dict().items()}
        copies = {name: t.detach().to(own_types.get(name, t.dtype), copy=True) for name, t in tensors.items()}
        try:
            policy.load_state_dict(copies, assign=True)
        except RuntimeError as error:
            raise ValueError(f"the saved tensors do not fit the policy's configuration: {error}") from error
        return policy

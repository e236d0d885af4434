"""The memory of a policy: one core for actor and critic, or one each; and how rows are replayed through it."""

from __future__ import annotations

from typing import Any, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from upslope.policies.config import ActorCriticConfig, MemoryConfig
from upslope.policies.memory_transformer import TransformerCore
from upslope.policies.packing import Packing
from upslope.policies.recurrent import Core, LeanCore, Memory, MemoryArrays, RecurrentCore
from upslope.trajectory import Observation, ObservationArrays


@final
class PolicyMemory(nn.Module):
    """Cores between the encoder and the heads of an actor-critic.

    What a policy remembers are named tensors: "actor/hidden", "critic/hidden" and so on, [B, ...] with a row's first
    position, [N, ...] in a rollout; "shared/..." where one core serves both.

    Args:
        actor: the actor's core, and the critic's too if there is no other.
        critic: the critic's, or None.
        shared: whether the actor's core serves a critic.
    """

    def __init__(self, actor: Core, critic: Core | None, *, shared: bool) -> None:
        super().__init__()
        self.actor, self.critic = actor, critic
        self.features, self.shared = actor.features, shared

    def named_cores(self) -> list[tuple[str, Core]]:
        """The cores and the names their tensors begin with."""
        first: tuple[str, Core] = ("shared" if self.shared else "actor", self.actor)
        return [first] if self.critic is None else [first, ("critic", self.critic)]

    def empty(self, environments: int) -> MemoryArrays:
        """The memory of environments in which nothing has happened yet: zeros, in the type of the parameters."""
        dtype = np.dtype(str(next(self.parameters()).dtype).removeprefix("torch."))
        return {
            f"{name}/{part}": np.zeros((environments, *shape), dtype=dtype)
            for name, core in self.named_cores()
            for part, shape in core.shapes.items()
        }

    def replay(
        self,
        features: Tensor,
        for_critic: Tensor | None,
        packing: Packing,
        memory: Observation | None,
        *,
        critic: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """What actor and critic get to see at the chosen steps of rows, differentiable.

        Args:
            features: [M, inputs] packed, for the actor, and for the critic where it has none of its own.
            for_critic: the critic's own, or None.
            packing: of the rows.
            memory: [B, ...] at each row's start; None for the empty one.
            critic: whether the critic is asked at all.

        Returns:
            [M, features] for the actor, and for the critic; None where it is the same.
        """
        name, core = self.named_cores()[0]
        seen, _ = core.replay(features, packing, part_of(memory, name))
        if self.critic is None or not critic:
            return seen, None
        own = features if for_critic is None else for_critic
        return seen, self.critic.replay(own, packing, part_of(memory, "critic"))[0]

    def for_values(
        self, features: Tensor, packing: Packing, memory: Observation | None, final: Tensor, ends: Tensor
    ) -> Tensor:
        """What the critic gets to see at the chosen steps, and then at the final observations, [M + K, features].

        Args:
            features: [M, inputs] packed, as the critic's core takes them.
            packing: of the rows.
            memory: [B, ...] at each row's start; None for the empty one.
            final: [K, inputs] of the final observations.
            ends: [K] the packed steps that they followed: each is seen with the memory that stood after its own.
        """
        name, core = self.named_cores()[-1]
        seen, trace = core.replay(features, packing, part_of(memory, name))
        if len(final) == 0:
            return seen
        one_step = Packing.of(torch.ones(len(final), 1, dtype=torch.bool, device=final.device), None)
        order = one_step.place
        after, _ = core.replay(final[order], one_step, core.after(trace, packing, ends))
        return torch.cat([seen, torch.empty_like(after).index_copy(0, order, after)])

    def lean(self) -> LeanMemory:
        """The twin for rollouts, on views of the parameters."""
        return LeanMemory(self)


def part_of(memory: Observation | None, name: str) -> Memory | None:
    """The tensors of one core, by their own names.

    Raises:
        ValueError: if the memory is not that of this policy.
    """
    if memory is None:
        return None
    if not isinstance(memory, dict):
        raise ValueError("a policy's memory is named tensors, got one tensor: take what its sampler or `start` gave")
    part = {key.removeprefix(f"{name}/"): tensor for key, tensor in memory.items() if key.startswith(f"{name}/")}
    if not part:
        raise ValueError(f"the memory holds nothing of {name!r}, only {sorted(memory)}: it is another policy's")
    return part


class LeanMemory:
    """What a policy remembers in a rollout, carried from step to step.

    Attributes:
        arrays: the memory, [N, ...].
    """

    def __init__(self, memory: PolicyMemory) -> None:
        self._empty = memory.empty
        self._cores = [(f"{name}/", core.lean()) for name, core in memory.named_cores()]
        self._carried: list[tuple[LeanCore, MemoryArrays]] = []
        self.arrays: MemoryArrays = {}

    def begin(self, memory: ObservationArrays | None, environments: int) -> None:
        """Take up a memory, by copying it, or begin with an empty one.

        Raises:
            ValueError: if it is of another policy, or of another number of environments.
        """
        arrays = self._empty(environments)
        if memory is not None:
            given = cast("MemoryArrays", memory)
            found = {name: np.shape(array) for name, array in given.items()}
            expected = {name: array.shape for name, array in arrays.items()}
            if found != expected:
                raise ValueError(
                    f"the memory has the shapes {found}, and this policy in {environments} environments remembers "
                    f"{expected}: begin with an empty memory"
                )
            for name, array in arrays.items():
                array[...] = given[name]
        self.arrays = arrays
        self._carried = [
            (core, {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)})
            for prefix, core in self._cores
        ]

    def restart(self, environments: np.ndarray) -> None:
        """Forget what belongs to some environments, by index or by a mask [N]."""
        for array in self.arrays.values():
            array[environments] = 0.0

    def step(self, features: np.ndarray, for_critic: np.ndarray | None) -> np.ndarray:
        """[N, features] for the actor; all memories move on.

        Args:
            features: [N, inputs] for the actor, and for the critic where it has none of its own.
            for_critic: the critic's own, or None.
        """
        (actor, memory), *rest = self._carried
        result = actor.step(features, memory)
        for critic, own in rest:
            critic.step(features if for_critic is None else for_critic, own)
        return result


class CarriedMemory:
    """What a policy remembers between calls of `act`, for users who step environments themselves.

        memory = policy.start()
        action = policy.act(observation, memory=memory)

    Attributes:
        arrays: the memory [N, ...] of as many environments as `act` was given observations of; None before the first.
    """

    def __init__(self) -> None:
        self.arrays: ObservationArrays | None = None

    def restart(self, environments: Any = None) -> None:
        """Forget: an episode has ended.

        Args:
            environments: which of a batch, by index or by a mask [N]; None for all.
        """
        if environments is None or self.arrays is None:
            self.arrays = None
            return
        for array in cast("MemoryArrays", self.arrays).values():
            array[environments] = 0.0


def taken_up(memory: CarriedMemory | None, count: int) -> ObservationArrays | None:
    """What `act` goes on from.

    Raises:
        ValueError: if there is none to carry it in, or it is that of another number of environments.
    """
    if memory is None:
        raise ValueError(
            "this policy has a memory: take memory = policy.start() at the start of an episode and give it with every "
            "step, policy.act(observation, memory=memory)"
        )
    if memory.arrays is None:
        return None
    carried = len(next(iter(cast("MemoryArrays", memory.arrays).values())))
    if carried != count:
        raise ValueError(
            f"the memory is of {carried} environments, and there are observations of {count}: take a new one with "
            "policy.start()"
        )
    return memory.arrays


def build_memory(
    config: MemoryConfig, policy: ActorCriticConfig, inputs: int, generator: torch.Generator | None
) -> PolicyMemory:
    """The memory that a configuration asks for.

    Args:
        config: of the memory.
        policy: of the whole policy.
        inputs: how many features come in.
        generator: of the initial weights; None leaves them on the meta device.
    """

    def core() -> Core:
        if config.kind == "transformer":
            gain = policy.hidden_gain if policy.orthogonal else None
            return TransformerCore(
                inputs, config.size, config.layers, config.context, config.heads, gain=gain, generator=generator
            )
        return RecurrentCore(
            config.kind, inputs, config.size, config.layers, orthogonal=policy.orthogonal, generator=generator
        )

    actor = core()
    return PolicyMemory(actor, core() if policy.critic and not config.shared else None, shared=config.shared)

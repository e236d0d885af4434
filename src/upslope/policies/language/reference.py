"""The frozen policy a divergence is measured from: a copy with a name and a hash, never an adapter switched off."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn

from upslope.policies.language.description import content_hash
from upslope.policies.language.library import quietly
from upslope.policies.language.policy import LanguagePolicy
from upslope.trajectory import AskedTwice, Evaluation, Observation, Steps, Trajectory


@final
class Reference(AskedTwice, nn.Module):
    """A language policy as it was at one moment; a `Policy` whose answers carry no gradient.

    Attributes:
        policy: the copy, without critic and with adapters merged into its weights.
        name: what it is a copy of, as shown and logged.
        content_hash: SHA-256 of its weights, see `content_hash`: the same in every process that has the same weights.
    """

    def __init__(self, policy: LanguagePolicy, name: str) -> None:
        super().__init__()
        self.policy = policy.requires_grad_(False)
        self.name = name
        self.content_hash = content_hash(policy.model)

    @property
    def sequential(self) -> bool:
        """Each step depends on all earlier positions of its row."""
        return True

    def sampler(self) -> NoReturn:
        """There is none.

        Raises:
            TypeError: always.
        """
        self.policy.sampler()
        raise AssertionError("unreachable")

    @torch.no_grad()
    def log_prob(self, observation: Observation, action: Tensor) -> Tensor:
        """log pi(a_t | tokens up to t), [..., T]."""
        return self.policy.log_prob(observation, action)

    @torch.no_grad()
    def evaluate(self, steps: Steps) -> Evaluation:
        """log-prob, entropy and distribution; no value, no gradient."""
        return self.policy.evaluate(steps)

    def values(self, trajectory: Trajectory) -> NoReturn:
        """There are none: a reference has no critic.

        Raises:
            TypeError: always.
        """
        raise TypeError("a reference has no critic: ask the policy that learns for values")


def freeze(policy: LanguagePolicy, name: str) -> Reference:
    """A copy of a policy that shares nothing with it and never changes.

    Args:
        policy: as it stands now; with adapters, the copy has them merged into its weights.
        name: what to call it: "start", "after SFT".
    """
    twin = LanguagePolicy(
        merged_copy(policy.model),
        policy.tokenizer,
        sampling=policy.sampling,
        value_head=False,
        precision=policy.precision,
        checkpoint_activations=False,
    )
    return Reference(twin, name)


def merged_copy(model: nn.Module) -> Any:
    """A transformers model of its own with the same weights, adapters of peft merged into them.

    Parameters come out in storage of their own, even where those of `model` are views into one buffer; tied ones stay
    tied.
    """
    twin: Any = copy.deepcopy(model)
    with quietly():
        import peft

        if isinstance(twin, peft.PeftModel):
            twin = twin.merge_and_unload()
    return twin

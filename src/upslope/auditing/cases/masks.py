"""The rows of masked policies: the gradient they follow is that of a policy which knows the valid actions alone.

The truth comes from elsewhere: the same network's logits, renormalised over the valid actions by a plain quotient,
pi(a|s) = 1[a in V(s)] e^{l_a} / sum_{b in V(s)} e^{l_b}. Two of the five states leave a single choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from upslope.algorithms import A2C, PPO, Algorithm, OneStepActorCritic, Reinforce
from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, identity, row
from upslope.auditing.declared import Circumstances, claim_of, unit_of
from upslope.auditing.measuring import Drawing, report
from upslope.auditing.report import AuditReport
from upslope.auditing.setting import FiniteSetting
from upslope.auditing.source import AlgorithmSource
from upslope.exact import FiniteMDP, NamedProblem, observed_value, solve
from upslope.exact._named import random_table
from upslope.policies import ActorCritic, ActorCriticConfig, HeadDistribution
from upslope.policies.sampler import ActorSampler
from upslope.spaces import ACTION_MASK, OBSERVATION, ActionMask, Composite, Discrete
from upslope.trajectory import (
    AskedTwice,
    Evaluation,
    Memoryless,
    Observation,
    ObservationArrays,
    Steps,
    Trajectory,
    map_observation,
)

_GAMMA, _SAMPLES = 0.8, 20_000
_STATES, _ACTIONS = 6, 3
_VALID = ((1, 0, 1), (0, 1, 0), (1, 1, 1), (1, 1, 0), (0, 0, 1), (1, 1, 1))
"""[S, A]; the last state is terminal."""
_NEXT = ((1, 2, 2), (3, 3, 4), (3, 4, 4), (5, 5, 5), (5, 5, 5), (5, 5, 5))
_REWARD = ((0.5, -1.0, 1.0), (2.0, -0.5, 1.0), (0.0, 1.5, -1.0), (1.0, 3.0, -2.0), (4.0, -3.0, 0.5), (0.0, 0.0, 0.0))


def masked_problem() -> NamedProblem:
    """Three steps through five states; each action leads where `_NEXT` says with probability 3/4, elsewhere else."""
    transition = np.zeros((_STATES, _ACTIONS, _STATES))
    for state, following in enumerate(_NEXT):
        for action, target in enumerate(following):
            transition[state, action, target] += 0.75
            transition[state, action, following[(action + 1) % _ACTIONS]] += 0.25
    mdp = FiniteMDP.from_tables(transition, _REWARD, start=0, terminal=[_STATES - 1], gamma=_GAMMA)
    return NamedProblem(
        name="masked", summary="some actions are invalid", mdp=mdp, policy=random_table(_STATES, _ACTIONS)
    )


class MaskedStates(AskedTwice, nn.Module):
    """An `ActorCritic` that sees the state's number and the mask of its valid actions, as a policy of numbers.

    Its critic is a table, set to the exact values.
    """

    valid: Tensor
    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        space = Composite(((ACTION_MASK, ActionMask((_ACTIONS,))), (OBSERVATION, Discrete(_STATES))))
        config = ActorCriticConfig(hidden=(6,), policy_gain=1.0, critic=False)
        generator = torch.Generator().manual_seed(0)
        self.inner = ActorCritic(space, Discrete(_ACTIONS), config, generator=generator).double()
        self.register_buffer("valid", torch.tensor(_VALID).bool())
        mdp = masked_problem().mdp
        with torch.no_grad():
            self.register_buffer("value", observed_value(mdp, solve(mdp, Renormalised(self))))

    def seen(self, state: Observation) -> Observation:
        """What the inner policy sees of states [...]."""
        assert isinstance(state, Tensor)
        return {ACTION_MASK: self.valid[state], OBSERVATION: state}

    @property
    def sequential(self) -> bool:
        """Each step stands on its own."""
        return False

    def sampler(self) -> MaskedSampler:
        """The inner policy's."""
        return MaskedSampler(self.inner.sampler(), self.valid.numpy())

    def log_prob(self, observation: Observation, action: Tensor) -> Tensor:
        """log pi(a|s), any leading shape."""
        return self.inner.log_prob(self.seen(observation), action)

    def evaluate(self, steps: Steps) -> Evaluation:
        """Of the inner policy, with the table's values."""
        found = self.inner.evaluate(replace(cast("Any", steps), observation=self.seen(steps.observation)))
        assert isinstance(steps.observation, Tensor)
        return replace(found, value=self.value[steps.observation])

    def values(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """The table's."""
        assert isinstance(trajectory.observation, Tensor)
        assert isinstance(trajectory.final_observation, Tensor)
        value = self.value[trajectory.observation]
        return value, trajectory.next_value(value, self.value[trajectory.final_observation])


class MaskedSampler(Memoryless):
    """The sampler of a `MaskedStates`."""

    def __init__(self, inner: ActorSampler, valid: np.ndarray) -> None:
        self.inner, self.valid = inner, valid

    def noise(self, generator: np.random.Generator, steps: int, environments: int) -> np.ndarray:
        """The inner sampler's."""
        return self.inner.noise(generator, steps, environments)

    def sample(self, observation: ObservationArrays, noise: np.ndarray) -> np.ndarray:
        """One valid action per state."""
        return self.inner.sample(self._seen(observation), noise)

    def mode(self, observation: ObservationArrays) -> np.ndarray:
        """The most likely valid action per state."""
        return self.inner.mode(self._seen(observation))

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """As it is."""
        return action

    def _seen(self, state: ObservationArrays) -> ObservationArrays:
        assert isinstance(state, np.ndarray)
        return {ACTION_MASK: self.valid[state], OBSERVATION: state}


class Renormalised(AskedTwice, nn.Module):
    """The same network, told of no mask: its probabilities are divided by their sum over the valid actions."""

    def __init__(self, masked: MaskedStates) -> None:
        super().__init__()
        self.masked = masked

    @property
    def sequential(self) -> bool:
        """Each step stands on its own."""
        return False

    def probabilities(self, state: Tensor) -> Tensor:
        """[..., A]."""
        inner = self.masked.inner
        raw = inner.actor(inner.encoder(state.reshape(-1))).view(*state.shape, _ACTIONS).exp()
        valid = raw * self.masked.valid[state]
        return valid / valid.sum(-1, keepdim=True)

    def log_prob(self, observation: Observation, action: Tensor) -> Tensor:
        """log pi(a|s), -inf where the action is invalid."""
        assert isinstance(observation, Tensor)
        chosen = self.probabilities(observation).gather(-1, action.unsqueeze(-1)).squeeze(-1)
        possible = chosen > 0.0
        return torch.where(possible, torch.where(possible, chosen, 1.0).log(), -torch.inf)

    def evaluate(self, steps: Steps) -> Evaluation:
        """Refused: it is there to be solved for."""
        raise NotImplementedError("this policy gives probabilities only")

    def values(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """Refused: it is there to be solved for."""
        raise NotImplementedError("this policy gives probabilities only")

    def sampler(self) -> MaskedSampler:
        """Refused: it is there to be solved for."""
        raise NotImplementedError("this policy gives probabilities only")


def cases() -> Iterator[Case]:
    """All rows of masked policies."""
    one_pass = PPO(gamma=_GAMMA, normalize_advantage=False, epochs=1, minibatches=1)
    for words, algorithm in (
        ("reward_to_go", Reinforce(gamma=_GAMMA)),
        ("reward_to_go, gamma^t kept", Reinforce(gamma=_GAMMA, discounted_states=True)),
        ("baselined", Reinforce(gamma=_GAMMA, psi="baselined")),
        ("lambda 0.5", A2C(gamma=_GAMMA, gae_lambda=0.5)),
        ("clip", one_pass),
        ("TD residual", OneStepActorCritic(gamma=_GAMMA)),
    ):
        yield _case(words, algorithm)
    yield _case("reward_to_go, sampled", Reinforce(gamma=_GAMMA), samples=_SAMPLES)
    yield _case("clip, sampled", one_pass, samples=_SAMPLES)
    for name in ("log_prob", "entropy", "kl"):
        yield row("Masking", f"{name} and its gradient", partial(_same, name))


def _case(words: str, algorithm: Algorithm, samples: int | None = None) -> Case:
    def run() -> AuditReport:
        problem, policy, target, unit = masked_problem(), MaskedStates(), algorithm.target, unit_of(algorithm)
        here = partial(FiniteSetting.of, problem, gamma=_GAMMA, unit=unit, rows=16, row_steps=3)
        return report(
            here(policy),
            AlgorithmSource(algorithm, seed=0, reference=None),
            claim_of(target, here(Renormalised(policy)).exact_gradient(target), Circumstances(unit=unit)),
            subject=type(algorithm).__name__,
            drawing=Drawing(samples=samples),
        )

    return Case(subject=type(algorithm).__name__, setting=f"valid actions only: {words}", run=run)


def _same(name: str) -> Found:
    """A quantity of every state and its gradient, through the mask and renormalised."""
    policy = MaskedStates()
    twin, state = Renormalised(policy), torch.arange(_STATES)
    action = policy.valid.int().argmax(-1)
    parameters = list(policy.inner.actor.parameters())
    evaluation = policy.inner.evaluate(_steps(policy, state, action))
    shifted = HeadDistribution(policy.inner.head, evaluation.distribution.parameters.detach() * 0.5)
    probability = twin.probabilities(state)
    safe = torch.where(policy.valid, probability, 1.0)
    match name:
        case "log_prob":
            found, expected = evaluation.log_prob, safe.gather(-1, action.unsqueeze(-1)).squeeze(-1).log()
        case "entropy":
            found, expected = evaluation.entropy, -(probability * safe.log()).sum(-1)
        case _:
            found = evaluation.distribution.kl(shifted)
            root = safe.detach().sqrt() * policy.valid
            other = torch.where(policy.valid, root / root.sum(-1, keepdim=True), 1.0)
            expected = (probability * (safe.log() - other.log())).sum(-1)
    weight = torch.linspace(1.0, 2.0, _STATES, dtype=torch.float64)
    both = [
        torch.cat(
            [value.detach(), *(part.flatten() for part in torch.autograd.grad((value * weight).sum(), parameters))]
        )
        for value in (found, expected)
    ]
    return identity(*both, problem="masked", target_name=f"{name} of the renormalised policy")


@dataclass(frozen=True, slots=True)
class _Seen:
    observation: Observation
    action: Tensor
    mask: Tensor
    time: Tensor | None = None
    memory: Observation | None = None


def _steps(policy: MaskedStates, state: Tensor, action: Tensor) -> Steps:
    return _Seen(map_observation(torch.clone, policy.seen(state)), action, torch.ones(_STATES, dtype=torch.bool))

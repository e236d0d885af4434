"""Rows of the natural step: the surrogate's gradient as declared, and what becomes of it, from explicit matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from upslope.algorithms import NPG, TRPO, Algorithm, Loss, Now
from upslope.auditing.cases.audited import audited
from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, identity, row
from upslope.auditing.cases.stage import stage
from upslope.auditing.declared import Circumstances, put_to_the_test
from upslope.auditing.source import AlgorithmSource, Recorder
from upslope.estimators import conjugate_gradient, flatten
from upslope.exact import TabularPolicy, natural_gradient
from upslope.policies import ActorCritic, ActorCriticConfig
from upslope.spaces import Box, Discrete
from upslope.train.natural import NaturalUpdate
from upslope.train.step import Learned, learn
from upslope.trajectory import Batch, Evaluation, Trajectory

_GAMMA, _LIMIT, _SAMPLES, _FEW = 0.8, 2, 20_000, 6_000
_PLAIN_TRPO = TRPO(gamma=_GAMMA, normalize_advantage=False)
_PLAIN_NPG = NPG(gamma=_GAMMA, normalize_advantage=False)
_STEP = TRPO(
    gamma=_GAMMA,
    normalize_advantage=False,
    max_divergence=0.05,
    conjugate_gradient_iterations=8,
    backtrack=0.7,
    critic_minibatches=2,
)
_DOUBLE = torch.float64
_ROWS, _LENGTH, _SEEN, _CHOICES, _MOVES = 4, 5, 3, 3, 2

Audited = ActorCritic | TabularPolicy


def cases() -> Iterator[Case]:
    """All rows of natural steps."""
    yield from _gradients()
    for name, build in _POLICIES.items():
        yield row("TRPO", f"one step of {name}, from explicit matrices", partial(_stepped, build, _STEP))
        yield row("TRPO", f"{name}: as far as the bound lets it", partial(_stepped, build, _FAR))
        yield row("NPG", f"one step of {name}, from explicit matrices", partial(_stepped, build, _PLAIN_NPG))
    fixed = replace(_PLAIN_NPG, max_divergence=None, step_size=0.3)
    yield row("NPG", "a fixed step size, from explicit matrices", partial(_stepped, _table, fixed))
    yield row("TRPO", "the loss, by hand", _loss)
    yield row("TRPO", "refused: the parameters are what they were", _refused)
    yield row("TRPO", "direction from all batches, without damping", partial(_whole, 0.0))
    yield row(
        "TRPO",
        "direction from all batches, damping 0.1",
        partial(_whole, 0.1),
        biased_by="damping turns the step towards the plain gradient",
    )


def _gradients() -> Iterator[Case]:
    """The surrogate's gradient, put to the test of its declaration."""
    for words, algorithm in (
        ("GAE, lambda 0.95", _PLAIN_TRPO),
        ("GAE, lambda 1", replace(_PLAIN_TRPO, gae_lambda=1.0)),
        ("reward to go", replace(_PLAIN_TRPO, psi="reward_to_go")),
        ("GAE, lambda 0.95", _PLAIN_NPG),
        ("reward to go", replace(_PLAIN_NPG, psi="reward_to_go")),
    ):
        for circumstances in put_to_the_test(algorithm.target, limit=_LIMIT):
            yield audited(words, algorithm, "six-state", circumstances)
    yield audited("GAE, lambda 0.95, sampled", _PLAIN_TRPO, "six-state", Circumstances(), samples=_SAMPLES)
    yield audited("entropy bonus", replace(_PLAIN_TRPO, entropy_coefficient=0.1), "six-state", Circumstances())
    yield audited("as it comes: standardised", TRPO(gamma=_GAMMA), "six-state", Circumstances(), samples=_FEW)
    on_completions = replace(_PLAIN_TRPO, gamma=1.0, psi="group")
    for circumstances in put_to_the_test(on_completions.target, limit=_LIMIT):
        if circumstances.limit is None and circumstances.unit is None:
            yield audited("group, completions", on_completions, "tokens", circumstances)


# --- one step, from explicit matrices ------------------------------------------------------------------------------


class _Actor(NamedTuple):
    """A policy, what it may see and do, and which of its parameters log pi depends on."""

    policy: Audited
    observation: Tensor
    action: Tensor
    parameters: tuple[nn.Parameter, ...]


def _table() -> _Actor:
    generator = torch.Generator().manual_seed(3)
    policy = TabularPolicy(_SEEN, _CHOICES, torch.randn(_SEEN, _CHOICES, generator=generator, dtype=_DOUBLE))
    observation = torch.randint(_SEEN, (_ROWS, _LENGTH), generator=generator)
    action = torch.randint(_CHOICES, (_ROWS, _LENGTH), generator=generator)
    return _Actor(policy, observation, action, (policy.theta,))


def _network(shared: bool) -> _Actor:
    generator = torch.Generator().manual_seed(4)
    config = ActorCriticConfig(hidden=(4,), policy_gain=1.0, shared=shared)
    policy = ActorCritic(Box((2,), -math.inf, math.inf), Discrete(_CHOICES), config, generator=generator).double()
    observation = torch.randn(_ROWS, _LENGTH, 2, generator=generator, dtype=_DOUBLE)
    action = torch.randint(_CHOICES, (_ROWS, _LENGTH), generator=generator)
    return _Actor(policy, observation, action, _not_of_critic(policy))


def _gaussian() -> _Actor:
    generator = torch.Generator().manual_seed(5)
    config = ActorCriticConfig(hidden=(3,), policy_gain=1.0, log_std_init=-0.4)
    space = Box((_MOVES,), -1.0, 1.0)
    policy = ActorCritic(Box((2,), -math.inf, math.inf), space, config, generator=generator).double()
    observation = torch.randn(_ROWS, _LENGTH, 2, generator=generator, dtype=_DOUBLE)
    action = torch.randn(_ROWS, _LENGTH, _MOVES, generator=generator, dtype=_DOUBLE)
    return _Actor(policy, observation, action, _not_of_critic(policy))


def _not_of_critic(policy: ActorCritic) -> tuple[nn.Parameter, ...]:
    return tuple(parameter for name, parameter in policy.named_parameters() if not name.startswith("critic"))


_FAR = replace(_STEP, max_divergence=0.7, damping=0.01, line_search_attempts=30)
_POLICIES: dict[str, Callable[[], _Actor]] = {
    "a table": _table,
    "a network": partial(_network, False),
    "a network with a torso that actor and critic share": partial(_network, True),
    "a Gaussian network with a free log_std": _gaussian,
}


class _Mover(Recorder):
    """A stepper that lets the natural step move, and nothing else."""

    def step_by(self, move: Callable[[], None]) -> float:
        """Keep minus the gradient, and let `move` move."""
        norm = super().step_by(move)
        move()
        return norm


def _fragments(actor: _Actor) -> Trajectory:
    """Fragments of chance observations, actions and rewards, one of them with an end inside."""
    generator = torch.Generator().manual_seed(6)
    ends = torch.zeros(_ROWS, _LENGTH, dtype=torch.bool)
    ends[1, 2] = True
    with torch.no_grad():
        behaviour = actor.policy.log_prob(actor.observation, actor.action)
    return Trajectory(
        observation=actor.observation,
        action=actor.action,
        reward=torch.randn(_ROWS, _LENGTH, generator=generator, dtype=_DOUBLE),
        terminated=ends,
        truncated=torch.zeros_like(ends),
        mask=torch.ones_like(ends),
        behaviour_log_prob=behaviour,
        time=torch.arange(_LENGTH).expand(_ROWS, -1),
        final_observation=actor.observation[:, 0],
        final_index=torch.arange(_ROWS) * _LENGTH + _LENGTH - 1,
    )


def _learned(actor: _Actor, algorithm: Algorithm, stepper: Recorder) -> Learned:
    return learn(
        actor.policy,
        algorithm,
        stepper,
        _fragments(actor),
        now=Now(),
        learning_rate=0.0,
        generator=np.random.Generator(np.random.Philox(0)),
    )


def _stepped(build: Callable[[], _Actor], algorithm: TRPO | NPG) -> Found:
    """Parameters after the step, its share and its KL: of the code that trains, and by hand."""
    actor = build()
    mover = _Mover(actor.parameters)
    learned = _learned(actor, algorithm, mover)
    told = torch.tensor([learned.metrics[name] for name in ("kl", "step_fraction")], dtype=_DOUBLE)
    found = torch.cat([flatten(actor.parameters).detach(), told])
    expected = _by_hand(build(), algorithm, mover.ascents[0], learned.advantage)
    return identity(found, expected, problem="fragments of chance steps", target_name="theta', KL, fraction by hand")


def _by_hand(actor: _Actor, algorithm: TRPO | NPG, gradient: Tensor, psi: Tensor) -> Tensor:
    start, fisher = flatten(actor.parameters).detach(), _fisher(actor)
    damped = fisher + algorithm.damping * torch.eye(len(start), dtype=_DOUBLE)
    direction = conjugate_gradient(damped.mv, gradient, iterations=algorithm.conjugate_gradient_iterations)
    search = isinstance(algorithm, TRPO)
    length = None if search else algorithm.step_size
    if length is None:
        assert algorithm.max_divergence is not None
        length = math.sqrt(2.0 * algorithm.max_divergence / float(direction @ fisher @ direction))
    old = _distributions(actor)
    before, fraction, divergence = float(psi.mean()), 1.0, 0.0
    for _ in range(algorithm.line_search_attempts if search else 1):
        _put(actor.parameters, start + fraction * length * direction)
        divergence = float(_divergence(actor, old, _distributions(actor)))
        with torch.no_grad():
            ratio = (actor.policy.log_prob(actor.observation, actor.action) - old[1]).exp()
        helps = float((ratio * psi).mean()) > before and divergence <= (algorithm.max_divergence or math.inf)
        if helps or not search:
            break
        fraction *= algorithm.backtrack
    told = torch.tensor([divergence, fraction], dtype=_DOUBLE)
    return torch.cat([flatten(actor.parameters).detach(), told])


@torch.no_grad()
def _distributions(actor: _Actor) -> tuple[Tensor, Tensor]:
    """The distributions' parameters [M, P], and the log-probs of the actions taken."""
    trajectory = _fragments(actor)
    parameters = actor.policy.evaluate(trajectory).distribution.parameters
    return parameters.flatten(0, 1).clone(), trajectory.behaviour_log_prob


def _divergence(actor: _Actor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """Mean KL(old || new) of a step, written out."""
    p, q = old[0], new[0]
    if actor.action.dim() == 2:
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    (mean, log_std), (other, other_log_std) = p.chunk(2, -1), q.chunk(2, -1)
    spread = ((2.0 * log_std).exp() + (mean - other).square()) / (2.0 * (2.0 * other_log_std).exp())
    return (other_log_std - log_std + spread - 0.5).sum(-1).mean()


def _fisher(actor: _Actor) -> Tensor:
    """The mean over steps of E_a[grad log pi grad log pi'], [P, P], from scores; of a Gaussian from J' M J."""
    parameters = actor.policy.evaluate(_fragments(actor)).distribution.parameters.flatten(0, 1)
    steps, total = len(parameters), torch.zeros((), dtype=_DOUBLE)
    if actor.action.dim() == 2:
        log_policy = parameters.log_softmax(-1)
        score = _rows(log_policy, actor.parameters)
        return torch.einsum("ma,map,maq->pq", log_policy.exp().detach(), score, score) / steps + total
    jacobian = _rows(parameters, actor.parameters)
    log_std = parameters.detach()[:, _MOVES:]
    metric = torch.cat([(-2.0 * log_std).exp(), torch.full_like(log_std, 2.0)], dim=-1)
    return torch.einsum("mo,mop,moq->pq", metric, jacobian, jacobian) / steps


def _rows(values: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """[M, O, P] the gradient of each entry of [M, O]."""
    rows = [
        flatten(torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True))
        for entry in values.flatten()
    ]
    return torch.stack(rows).view(*values.shape, -1)


@torch.no_grad()
def _put(parameters: Sequence[nn.Parameter], vector: Tensor) -> None:
    parts = vector.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view_as(parameter))


def _loss() -> Found:
    """-L with half of a bonus that falls along a line, of a policy other than the one that acted."""
    actor = _table()
    trajectory = _fragments(actor)
    with torch.no_grad():
        actor.parameters[0].mul_(0.5)
    algorithm = replace(_STEP, entropy_coefficient=0.6, entropy_schedule="linear")
    batch = algorithm.prepare(_batch(trajectory, trajectory.reward))
    found = algorithm.loss(batch, actor.policy.evaluate(trajectory), Now(progress=0.5)).value
    probability = actor.parameters[0].detach().softmax(-1)[actor.observation]
    taken = probability.gather(-1, actor.action.unsqueeze(-1)).squeeze(-1)
    ratio = taken / trajectory.behaviour_log_prob.exp()
    entropy = -(probability * probability.log()).sum(-1)
    expected = -(ratio * trajectory.reward + 0.3 * entropy).mean()
    return identity(
        found.reshape(1), expected.reshape(1), problem="fragments of chance steps", target_name="-mean(rho Psi + c H)"
    )


def _batch(trajectory: Trajectory, psi: Tensor) -> Batch:
    """Whole rows, each step with the same weight."""
    return Batch(
        observation=trajectory.observation,
        action=trajectory.action,
        mask=trajectory.mask,
        behaviour_log_prob=trajectory.behaviour_log_prob,
        advantage=psi,
        value_target=None,
        behaviour_value=None,
        behaviour_distribution=None,
        weight=torch.full_like(psi, 1.0 / psi.numel()),
    )


# --- refused ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _NeverBetter:
    """TRPO whose loss has its gradient and never changes its value: no step makes it smaller."""

    plain: TRPO

    def __getattr__(self, name: str) -> object:
        """All but the loss is that of TRPO."""
        return getattr(self.plain, name)

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """0 with a gradient."""
        found = self.plain.loss(batch, evaluation, now)
        return Loss(value=found.value - found.value.detach(), metrics=found.metrics)


def _refused() -> Found:
    actor = _network(False)
    start = flatten(actor.parameters).detach().clone()
    learned = _learned(actor, _NeverBetter(_STEP), _Mover(actor.parameters))  # pyright: ignore[reportArgumentType]
    told = torch.tensor([learned.metrics["kl"], learned.metrics["step_fraction"]], dtype=_DOUBLE)
    found = torch.cat([flatten(actor.parameters).detach(), told])
    expected = torch.cat([start, torch.zeros(2, dtype=_DOUBLE)])
    return identity(found, expected, problem="fragments of chance steps", target_name="theta, KL 0, fraction 0")


# --- the direction from all batches ----------------------------------------------------------------------------------


def _whole(damping: float) -> Found:
    """CG on the mean of F and g over every fragment there is, against F^+ grad by the tables."""
    on = stage("two-state", unit="fragments", steps=1)
    setting, parameters = on.setting, on.setting.parameters
    algorithm = replace(_PLAIN_TRPO, gamma=on.gamma)
    gradient, fisher = torch.zeros(()), torch.zeros(())
    source = AlgorithmSource(algorithm)
    for probability, trajectory in setting.every():
        gradient = gradient + probability * source.ascent(setting.policy, parameters, trajectory)
        fisher = fisher + probability * _matrix(setting.policy, algorithm, parameters, trajectory)
    found = conjugate_gradient(lambda v: fisher @ v + damping * v, gradient, iterations=200, tolerance=1e-28)
    exact = natural_gradient(setting.mdp, setting.policy, gradient="undiscounted_states", parameters=parameters)
    return identity(found, exact, problem=on.name, target_name="natural gradient F^+ g, g without gamma^t")


def _matrix(
    policy: TabularPolicy, algorithm: TRPO | NPG, parameters: Sequence[nn.Parameter], trajectory: Trajectory
) -> Tensor:
    """F of one batch as the step has it, column by column."""
    batch = _batch(trajectory, torch.zeros_like(trajectory.reward))
    product = NaturalUpdate(policy, algorithm, parameters, [batch], Now()).fisher()
    every = torch.eye(sum(parameter.numel() for parameter in parameters), dtype=_DOUBLE)
    return torch.stack([product(column) for column in every])

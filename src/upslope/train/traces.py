"""Learning by eligibility traces: one update per step of each environment, along what led up to it.

    z_i     = decay z_i + I grad_i                   one trace per environment i, [N, P]
    params += learning_rate * mean_i delta_i z_i

The traces are followed as `upslope.algorithms.traces` says, for any differentiable policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor, nn

from upslope.algorithms.average_reward import refuse_ends
from upslope.algorithms.protocol import Algorithm, Now, Traces
from upslope.diagnostics import Meter
from upslope.estimators import (
    accumulate_trace,
    differential_td_residual,
    discount_weight,
    flatten,
    td_residual,
    unflatten,
)
from upslope.policies import ActorCritic
from upslope.policies.fused import ROW_GRADIENTS
from upslope.streams import Shuffler
from upslope.train.step import Learned
from upslope.train.stepper import Stepper
from upslope.trajectory import Evaluation, Policy, Trajectory, Tree


class TraceOptimizer(Stepper, Protocol):
    """An optimiser with something to remember."""

    def state(self) -> Tree:
        """What it carries, for a checkpoint."""
        ...

    def load_state(self, tree: Tree) -> None:
        """Go on from `state()`."""
        ...


@final
class TraceLearner:
    """Follows the eligibility traces that an algorithm declares; a `upslope.train.learner.Learner`.

    Args:
        policy: whose parameters are moved, through the optimiser that holds them. What a policy with memory carries
            into a step counts as given there: no gradient goes back through it.
        algorithm: with traces for the rule of its passes.
        optimizer: takes the steps, downhill of minus the update.
        actor: those of the optimiser's parameters that log pi may depend on.
        critic: those that V may depend on.

    Raises:
        ValueError: if the algorithm has no traces.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        optimizer: TraceOptimizer,
        *,
        actor: Sequence[nn.Parameter],
        critic: Sequence[nn.Parameter],
    ) -> None:
        rule = algorithm.passes.rule
        if not isinstance(rule, Traces):
            raise ValueError(f"{type(algorithm).__name__} declares no traces in its passes")
        self._policy, self._algorithm, self._optimizer, self._rule = policy, algorithm, optimizer, rule
        self._critic = _Trace(critic, decay=rule.critic_decay)
        self._actor = None if rule.actor_decay is None else _Trace(actor, decay=rule.actor_decay)
        self._apart = not {id(parameter) for parameter in actor} & {id(parameter) for parameter in critic}

    def learn(
        self,
        trajectory: Trajectory,
        *,
        now: Now,
        learning_rate: float,
        generator: Shuffler | None = None,
        meter: Meter | None = None,
        reference: Policy | None = None,
    ) -> Learned:
        """Update the policy from one step of each environment, [N, 1].

        Args:
            trajectory: that step, with its reward as the algorithm should see it. An environment that took none (its
                mask is False) keeps its trace.
            now: the algorithm's carried numbers.
            learning_rate: alpha_theta.
            generator, meter, reference: of other learners; nothing here draws, is watched or stays close.

        Raises:
            ValueError: if there are several steps.
            UsageError: if a step terminates where there is an average reward.
        """
        del generator, meter, reference
        if trajectory.shape[1] != 1:
            raise ValueError(f"traces are followed step by step: give rows of 1 step, not {trajectory.shape[1]}")
        rule = self._rule
        with torch.no_grad():
            value, next_value = self._policy.values(trajectory)
            residual = self._residual(trajectory, value, next_value, now)[:, 0]
        self._optimizer.zero_gradient()
        with torch.enable_grad():
            evaluation = self._policy.evaluate(trajectory)
        self._accumulate(trajectory, evaluation)
        self._critic.descend(residual, rule.value_ratio)
        if self._actor is not None:
            self._actor.descend(residual, 1.0)
        norm = self._optimizer.step(learning_rate)
        metrics = _metrics(residual, evaluation)
        metrics["gradient_norm"], metrics["optimizer_steps"] = norm, 1.0
        if rule.average_reward_ratio is not None:
            step_size = rule.average_reward_ratio * learning_rate
            metrics["average_reward"] = now.state["average_reward"] + step_size * float(residual.mean())
        state = self._algorithm.adapt(now.state, metrics)
        return Learned(state=state, metrics=metrics, advantage=residual.unsqueeze(-1))

    def _residual(self, trajectory: Trajectory, value: Tensor, next_value: Tensor, now: Now) -> Tensor:
        """delta [N, 1], 0 where no step was taken."""
        rule = self._rule
        if rule.average_reward_ratio is not None:
            refuse_ends(trajectory)
            average = now.state["average_reward"]
            residual = differential_td_residual(trajectory.reward, average, value, next_value)
        else:
            residual = td_residual(trajectory.reward, trajectory.discount(rule.discount), value, next_value)
        return residual.masked_fill(~trajectory.mask, 0.0)

    def _accumulate(self, trajectory: Trajectory, evaluation: Evaluation) -> None:
        """One step of every trace."""
        assert evaluation.value is not None
        value, log_prob = evaluation.value[:, 0], evaluation.log_prob[:, 0]
        restart, live = (trajectory.time == 0)[:, 0], trajectory.mask[:, 0]
        critic, actor = self._critic, self._actor
        if actor is None:
            critic.accumulate(gradients_by_row(value, critic.parameters), restart=restart, live=live)
            return
        if self._apart:
            both = gradients_by_row(value + log_prob, [*critic.parameters, *actor.parameters])
            slope, score = both.split([critic.size, actor.size], dim=-1)
        else:
            slope = gradients_by_row(value, critic.parameters, again=True)
            score = gradients_by_row(log_prob, actor.parameters)
        gamma, weight = self._rule.state_discount, 1.0
        if gamma != 1.0:
            weight = discount_weight(trajectory.time[:, 0], gamma, dtype=score.dtype)
        critic.accumulate(slope, restart=restart, live=live)
        actor.accumulate(score, restart=restart, live=live, weight=weight)

    def state(self) -> Tree:
        """The optimiser's, and every trace."""
        return {
            "optimizer": self._optimizer.state(),
            "critic": self._critic.state(),
            "actor": None if self._actor is None else self._actor.state(),
        }

    def load_state(self, tree: Tree) -> None:
        """Go on from `state()`."""
        self._optimizer.load_state(tree["optimizer"])
        self._critic.load_state(tree["critic"])
        if self._actor is not None:
            self._actor.load_state(tree["actor"])


def actor_and_critic(policy: ActorCritic) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters that log pi may depend on, and those that V may: all but the other's own."""
    critics = [module for module in (policy.critic, policy.critic_encoder) if module is not None]
    for_value = {id(parameter) for module in critics for parameter in module.parameters()}
    for_actions = {id(parameter) for parameter in policy.actor.parameters()}
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return {
        "actor": [parameter for parameter in trainable if id(parameter) not in for_value],
        "critic": [parameter for parameter in trainable if id(parameter) not in for_actions],
    }


@final
class _Trace:
    """The traces of one function of the parameters, one per environment, [N, P]; all 0 before the first step."""

    def __init__(self, parameters: Sequence[nn.Parameter], *, decay: float) -> None:
        self.parameters, self._decay = list(parameters), decay
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self._trace: Tensor | None = None

    def accumulate(self, gradient: Tensor, *, restart: Tensor, live: Tensor, weight: Tensor | float = 1.0) -> None:
        """One step of the environments that are live, with what its gradient [N, P] brings.

        Raises:
            ValueError: if there are other environments than before.
        """
        before = torch.zeros_like(gradient) if self._trace is None else self._trace
        if before.shape != gradient.shape:
            raise ValueError(f"there are traces of {len(before)} environments, and steps of {len(gradient)}")
        after = accumulate_trace(before, gradient, decay=self._decay, weight=weight, restart=restart)
        self._trace = after if bool(live.all()) else torch.where(live.unsqueeze(-1), after, before)

    def descend(self, residual: Tensor, ratio: float) -> None:
        """Leave minus ratio * mean_i delta_i z_i where the optimiser looks for a gradient."""
        assert self._trace is not None
        step = (residual.to(self._trace.dtype) @ self._trace) * (-ratio / len(residual))
        for parameter, piece in zip(self.parameters, unflatten(step, self.parameters), strict=True):
            if parameter.grad is None:
                parameter.grad = piece
            else:
                parameter.grad.add_(piece)

    def state(self) -> Tree:
        """[N, P], or None before the first step."""
        return self._trace

    def load_state(self, tree: Tree) -> None:
        """Go on from `state()`."""
        self._trace = None if tree is None else tree.clone()


def gradients_by_row(output: Tensor, parameters: Sequence[nn.Parameter], *, again: bool = False) -> Tensor:
    """The gradient of each entry of `output` [N], flat over the parameters: [N, P].

    Where all parameters are those of perceptrons that work on N rows at once, by one backward pass; else by N.

    Args:
        output: entry i depends on row i of what the policy saw alone.
        parameters: 0 where the output does not depend on one.
        again: whether the graph will be needed again.
    """
    if len(output) == 1:
        found = torch.autograd.grad(
            output.sum(), parameters, retain_graph=again, allow_unused=True, materialize_grads=True
        )
        return flatten(found).unsqueeze(0)
    with ROW_GRADIENTS.recording() as rows:
        total = torch.autograd.grad(output.sum(), parameters, retain_graph=True, allow_unused=True)
    pieces = [
        _recorded(rows, parameter, summed, len(output)) for parameter, summed in zip(parameters, total, strict=True)
    ]
    if any(piece is None for piece in pieces):
        each = [
            torch.autograd.grad(row, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for row in output
        ]
        return torch.stack([flatten(gradients) for gradients in each])
    return torch.cat([piece for piece in pieces if piece is not None], dim=-1)


def _recorded(rows: dict[int, Any], parameter: nn.Parameter, summed: Tensor | None, count: int) -> Tensor | None:
    """[N, size] what each row brings to a parameter; None if that was not recorded."""
    if summed is None:
        return torch.zeros(count, parameter.numel(), dtype=parameter.dtype, device=parameter.device)
    found = rows.pop(parameter.data_ptr(), None)
    if found is None or len(found[0]) != count:
        return None
    gradient, features = found
    if features is None:
        return torch.from_numpy(gradient)
    return torch.from_numpy(np.einsum("mo,mf->mof", gradient, features).reshape(count, -1))


@torch.no_grad()
def _metrics(residual: Tensor, evaluation: Evaluation) -> dict[str, float]:
    """Means over the environments."""
    watched = torch.stack([residual, 0.5 * residual.square(), evaluation.entropy[:, 0].to(residual.dtype)])
    names = ("td_error", "value_loss", "entropy")
    return dict(zip(names, watched.mean(-1).tolist(), strict=True))

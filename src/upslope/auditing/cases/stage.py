"""Where estimators are measured: all rows of a problem with their probabilities, and claims held to them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from upslope.auditing.cases.measurement import Found, row_gradients, weighted_moments
from upslope.auditing.moments import Moments
from upslope.auditing.setting import Behaviour, Critic, FiniteSetting, Unit
from upslope.exact import Rows, Solution, enumerate_episodes, enumerate_fragments, policy_gradient, problem, solve
from upslope.exact.gradient import Gradient
from upslope.trajectory import Trajectory

GRAD_J = "grad J_gamma"
STATES_UNDISCOUNTED = "sum_s eta_1(s) sum_a grad pi(a|s) q_gamma(s,a)"


def by_loop(x: Tensor, k: Tensor) -> Tensor:
    """y_t = x_t + k_t y_{t+1}, one step after the other."""
    following, solved = torch.zeros_like(x[..., 0]), list[Tensor]()
    for time in reversed(range(x.shape[-1])):
        following = x[..., time] + k[..., time] * following
        solved.append(following)
    return torch.stack(solved[::-1], dim=-1)


class Spaced(NamedTuple):
    """Columns [R, 2T] whose even positions are the steps of a stage, and whose odd ones nobody chose."""

    reward: Tensor
    discount: Tensor
    value: Tensor
    next_value: Tensor
    cut: Tensor
    mask: Tensor


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    return torch.stack((even, odd), dim=-1).flatten(-2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """All rows of a setting, and what an algorithm reads off them.

    Attributes:
        setting: problem, policy, critic, who acted.
        rows: under the policy that acted.
        solution: of the policy differentiated.
    """

    setting: FiniteSetting
    rows: Rows
    solution: Solution

    @property
    def name(self) -> str:
        """Of the problem, and what is unusual about it."""
        limit = self.setting.limit
        return self.setting.name if limit is None else f"{self.setting.name}, time limit {limit}"

    @property
    def gamma(self) -> float:
        """The discount factor."""
        return self.setting.mdp.gamma

    @property
    def trajectory(self) -> Trajectory:
        """All rows."""
        return self.rows.trajectory

    @property
    def mask(self) -> Tensor:
        """[R, T]."""
        return self.rows.trajectory.mask

    @property
    def reward(self) -> Tensor:
        """[R, T]."""
        return self.rows.trajectory.reward

    @property
    def cut(self) -> Tensor:
        """[R, T]."""
        return self.rows.trajectory.cut

    @property
    def discount(self) -> Tensor:
        """[R, T]."""
        return self.rows.trajectory.discount(self.gamma)

    @property
    def behaviour_log_prob(self) -> Tensor:
        """[R, T] of the policy that acted."""
        return self.rows.trajectory.behaviour_log_prob

    @property
    def log_prob(self) -> Tensor:
        """[R, T] of the policy differentiated, with gradient."""
        return self.setting.policy.log_prob(self.rows.trajectory.observation, self.rows.trajectory.action)

    @cached_property
    def values(self) -> tuple[Tensor, Tensor]:
        """V_t and V'_t, [R, T], of the critic as it is."""
        with torch.no_grad():
            return self.setting.policy.values(self.rows.trajectory)

    @property
    def value(self) -> Tensor:
        """[R, T]."""
        return self.values[0]

    @property
    def next_value(self) -> Tensor:
        """[R, T]."""
        return self.values[1]

    @cached_property
    def acted(self) -> tuple[Tensor, Tensor]:
        """eta_b(s) and b(a|s) of the policy that acted."""
        with torch.no_grad():
            solution = solve(self.setting.mdp, self.setting.behaviour)
        return solution.undiscounted_visits, solution.policy

    @property
    def off_policy_gradient(self) -> Tensor:
        """sum_s eta_b(s) sum_a grad pi(a|s) A_pi(s,a): states as the one that acted visits them, actions of ours."""
        policy = self.setting.policy.preferences().softmax(-1)
        worth = (self.acted[0].unsqueeze(-1) * policy * self.solution.advantage).sum()
        return torch.autograd.grad(worth, self.setting.parameters)[0].flatten()

    @property
    def mask_if_needed(self) -> Tensor | None:
        """None where every step was chosen."""
        return None if self.setting.unit == "fragments" else self.mask

    def leaning(self, decay: float) -> Tensor:
        """[S, A] the mean lambda-return of whole episodes after each action, with the critic as it is.

        u = (I - gamma lambda P)^-1 (r + gamma (1 - lambda) P V)       r(s,a) + gamma P_a ((1 - lambda) V + lambda u)
        """
        mdp, value = self.setting.mdp, self._critic
        move, reward = self._chain
        solved = torch.linalg.solve(
            torch.eye(mdp.states, dtype=torch.float64) - mdp.gamma * decay * move,
            (self.solution.policy * reward).sum(-1) + mdp.gamma * (1.0 - decay) * (move @ value),
        )
        return reward + mdp.gamma * mdp.transition @ torch.where(
            mdp.terminal, 0.0, (1.0 - decay) * value + decay * solved
        )

    def looking_ahead(self, steps: int) -> Tensor:
        """[S, A] the mean n-step return of whole episodes after each action: n rewards, then the critic as it is."""
        mdp, value = self.setting.mdp, self._critic
        move, reward = self._chain
        for _ in range(steps - 1):
            value = (self.solution.policy * reward).sum(-1) + mdp.gamma * (move @ value)
            value = torch.where(mdp.terminal, 0.0, value)
        return reward + mdp.gamma * mdp.transition @ value

    @property
    def _critic(self) -> Tensor:
        """[S] V, 0 after the end."""
        return torch.where(self.setting.mdp.terminal, 0.0, self.setting.policy.value.detach())

    @property
    def _chain(self) -> tuple[Tensor, Tensor]:
        """P_pi [S, S] and r(s,a) [S, A], nothing after the end."""
        mdp, going = self.setting.mdp, (~self.setting.mdp.terminal).to(torch.float64)
        move = torch.einsum("sa,sax->sx", self.solution.policy, mdp.transition) * going.unsqueeze(-1)
        return move, (mdp.transition * mdp.reward).sum(-1) * going.unsqueeze(-1)

    @property
    def spaced(self) -> Spaced:
        """The same steps with one that the policy did not choose after each.

        What these carry must not be read, but for V' before the next chosen step, and nothing after an end.
        """
        last = self.cut & self.mask
        nothing = torch.zeros_like(self.reward)
        return Spaced(
            reward=_interleave(self.reward, nothing + 99.0),
            discount=_interleave(nothing + self.gamma, self.discount),
            value=_interleave(self.value, nothing - 77.0),
            next_value=_interleave(nothing - 55.0, torch.where(self.discount > 0, self.next_value, 33.0)),
            cut=_interleave(torch.zeros_like(last), last),
            mask=_interleave(self.mask, torch.zeros_like(self.mask)),
        )

    @cached_property
    def probability(self) -> Tensor:
        """[R] of each row."""
        return self.rows.behaviour_probability

    def with_critic(self, value: Tensor) -> Stage:
        """The same with another critic, [S]."""
        policy = copy.deepcopy(self.setting.policy)
        with torch.no_grad():
            policy.value.copy_(value)
        return replace(self, setting=replace(self.setting, policy=policy))

    def gradient(self, kind: Gradient = "discounted") -> Tensor:
        """The exact policy gradient of the setting."""
        setting = self.setting
        return policy_gradient(
            setting.mdp, setting.policy, gradient=kind, limit=setting.limit, parameters=setting.parameters
        )

    def estimate(self, psi: Tensor, truth: Tensor, target_name: str) -> Found:
        """Psi held, for every state and action that is visited, against a table.

            E[Psi_t | s_t = s, a_t = a]

        Args:
            psi: [R, T].
            truth: [S, A].
            target_name: the table in words.
        """
        pair = self.rows.state * truth.shape[1] + self.trajectory.action
        return self._conditional(psi, pair, truth, target_name)

    def estimate_of_state(self, target: Tensor, truth: Tensor, target_name: str) -> Found:
        """The same for every state, with `truth` [S]: E[target_t | s_t = s]."""
        return self._conditional(target, self.rows.state, truth, target_name)

    def _conditional(self, psi: Tensor, place: Tensor, truth: Tensor, target_name: str) -> Found:
        weight = torch.where(self.mask, self.probability.unsqueeze(-1), 0.0).flatten()

        def total(entries: Tensor) -> Tensor:
            return torch.zeros(truth.numel(), dtype=torch.float64).index_add(0, place.flatten(), entries)

        chance = total(weight)
        seen = chance > 0
        mean = total(weight * psi.flatten())[seen] / chance[seen]
        square = total(weight * psi.flatten().square())[seen] / chance[seen]
        return Found(
            problem=self.name,
            target_name=target_name,
            target=truth.flatten()[seen].detach(),
            moments=Moments(mean=mean, variance=float((square - mean.square()).clamp(min=0.0).sum())),
            batches=len(self.rows),
        )

    def ascent(
        self,
        objective: Tensor,
        target: Tensor,
        target_name: str,
        *,
        weight: Tensor | float = 1.0,
        parameters: Sequence[Tensor] | None = None,
    ) -> Found:
        """The gradient of sum_t w_t objective_t of each row, held against an exact one.

        Args:
            objective: [R, T] with gradient; not read where the mask is False.
            target: [P].
            target_name: that in words.
            weight: [R, T] w, or one number.
            parameters: with respect to which; the actor's if None.
        """
        per_row = (torch.where(self.mask, objective, 0.0) * weight).sum(-1)
        return self.ascent_of_rows(per_row, target, target_name, parameters=parameters)

    def ascent_of_rows(
        self, objective: Tensor, target: Tensor, target_name: str, *, parameters: Sequence[Tensor] | None = None
    ) -> Found:
        """The same with one number per row, `objective` [R]."""
        chosen = self.setting.parameters if parameters is None else parameters
        continuing = self.setting.mdp.kind == "continuing"
        return Found(
            problem=self.name,
            target_name=target_name,
            target=target.detach(),
            moments=weighted_moments(self.probability, row_gradients(objective, chosen)),
            trajectories=1.0 if continuing else self.setting.trajectories_per_row,
            steps=self.setting.steps_per_row,
            batches=len(self.rows),
        )


@cache
def stage(
    name: str = "six-state",
    *,
    unit: Unit = "episodes",
    critic: Critic = "exact",
    behaviour: Behaviour = "on_policy",
    limit: int | None = None,
    steps: int = 3,
) -> Stage:
    """All rows of a named problem; built once.

    Args:
        name: of the problem.
        unit: whole episodes, or fragments of `steps` steps of environments that reset themselves.
        critic: what the critic knows.
        behaviour: who acted.
        limit: time limit in steps.
        steps: T of a fragment.
    """
    named = problem(name)
    setting = FiniteSetting.build(
        named,
        gamma=named.mdp.gamma,
        unit=unit,
        critic=critic,
        behaviour=behaviour,
        limit=limit,
        row_steps=steps,
    )
    if unit == "episodes":
        rows = enumerate_episodes(setting.mdp, setting.behaviour, limit=setting.limit)
    else:
        rows = enumerate_fragments(setting.mdp, setting.behaviour, steps=steps, limit=setting.limit)
    with torch.no_grad():
        solution = solve(setting.mdp, setting.policy)
    return Stage(setting=setting, rows=rows, solution=solution)

"""Every row there can be, with its probability: expectations without sampling.

    Pr(row) = luck(row) * prod_t pi(a_t|s_t)^{m_t}
    E[f] = sum_rows Pr(row) f(row)

`luck` is what the world contributes: the start and the transitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from upslope.exact.finite import FiniteMDP
from upslope.exact.solve import action_probabilities, solve
from upslope.trajectory import Policy, Trajectory

NEGLIGIBLE = 1e-14
"""Rows and states less likely than this are not followed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """All rows, padded at the end to a common length.

    Attributes:
        trajectory: [R, T]; `mask` is False after a row's end, and `behaviour_log_prob` is that of the policy the rows
            were enumerated for.
        luck: [R] the world's part of the probability.
        length: [R] positions of each row, chosen or not.
        state: [R, T] number of the state of each position, where rows come from a finite MDP; else empty.
    """

    trajectory: Trajectory
    luck: Tensor
    length: Tensor
    state: Tensor
    _final: Tensor = field(init=False, repr=False)
    """[R, T] which entry of `final_observation` a position has; -1 for none."""

    def __post_init__(self) -> None:
        """Look up the open ends once."""
        index = self.trajectory.final_index
        entry = torch.full((self.trajectory.reward.numel(),), -1).index_copy(0, index, torch.arange(len(index)))
        object.__setattr__(self, "_final", entry.view(self.trajectory.shape))

    def __len__(self) -> int:
        """R."""
        return len(self.luck)

    def probability(self, log_prob: Tensor) -> Tensor:
        """[R] luck times the product over chosen steps; differentiable in `log_prob` [R, T]."""
        return self.luck * log_prob.masked_fill(~self.trajectory.mask, 0.0).sum(-1).exp()

    @property
    def behaviour_probability(self) -> Tensor:
        """[R] under the policy the rows were enumerated for."""
        return self.probability(self.trajectory.behaviour_log_prob)

    def select(self, rows: Sequence[int] | Tensor) -> Trajectory:
        """Some rows as one trajectory, no longer than the longest of them; a row may be named more than once."""
        index = torch.as_tensor(rows, dtype=torch.long)
        whole, longest = self.trajectory, int(self.length[index].max())
        assert isinstance(whole.observation, Tensor)
        assert isinstance(whole.final_observation, Tensor)
        if len(index) == 1:
            first = int(index)

            def pick(column: Tensor) -> Tensor:
                return column[first : first + 1, :longest]

        else:

            def pick(column: Tensor) -> Tensor:
                return column[:, :longest].index_select(0, index)

        entry = pick(self._final).flatten()
        final_index = (entry >= 0).nonzero().squeeze(-1)
        return Trajectory(
            observation=pick(whole.observation),
            action=pick(whole.action),
            reward=pick(whole.reward),
            terminated=pick(whole.terminated),
            truncated=pick(whole.truncated),
            mask=pick(whole.mask),
            behaviour_log_prob=pick(whole.behaviour_log_prob),
            time=pick(whole.time),
            final_observation=whole.final_observation[entry[final_index]],
            final_index=final_index,
            group=None if whole.group is None else whole.group[index],
            policy_version=whole.policy_version,
        )


def enumerate_episodes(
    mdp: FiniteMDP, policy: Policy, *, limit: int | None = None, start: int | None = None, most: int = 200_000
) -> Rows:
    """All whole episodes, one row each.

    Args:
        mdp: an episodic problem.
        policy: how likely actions are; rows of probability below `NEGLIGIBLE` are not followed. Of a policy that looks
            at earlier steps every action is followed, and rows are left out only where the world makes them negligible.
        limit: episodes are truncated after this many steps; None follows them to their end.
        start: begin in this state instead of the start distribution.
        most: refuse beyond this many rows.

    Raises:
        ValueError: if there are more than `most` rows, the problem has no episodes, or no episode can begin in `start`.
    """
    if mdp.kind == "continuing" and limit is None:
        raise ValueError("a continuing problem has no episodes: give a limit, or use enumerate_fragments")
    if start is not None and (not 0 <= start < mdp.states or bool(mdp.terminal[start])):
        raise ValueError(f"start must be a state that is not terminal, from 0 to {mdp.states - 1}; got {start}")
    first = mdp.start if start is None else torch.eye(mdp.states, dtype=torch.float64)[start]
    states = first.nonzero().squeeze(-1)
    begin = _begin(states, torch.zeros_like(states), first[states])
    return _enumerate(mdp, policy, begin, lambda layer, _: layer.terminated | layer.truncated, limit, most)


def enumerate_fragments(
    mdp: FiniteMDP, policy: Policy, *, steps: int, limit: int | None = None, most: int = 200_000
) -> Rows:
    """All rows of `steps` steps of environments that reset themselves and have run for long.

    Rows begin in the stationary distribution of state and time under the policy, go through ends of episodes into the
    next ones, and are cut where the row ends. In a continuing problem they begin at time 0 in the stationary
    distribution of states.

    Args:
        mdp: the problem.
        policy: whose steps these are.
        steps: T.
        limit: episodes are truncated after this many steps; None never does.
        most: refuse beyond this many rows.

    Raises:
        ValueError: if there are more than `most` rows, or a continuing problem is given a limit.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    if mdp.kind == "continuing":
        if limit is not None:
            raise ValueError("a continuing problem has no time limit: leave limit out")
        with torch.no_grad():
            share = solve(mdp, policy).on_policy.unsqueeze(0)
    else:
        occupancy = state_time_occupancy(mdp, policy, limit=limit)
        share = occupancy / occupancy.sum()
    time, states = (share > NEGLIGIBLE).nonzero().unbind(-1)
    begin = _begin(states, time, share[time, states])
    return _enumerate(
        mdp, policy, begin, lambda layer, depth: torch.full_like(layer.terminated, depth + 1 == steps), limit, most
    )


def state_time_occupancy(mdp: FiniteMDP, policy: Policy, *, limit: int | None = None, longest: int = 10_000) -> Tensor:
    """Pr(s_t = s) for every t an episode can reach, [H, S]; its sum over t is eta_1.

    Raises:
        ValueError: if episodes of more than `longest` steps have noticeable probability.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 step; got {limit}")
    with torch.no_grad():
        move = torch.einsum("sa,sax->sx", action_probabilities(mdp, policy), mdp.transition)
    going = ~mdp.terminal
    at, rows = mdp.start * going, list[Tensor]()
    while float(at.sum()) > NEGLIGIBLE and (limit is None or len(rows) < limit):
        if len(rows) == longest:
            raise ValueError(
                f"episodes of more than {longest} steps have probability {float(at.sum()):.1e}: give a time limit"
            )
        rows.append(at)
        at = (at @ move) * going
    return torch.stack(rows)


class _Outcomes(NamedTuple):
    """All that can happen, [O], sorted by state: `first[s]` to `first[s] + choices[s]` are those of state s."""

    action: Tensor
    following: Tensor
    reward: Tensor
    luck: Tensor
    chance: Tensor
    first: Tensor
    choices: Tensor


class _Open(NamedTuple):
    """Rows that go on, [N]: the step they come from in the layer before (-1 for none), and where they stand."""

    parent: Tensor
    state: Tensor
    time: Tensor
    luck: Tensor
    chance: Tensor


class _Layer(NamedTuple):
    """The steps at one depth of all rows, [N]."""

    parent: Tensor
    state: Tensor
    time: Tensor
    outcome: Tensor
    terminated: Tensor
    truncated: Tensor
    luck: Tensor
    chance: Tensor


def _enumerate(
    mdp: FiniteMDP,
    policy: Policy,
    begin: _Open,
    complete: Callable[[_Layer, int], Tensor],
    limit: int | None,
    most: int,
) -> Rows:
    """Breadth first: all rows grow by a step at a time. `complete` says which steps of a layer are a row's last."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 step; got {limit}")
    outcomes = _outcomes(mdp, policy)
    layers, last = list[_Layer](), list[Tensor]()
    rows, going = 0, begin
    while len(going.state):
        _refuse(rows + len(going.state), most)
        layer = _step(mdp, outcomes, going, limit)
        finished = complete(layer, len(layers))
        layers.append(layer)
        last.append(finished.nonzero().squeeze(-1))
        rows += len(last[-1])
        going = _go_on(mdp, outcomes, layer, ~finished)
    _refuse(rows, most)
    return _seal(mdp, policy, outcomes, layers, last)


def _begin(state: Tensor, time: Tensor, luck: Tensor) -> _Open:
    return _Open(torch.full_like(state, -1), state, time, luck, torch.ones_like(luck))


def _refuse(rows: int, most: int) -> None:
    if rows > most:
        raise ValueError(
            f"there are more than {most} rows: take a smaller problem, a time limit, fewer steps, or samples"
        )


def _outcomes(mdp: FiniteMDP, policy: Policy) -> _Outcomes:
    chance = torch.ones(mdp.states, mdp.actions, dtype=torch.float64)
    if not policy.sequential:
        with torch.no_grad():
            chance = action_probabilities(mdp, policy)
    value, share = mdp.reward_value, mdp.reward_probability
    if value is None or share is None:
        value, share = mdp.reward.unsqueeze(-1), torch.ones(1, dtype=torch.float64)
    luck = mdp.transition.unsqueeze(-1) * share * (~mdp.terminal)[:, None, None, None]
    where = (luck > 0).nonzero().unbind(-1)
    state, action, following, _ = where
    count = torch.bincount(state, minlength=mdp.states)
    return _Outcomes(
        action, following, value[where], luck[where], chance[state, action], count.cumsum(0) - count, count
    )


def _step(mdp: FiniteMDP, outcomes: _Outcomes, going: _Open, limit: int | None) -> _Layer:
    """Everything that can happen to every open row, but what is negligible."""
    count = outcomes.choices[going.state]
    row = torch.arange(len(count)).repeat_interleave(count)
    within = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    outcome = outcomes.first[going.state[row]] + within
    luck = going.luck[row] * outcomes.luck[outcome]
    chance = going.chance[row] * outcomes.chance[outcome]
    kept = luck * chance >= NEGLIGIBLE
    row, outcome = row[kept], outcome[kept]
    time = going.time[row]
    terminated = mdp.terminal[outcomes.following[outcome]]
    truncated = torch.zeros_like(terminated) if limit is None else ~terminated & (time + 1 >= limit)
    return _Layer(going.parent[row], going.state[row], time, outcome, terminated, truncated, luck[kept], chance[kept])


def _go_on(mdp: FiniteMDP, outcomes: _Outcomes, layer: _Layer, going: Tensor) -> _Open:
    """The unfinished rows one step later: in the state that followed, or after an end in a new start."""
    ended = layer.terminated | layer.truncated
    along = (going & ~ended).nonzero().squeeze(-1)
    anew = (going & ended).nonzero().squeeze(-1)
    starts = mdp.start.nonzero().squeeze(-1)
    again, first = anew.repeat_interleave(len(starts)), starts.repeat(len(anew))
    return _Open(
        torch.cat([along, again]),
        torch.cat([outcomes.following[layer.outcome[along]], first]),
        torch.cat([layer.time[along] + 1, torch.zeros_like(again)]),
        torch.cat([layer.luck[along], layer.luck[again] * mdp.start[first]]),
        torch.cat([layer.chance[along], layer.chance[again]]),
    )


def _seal(mdp: FiniteMDP, policy: Policy, outcomes: _Outcomes, layers: list[_Layer], last: list[Tensor]) -> Rows:
    """Follow the rows from their last steps back to their first."""
    width = len(layers)
    length = torch.cat([torch.full_like(steps, depth + 1) for depth, steps in enumerate(last)])
    luck = torch.cat([layer.luck[steps] for layer, steps in zip(layers, last, strict=True)])
    state, time, outcome = (torch.zeros(len(length), width, dtype=torch.long) for _ in range(3))
    terminated, truncated = (torch.zeros(len(length), width, dtype=torch.bool) for _ in range(2))
    step, row = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    for depth in reversed(range(width)):
        layer = layers[depth]
        step = torch.cat([step, last[depth]])
        row = torch.cat([row, (length == depth + 1).nonzero().squeeze(-1)])
        for column, entries in (
            (state, layer.state),
            (time, layer.time),
            (outcome, layer.outcome),
            (terminated, layer.terminated),
            (truncated, layer.truncated),
        ):
            column[row, depth] = entries[step]
        step = layer.parent[step]
    mask = torch.arange(width) < length.unsqueeze(-1)
    ends = torch.arange(width) == length.unsqueeze(-1) - 1
    open_end = mask & ~terminated & (truncated | ends)
    observation, action = mdp.observation[state], outcomes.action[outcome].masked_fill(~mask, 0)
    with torch.no_grad():
        log_prob = policy.log_prob(observation, action).to(torch.float64)
    trajectory = Trajectory(
        observation=observation,
        action=action,
        reward=outcomes.reward[outcome].masked_fill(~mask, 0.0),
        terminated=terminated,
        truncated=truncated,
        mask=mask,
        behaviour_log_prob=log_prob,
        time=time,
        final_observation=mdp.observation[outcomes.following[outcome[open_end]]],
        final_index=open_end.flatten().nonzero().squeeze(-1),
    )
    return Rows(trajectory=trajectory, luck=luck, length=length, state=state)

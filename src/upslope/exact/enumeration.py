"""Every row there can be, with its probability: expectations without sampling.

    Pr(row) = luck(row) * prod_t pi(a_t|s_t)^{m_t}
    E[f] = sum_rows Pr(row) f(row)

`luck` is what the world contributes: the start and the transitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from upslope.exact.finite import FiniteMDP
from upslope.exact.solve import action_probabilities
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

    def select(self, rows: Sequence[int]) -> Trajectory:
        """Some rows as one trajectory, no longer than the longest of them; a row may be named more than once."""
        index = torch.tensor(rows)
        whole, longest = self.trajectory, int(self.length[index].max())
        steps = whole.reward.shape[1]
        lookup = {int(place): entry for entry, place in enumerate(whole.final_index.tolist())}
        kept: list[int] = []
        places: list[int] = []
        for new, row in enumerate(rows):
            for position in range(longest):
                entry = lookup.get(row * steps + position)
                if entry is not None:
                    kept.append(entry)
                    places.append(new * longest + position)
        assert isinstance(whole.observation, Tensor)
        assert isinstance(whole.final_observation, Tensor)
        return replace(
            whole,
            observation=whole.observation[index, :longest],
            action=whole.action[index, :longest],
            reward=whole.reward[index, :longest],
            terminated=whole.terminated[index, :longest],
            truncated=whole.truncated[index, :longest],
            mask=whole.mask[index, :longest],
            behaviour_log_prob=whole.behaviour_log_prob[index, :longest],
            time=whole.time[index, :longest],
            final_observation=whole.final_observation[torch.tensor(kept, dtype=torch.long)],
            final_index=torch.tensor(places, dtype=torch.long),
            group=None if whole.group is None else whole.group[index],
        )


@dataclass(frozen=True, slots=True)
class _Path:
    """An open or closed row: what happened, and how likely the world makes it."""

    luck: float
    chance: float
    state: int
    time: int
    steps: tuple[tuple[int, int, float, int, int, bool, bool], ...] = ()
    """(state, action, reward, following state, time, terminated, truncated)"""


def enumerate_episodes(
    mdp: FiniteMDP, policy: Policy, *, limit: int | None = None, start: int | None = None, most: int = 200_000
) -> Rows:
    """All whole episodes, one row each.

    Args:
        mdp: an episodic problem.
        policy: how likely actions are; ones of probability below `NEGLIGIBLE` are not followed.
        limit: episodes are truncated after this many steps; None follows them to their end.
        start: begin in this state instead of the start distribution.
        most: refuse beyond this many rows.

    Raises:
        ValueError: if there are more than `most` rows.
    """
    first = mdp.start if start is None else torch.eye(mdp.states, dtype=torch.float64)[start]
    paths = [_Path(p, 1.0, state, 0) for state, p in enumerate(first.tolist()) if p > 0.0]
    return _enumerate(mdp, policy, paths, lambda path: path.steps[-1][5] or path.steps[-1][6], limit, most)


def enumerate_fragments(
    mdp: FiniteMDP, policy: Policy, *, steps: int, limit: int | None = None, most: int = 200_000
) -> Rows:
    """All rows of `steps` steps of environments that reset themselves and have run for long.

    Rows begin in the stationary distribution of state and time under the policy, go through ends of episodes into the
    next ones, and are cut where the row ends.

    Args:
        mdp: an episodic problem.
        policy: whose steps these are.
        steps: T.
        limit: episodes are truncated after this many steps; None never does.
        most: refuse beyond this many rows.

    Raises:
        ValueError: if there are more than `most` rows.
    """
    occupancy = state_time_occupancy(mdp, policy, limit=limit)
    share = occupancy / occupancy.sum()
    paths = [
        _Path(float(share[time, state]), 1.0, state, time)
        for time, state in (share > NEGLIGIBLE).nonzero().tolist()
    ]
    return _enumerate(mdp, policy, paths, lambda path: len(path.steps) == steps, limit, most)


def state_time_occupancy(mdp: FiniteMDP, policy: Policy, *, limit: int | None = None, longest: int = 10_000) -> Tensor:
    """Pr(s_t = s) for every t an episode can reach, [H, S]; its sum over t is eta_1.

    Raises:
        ValueError: if episodes of more than `longest` steps have noticeable probability.
    """
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


def _enumerate(
    mdp: FiniteMDP,
    policy: Policy,
    paths: list[_Path],
    complete: Callable[[_Path], bool],
    limit: int | None,
    most: int,
) -> Rows:
    with torch.no_grad():
        chance = action_probabilities(mdp, policy).tolist()
    done: list[_Path] = []
    while paths:
        path = paths.pop()
        for longer in _continuations(mdp, chance, path, limit):
            if longer.luck * longer.chance < NEGLIGIBLE:
                continue
            if complete(longer):
                done.append(longer)
            elif longer.steps[-1][5] or longer.steps[-1][6]:
                paths += [
                    replace(longer, state=state, time=0, luck=longer.luck * p)
                    for state, p in enumerate(mdp.start.tolist())
                    if p > 0.0
                ]
            else:
                paths.append(longer)
        if len(done) + len(paths) > most:
            raise ValueError(
                f"there are more than {most} rows: take a smaller problem, a time limit, fewer steps, or samples"
            )
    return _seal(mdp, policy, done)


def _continuations(mdp: FiniteMDP, chance: list[list[float]], path: _Path, limit: int | None) -> list[_Path]:
    longer: list[_Path] = []
    for action, likely in enumerate(chance[path.state]):
        if likely < NEGLIGIBLE:
            continue
        for following in mdp.transition[path.state, action].nonzero().flatten().tolist():
            luck = path.luck * float(mdp.transition[path.state, action, following])
            terminated = bool(mdp.terminal[following])
            truncated = not terminated and limit is not None and path.time + 1 >= limit
            for reward, share in _rewards(mdp, path.state, action, following):
                step = (path.state, action, reward, following, path.time, terminated, truncated)
                longer.append(
                    _Path(luck * share, path.chance * likely, following, path.time + 1, (*path.steps, step))
                )
    return longer


def _rewards(mdp: FiniteMDP, state: int, action: int, following: int) -> list[tuple[float, float]]:
    """(reward, probability) of a transition."""
    where = (state, action, following)
    if mdp.reward_value is None or mdp.reward_probability is None:
        return [(float(mdp.reward[where]), 1.0)]
    pairs = zip(mdp.reward_value[where].tolist(), mdp.reward_probability[where].tolist(), strict=True)
    return [(value, share) for value, share in pairs if share > 0.0]


def _seal(mdp: FiniteMDP, policy: Policy, done: list[_Path]) -> Rows:
    length = torch.tensor([len(path.steps) for path in done])
    width = int(length.max())
    padding = (0, 0, 0.0, 0, 0, False, False)
    table = [[*path.steps, *[padding] * (width - len(path.steps))] for path in done]
    columns = list(zip(*(step for row in table for step in row), strict=True))
    state, action, following, time = (torch.tensor(columns[i]).view(-1, width) for i in (0, 1, 3, 4))
    terminated, truncated = (torch.tensor(columns[i]).view(-1, width) for i in (5, 6))
    mask = torch.arange(width) < length.unsqueeze(-1)
    last = torch.arange(width) == length.unsqueeze(-1) - 1
    open_end = mask & ~terminated & (truncated | last)
    observation = mdp.observation[state]
    with torch.no_grad():
        log_prob = policy.log_prob(observation, action).to(torch.float64)
    trajectory = Trajectory(
        observation=observation,
        action=action,
        reward=torch.tensor(columns[2], dtype=torch.float64).view(-1, width),
        terminated=terminated,
        truncated=truncated,
        mask=mask,
        behaviour_log_prob=log_prob,
        time=time,
        final_observation=mdp.observation[following[open_end]],
        final_index=open_end.flatten().nonzero().squeeze(-1),
    )
    luck = torch.tensor([path.luck for path in done], dtype=torch.float64)
    return Rows(trajectory=trajectory, luck=luck, length=length, state=state)

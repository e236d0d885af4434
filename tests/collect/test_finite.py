"""Finite problems as environments: alone and together the same, in law what the tables say, exactly resumable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from upslope.collect import (
    EnvironmentCollector,
    EnvironmentConfig,
    FiniteEnvironment,
    FiniteFactory,
    FiniteVectorEnvironment,
    RandomPolicy,
    SyncEnvironments,
    check_environment,
    make_environments,
    resolve_environments,
)
from upslope.collect.resume import freeze, resume_problem
from upslope.exact import FiniteMDP, TabularPolicy, solve, state_time_occupancy
from upslope.exact.problems import PROBLEMS, problem
from upslope.spaces import Box, Discrete

NAMES = list(PROBLEMS)


def walk(environments: Any, steps: int, seed: int) -> list[Any]:
    """What every step of random actions brought."""
    generator = np.random.default_rng(seed)
    seeds = [100 + seed + index for index in range(environments.num_envs)]
    trace: list[Any] = [freeze(environments.reset(seeds))]
    for _ in range(steps):
        action = generator.integers(environments.action_space.n, size=environments.num_envs)
        step = environments.step(action)
        trace.append(
            freeze([step.observation, step.reward, step.terminated, step.truncated, step.finished, step.final])
        )
    return trace


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", [None, 3])
def test_alone_and_together_are_the_same_to_the_last_bit(name: str, limit: int | None) -> None:
    """Over more steps than numbers are drawn ahead, with random rewards, ragged ends and time limits."""
    factory = FiniteFactory(problem(name).mdp, limit)
    assert walk(factory.together(5), 1100, 0) == walk(SyncEnvironments([factory] * 5), 1100, 0)


def test_an_environment_does_the_same_whoever_is_beside_it() -> None:
    mdp = problem("noisy-rewards").mdp
    many, few = FiniteVectorEnvironment(mdp, 40), FiniteVectorEnvironment(mdp, 1)
    many.reset(list(range(40)))
    few.reset([17])
    for _ in range(300):
        ours, theirs = few.step(np.array([1])), many.step(np.ones(40, dtype=np.int64))
        assert ours.reward[0] == theirs.reward[17]


@pytest.mark.parametrize("name", NAMES)
def test_gymnasium_finds_nothing_wrong(name: str) -> None:
    check_env(FiniteEnvironment(problem(name).mdp, 20), skip_render_check=True)


def test_ours_finds_nothing_wrong_in_any_way_of_stepping() -> None:
    report = check_environment(FiniteFactory(problem("noisy-rewards").mdp, 2), steps=400)
    assert report.ok, report
    assert "4 x native: the collector and a plain loop agree" in str(report)
    assert "snapshots hold" in str(report)


def test_states_and_rewards_follow_the_tables() -> None:
    """Chi-square of each (s, a) against p(s'|s,a), and of each reward against its distribution."""
    mdp = replace(problem("noisy-rewards").mdp, start=torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64))
    environments, generator = FiniteVectorEnvironment(mdp, 500), np.random.default_rng(1)
    state = environments.reset(list(range(500)))
    following, rewards, starts = np.zeros((4, 2, 4)), np.zeros((4, 2, 3)), np.zeros(4)
    assert mdp.reward_value is not None
    values = mdp.reward_value[:, :, 0].numpy()
    for _ in range(400):
        action = generator.integers(2, size=500)
        step = environments.step(action)
        after = np.array(step.observation)
        if step.finished is not None:
            starts += np.bincount(after[step.finished], minlength=4)
            after[step.finished] = step.final
        np.add.at(following, (state, action, after), 1)
        kind = np.abs(values[state, action] - step.reward[:, None]).argmin(axis=1)
        assert np.abs(values[state, action, kind] - step.reward).max() < 1e-12
        np.add.at(rewards, (state, action, kind), 1)
        state = step.observation
    for counts, probability in (
        (following[:3], mdp.transition[:3].numpy()),
        (rewards[:3], np.broadcast_to([0.25, 0.25, 0.5], (3, 2, 3))),
        (starts, mdp.start.numpy()),
    ):
        expected = counts.sum(-1, keepdims=True) * probability
        assert counts[expected == 0].sum() == 0
        freedom = (probability > 0).sum() - counts[..., 0].size
        statistic = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
        assert statistic < freedom + 4.0 * np.sqrt(2.0 * freedom)


@pytest.mark.parametrize(
    ("name", "limit"), [("six-state", None), ("loops", None), ("loops", 3), ("short-corridor", None)]
)
def test_returns_and_visits_are_what_is_solved_for(name: str, limit: int | None) -> None:
    mdp = replace(problem(name).mdp, gamma=1.0)
    policy = problem(name).policy(3)
    collector = EnvironmentCollector(FiniteVectorEnvironment(mdp, 500, limit), episodes=8000, seed=2)
    trajectory = collector.collect(policy, 0)
    occupancy = state_time_occupancy(mdp, policy, limit=limit)
    length = trajectory.mask.sum(-1).double()
    assert abs(length.mean() - occupancy.sum()) < 4.0 * length.std() / 8000**0.5
    if limit is None:
        total = (trajectory.reward * trajectory.mask).sum(-1).double()
        assert abs(total.mean() - solve(mdp, policy).objective) < 4.0 * total.std() / 8000**0.5
    else:
        assert int(length.max()) == limit
        assert not (trajectory.terminated & trajectory.truncated).any()


def test_termination_goes_before_truncation_and_the_true_end_is_seen() -> None:
    """0 -> 1 -> 2 (terminal): with a limit of 2 it terminates, with a limit of 1 it is cut in state 1."""
    mdp = FiniteMDP.from_tables([[[0, 1, 0]], [[0, 0, 1]], [[0, 0, 0]]], [[1.0], [2.0], [0.0]], terminal=[2])
    for limit, ends in ((2, [(2, True, False)]), (1, [(1, False, True)] * 2), (None, [(2, True, False)])):
        environments, seen = FiniteVectorEnvironment(mdp, 1, limit), []
        environments.reset([0])
        for _ in range(2):
            step = environments.step(np.array([0]))
            if step.finished is not None:
                assert step.final is not None
                assert step.observation.tolist() == [0]
                seen.append((int(step.final[0]), bool(step.terminated[0]), bool(step.truncated[0])))
        assert seen == ends


@pytest.mark.parametrize("name", ["noisy-rewards", "ring", "loops"])
def test_snapshots_hold(name: str) -> None:
    factory = FiniteFactory(problem(name).mdp, 7)
    assert resume_problem(lambda: factory.together(3), steps=700) is None
    assert resume_problem(lambda: SyncEnvironments([factory], resume="snapshot"), steps=700) is None


def test_a_reset_without_seeds_goes_on_with_the_random_numbers() -> None:
    mdp = problem("six-state").mdp
    first, second = FiniteVectorEnvironment(mdp, 200), FiniteVectorEnvironment(mdp, 200)
    one = [first.reset(list(range(200))), *(first.reset(None) for _ in range(5))]
    two = [second.reset(list(range(200))), *(second.reset(None) for _ in range(5))]
    assert freeze(one) == freeze(two)
    assert len({np.array(each).tobytes() for each in one}) == 6
    assert not np.array_equal(
        FiniteVectorEnvironment(mdp, 200).reset(None), FiniteVectorEnvironment(mdp, 200).reset(None)
    )


def test_what_is_seen_decides_the_space() -> None:
    plain = FiniteMDP.from_tables([[[0, 1]], [[0, 0]]], [[1.0], [0.0]], terminal=[1])
    for observation, space, seen in (
        (torch.tensor([3, 0]), Discrete(4), 3),
        (torch.tensor([[1.0, -2.0], [0.5, 4.0]]), Box((2,), -2.0, 4.0), [1.0, -2.0]),
        (torch.tensor([-1, 0]), Box((), -1.0, 0.0, "int64"), -1),
    ):
        mdp = replace(plain, observation=observation)
        together = FiniteVectorEnvironment(mdp, 2)
        assert together.observation_space == space
        assert together.reset([0, 1]).tolist() == [seen, seen]
        alone = FiniteEnvironment(mdp)
        observed, info = alone.reset(seed=0)
        assert alone.observation_space.contains(observed)
        assert np.array_equal(observed, seen)
        assert info == {}


def test_tables_are_stepped_natively_and_snapshotted_unless_asked_otherwise() -> None:
    factory = FiniteFactory(problem("six-state").mdp)
    resolution = resolve_environments(factory, EnvironmentConfig(count=2))
    assert (resolution.config.vectorization, resolution.config.resume) == ("native", "snapshot")
    ways: list[tuple[Any, type]] = [("native", FiniteVectorEnvironment), ("sync", SyncEnvironments)]
    for way, kind in ways:
        made = make_environments(factory, EnvironmentConfig(count=3, vectorization=way, time_limit=2))
        assert isinstance(made, kind)
        assert made.num_envs == 3
        collector = EnvironmentCollector(made, episodes=30, seed=0)
        assert int(collector.collect(RandomPolicy(made.action_space), 0).mask.sum(-1).max()) == 2


def test_what_has_no_meaning_is_refused() -> None:
    mdp = problem("two-state").mdp
    with pytest.raises(ValueError, match="time limit is at least 1"):
        FiniteEnvironment(mdp, 0)
    with pytest.raises(ValueError, match="count=0"):
        FiniteVectorEnvironment(mdp, 0)
    for environment in (FiniteEnvironment(mdp), FiniteVectorEnvironment(mdp, 1)):
        with pytest.raises(gymnasium.error.ResetNeeded):
            environment.step(np.zeros(1, dtype=np.int64))
    alone, together = FiniteEnvironment(mdp), FiniteVectorEnvironment(mdp, 2)
    alone.reset(seed=0)
    together.reset([0, 1])
    with pytest.raises(ValueError, match="actions are 0 to 1"):
        alone.step(2)
    with pytest.raises(ValueError, match="actions are 0 to 1"):
        together.step(np.array([0, -1]))
    for action in (0.5, True, np.array([0]), float("nan")):
        with pytest.raises(ValueError, match="actions are 0 to 1, whole numbers; got"):
            alone.step(action)
    with pytest.raises(ValueError, match=r"whole numbers; got 0\.0 to 0\.5"):
        together.step(np.array([0.0, 0.5]))
    for limit in (2.5, 2.0, True):
        with pytest.raises(ValueError, match="at least 1 step, a whole number, or None for no limit; got"):
            FiniteEnvironment(mdp, cast(int, limit))
        with pytest.raises(ValueError, match="at least 1 step, a whole number, or None for no limit; got"):
            FiniteVectorEnvironment(mdp, 1, cast(int, limit))
    tree = together.snapshot()
    with pytest.raises(ValueError, match="resume with count=2"):
        FiniteVectorEnvironment(mdp, 3).restore(tree)
    other = FiniteMDP.from_tables([[[0.5, 0.5]], [[0, 0]]], [[0.0], [0.0]], terminal=[1])
    with pytest.raises(ValueError, match="this problem has the states 0 to 1"):
        FiniteVectorEnvironment(other, 2).restore({**tree, "state": np.array([2, 0])})
    while not alone.step(0)[2]:
        pass
    with pytest.raises(gymnasium.error.ResetNeeded):
        alone.step(0)


def test_a_table_policy_trains_on_what_it_sees() -> None:
    """The tables' own observation is what a policy over states is asked with."""
    mdp = problem("six-state").mdp
    trajectory = EnvironmentCollector(FiniteVectorEnvironment(mdp, 4), steps=6, seed=0).collect(TabularPolicy(7, 2), 0)
    assert trajectory.observation.dtype == torch.int64
    assert not mdp.terminal[trajectory.observation].any()

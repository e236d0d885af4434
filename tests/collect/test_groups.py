"""Episodes of a group begin alike and go their own ways."""

from collections.abc import Sequence

import gymnasium
import numpy as np
import pytest
import torch
from small_worlds import Forgetful, Remembering, Walk

from upslope.collect import (
    EnvironmentCollector,
    EnvironmentConfig,
    FiniteVectorEnvironment,
    SyncEnvironments,
    make_environments,
)
from upslope.collect.actions import RandomPolicy
from upslope.collect.groups import GroupCollector, GroupStart
from upslope.errors import UsageError
from upslope.exact.problems import problem
from upslope.trajectory import Trajectory

STARTS: Sequence[GroupStart] = ("seed", "snapshot")


def cartpoles(count: int, **settings) -> SyncEnvironments:
    config = EnvironmentConfig(id="CartPole-v1", count=count, vectorization="sync", resume="snapshot", **settings)
    made = make_environments(config)
    assert isinstance(made, SyncEnvironments)
    return made


def collector(environments, **settings) -> GroupCollector:
    return GroupCollector(environments, **{"episodes": 8, "size": 2, "start": "seed", "seed": 3, **settings})


def collected(of: GroupCollector, update: int = 0) -> Trajectory:
    return of.collect(RandomPolicy(of.environments.action_space), update)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("count", "size"), [(4, 2), (8, 4), (8, 8)])
def test_episodes_of_a_group_begin_alike_and_others_elsewhere(start, count, size):
    grouped = collector(cartpoles(count), start=start, size=size)
    for update in range(2):
        trajectory = collected(grouped, update)
        assert trajectory.group is not None
        assert trajectory.group.tolist() == [row // size for row in range(8)]
        first = trajectory.observation[:, 0]
        begun = {tuple(row) for row in first.tolist()}
        assert len(begun) == 8 // size
        assert all(torch.equal(first[row], first[row // size * size]) for row in range(8))
        assert len({tuple(row) for row in trajectory.action.tolist()}) > size // 2


@pytest.mark.parametrize("start", STARTS)
def test_the_worlds_random_numbers_are_common_to_a_group(start):
    class Same(RandomPolicy):
        """Acts alike everywhere, so that only the world can tell episodes apart."""

        def noise(self, generator, steps, environments):
            one = super().noise(generator, steps, 1)
            return np.repeat(one, environments, axis=1)

    environments = SyncEnvironments([Remembering] * 4, resume="snapshot")
    grouped = collector(environments, start=start, episodes=4)
    trajectory = grouped.collect(Same(grouped.environments.action_space), 0)
    rows = trajectory.observation
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[2], rows[3])
    assert not torch.equal(rows[0], rows[2])


def test_updates_and_waves_begin_differently():
    grouped = collector(cartpoles(2), size=2)
    begun = [collected(grouped, update).observation[::2, 0] for update in range(2)]
    assert len({tuple(row) for row in torch.cat(begun).tolist()}) == 8


def test_waves_are_the_same_episodes_whenever_they_are_collected():
    grouped = collector(cartpoles(4))
    first = collected(grouped, 1)
    again = collected(collector(cartpoles(4)), 1)
    assert torch.equal(first.observation, again.observation)
    assert torch.equal(first.action, again.action)
    finished = grouped.finished()
    assert len(finished) == 8
    assert sorted(length for _, length in finished) == sorted(first.mask.sum(-1).tolist())
    assert grouped.steps_taken >= int(first.mask.sum())


def test_an_interrupted_collector_goes_on_the_same():
    grouped, other = collector(cartpoles(4), start="snapshot"), collector(cartpoles(4), start="snapshot")
    collected(grouped, 0)
    other.restore(grouped.snapshot())
    assert torch.equal(collected(grouped, 1).action, collected(other, 1).action)
    assert grouped.finished() == other.finished()


def test_tables_have_a_seed_each():
    environments = FiniteVectorEnvironment(problem("six-state").mdp, 4, time_limit=5)
    first = collected(collector(environments, episodes=4)).observation[:, 0]
    assert first[0] == first[1]
    assert first[2] == first[3]


class OneForAll(Walk):
    """Begins where it likes, whatever the seed."""

    def reset(self, *, seed=None, options=None):
        gymnasium.Env.reset(self)
        self.position = np.random.default_rng().normal(size=3)
        return self.position, {}


def test_environments_that_do_not_begin_alike_are_refused():
    with pytest.raises(UsageError, match="environments 0 and 1 are of one group and do not begin alike"):
        collected(collector(SyncEnvironments([OneForAll] * 4)))
    native = make_environments(EnvironmentConfig(id="CartPole-v1", count=4, vectorization="native"))
    with pytest.raises(UsageError, match=r"set it to 'sync' or 'async'"):
        collected(collector(native))
    together = FiniteVectorEnvironment(problem("six-state").mdp, 4, time_limit=5, resume="snapshot")
    with pytest.raises(UsageError, match=r"environment.vectorization to 'sync'"):
        collected(collector(together, start="snapshot"))


def test_snapshots_that_do_not_hold_are_refused():
    with pytest.raises(UsageError, match="state of these environments cannot be taken"):
        collector(SyncEnvironments([Walk] * 4), start="snapshot")
    begun = collected(collector(SyncEnvironments([Forgetful] * 4, resume="snapshot"), start="snapshot", episodes=4))
    assert torch.equal(begun.observation[0, 0], begun.observation[1, 0])


def test_numbers_that_do_not_divide_are_refused():
    with pytest.raises(UsageError, match="no whole groups of 3"):
        collector(cartpoles(4), size=3, episodes=12)
    with pytest.raises(UsageError, match="not so many for each of 4 environments"):
        collector(cartpoles(4), episodes=6)


def test_steps_come_in_no_waves():
    fragments = EnvironmentCollector(cartpoles(2), steps=4, seed=0)
    with pytest.raises(ValueError, match="give episodes per update instead of steps=4"):
        fragments.collect_wave(RandomPolicy(fragments.action_space), 0, 1)

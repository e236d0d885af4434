"""Groups hold episodes of one start, and pairs of segments stand the right way round."""

import torch

from upslope.collect.finite import FiniteVectorEnvironment
from upslope.collect.given_data import SegmentPairsConfig
from upslope.collect.groups import GroupCollector
from upslope.collect.recorded import unsampled
from upslope.collect.rows import Piece
from upslope.collect.segments import SegmentPair, SegmentPairCollector, draw_segment_pairs
from upslope.collect.trajectory_file import Recording
from upslope.exact import enumerate_episodes, problem
from upslope.trajectory import Trajectory


def episodes() -> Trajectory:
    """All episodes of three states or more of a problem with two starts."""
    six = problem("six-state")
    rows = enumerate_episodes(six.mdp, six.policy(0))
    return rows.select((rows.length >= 3).nonzero().flatten())


def test_group_i_is_of_rows_that_begin_alike():
    six = problem("six-state")
    policy = six.policy(0)
    collector = GroupCollector(FiniteVectorEnvironment(six.mdp, 12), episodes=24, size=4, start="seed", seed=1)
    starts: set[int] = set()
    for update in range(3):
        trajectory = collector.collect(policy, update)
        assert isinstance(trajectory.observation, torch.Tensor)
        assert trajectory.group is not None
        for group in range(6):
            begun = set(trajectory.observation[trajectory.group == group, 0].tolist())
            assert int((trajectory.group == group).sum()) == 4
            assert len(begun) == 1
            starts |= begun
    assert len(starts) == 2


def test_pairs_of_segments_stand_the_right_way_round():
    whole, two = episodes(), problem("six-state")
    environments = FiniteVectorEnvironment(two.mdp, 1)
    pieces = [Piece(row=row, start=1, stop=3) for row in (4, 2)]
    recording = Recording(
        trajectory=whole, observation_space=environments.observation_space, action_space=environments.action_space
    )
    pair = SegmentPair(chosen=pieces[0], rejected=pieces[1])
    collector = SegmentPairCollector(recording, [pair], environments, SegmentPairsConfig(), seed=0)
    taken = collector.take([0])
    assert isinstance(taken.observation, torch.Tensor)
    assert isinstance(whole.observation, torch.Tensor)
    assert taken.reward.tolist() == [[0.0, 1.0], [0.0, -1.0]]
    for row, piece in enumerate(pieces):
        assert torch.equal(taken.observation[row], whole.observation[piece.row, 1:3])
        assert torch.equal(taken.action[row], whole.action[piece.row, 1:3])


def test_the_segment_with_the_higher_return_is_preferred():
    whole = episodes()
    total = torch.where(whole.mask, whole.reward, 0.0)
    for pair in draw_segment_pairs(whole, drawn=50, length=2, by="segment", seed=0):
        better, worse = (float(total[one.row, one.start : one.stop].sum()) for one in (pair.chosen, pair.rejected))
        assert better > worse


def test_nobody_sampled_what_is_given():
    given = unsampled(episodes())
    assert bool(given.behaviour_log_prob[given.mask].isnan().all())
    assert bool((given.behaviour_log_prob[~given.mask] == 0.0).all())

import pytest
from gymnasium.vector import AutoresetMode

from upslope.collect import EnvironmentCollector, GymnasiumVector, SyncEnvironments, Tick, TickVector, tick_advantages
from upslope.collect.conformance import TickPolicy, tick_cases


@pytest.mark.parametrize("case", tick_cases(), ids=lambda case: case.name)
def test_ends_of_episodes_are_exact_through_the_whole_collector(case):
    assert case.error() < 1e-5


def test_the_published_figures():
    (row,) = tick_advantages(SyncEnvironments([Tick]), steps=12)
    expected = [7.275, 6.215, 5.021, 3.640, 2.000, 7.275, 6.215, 5.021, 3.640, 2.000, 4.672, 2.600]
    assert [round(advantage, 3) for advantage in row] == expected


def test_reset_steps_are_no_samples():
    collector = EnvironmentCollector(GymnasiumVector(TickVector(2, AutoresetMode.NEXT_STEP)), steps=13, seed=0)
    trajectory = collector.collect(TickPolicy(), 0)
    live = [True] * 5 + [False] + [True] * 5 + [False] + [True]
    assert trajectory.mask.tolist() == [live, live]
    assert trajectory.time[0].tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 0, 0]
    assert trajectory.final_index.tolist() == [4, 10, 12, 17, 23, 25]
    assert trajectory.final_observation[:, 0].tolist() == pytest.approx([1.0, 1.0, 0.2] * 2)
    assert collector.finished() == [(5.0, 5)] * 4


def test_a_row_may_end_or_begin_on_a_reset_step():
    collector = EnvironmentCollector(GymnasiumVector(TickVector(1, AutoresetMode.NEXT_STEP)), steps=6, seed=0)
    for update in range(3):
        trajectory = collector.collect(TickPolicy(), update)
        assert trajectory.mask[0].tolist() == [True] * 5 + [False]
        assert trajectory.final_index.tolist() == [4]
    collector = EnvironmentCollector(GymnasiumVector(TickVector(1, AutoresetMode.NEXT_STEP)), steps=5, seed=0)
    collector.collect(TickPolicy(), 0)
    trajectory = collector.collect(TickPolicy(), 1)
    assert trajectory.mask[0].tolist() == [False] + [True] * 4
    assert trajectory.time[0].tolist() == [0, 0, 1, 2, 3]
    assert trajectory.final_index.tolist() == [4]
    assert trajectory.final_observation.tolist() == [[pytest.approx(0.8)]]


def test_truncation_as_termination_only_where_asked_for():
    collector = EnvironmentCollector(SyncEnvironments([Tick]), steps=7, seed=0, truncation="as_termination")
    trajectory = collector.collect(TickPolicy(), 0)
    assert trajectory.terminated[0].tolist() == [False] * 4 + [True] + [False] * 2
    assert not trajectory.truncated.any()
    assert trajectory.final_index.tolist() == [6]

"""Algorithms that compare the episodes of a group, audited in tables."""

from __future__ import annotations

import pytest

from upslope import GRPO, PPO, RLOO
from upslope.auditing import audit
from upslope.auditing.groups import GroupSetting
from upslope.errors import UsageError
from upslope.exact import problem


@pytest.mark.parametrize("size", [None, 3])
def test_groups_of_episodes_follow_what_is_declared(size: int | None) -> None:
    exact = audit(RLOO(), "bandit", size=size)
    assert exact.moments.exact
    assert (exact.declared, exact.verdict) == ("unbiased", "unbiased")
    assert exact.trajectories == (size or 2)
    shrunk = audit(GRPO(scale="none", reduction="trajectory_sum"), "bandit", size=size)
    assert (shrunk.declared, shrunk.verdict) == ("unbiased", "unbiased")
    assert audit(GRPO(), "bandit", size=size).verdict == "biased"


def test_too_many_groups_are_drawn() -> None:
    with pytest.raises(ValueError, match="groups of 4 episodes"):
        next(GroupSetting.build(problem("two-state"), size=4).every())
    assert not audit(RLOO(), "two-state", size=4, samples=2560).moments.exact


def test_a_group_has_two_episodes_at_least_and_belongs_to_what_compares_one() -> None:
    with pytest.raises(UsageError, match="2 or more"):
        audit(RLOO(), "bandit", size=1)
    with pytest.raises(UsageError, match="sees single episodes"):
        audit(PPO(gamma=1.0), "bandit", size=2)
    with pytest.raises(UsageError, match="groups are of completions"):
        audit(RLOO(), "bandit", groups=2)

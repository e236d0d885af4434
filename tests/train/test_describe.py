"""What a run says of itself: every setting that changes the estimate has a row."""

from __future__ import annotations

from typing import Any

import pytest

from upslope import ActorCriticConfig, EnvironmentConfig, MemoryConfig, RolloutConfig, Run
from upslope.train.describe import describe_run

CART = EnvironmentConfig(id="CartPole-v1")


@pytest.mark.parametrize(
    ("changes", "row", "words"),
    [
        ({"environment": EnvironmentConfig(id="Taxi-v4", action_mask="info")}, "invalid actions", "info"),
        (
            {"policy": ActorCriticConfig(memory=MemoryConfig(size=24))},
            "memory",
            "24 gated recurrent units, 1 layer",
        ),
        (
            {"policy": ActorCriticConfig(memory=MemoryConfig(kind="transformer", context=9), shared=True)},
            "memory",
            "the last 9 steps",
        ),
        ({"rollout": RolloutConfig(lag=3)}, "who acts", "3 updates ago"),
        ({"rollout": RolloutConfig(behaviour="runs/other")}, "who acts", "runs/other"),
        ({"rollout": RolloutConfig(batches=4)}, "data", "last 4 updates"),
    ],
)
def test_settings_that_change_the_estimate_have_a_row(changes: dict[str, Any], row: str, words: str) -> None:
    assert row not in describe_run(Run(environment=CART))
    assert words in describe_run(Run(**{"environment": CART, **changes}))[row]

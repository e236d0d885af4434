"""The penalty on the distance from a reference: which estimate it takes, and what it says of itself."""

from __future__ import annotations

import pytest

from upslope.algorithms import ReferenceKL


@pytest.mark.parametrize(
    ("penalty", "estimate", "words", "biased"),
    [
        (ReferenceKL(coefficient=0.1), "k2", "visits held fixed", False),
        (ReferenceKL(coefficient=0.1, place="reward"), "k1", "of whole trajectories", False),
        (ReferenceKL(coefficient=0.1, estimator="exact"), "exact", "without sampling noise", False),
        (ReferenceKL(coefficient=0.1, estimator="k1"), "k1", "mean gradient 0", True),
        (ReferenceKL(coefficient=0.1, estimator="k3"), "k3", "forward KL", True),
        (ReferenceKL(coefficient=0.1, place="reward", estimator="k3"), "k3", "not that of any KL", True),
        (ReferenceKL(coefficient=0.1, place="reward", baselined=False), "k1", "after the baseline", False),
    ],
)
def test_a_penalty_says_what_it_follows(penalty: ReferenceKL, estimate: str, words: str, biased: bool) -> None:
    assert penalty.estimate == estimate
    assert words in penalty.describe()
    assert bool(penalty.biased_by) is biased
    assert penalty.needs == ("distribution" if estimate == "exact" else "log_prob")


def test_without_a_coefficient_no_reference_is_asked_for() -> None:
    for penalty in (ReferenceKL(), ReferenceKL(place="reward"), ReferenceKL(estimator="k3")):
        assert penalty.needs == "none"
        assert penalty.penalty is None
        assert not penalty.biased_by
        assert penalty.describe() == "none"

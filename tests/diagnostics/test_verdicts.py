"""Verdicts need the same sign in most of the last records; each says the number and what to do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from upslope.diagnostics import RULES, Verdict, Watch, verdict_line, verdicts
from upslope.diagnostics.verdicts import LAST

GOOD: dict[str, Any] = {
    "kind": "train",
    "progress": 0.6,
    "gradient_norm": 1.0,
    "first_ratio_error": 0.0,
    "kl": 0.01,
    "dead_gradient_share": 0.1,
    "effective_sample_size": 0.98,
    "explained_variance": 0.8,
    "entropy_share": 0.7,
    "zero_advantage_groups": 0.3,
    "gradient_snr": 1.0,
    "chosen_log_ratio": 0.5,
    "variance/reward_to_go": 10.0,
    "reward_deviation": 0.5,
    "termination_share": 0.01,
}
WRONG = {
    "gradient not finite": ("gradient_norm", math.nan, "optimiser steps are skipped"),
    "ratio not 1": ("first_ratio_error", 0.3, "the ratio is off 1 by 0.3"),
    "policy jumps": ("kl", 0.4, "by a KL of 0.4"),
    "dead gradient": ("dead_gradient_share", 0.83, "83% of the batch has no gradient"),
    "few steps count": ("effective_sample_size", 0.11, "leave 11% of the batch"),
    "critic explains nothing": ("explained_variance", -0.02, "the critic explains nothing: explained variance -0.02;"),
    "groups without advantage": ("zero_advantage_groups", 0.95, "95% of the groups teach nothing"),
    "chosen answers lost": ("chosen_log_ratio", -3.0, "have a log-prob -3.0 beside that of the reference"),
    "batch too small": ("gradient_snr", 0.025, "the noise scale of the gradient is 40 times the steps of an update"),
    "batch too large": ("gradient_snr", 200.0, "200 times the steps at which"),
}


def history(records: int = 15, **changes: Any) -> list[dict[str, Any]]:
    return [{**GOOD, **changes, "step": 1000 * (k + 1)} for k in range(records)]


def test_a_good_history_has_no_verdict() -> None:
    assert verdicts(history()) == []
    assert verdicts([]) == []
    assert verdict_line([]) == ""


def test_every_rule_is_tried() -> None:
    assert {rule.name for rule in RULES} == {*WRONG, "exploration over"}


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_figure_gives_its_verdict_and_no_other(name: str) -> None:
    figure, value, text = WRONG[name]
    (verdict,) = verdicts(history(**{figure: value}))
    assert verdict.name == name
    assert text in verdict.text
    assert verdict.level == ("hint" if name.startswith(("batch", "chosen")) else "warning")


@pytest.mark.parametrize("name", sorted(set(WRONG) - {"gradient not finite"}))
def test_a_bad_moment_is_no_verdict(name: str) -> None:
    figure, value, _ = WRONG[name]
    records = history()
    for record in records[-4:]:
        record[figure] = value
    assert verdicts(records) == []
    assert verdicts(history(4, **{figure: value})) == []


def test_a_verdict_goes_when_its_sign_goes() -> None:
    assert verdicts(history(kl=1.0) + history(LAST)) == []


def test_infinite_gradients_count_and_missing_figures_do_not() -> None:
    assert [verdict.name for verdict in verdicts(history(gradient_norm=math.inf))] == ["gradient not finite"]
    assert verdicts([{"kind": "train", "step": 1} for _ in range(20)]) == []
    assert verdicts([{"kind": "evaluation", "kl": 1.0} for _ in range(20)]) == []
    assert verdicts(history(explained_variance=math.nan)) == []


def test_a_critic_is_not_blamed_at_the_beginning_or_where_returns_no_longer_vary() -> None:
    assert verdicts(history(explained_variance=-1.0, progress=0.1)) == []
    solved = history() + history(explained_variance=-1.0, **{"variance/reward_to_go": 1e-4})
    assert verdicts(solved) == []


def test_a_policy_decided_early_is_warned_of_to_the_end_and_one_decided_late_is_not() -> None:
    early = history(entropy_share=0.001, progress=0.3) + history(entropy_share=0.001, progress=1.0)
    assert [verdict.name for verdict in verdicts(early)] == ["exploration over"]
    assert verdicts(history() + history(entropy_share=0.001, progress=0.9)) == []
    assert verdicts(history(entropy_share=0.001, progress=0.3) + history()) == []


def test_nothing_to_learn_is_said_alone_and_only_if_it_was_so_from_the_start() -> None:
    nothing = {"reward_deviation": 0.0, "termination_share": 0.0, "explained_variance": -1.0}
    assert [verdict.name for verdict in verdicts(history(**nothing))] == ["nothing to learn"]
    assert "nothing to learn" not in {verdict.name for verdict in verdicts(history(1) + history(**nothing))}


def test_hints_are_for_runs_without_warnings() -> None:
    found = verdicts(history(gradient_snr=0.01, kl=1.0))
    assert [verdict.level for verdict in found] == ["warning"]


def test_one_line_of_warnings() -> None:
    warning, hint = Verdict(level="warning", name="a", text="A"), Verdict(level="hint", name="b", text="B")
    assert verdict_line([warning, hint, warning]) == "A | A"


def test_a_watch_says_after_each_record_what_the_history_says() -> None:
    records = history(7) + history(9, kl=1.0) + history(3, explained_variance=-1.0)
    watch = Watch()
    for count, record in enumerate(records, start=1):
        watch.add(record)
        assert watch.verdicts() == verdicts(records[:count])


def test_records_with_some_figures_alone() -> None:
    watch = Watch()
    for _ in range(20):
        watch.add({"kind": "train", "reward_deviation": 0.0})
        watch.add({"kind": "train", "termination_share": 0.0, "kl": "much"})
        watch.add({"kind": "train"})
        watch.add({})
    assert watch.verdicts() == []

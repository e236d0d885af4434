"""What is searched, as it is written on the command line."""

from __future__ import annotations

import pytest

from upslope.errors import UsageError
from upslope.options import configure
from upslope.recipes import load_recipe
from upslope.train.search_space import Choice, Range, as_settings, searched, usual_space


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("algorithm.gamma=0.9..0.999", Range(name="algorithm.gamma", low=0.9, high=0.999, log=False, whole=False)),
        ("--policy.log-std=1e-5..1e-2:log", Range(name="policy.log_std", low=1e-5, high=1e-2, log=True, whole=False)),
        ("algorithm.epochs=1..10", Range(name="algorithm.epochs", low=1, high=10, log=False, whole=True)),
        ("rollout.steps=32,64,128", Choice(name="rollout.steps", values=("32", "64", "128"))),
        ("policy.hidden=64 64, 32", Choice(name="policy.hidden", values=("64 64", "32"))),
    ],
    ids=["range", "log", "whole", "choice", "words"],
)
def test_what_is_written_is_read(text: str, wanted: Range | Choice) -> None:
    assert searched(text) == wanted
    assert searched(wanted.written()) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("algorithm.gamma", "says nothing to search"),
        ("algorithm.gamma=0.9", "leaves no choice"),
        ("algorithm.gamma=0.9,0.9", "leaves no choice"),
        ("algorithm.gamma=0.99..0.9", "from a smaller number to a larger"),
        ("algorithm.gamma=0..0.9:log", "both above 0"),
        ("algorithm.gamma=low..high", "two numbers"),
        ("algorithm.gamma=0.1..inf", "from a smaller number to a larger"),
    ],
)
def test_what_means_nothing_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        searched(text)


def test_values_become_words_of_the_command_line() -> None:
    values = [("policy.hidden", "64 64"), ("policy.normalize_observation", "False"), ("algorithm.clip", "0.1")]
    words = as_settings(values)
    assert words == ["--policy.hidden", "64", "64", "--policy.no_normalize_observation", "--algorithm.clip", "0.1"]
    run = configure(load_recipe("cartpole-ppo"), words, program="test")
    assert (run.policy.hidden, run.policy.normalize_observation, run.algorithm.clip) == ((64, 64), False, 0.1)


@pytest.mark.parametrize(
    "recipe", ["cartpole-ppo", "cartpole-reinforce", "short-corridor-actor-critic", "arithmetic-grpo"]
)
def test_the_usual_space_is_one_the_recipe_takes(recipe: str) -> None:
    run = load_recipe(recipe)
    space = usual_space(run)
    assert space[0].name == "optimizer.learning_rate"
    for part in space:
        for value in part.ends():
            configure(run, as_settings([(part.name, value)]), program="test")


def test_the_usual_space_of_a_ppo() -> None:
    rate = load_recipe("cartpole-ppo").optimizer.learning_rate
    space = {part.name: part for part in usual_space(load_recipe("cartpole-ppo"))}
    first = space["optimizer.learning_rate"]
    assert isinstance(first, Range)
    assert (first.low, first.high, first.log) == (pytest.approx(rate / 10), pytest.approx(rate * 10), True)
    assert {"algorithm.clip", "algorithm.gae_lambda", "algorithm.entropy_coefficient", "rollout.steps"} <= set(space)

"""Configurations as files: there and back for every recipe, and a named fault for whatever else comes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upslope import PPO, EnvironmentConfig, OptimizerConfig, RolloutConfig, Run
from upslope.recipes import RECIPES, cartpole_ppo
from upslope.train.config_file import ConfigError, config_to_tree, differences, read_run, run_from_tree


def through_text(run: Run) -> Any:
    return json.loads(json.dumps(config_to_tree(run)))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_comes_back_the_same(name: str) -> None:
    run = RECIPES[name]()
    assert run_from_tree(through_text(run)) == run


@given(
    clip=st.floats(0.01, 0.99),
    steps=st.integers(1, 10**12),
    seed=st.integers(0, 2**63),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    hidden=st.lists(st.integers(1, 512), max_size=4),
    name=st.none() | st.text(max_size=20),
    directory=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20),
    arguments=st.dictionaries(
        st.text(max_size=8),
        st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        max_size=4,
    ),
)
@settings(max_examples=60, deadline=None)
def test_any_values_come_back_the_same(
    clip: float,
    steps: int,
    seed: int,
    betas: tuple[float, float],
    hidden: list[int],
    name: str | None,
    directory: str,
    arguments: dict[str, bool | int | float | str],
) -> None:
    run = cartpole_ppo()
    run = replace(
        run,
        environment=replace(run.environment, kwargs=arguments),
        policy=replace(run.policy, hidden=tuple(hidden)),
        algorithm=PPO(clip=clip),
        optimizer=OptimizerConfig(betas=betas),
        steps=steps,
        seed=seed,
        name=name,
        directory=Path(directory),
    )
    back = run_from_tree(through_text(run))
    assert back == run
    assert [type(value) for value in back.environment.kwargs.values()] == [type(v) for v in arguments.values()]


def everywhere(tree: Any, place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The places of all settings in a configuration tree."""
    found: list[tuple[str, ...]] = []
    for name, value in tree.items():
        if name == "class":
            continue
        found.append((*place, name))
        if isinstance(value, dict) and "class" in value:
            found += everywhere(value, (*place, name))
    return found


PLACES = everywhere(through_text(cartpole_ppo()))


def changed(place: tuple[str, ...], change: Callable[[dict[str, Any], str], None]) -> Any:
    tree = through_text(cartpole_ppo())
    inner = tree
    for name in place[:-1]:
        inner = inner[name]
    change(inner, place[-1])
    return tree


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_missing_setting_is_named(place: tuple[str, ...]) -> None:
    tree = changed(place, lambda inner, name: inner.pop(name))
    with pytest.raises(ConfigError, match=rf"run{''.join('.' + name for name in place[:-1])}.*'{place[-1]}'"):
        run_from_tree(tree)


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_setting_of_the_wrong_type_is_named(place: tuple[str, ...]) -> None:
    """A list of nulls is nothing that any setting takes."""
    tree = changed(place, lambda inner, name: inner.update({name: [None, None, None]}))
    with pytest.raises(ConfigError, match=rf"run\.{'.'.join(place)}"):
        run_from_tree(tree)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("algorithm", "kl_stop"), "never", "must be one of 'before_step', 'after_epoch', got 'never'"),
        (("algorithm", "clip"), "0.2", "run.algorithm.clip must be float"),
        (("algorithm", "clip"), True, "run.algorithm.clip must be float"),
        (("algorithm", "clip"), 1.5, "between 0 and 1, got 1.5"),
        (("steps",), 10.5, "run.steps must be int, got 10.5"),
        (("steps",), True, "run.steps must be int, got True"),
        (("steps",), 0, "steps must be at least 1"),
        (("optimizer", "learning_rate"), 10**400, "run.optimizer.learning_rate is too large"),
        (("optimizer", "betas"), [0.9], "must have 2 entries, got 1"),
        (("optimizer", "betas"), {"0": 0.9}, "must be a list"),
        (("policy", "hidden"), [64, "64"], r"run.policy.hidden\[1\] must be int, got '64'"),
        (("policy", "critic"), 1, "run.policy.critic must be bool"),
        (("environment", "kwargs"), {"render": [1]}, "run.environment.kwargs.render"),
        (("environment", "kwargs"), [], "must be a mapping"),
        (("algorithm", "class"), "Foo", "a Foo, which is not one of upslope's own classes; give the recipe"),
        (("algorithm", "class"), ["PPO"], "not one of upslope's own classes"),
        (("optimizer", "class"), "PPO", "run.optimizer must be the settings of a OptimizerConfig"),
        (("algorithm",), None, "run.algorithm must be the settings of a PPO"),
        (("surprise",), 1, "unknown settings .'surprise'."),
        (("algorithm", "__init__"), "os.system", "unknown settings .'__init__'."),
    ],
)
def test_hostile_values_are_named(place: tuple[str, ...], value: object, said: str) -> None:
    tree = changed(place, lambda inner, name: inner.update({name: value}))
    with pytest.raises(ConfigError, match=said):
        run_from_tree(tree)


@pytest.mark.parametrize("tree", [None, [], "run", 3, {}, {"class": "Run"}, {"class": "PPO"}])
def test_what_is_no_configuration_is_refused(tree: Any) -> None:
    with pytest.raises(ConfigError):
        run_from_tree(tree)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["class", "a", "0"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(place=st.sampled_from(PLACES), value=json_values)
@settings(max_examples=200, deadline=None)
def test_anything_at_any_place_is_read_or_refused_by_name(place: tuple[str, ...], value: Any) -> None:
    """Never another error than ours, and what is read has the types that the settings have."""
    tree = changed(place, lambda inner, name: inner.update({name: value}))
    try:
        run = run_from_tree(tree)
    except ConfigError:
        return
    assert isinstance(run, Run)
    again = run_from_tree(through_text(run))
    assert config_to_tree(again) == config_to_tree(run) or value != value


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[" * 200_000, "cannot be read"),
        (b'{"run": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"[]", "holds no run configuration"),
        (b"{}", "holds no run configuration"),
        (b'{"run": 1}', "must be the settings of a Run"),
    ],
)
def test_files_that_are_no_configuration(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_run(tmp_path)


def test_a_directory_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run directory"):
        read_run(tmp_path)


def test_values_that_no_file_can_hold_are_refused() -> None:
    @dataclass(frozen=True)
    class Own:
        function: Callable[[], None]

    with pytest.raises(ConfigError, match="plain values, got function"):
        config_to_tree(Own(lambda: None))


def test_differences_are_told_by_dotted_name() -> None:
    old = through_text(cartpole_ppo())
    new = copy.deepcopy(old)
    new["algorithm"]["clip"], new["seed"] = 0.1, 7
    del new["steps"]
    assert differences(old, new) == {"algorithm.clip": (0.2, 0.1), "steps": (old["steps"], None), "seed": (1, 7)}
    assert differences(old, old) == {}


def test_every_setting_says_what_it_is_for() -> None:
    """The command line shows these texts; a setting without one would stand there bare."""
    import ast
    import inspect

    def check(kind: type) -> None:
        tree = ast.parse(inspect.getsource(kind))
        body = tree.body[0].body  # pyright: ignore
        for first, second in zip(body, [*body[1:], None], strict=True):
            if isinstance(first, ast.AnnAssign) and isinstance(first.target, ast.Name):
                documented = isinstance(second, ast.Expr) and isinstance(second.value, ast.Constant)
                assert documented, f"{kind.__name__}.{first.target.id}"

    run = cartpole_ppo()
    check(Run)
    for entry in fields(Run):
        value = getattr(run, entry.name)
        if is_dataclass(value):
            check(type(value))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: RolloutConfig(steps=None), "set one, the other None"),
        (lambda: RolloutConfig(steps=8, episodes=8), "set one, the other None"),
        (lambda: RolloutConfig(steps=0), "at least one step"),
        (lambda: replace(cartpole_ppo(), algorithm=RECIPES["cartpole-reinforce"]().algorithm), "needs whole episodes"),
        (lambda: replace(RECIPES["cartpole-reinforce"](), algorithm=PPO()), "needs a critic"),
        (
            lambda: replace(RECIPES["acrobot-ppo"](), rollout=RolloutConfig(steps=None, episodes=16)),
            "normalize_reward follows each environment step by step",
        ),
        (lambda: Run(environment=EnvironmentConfig(), steps=-5), "steps must be at least 1, got -5"),
        (lambda: Run(environment=EnvironmentConfig(), seed=-1), "seed must be at least 0, got -1"),
        (lambda: Run(environment=EnvironmentConfig(), threads=0), "threads must be at least 1, got 0"),
    ],
)
def test_combinations_without_meaning_are_refused(build: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()

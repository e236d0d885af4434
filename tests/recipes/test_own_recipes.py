"""A recipe in a file of the user's own: what its settings may not be, and what is a mistake in its code."""

from __future__ import annotations

from pathlib import Path

import pytest

from upslope.cli import main
from upslope.recipes import load_recipe

OWN = """
from pathlib import Path

from upslope import A2C, EnvironmentConfig, Run
from upslope.collect.given_data import RecordedConfig

WORLD = EnvironmentConfig(id="CartPole-v1")


def recorded():
    return Run(environment=WORLD, algorithm=A2C(), rollout=RecordedConfig(file=Path("x.safetensors")))


def unknown():
    return Run(environment=WORLD, nope=3)


def own_value():
    raise ValueError("my own mistake")


def own_type():
    return WORLD + 1


def own_number():
    return Run(environment=WORLD, steps=int("many"))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with these recipes in it."""
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "at_once.py").write_text(OWN + "\nRUN = Run(environment=WORLD, steps=0)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("mine.py:recorded", "A2C learns from what the policy does itself: set rollout to"),
        ("mine.py:unknown", "unexpected keyword argument 'nope'"),
        ("at_once.py:recorded", "steps must be at least 1"),
    ],
    ids=["value", "name", "outside-the-function"],
)
def test_settings_that_are_refused_are_told_with_their_place(
    place: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", place]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"upslope: {place}: ")
    assert words in complaint


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("own_value", ValueError, "my own mistake"),
        ("own_type", TypeError, "unsupported operand"),
        ("own_number", ValueError, "invalid literal"),
    ],
)
def test_a_mistake_in_the_recipes_code_stays_what_it_is(
    name: str, kind: type[Exception], words: str, here: Path
) -> None:
    with pytest.raises(kind, match=words) as caught:
        load_recipe(f"mine.py:{name}")
    assert caught.type is kind

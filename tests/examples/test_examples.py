"""The examples run, each with a tiny budget, and stay what they say they are."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from upslope import cli

EXAMPLES = Path(__file__).parents[2] / "examples"
BY_HAND = ("ppo_cartpole", "reinforce_estimators")
CATALOGUE = EXAMPLES / "peer_losses.py"
"""A list of losses, each of them short: `tests/auditing/test_peer_losses.py` sees to that."""


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=f"example_{name}")


def test_ppo_by_hand() -> None:
    example = load("ppo_cartpole")
    mean = example["main"](example["Settings"](steps=1_024, length=64, epochs=2))
    assert mean > 8.0


def test_ppo_by_hand_learns() -> None:
    example = load("ppo_cartpole")
    before = example["main"](example["Settings"](steps=512))
    after = example["main"](example["Settings"](steps=12_288, learning_rate=1e-3))
    assert after > 2.0 * before


@pytest.mark.parametrize("psi", ["total_reward", "advantage"])
def test_reinforce_by_hand(psi: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("reinforce_estimators")
    ratios = example["main"](example["Settings"](psi=psi, updates=2, episodes=4, longest=40))
    assert len(ratios) == 6
    assert all(math.isfinite(ratio) and ratio > 0.0 for ratio in ratios.values())
    assert "td_residual" in capsys.readouterr().out


def test_own_network(tmp_path: Path) -> None:
    example = load("own_network")
    total = example["main"](example["Settings"](steps=1_024, directory=tmp_path))
    assert total >= 1.0
    assert (tmp_path / "cartpole-residual-seed1" / "policy" / "model.safetensors").is_file()


def test_own_recipe(tmp_path: Path) -> None:
    recipe = f"{EXAMPLES / 'own_recipe.py'}:short_pole"
    quiet = ["--log.no-progress", "--log.no-tensorboard", "--evaluation.times", "0", "--directory", str(tmp_path)]
    assert cli.main(["train", recipe, "--steps", "1024", *quiet]) == 0
    assert cli.main(["resume", str(tmp_path / "short-pole-seed1"), "--recipe", recipe, "--steps", "2048"]) == 0


@pytest.mark.parametrize("name", BY_HAND)
def test_examples_by_hand_use_mathematics_and_policies_alone(name: str) -> None:
    imports = re.findall(
        r"^(?:from|import) (upslope\S*)(?: import (.*))?$", (EXAMPLES / f"{name}.py").read_text(), re.M
    )
    rooms = {names if module == "upslope" else module.removeprefix("upslope.") for module, names in imports}
    assert rooms
    assert rooms <= {"estimators", "policies", "spaces", "trajectory"}


@pytest.mark.parametrize("path", sorted({*EXAMPLES.glob("*.py")} - {CATALOGUE}), ids=lambda path: path.stem)
def test_examples_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 150

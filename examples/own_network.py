"""A network of one's own: train with it, save, load, act.

    python examples/own_network.py --steps 50000

Any `nn.Module` from observations [M, ...] to features [M, features] is an encoder. It sees observations after
normalisation; actor and critic heads come on top, and unless `shared` the critic gets a copy of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium
import torch
import tyro
from torch import Tensor, nn

import upslope


class Residual(nn.Module):
    """The observation as it is, and what a hidden layer makes of it, side by side and to one scale."""

    def __init__(self, inputs: int, hidden: int = 64) -> None:
        super().__init__()
        self.features = inputs + hidden
        self.hidden = nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.ReLU())

    def forward(self, observation: Tensor) -> Tensor:
        observation = observation.float()
        return torch.cat([observation, self.hidden(observation)], dim=-1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 50_000
    """Environment steps."""
    seed: int = 1
    directory: Path = Path("runs")
    """Where the run directory is made."""


def main(settings: Settings) -> float:
    torch.manual_seed(settings.seed)
    recipe = upslope.recipes.cartpole_ppo()
    run = replace(
        recipe,
        recipe="cartpole-residual",
        policy=replace(recipe.policy, hidden=(64,)),
        steps=settings.steps,
        seed=settings.seed,
        directory=settings.directory,
    )
    result = upslope.train(run, encoder=Residual(inputs=4))

    # What was saved names no class and holds no code, so loading takes a fresh encoder of the same kind.
    policy = upslope.load(result.directory / "policy", encoder=Residual(inputs=4))
    environment = gymnasium.make("CartPole-v1")
    observation, _ = environment.reset(seed=settings.seed)
    total, ended = 0.0, False
    while not ended:
        observation, reward, terminated, truncated, _ = environment.step(policy.act(observation))
        total, ended = total + float(reward), terminated or truncated
    environment.close()
    print(f"{result.directory}: one episode with the loaded policy returned {total:.0f}")
    return total


if __name__ == "__main__":
    main(tyro.cli(Settings))

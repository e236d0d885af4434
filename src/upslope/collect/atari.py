"""What Atari games need before a policy can learn from their pixels."""

from __future__ import annotations

from typing import Any, cast

import gymnasium
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, TimeLimit


class ServeBall(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Presses FIRE at the start of an episode and after every life lost, for games that wait for it.

    In Breakout nothing moves until FIRE: a policy that does not know yet would stand still for a whole episode of
    27,000 steps. The step in which a life is lost goes on with the step of the FIRE, and has the rewards of both.
    Games without a FIRE are left as they are.

    Args:
        environment: an Atari game inside `gymnasium.wrappers.AtariPreprocessing`.
    """

    def __init__(self, environment: gymnasium.Env[Any, Any]) -> None:
        super().__init__(environment)
        game = cast("Any", environment.unwrapped)
        meanings = game.get_action_meanings()
        self._fire = meanings.index("FIRE") if "FIRE" in meanings else None
        self._lives = game.ale.lives
        self._left = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin and serve."""
        observation, info = self.env.reset(seed=seed, options=options)
        if self._fire is not None:
            observation, _, terminated, truncated, info = self.env.step(self._fire)
            if terminated or truncated:
                observation, info = self.env.reset(options=options)
        self._left = self._lives()
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and serve again if a life was lost."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self._fire is not None and not (terminated or truncated) and self._lives() < self._left:
            observation, more, terminated, truncated, info = self.env.step(self._fire)
            reward = float(reward) + float(more)
        self._left = self._lives()
        return observation, reward, terminated, truncated, info


def preprocess(environment: gymnasium.Env[Any, Any], time_limit: int | None) -> gymnasium.Env[Any, Any]:
    """84 x 84 grey frames, every 4th, the last 4 stacked; up to 30 idle steps at the start, then FIRE where it matters.

    Args:
        environment: a game that skips no frames itself (`frameskip=1`).
        time_limit: decisions after which an episode is truncated, or None.
    """
    shown = FrameStackObservation(ServeBall(AtariPreprocessing(environment)), 4)
    return shown if time_limit is None else TimeLimit(shown, time_limit)

"""`upslope train`: train a recipe."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence

from upslope.commands.common import DONE, conclude, configured

_HELP = """usage: upslope train RECIPE [--setting value ...]

Train a recipe: a name from `upslope recipes`, or path/to/file.py:function for a function of yours that returns an
upslope.Run. Settings are the fields of the recipe's configuration:

  upslope train cartpole-ppo
  upslope train cartpole-ppo --algorithm.clip 0.1 --seed 3 --steps 1e6
  upslope train my_recipe.py:hopper --name first-try

`upslope train RECIPE --help` shows every setting of that recipe and what it is."""


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(_HELP)
        return DONE
    recipe, run = configured(arguments, "train")
    from upslope.train import train

    start = time.monotonic()
    result = train(run)
    another = _another_seed(recipe, arguments[1:], run.seed + 1)
    return conclude(result, run, time.monotonic() - start, recipe=recipe, steps=None, resumed=False, another=another)


def _another_seed(recipe: str, settings: Sequence[str], seed: int) -> str | None:
    """The same with another seed; None where the run's own name or seed is among the settings."""
    if any(word.startswith(("--seed", "--name")) for word in settings):
        return None
    return shlex.join(["upslope", "train", recipe, *settings, "--seed", str(seed)])

"""Recipes by name, and recipes from a user's file."""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from upslope.errors import UsageError
from upslope.recipes import (
    arithmetic,
    calculator,
    continuing,
    control,
    countdown,
    fine_tuning,
    groups,
    masks,
    memory,
    natural,
    off_policy,
    peers,
    presets,
    real_models,
    tables,
    traces,
    words,
)
from upslope.train import Run
from upslope.train.language import LanguageRun
from upslope.train.session import AnyRun
from upslope.user_code import function_from_file

RECIPES: dict[str, Callable[[], AnyRun]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        control.cartpole_ppo,
        control.cartpole_a2c,
        control.cartpole_actor_critic,
        control.cartpole_baseline,
        control.cartpole_reinforce,
        control.acrobot_ppo,
        control.mountaincar_continuous_ppo,
        control.pendulum_ppo,
        control.lunarlander_ppo,
        control.bipedalwalker_ppo,
        control.hopper_ppo,
        control.halfcheetah_ppo,
        control.walker2d_ppo,
        control.breakout_ppo,
        groups.cartpole_grpo,
        groups.cartpole_rloo,
        groups.inverted_pendulum_grpo,
        groups.cartpole_clone,
        groups.cartpole_segment_dpo,
        fine_tuning.cartpole_novice,
        fine_tuning.cartpole_fine_tune,
        masks.taxi_ppo,
        memory.cartpole_hidden_gru,
        memory.cartpole_hidden_lstm,
        memory.cartpole_hidden_transformer,
        memory.cartpole_hidden_memoryless,
        natural.cartpole_trpo,
        natural.cartpole_npg,
        natural.pendulum_trpo,
        natural.hopper_trpo,
        natural.halfcheetah_trpo,
        tables.short_corridor_reinforce,
        tables.short_corridor_baseline,
        tables.short_corridor_actor_critic,
        tables.six_state_ppo,
        traces.short_corridor_traces,
        traces.cartpole_traces,
        traces.random_walk_prediction,
        continuing.access_control_actor_critic,
        continuing.access_control_ppo,
        continuing.pendulum_continuing_ppo,
        off_policy.cartpole_vtrace,
        off_policy.cartpole_ppo_stale,
        off_policy.six_state_importance_sampled,
        presets.ppo_cleanrl,
        presets.ppo_sb3,
        presets.ppo_paper,
        arithmetic.arithmetic_sft,
        arithmetic.arithmetic_reinforce,
        arithmetic.arithmetic_rloo,
        arithmetic.arithmetic_grpo,
        arithmetic.arithmetic_dr_grpo,
        arithmetic.arithmetic_dapo,
        arithmetic.arithmetic_gspo,
        arithmetic.arithmetic_ppo,
        arithmetic.arithmetic_dpo,
        peers.grpo_trl,
        peers.grpo_verl,
        peers.grpo_openrlhf,
        peers.grpo_nemo_rl,
        peers.grpo_prime_rl,
        countdown.countdown_sft,
        countdown.countdown_grpo,
        calculator.calculator_sft,
        calculator.calculator_grpo,
        words.spell_backward_sft,
        words.spell_backward_grpo,
        real_models.gsm8k_qwen_0_5b_sft,
        real_models.gsm8k_qwen_0_5b_grpo,
        real_models.gsm8k_qwen_0_5b_grpo_lora,
        real_models.gsm8k_qwen_0_5b_dpo,
        real_models.gsm8k_qwen_1_5b_grpo,
        real_models.gsm8k_qwen_1_5b_grpo_lora,
        real_models.gsm8k_qwen_7b_grpo_lora,
    )
}
"""Every built-in recipe."""


def load_recipe(name: str) -> AnyRun:
    """A recipe by its name, or from a file: `path/to/my_recipe.py:function`.

    Args:
        name: a key of `RECIPES`, or a Python file and the name of a function in it that takes nothing and returns a
            `Run` or a `LanguageRun`. The file is the user's own code and is run.

    Raises:
        UsageError: if there is no such recipe, what it returns is no run, or the settings it gives are refused.
    """
    if ":" in name:
        return _from_file(name)
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else "`upslope recipes` lists them."
        raise UsageError(
            f"there is no recipe called {name!r}; {hint} A recipe of your own is given as path/to/file.py:function"
        )
    return RECIPES[name]()


def _from_file(name: str) -> AnyRun:
    with _naming(name):
        recipe = function_from_file(name, what="recipe")
    needed = [p.name for p in inspect.signature(recipe).parameters.values() if p.default is p.empty and p.kind < 2]
    if needed:
        raise UsageError(f"{name!r} needs arguments ({', '.join(needed)}); a recipe takes none: give them defaults")
    with _naming(name):
        run = recipe()
    if not isinstance(run, Run | LanguageRun):
        raise UsageError(f"{name!r} returned a {type(run).__name__}; a recipe returns an upslope.Run, or a LanguageRun")
    return run


_ARGUMENTS = re.compile(r"\w+\.__init__\(\) (got|missing|takes) ")


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Around the user's own code: a setting that is refused in here is a `UsageError` that names the place.

    That is a ValueError or TypeError raised by the library, or an argument that a class does not take. Anything else
    is a mistake in the user's code, and its traceback leads there.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        if type(error) not in (ValueError, TypeError):
            raise
        frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
        ours = str(frame.f_globals["__name__"]).startswith("upslope.")
        if ours or (isinstance(error, TypeError) and _ARGUMENTS.match(str(error))):
            raise UsageError(f"{place}: {error}") from error
        raise

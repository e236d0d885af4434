"""Where a run begins: a folder, or what a recipe made, which is trained first if it is not there."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upslope.errors import UsageError

if TYPE_CHECKING:
    from upslope.train import Result
    from upslope.train.session import AnyRun


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What had to be trained first.

    Attributes:
        run: its configuration.
        result: of its training.
        seconds: it took.
        resumed: it was there and had not come to its end.
    """

    run: AnyRun
    result: Result[Any, Any]
    seconds: float
    resumed: bool


def find_start(
    run: AnyRun,
    *,
    tell: Callable[[str], None],
    conclude: Callable[[Made], None],
    before: tuple[str, ...] = (),
) -> Path | None:
    """The folder that `run.start_from` stands for; None where the run begins with no other one's policy.

    A folder is taken as it is. Of a recipe, the newest finished result with the run's seed below the run's directory
    is taken; else an unfinished one is brought to its end, or the recipe is trained.

    Args:
        run: about to begin.
        tell: says what is taken.
        conclude: is given what had to be trained.
        before: names of recipes that wait for this one.

    Raises:
        UsageError: if `start_from` is neither, a folder holds no policy, or recipes start from each other.
    """
    if run.start_from is None:
        return None
    if Path(run.start_from).is_dir():
        _check_policy(Path(run.start_from), run)
        return Path(run.start_from)
    recipe = _recipe(run, run.start_from)
    if recipe.recipe in (*before, run.recipe):
        chain = " from ".join([*before, run.recipe, recipe.recipe])
        raise UsageError(f"no run can begin: {chain}, which starts from itself; give start_from a folder")
    found = sorted(_results(recipe), key=lambda place: place.stat().st_mtime_ns, reverse=True)
    finished = [place for place in found if _finished(place)]
    if finished:
        tell(f"{run.recipe} starts from {finished[0] / 'policy'}{_unlike(finished[0], recipe)}")
        return finished[0]
    below = find_start(recipe, tell=tell, conclude=conclude, before=(*before, run.recipe))
    made = _train(recipe, found[0] if found else None, below, tell, run.recipe)
    conclude(made)
    return made.result.directory


def _check_policy(place: Path, run: AnyRun) -> None:
    """Refuse a folder that no policy can be in."""
    from upslope.train import Run

    if (place / "policy").is_dir():
        return
    if (place / "metrics.jsonl").is_file() or (place / "start").is_dir():
        raise UsageError(
            f"start_from={str(place)!r} is a run without a policy yet: let it come to its first checkpoint"
        )
    if not (place / "config.json").is_file():
        raise UsageError(
            f"start_from={str(place)!r} is a folder without a policy (it has no config.json): give a run directory, or "
            + ("a policy folder" if isinstance(run, Run) else "a folder as transformers' save_pretrained writes it")
        )


def _recipe(run: AnyRun, name: str) -> AnyRun:
    """The recipe of that name, with what decides where and how it runs taken from the run that needs it."""
    from upslope.recipes import RECIPES, load_recipe
    from upslope.train import Run
    from upslope.train.language import LanguageRun

    kind = Run if isinstance(run, Run) else LanguageRun
    if ":" not in name and name not in RECIPES:
        raise UsageError(
            f"start_from={name!r} is neither a folder nor a recipe: give a policy folder, a run directory, or one of "
            f"{', '.join(name for name, recipe in RECIPES.items() if isinstance(recipe(), kind))}"
        )
    recipe = load_recipe(name)
    if not isinstance(recipe, kind):
        trains, needed = ("a language model", "an agent") if kind is Run else ("an agent", "a language model")
        raise UsageError(f"start_from={name!r} trains {trains}, and {needed} is needed: give another recipe")
    if recipe.recipe == "custom":
        recipe = dataclasses.replace(recipe, recipe=name)
    shown = ("tensorboard", "wandb", "wandb_project", "progress")
    log = dataclasses.replace(recipe.log, **{setting: getattr(run.log, setting) for setting in shown})
    recipe = dataclasses.replace(recipe, seed=run.seed, directory=run.directory, threads=run.threads, log=log)
    if isinstance(recipe, LanguageRun) and isinstance(run, LanguageRun):
        recipe = dataclasses.replace(recipe, device=run.device)
    return recipe


def _results(recipe: AnyRun) -> list[Path]:
    """Directories of runs of this recipe with this seed."""
    from upslope.train.config_file import ConfigError, recorded_run

    found: list[Path] = []
    if not recipe.directory.is_dir():
        return found
    for place in recipe.directory.iterdir():
        if not (place / "config.json").is_file():
            continue
        try:
            recorded = recorded_run(place)
        except ConfigError:
            continue
        if (recorded.get("recipe"), recorded.get("seed")) == (recipe.recipe, recipe.seed):
            found.append(place)
    return found


def _finished(place: Path) -> bool:
    """Whether the last update was taken, and the policy saved after it."""
    from upslope.train.checkpoint import latest_checkpoint
    from upslope.train.config_file import recorded_run

    newest = latest_checkpoint(place / "checkpoints", on_damaged=lambda path, error: None)
    if newest is None or newest.step < recorded_run(place)["steps"] or not (place / "policy").is_dir():
        return False
    return (place / "policy").stat().st_mtime_ns >= newest.path.stat().st_mtime_ns


def _unlike(place: Path, recipe: AnyRun) -> str:
    """In which settings a result was made otherwise than the recipe says now."""
    from upslope.train.config_file import config_to_tree, differences, recorded_run

    wanted = json.loads(json.dumps(config_to_tree(recipe)))
    indifferent = ("log.", "checkpoint.", "evaluation.", "name", "directory", "threads")
    other = [
        f"{name}={old}"
        for name, (old, _) in differences(recorded_run(place), wanted).items()
        if not name.startswith(indifferent)
    ]
    if not other:
        return ""
    return f" (made with other settings than the recipe's: {', '.join(other[:4])}{', ...' if len(other) > 4 else ''})"


def _train(
    recipe: AnyRun, unfinished: Path | None, start: Path | None, tell: Callable[[str], None], waiting: str
) -> Made:
    from upslope.train import resume, train

    begun = time.monotonic()
    if unfinished is not None:
        tell(f"{waiting} starts from {recipe.recipe}: {unfinished} has not come to its end and goes on first")
        result = resume(unfinished)
    else:
        tell(f"{waiting} starts from {recipe.recipe}, which is trained first")
        result = train(recipe, start=start)
    return Made(run=recipe, result=result, seconds=time.monotonic() - begun, resumed=unfinished is not None)

"""What an agent's run begins with and never changes: the starting policy, the one that a distance is taken from, the
one that acts where that is another than the one that learns, and the potential that shapes the rewards.

They lie in the run directory, so that going on depends on nothing outside it: the starting policy as `start/`, a
reference that is another policy as `reference/`, the policy that acts as `behaviour/`, one whose value is the potential
as `potential/`. Their hashes stand in `config.json` and in every checkpoint, and that of the file of a potential that
is a function of the user's own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from upslope.errors import UsageError
from upslope.policies import ActorCritic
from upslope.policies.content import content_hash
from upslope.spaces import Composite
from upslope.train.config import RolloutConfig, Run
from upslope.train.optimizer import FlatOptimizer
from upslope.train.run_directory import RunDirectory
from upslope.train.saving import load, save
from upslope.train.session import ResumeError
from upslope.train.settings import START
from upslope.train.shaping import Shaping, file_hash, shaping_by_function, shaping_by_policy
from upslope.trajectory import Trajectory

_CRITIC = ("critic.", "critic_encoder.", "memory.critic.")
_MAY_BE_NEW = (*_CRITIC, "reward_normalizer.")
_OWN_OF_THE_RUN = frozenset(
    {"critic", "normalize_reward", "reward_clip", "log_std_init", "orthogonal", "hidden_gain", "policy_gain"}
    | {"value_gain", "distribution", "encoder"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """The folders that an agent's run begins with.

    Attributes:
        start: of the policy whose weights it takes; None for weights made anew.
        reference: of a reference that is another policy than the one the run begins with; None where it is not.
        behaviour: of the policy that acts throughout; None where the one that learns does.
        potential: of the policy whose value shapes the rewards; None where none does.
    """

    start: Path | None
    reference: Path | None
    behaviour: Path | None
    potential: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """What an agent's run begins with.

    Attributes:
        start: a copy of the policy before its first step, where the run needs it to go on; else None.
        reference: the frozen policy that the algorithm stays close to, or None.
        behaviour: the policy that acts throughout, or None.
        potential: the policy whose value shapes the rewards, or None.
        shaping: of the rewards, or None.
        hashes: of these, by name.
        notes: worth telling the user.
    """

    start: ActorCritic | None
    reference: ActorCritic | None
    behaviour: ActorCritic | None
    potential: ActorCritic | None
    shaping: Shaping | None
    hashes: dict[str, str]
    notes: tuple[str, ...]

    def shaped(self, trajectory: Trajectory, gamma: float) -> Trajectory:
        """What is learnt from what was collected: with F in the rewards, where they are shaped."""
        return trajectory if self.shaping is None else self.shaping.shaped(trajectory, gamma)


def start_folder(start_from: str | None, given: Path | None) -> Path | None:
    """The folder that a run begins with, of either kind of run.

    Args:
        start_from: as configured.
        given: the folder that it stands for, where it is the name of a recipe.

    Raises:
        UsageError: if none can be told.
    """
    if start_from is None:
        if given is not None:
            raise UsageError("start is the folder that run.start_from stands for, which is None: set start_from, too")
        return None
    place = Path(start_from) if given is None else given
    if not place.is_dir():
        raise UsageError(
            f"start_from={start_from!r} is no folder{'' if given is None else f', and neither is {given}'}: give a "
            "policy folder or a run directory; for the name of a recipe train that one first and give its run "
            "directory, start=... in Python"
        )
    return place


def places_of(run: Run, start: Path | None) -> Places:
    """Where a new run finds what it begins with.

    Args:
        run: the configuration.
        start: the folder that `run.start_from` stands for, where it is the name of a recipe.

    Raises:
        UsageError: if there is no such folder.
    """
    shaping = run.shaping
    return Places(
        start=start_folder(run.start_from, start),
        reference=_folder("reference", None if run.reference == START else run.reference),
        behaviour=_folder("rollout.behaviour", run.acting.behaviour),
        potential=None if shaping is None or shaping.by_function else _folder("shaping.potential", shaping.potential),
    )


def places_in(run: Run, directory: RunDirectory) -> Places:
    """Where a run that goes on finds the same."""
    kept = run.start_from is not None or _refers_to_start(run)
    other = _needs_reference(run) and not _refers_to_start(run)
    return Places(
        start=directory.start if kept else None,
        reference=directory.reference if other else None,
        behaviour=None if run.acting.behaviour is None else directory.behaviour,
        potential=None if run.shaping is None or run.shaping.by_function else directory.potential,
    )


def _folder(setting: str, place: str | None) -> Path | None:
    """The folder that a setting names.

    Raises:
        UsageError: if there is none.
    """
    if place is None or Path(place).is_dir():
        return None if place is None else Path(place)
    or_else = {"reference": f" or {START!r}", "shaping.potential": " or path/to/file.py:function"}
    raise UsageError(
        f"{setting}={place!r} is no folder: give a policy folder or a run directory{or_else.get(setting, '')}"
    )


def begin(policy: ActorCritic, run: Run, places: Places, encoder: nn.Module | None) -> Beginning:
    """Give a new policy the weights it begins with, and set the reference apart.

    Args:
        policy: as built; no optimiser has its parameters yet. Its weights and the statistics of its normalisers become
            those of the starting policy.
        run: the configuration.
        places: of what it begins with.
        encoder: the user's own, if any.

    Raises:
        UsageError: if spaces, network or distribution are not the run's.
        CheckpointError: if a folder is missing, damaged or no policy folder.
    """
    notes: tuple[str, ...] = ()
    if places.start is not None:
        start = load(places.start, encoder=copy.deepcopy(encoder))
        new = _take(policy, start, f"start_from ({places.start})")
        if "critic" in new:
            notes = (f"{places.start} has no critic: the run's begins untrained (critic_first trains it alone first)",)
    kept = places.start is not None or _refers_to_start(run)
    first = copy.deepcopy(policy).requires_grad_(False) if kept else None
    reference = first if _refers_to_start(run) else None
    if places.reference is not None:
        reference = _frozen(policy, "reference", places.reference, encoder)
        if run.algorithm.passes.reference == "distribution":
            _check_same_spread(policy, reference)
    fragments = isinstance(run.rollout, RolloutConfig) and run.rollout.steps is not None
    if fragments and reference is not None and reference.sequential:
        raise UsageError(
            "the reference has a memory, and in the middle of an episode nobody knows what it would hold: learn from "
            "whole episodes (rollout.episodes, with rollout.steps=None), or take a policy without policy.memory"
        )
    behaviour = potential = shaping = None
    if places.behaviour is not None:
        behaviour = _frozen(policy, "rollout.behaviour", places.behaviour, encoder)
    if run.shaping is not None and places.potential is not None:
        potential = _frozen(policy, "shaping.potential", places.potential, encoder, acts=False)
        shaping = shaping_by_policy(run.shaping, potential)
    named = {START: first, "reference": reference, "behaviour": behaviour, "potential": potential}
    hashes = {name: content_hash(one) for name, one in named.items() if one is not None}
    if run.shaping is not None and run.shaping.by_function:
        shaping, hashes["potential"] = shaping_by_function(run.shaping), file_hash(run.shaping)
    return Beginning(
        start=first,
        reference=reference,
        behaviour=behaviour,
        potential=potential,
        shaping=shaping,
        hashes=hashes,
        notes=notes,
    )


def _frozen(
    policy: ActorCritic, setting: str, place: Path, encoder: nn.Module | None, *, acts: bool = True
) -> ActorCritic:
    """A policy that never changes.

    Args:
        policy: of the run.
        setting: that names it.
        place: its folder.
        encoder: the user's own, if any.
        acts: whether its actions matter, beside its values.

    Raises:
        UsageError: if it sees, or does, something else.
        CheckpointError: if the folder is damaged or no policy folder.
    """
    other = load(place, encoder=copy.deepcopy(encoder)).requires_grad_(False)
    check = _check_same_actions if acts else _check_same_observations
    check(policy, other, f"{setting} ({place})")
    return other


def keep(beginning: Beginning, directory: RunDirectory) -> None:
    """Write all that a resumed run needs of it into the run directory.

    Raises:
        CheckpointError: if it cannot be written.
    """
    if beginning.start is not None:
        save(beginning.start, directory.start)
    if beginning.reference is not None and beginning.reference is not beginning.start:
        save(beginning.reference, directory.reference)
    if beginning.potential is not None:
        save(beginning.potential, directory.potential)
    if beginning.behaviour is not None:
        save(beginning.behaviour, directory.behaviour)


def check_hashes(found: dict[str, str], recorded: dict[str, str]) -> None:
    """Refuse to go on from anything else than what the run began with.

    Raises:
        ResumeError: naming what differs.
    """
    if found != recorded:
        names = sorted(name for name in {*found, *recorded} if found.get(name) != recorded.get(name))
        raise ResumeError(
            f"{' and '.join(names)} in the run directory are not what the run began with (their hashes differ): bring "
            "them back from a copy, or start a new run"
        )


@final
class Hold:
    """Keeps all but the critic's own parameters where they are during the first updates of a run.

    When they are let go the optimiser begins anew. Adam corrects its moments by the number of steps taken, which is the
    same for all parameters: those that were held, whose moments are still 0, would begin with steps several times too
    long.

    Args:
        policy: whose parameters the optimiser holds.
        optimizer: of its flat buffer.
        updates: how many.
    """

    def __init__(self, policy: ActorCritic, optimizer: FlatOptimizer, updates: int) -> None:
        self._optimizer, self._updates = optimizer, updates
        named = [(name, entry) for name, entry in policy.named_parameters() if entry.requires_grad]
        self._held = torch.cat([torch.full((entry.numel(),), not name.startswith(_CRITIC)) for name, entry in named])

    def before(self, update: int) -> None:
        """Hold on, or let go."""
        self._optimizer.held = self._held if update < self._updates else None
        if self._updates and update == self._updates:
            self._optimizer.restart()


def _needs_reference(run: Run) -> bool:
    return run.algorithm.passes.reference != "none"


def _refers_to_start(run: Run) -> bool:
    return _needs_reference(run) and run.reference in (None, START)


def _take(policy: ActorCritic, start: ActorCritic, place: str) -> set[str]:
    """Copy weights and statistics; returns the parts that the start does not have and which stay as they were made."""
    _check_same_actions(policy, start, place)
    _check_same_network(policy, start, place)
    own, given = policy.state_dict(), start.state_dict()
    new = {name for name in own if name not in given}
    for name, tensor in own.items():
        if name not in new:
            tensor.copy_(given[name])
    return {name.split(".")[0] for name in new}


def _check_same_observations(policy: ActorCritic, other: ActorCritic, place: str) -> None:
    """Refuse a policy that sees something else."""
    if _outline(policy.observation_space) != _outline(other.observation_space):
        raise UsageError(
            f"the policy of {place} sees other observations than the environment gives: {other.observation_space} "
            f"there, {policy.observation_space} here; take one that was trained on the same observations"
        )


def _check_same_actions(policy: ActorCritic, other: ActorCritic, place: str) -> None:
    """Refuse a policy that sees or does something else."""
    _check_same_observations(policy, other, place)
    if policy.action_space != other.action_space:
        raise UsageError(
            f"the policy of {place} acts in another action space than the environment has: {other.action_space} "
            f"there, {policy.action_space} here; take one that was trained for the same actions"
        )
    ours, theirs = type(policy.head).__name__, type(other.head).__name__
    if ours != theirs:
        raise UsageError(
            f"the policy of {place} draws actions from another family: {theirs} there, {ours} here; set "
            "policy.distribution to that policy's"
        )


def _check_same_spread(policy: ActorCritic, reference: ActorCritic) -> None:
    """Refuse an exact KL of distributions whose parameters do not mean the same."""
    for name in ("log_std_bounds", "state_dependent_std"):
        here, there = getattr(policy.config, name), getattr(reference.config, name)
        if here != there:
            raise UsageError(
                f"an exact KL compares parameters of distributions, and the reference's mean something else: its "
                f"policy.{name} is {there!r}, and {here!r} here; take another estimator, or make them equal"
            )


def _check_same_network(policy: ActorCritic, start: ActorCritic, place: str) -> None:
    """Refuse a policy whose function the weights alone would not carry over."""
    other: list[str] = []
    for name in policy.config.__dataclass_fields__:
        here, there = getattr(policy.config, name), getattr(start.config, name)
        if name not in _OWN_OF_THE_RUN and here != there:
            other.append(f"policy.{name} is {there!r} there and {here!r} here")
    own, given = policy.state_dict(), start.state_dict()
    if not other:
        for name in sorted({*own, *given}):
            if (name in own and name in given) or name.startswith(_MAY_BE_NEW):
                continue
            other.append(f"{name} is only {'here' if name in own else 'there'}")
        for name in own.keys() & given.keys():
            if own[name].shape != given[name].shape:
                other.append(f"{name} is {tuple(given[name].shape)} there and {tuple(own[name].shape)} here")
    if other:
        raise UsageError(
            f"the network of {place} is not the run's: {'; '.join(sorted(other)[:6])}. Set the run's policy to what "
            "that policy has, or start from another one"
        )


def _outline(space: Any) -> Any:
    """A space without its bounds, which no network looks at."""
    if isinstance(space, Composite):
        return [(name, _outline(leaf)) for name, leaf in space.entries]
    return [type(space).__name__] + [
        getattr(space, name) for name in space.__dataclass_fields__ if name not in ("low", "high", "start", "dtype")
    ]

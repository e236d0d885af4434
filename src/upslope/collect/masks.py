"""Masks of valid actions become an entry of the observation, at the door.

Gymnasium has no one place for them: `info["action_mask"]` (Taxi, and environments made after it), a method of the
environment (sb3-contrib's `action_masks()`), or a key of a Dict observation (PettingZoo). All three become the entry
"action_mask" of what the policy sees, so that whatever holds an observation holds its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, cast, final

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from upslope.collect.errors import ActionMaskError, MissingActionMaskError, UnsupportedSpaceError
from upslope.policies.masking import action_sizes, has_valid, read_mask
from upslope.spaces import ACTION_MASK, OBSERVATION, Discrete, MultiDiscrete
from upslope.trajectory import ObservationArrays

MaskSource: TypeAlias = Literal["none", "info", "method", "observation"]
"""Where an environment's masks of valid actions are."""

_NAMES = {"info": "action_mask", "method": "action_masks", "observation": "action_mask"}
_Dict: TypeAlias = dict[str, Any]


class MaskSpace(gymnasium.spaces.MultiBinary):
    """Gymnasium's form of `upslope.spaces.ActionMask`: bits with choices."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__(sum(sizes))
        self.sizes = sizes


def mask_name(source: MaskSource, name: str | None) -> str:
    """The key of info, the method or the key of the observation: as given, or what most environments call it."""
    return _NAMES[source] if name is None else name


def mask_of(observation: ObservationArrays) -> np.ndarray | None:
    """[N, sum(sizes)] bool, the mask among observations as collected; None where there is none."""
    mask = observation.get(ACTION_MASK) if isinstance(observation, dict) else None
    return mask if mask is not None and mask.dtype == bool else None


@final
class MaskedEnvironment(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose mask is part of its observation.

    A Dict observation gets the entry "action_mask"; any other becomes `{"observation": ..., "action_mask": ...}`. At
    the end of an episode, where nobody acts, a mask may be empty or missing.

    Args:
        environment: outermost, with all its other wrappers.
        source: where its masks are.
        name: what they are called there; None for `action_mask`, or `action_masks` where it is a method.

    Raises:
        UnsupportedSpaceError: if its actions are no choices, or its observation has no place for a mask.
        ActionMaskError (also in reset and step): if a mask is missing, is none, or leaves no valid action.
    """

    def __init__(self, environment: gymnasium.Env[Any, Any], source: MaskSource, name: str | None = None) -> None:
        super().__init__(environment)
        self._source, self._name = source, mask_name(source, name)
        self._sizes = _sizes(environment.action_space)
        self._composite = isinstance(environment.observation_space, gymnasium.spaces.Dict)
        self.observation_space = _masked_space(environment.observation_space, source, self._name, self._sizes)
        if source == "method":
            self._method = _method(environment, environment.get_wrapper_attr, self._name)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: _Dict | None = None) -> tuple[Any, _Dict]:
        """Begin an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._steps = 0
        return self._with_mask(observation, info, ended=False), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, _Dict]:
        """Take one step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        seen = self._with_mask(observation, info, ended=bool(terminated or truncated))
        return seen, reward, terminated, truncated, info

    def get_state(self) -> _Dict:
        """How far the episode is: the mask itself is that of the environment's state."""
        return {"steps": self._steps}

    def set_state(self, state: _Dict) -> None:
        """Be as far."""
        self._steps = int(state["steps"])

    def _with_mask(self, observation: Any, info: Any, *, ended: bool) -> _Dict:
        entries = dict(observation) if self._composite else {OBSERVATION: observation}
        found = None
        match self._source:
            case "info":
                found = info.get(self._name)
            case "method":
                found = None if ended else self._method()
            case _:
                found = entries.pop(self._name, None)
        return {**entries, ACTION_MASK: _checked(found, self._sizes, self._where, ended=ended)}

    def _where(self) -> str:
        place = _PLACES[self._source].format(self._name)
        return (
            f"{self.env} after {self._steps} steps of the episode, {place}"
            if self._steps
            else f"{self.env} after reset(), {place}"
        )


@final
class MaskedVectorEnvironment(VectorWrapper[Any, Any, Any, Any, Any]):
    """The same for a vector environment, whichever way it resets itself.

    Of Gymnasium's own, the last mask of an episode that a SAME_STEP environment has already left is taken from
    `info["final_info"]`; where there is none, it is empty: nobody acts there.

    Args:
        environment: to be adapted.
        source, name: as in `MaskedEnvironment`.

    Raises:
        UnsupportedSpaceError: as `MaskedEnvironment` does.
        ActionMaskError (also in reset and step): likewise; it names the environment.
    """

    def __init__(self, environment: VectorEnv[Any, Any, Any], source: MaskSource, name: str | None = None) -> None:
        super().__init__(environment)
        self._source, self._name = source, mask_name(source, name)
        self._sizes = _sizes(environment.single_action_space)
        single = environment.single_observation_space
        self._composite = isinstance(single, gymnasium.spaces.Dict)
        self.single_observation_space = _masked_space(single, source, self._name, self._sizes)
        self.observation_space = batch_space(self.single_observation_space, environment.num_envs)
        if source == "method":
            self._method = _vector_method(environment, self._name)
        self._masks = np.zeros((environment.num_envs, sum(self._sizes)), dtype=bool)
        self._steps = 0

    def reset(self, *, seed: Any = None, options: _Dict | None = None) -> tuple[Any, _Dict]:
        """Begin episodes, everywhere or where `options["reset_mask"]` says."""
        chosen = None if options is None else options.get("reset_mask")
        observation, info = self.env.reset(seed=seed, options=options)
        everywhere = np.ones(self.num_envs, dtype=bool)
        new = everywhere if chosen is None else np.asarray(chosen, dtype=bool)
        self._steps = 0 if chosen is None else self._steps
        return self._with_masks(observation, info, "observation", new, ~everywhere), info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, _Dict]:
        """Take one step in each."""
        observation, reward, terminated, truncated, info = self.env.step(actions)
        self._steps += 1
        same_step = self.metadata.get("autoreset_mode") in (AutoresetMode.SAME_STEP, AutoresetMode.SAME_STEP.value)
        done = np.logical_or(terminated, truncated)
        new = np.ones(self.num_envs, dtype=bool)
        seen = self._with_masks(observation, info, "observation", new, np.zeros_like(new) if same_step else done)
        if "final_obs" in info:
            info = {**info, "final_obs": self._finals(info, done)}
        return seen, reward, terminated, truncated, info

    def get_state(self) -> _Dict:
        """The masks that a reset of some environments leaves as they are, and the steps since all began."""
        return {"masks": self._masks.copy(), "steps": self._steps}

    def set_state(self, state: _Dict) -> None:
        """Put those back."""
        self._masks, self._steps = np.array(state["masks"], dtype=bool), int(state["steps"])

    def _with_masks(self, observation: Any, info: Any, where: str, new: np.ndarray, ended: np.ndarray) -> _Dict:
        entries = dict(observation) if self._composite else {OBSERVATION: observation}
        masks = self._masks.copy()
        match self._source:
            case "info":
                found, given = info.get(self._name), np.asarray(info.get(f"_{self._name}", new), dtype=bool)
            case "method":
                found, given = self._method(), new
            case _:
                found, given = entries.pop(self._name, None), new
        for index in np.flatnonzero(new):
            row = found[index] if found is not None and given[index] else None
            masks[index] = _checked(row, self._sizes, self._describe(where, int(index)), ended=bool(ended[index]))
        self._masks = masks
        return {**entries, ACTION_MASK: masks.copy()}

    def _finals(self, info: Mapping[str, Any], done: np.ndarray) -> np.ndarray:
        """The last observations with their masks, one dict per environment whose episode ended."""
        finals: np.ndarray = np.full(self.num_envs, None, dtype=object)
        inner = cast("_Dict", info.get("final_info", {}))
        for index in np.flatnonzero(done):
            theirs = _row(info["final_obs"], int(index))
            entries = dict(theirs) if self._composite else {OBSERVATION: theirs}
            found = entries.pop(self._name, None) if self._source == "observation" else None
            if self._source == "info" and inner.get(f"_{self._name}", done)[index] and self._name in inner:
                found = inner[self._name][index]
            where = self._describe("last observation", int(index))
            finals[index] = {**entries, ACTION_MASK: _checked(found, self._sizes, where, ended=True)}
        return finals

    def _describe(self, where: str, index: int) -> Callable[[], str]:
        place = _PLACES[self._source].format(self._name)
        return lambda: f"environment {index} of {self.env}, step {self._steps}: {where}, {place}"


_WITHOUT = 'environment.action_mask="none" for an environment without masks'
_PLACES = {"info": "info[{!r}]", "method": "the method {}()", "observation": "the observation's entry {!r}"}


def mask_environment(
    environment: gymnasium.Env[Any, Any], source: MaskSource, name: str | None
) -> gymnasium.Env[Any, Any]:
    """The environment, with its mask in its observation unless the source is "none"."""
    return environment if source == "none" else MaskedEnvironment(environment, source, name)


def mask_vector_environment(
    environment: VectorEnv[Any, Any, Any], source: MaskSource, name: str | None
) -> VectorEnv[Any, Any, Any]:
    """The same for a vector environment."""
    return environment if source == "none" else MaskedVectorEnvironment(environment, source, name)


def _sizes(space: gymnasium.Space[Any]) -> tuple[int, ...]:
    match space:
        case gymnasium.spaces.Discrete():
            ours = Discrete(int(space.n))
        case gymnasium.spaces.MultiDiscrete() if len(space.shape) == 1:
            ours = MultiDiscrete(tuple(map(int, space.nvec)), (0,) * len(space.nvec))
        case _:
            raise UnsupportedSpaceError(
                f"masks of valid actions are for Discrete and MultiDiscrete actions, not {space}: set "
                'environment.action_mask="none"'
            )
    sizes = action_sizes(ours)
    assert sizes is not None
    return sizes


def _masked_space(
    space: gymnasium.Space[Any], source: MaskSource, name: str, sizes: tuple[int, ...]
) -> gymnasium.spaces.Dict:
    entries = dict(space.spaces) if isinstance(space, gymnasium.spaces.Dict) else {OBSERVATION: space}
    if source == "observation":
        if entries.pop(name, None) is None or not isinstance(space, gymnasium.spaces.Dict):
            raise UnsupportedSpaceError(
                f"the mask should be the entry {name!r} of the observation, and the observation space is {space}: set "
                "environment.action_mask_name to the key it has there, environment.action_mask to where it is, or "
                f"{_WITHOUT}"
            )
        if not entries:
            raise UnsupportedSpaceError(f"{space} has no entry but the mask: there is nothing for a policy to see")
    if ACTION_MASK in entries:
        raise UnsupportedSpaceError(
            f"the observation space {space} has an entry {ACTION_MASK!r} already; if that is the mask, set "
            'environment.action_mask="observation", else rename it'
        )
    return gymnasium.spaces.Dict({**entries, ACTION_MASK: MaskSpace(sizes)})


def _checked(found: Any, sizes: tuple[int, ...], where: Callable[[], str], *, ended: bool) -> np.ndarray:
    """Bool [sum(sizes)] of what was found; empty where an episode ended and there is none."""
    if found is None:
        if ended:
            return np.zeros(sum(sizes), dtype=bool)
        raise MissingActionMaskError(
            f"{where()}: there is no mask of valid actions. Every reset() and step() must give one; set "
            "environment.action_mask to where it is (info, method or observation) and environment.action_mask_name to "
            f"its name, or {_WITHOUT}"
        )
    try:
        mask = read_mask(found, sizes)
    except ValueError as error:
        raise ActionMaskError(f"{where()}: {error}") from error
    if not ended and not has_valid(mask, sizes):
        raise ActionMaskError(
            f"{where()}: no action is valid ({found!r:.100}). Some action must be, until the episode ends: terminate "
            "where nothing can be done"
        )
    return mask


def _method(environment: Any, find: Callable[[str], Any], name: str) -> Callable[[], Any]:
    try:
        method = find(name)
    except AttributeError:
        method = None
    if not callable(method):
        raise MissingActionMaskError(
            f"{environment} has no method {name}() to ask for masks of valid actions: set environment.action_mask_name "
            f'to what it is called, environment.action_mask="info" if masks are in info, or {_WITHOUT}'
        )
    return method


def _vector_method(environment: VectorEnv[Any, Any, Any], name: str) -> Callable[[], Any]:
    bare: Any = environment.unwrapped
    if isinstance(bare, SyncVectorEnv):
        _method(environment, bare.envs[0].get_wrapper_attr, name)
    if isinstance(bare, SyncVectorEnv | AsyncVectorEnv):
        return lambda: bare.call(name)
    return _method(environment, lambda wanted: getattr(bare, wanted), name)


def _row(batch: Any, index: int) -> Any:
    """One environment's observation, of an array of them or of batched arrays, in dicts."""
    if isinstance(batch, dict):
        return {key: _row(entry, index) for key, entry in cast("_Dict", batch).items()}
    if isinstance(batch, tuple):
        return tuple(_row(entry, index) for entry in cast("tuple[Any, ...]", batch))
    return batch[index]

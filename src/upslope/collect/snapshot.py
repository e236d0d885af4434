"""The state of an environment as plain values and arrays, for the classes whose state is known.

Copying an environment object is no snapshot: a copied MuJoCo or Atari environment silently becomes another one. So each
class has its own adapter, a user's class brings the two methods of `Snapshotable`, and whatever is left is not
snapshotted at all but rebuilt (see `upslope.collect.vector.VectorEnvironment.rebuild`).
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast, runtime_checkable

import gymnasium
import numpy as np
import torch

from upslope.trajectory import Tree


@runtime_checkable
class Snapshotable(Protocol):
    """An environment or wrapper that can say all it remembers (a wrapper: only what it adds to the one inside)."""

    def get_state(self) -> Tree:
        """All that the next steps depend on: nested dicts and lists of numbers, strings, None, arrays and tensors."""
        ...

    def set_state(self, state: Tree) -> None:
        """Be in that state, which is as `get_state` gave it, but for tuples, which have become lists."""
        ...


_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "gymnasium.envs.classic_control.cartpole:CartPoleEnv": ("state", "steps_beyond_terminated"),
    "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv": ("state", "steps", "prev_done"),
    "gymnasium.envs.classic_control.pendulum:PendulumEnv": ("state", "last_u"),
    "gymnasium.envs.classic_control.acrobot:AcrobotEnv": ("state",),
    "gymnasium.envs.classic_control.mountain_car:MountainCarEnv": ("state",),
    "gymnasium.envs.classic_control.continuous_mountain_car:Continuous_MountainCarEnv": ("state",),
    "gymnasium.envs.toy_text.frozen_lake:FrozenLakeEnv": ("s", "lastaction"),
    "gymnasium.envs.toy_text.cliffwalking:CliffWalkingEnv": ("s", "lastaction"),
    "gymnasium.envs.toy_text.taxi:TaxiEnv": ("s", "lastaction", "fickle_step", "taxi_orientation"),
    "gymnasium.envs.toy_text.blackjack:BlackjackEnv": (
        "dealer",
        "player",
        "dealer_top_card_suit",
        "dealer_top_card_value_str",
    ),
    "upslope.collect.finite:FiniteEnvironment": ("state", "elapsed"),
    "upslope.collect.partial:KeptEntries": (),
    "gymnasium.wrappers.common:TimeLimit": ("_elapsed_steps",),
    "gymnasium.wrappers.common:OrderEnforcing": ("_has_reset",),
    "gymnasium.wrappers.common:PassiveEnvChecker": ("checked_reset", "checked_step"),
    "gymnasium.wrappers.transform_action:ClipAction": (),
    "gymnasium.wrappers.transform_action:RescaleAction": (),
    "gymnasium.wrappers.transform_observation:DtypeObservation": (),
    "gymnasium.wrappers.transform_observation:FilterObservation": (),
    "gymnasium.wrappers.transform_observation:FlattenObservation": (),
    "gymnasium.wrappers.transform_observation:RescaleObservation": (),
    "gymnasium.wrappers.transform_observation:ReshapeObservation": (),
    "gymnasium.wrappers.stateful_observation:TimeAwareObservation": ("timesteps",),
}
_MUJOCO = "gymnasium.envs.mujoco."
_STORED = tuple(
    np.dtype(code) for code in ("?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8")
)
"""Types of arrays that a checkpoint can hold."""
_DEPTH = 32
_FAULTS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What mistakes in a user's get_state and set_state raise."""


def qualified_name(thing: object) -> str:
    """`"module:Class"` of an object."""
    return f"{type(thing).__module__}:{type(thing).__qualname__}"


def snapshot_environment(environment: gymnasium.Env[Any, Any] | gymnasium.vector.VectorEnv[Any, Any, Any]) -> Tree:
    """The state of an environment and of the wrappers around it, outermost first.

    Raises:
        ValueError: if a layer's state cannot be taken.
    """
    return [{"class": qualified_name(layer), "state": _layer_state(layer)} for layer in _layers(environment)]


def restore_environment(
    environment: gymnasium.Env[Any, Any] | gymnasium.vector.VectorEnv[Any, Any, Any], tree: Tree
) -> None:
    """Put a snapshot into an environment of the same make, fresh or used.

    It is reset first: wrappers such as Gymnasium's checker refuse to step what they never saw begin.

    Raises:
        ValueError: if the snapshot is of other classes.
    """
    layers = _layers(environment)
    if [qualified_name(layer) for layer in layers] != [entry["class"] for entry in tree]:
        raise ValueError(
            f"the checkpoint holds the state of {[entry['class'] for entry in tree]}, this environment is made of "
            f"{[qualified_name(layer) for layer in layers]}; resume with the environment the run was started with"
        )
    environment.reset()
    for layer, entry in zip(layers, tree, strict=True):
        _restore_layer(layer, entry["state"])


def _layers(environment: Any) -> list[Any]:
    layers = [environment]
    while isinstance(layers[-1], gymnasium.Wrapper | gymnasium.vector.VectorWrapper):
        layers.append(layers[-1].env)
    return layers


def _layer_state(layer: Any) -> Tree:
    name = qualified_name(layer)
    if name.startswith(_MUJOCO):
        return {"random": _generator_state(layer.np_random), **_mujoco_state(layer)}
    if name in _ATTRIBUTES:
        attributes = {
            attribute: _plain(getattr(layer, attribute, None), f"{name}.{attribute}") for attribute in _ATTRIBUTES[name]
        }
        return attributes if _is_wrapper(layer) else {"random": _generator_state(layer.np_random), **attributes}
    if isinstance(layer, Snapshotable):
        try:
            state = layer.get_state()
        except _FAULTS as error:
            raise ValueError(f"{name}.get_state() raised {type(error).__name__}: {error}") from error
        return _plain(state, f"what {name}.get_state() returns")
    raise ValueError(
        f"the state of {name} cannot be taken: give it get_state() and set_state(state), or run with resume='rebuild'"
    )


def _restore_layer(layer: Any, state: Any) -> None:
    name = qualified_name(layer)
    if not name.startswith(_MUJOCO) and name not in _ATTRIBUTES:
        try:
            cast("Snapshotable", layer).set_state(_unplain(state))
        except _FAULTS as error:
            raise ValueError(f"{name}.set_state(state) raised {type(error).__name__}: {error}") from error
        return
    if not _is_wrapper(layer):
        layer.np_random = _generator(state["random"])
    if name.startswith(_MUJOCO):
        _restore_mujoco(layer, state)
        return
    for attribute in _ATTRIBUTES[name]:
        setattr(layer, attribute, _unplain(state[attribute]))


def _is_wrapper(layer: Any) -> bool:
    return isinstance(layer, gymnasium.Wrapper | gymnasium.vector.VectorWrapper)


def _plain(value: Any, where: str, depth: int = 0) -> Tree:
    """What a checkpoint can hold of a value: NumPy scalars become arrays without dimensions, tuples become lists.

    Raises:
        ValueError: naming the place of what it cannot hold.
    """
    match value:
        case None | bool():
            return value
        case str():
            return str(value)
        case np.generic():
            return _plain(np.array(value), where)
        case np.ndarray() if value.dtype in _STORED:
            return np.array(value)
        case torch.Tensor() if value.layout is torch.strided:
            return value.detach().cpu().clone()
        case int():
            return int(value)
        case float():
            return float(value)
        case dict() | list() | tuple() if depth >= _DEPTH:
            raise ValueError(f"{where} is nested more than {_DEPTH} levels deep, or contains itself")
        case dict():
            for key in value:
                if type(key) is not str:
                    raise ValueError(f"{where} has the key {key!r}; keys must be str")
            return {key: _plain(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
        case _:
            kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise ValueError(
                f"{where} is of the type {kind}, which a checkpoint cannot hold: return dicts with str keys, lists, "
                "None, bool, int, float, str, numeric arrays or tensors, or run with resume='rebuild'"
            )


def _unplain(value: Tree) -> Any:
    match value:
        case dict():
            return {key: _unplain(item) for key, item in value.items()}
        case list() | tuple():
            return [_unplain(item) for item in value]
        case np.ndarray():
            return value.copy() if value.ndim else value[()]
        case torch.Tensor():
            return value.clone()
        case _:
            return value


def _generator_state(generator: np.random.Generator) -> Tree:
    """A PCG64 generator's state, its 128-bit numbers as text."""
    state = cast("dict[str, Any]", generator.bit_generator.state)
    if state["bit_generator"] != "PCG64":
        raise ValueError(f"the random numbers come from {state['bit_generator']}, not PCG64; run with resume='rebuild'")
    inner = state["state"]
    return {
        "state": str(inner["state"]),
        "increment": str(inner["inc"]),
        "has_uint32": int(state["has_uint32"]),
        "uinteger": int(state["uinteger"]),
    }


def _generator(state: Tree) -> np.random.Generator:
    bits = np.random.PCG64(0)
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": int(state["state"]), "inc": int(state["increment"])},
        "has_uint32": state["has_uint32"],
        "uinteger": state["uinteger"],
    }
    return np.random.Generator(bits)


def _mujoco_arrays(data: Any) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name in dir(data):
        if name.startswith("_"):
            continue
        value = getattr(data, name)
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.flags.writeable:
            arrays[name] = value
    return arrays


def _mujoco_state(environment: Any) -> dict[str, Tree]:
    """The integration state and every derived array: some rewards read fields of the step before."""
    mujoco = importlib.import_module("mujoco")
    kind = int(mujoco.mjtState.mjSTATE_INTEGRATION)
    state = np.zeros(mujoco.mj_stateSize(environment.model, kind))
    mujoco.mj_getState(environment.model, environment.data, state, kind)
    arrays = {name: array.copy() for name, array in _mujoco_arrays(environment.data).items()}
    return {"integration": state, "arrays": arrays}


def _restore_mujoco(environment: Any, state: Tree) -> None:
    mujoco = importlib.import_module("mujoco")
    kind = int(mujoco.mjtState.mjSTATE_INTEGRATION)
    mujoco.mj_setState(environment.model, environment.data, np.asarray(state["integration"]), kind)
    mujoco.mj_forward(environment.model, environment.data)
    for name, array in _mujoco_arrays(environment.data).items():
        saved = state["arrays"].get(name)
        if saved is not None and tuple(saved.shape) == array.shape:
            array[...] = np.asarray(saved)

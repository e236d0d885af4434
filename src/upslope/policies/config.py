"""The settings of a control policy, and the family of distributions they ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np

from upslope.policies.continuous import Beta, Gaussian, SquashedGaussian
from upslope.policies.distributions import Bernoulli, Categorical, Head, MultiCategorical
from upslope.policies.networks import ActivationName, EncoderName, ImageLayout
from upslope.spaces import (
    ActionMask,
    Box,
    Composite,
    Discrete,
    Leaf,
    MultiBinary,
    MultiDiscrete,
    ObservationLeaf,
    Space,
    space_from_tree,
)
from upslope.typed_tree import read_fields, read_value


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """What a policy remembers of the episode so far; it stands between the encoder (and torso) and the heads."""

    kind: Literal["gru", "lstm", "transformer"] = "gru"
    """A gated recurrent unit, a long short-term memory, or attention to the last steps of the episode."""
    size: int = 64
    """Units, or features, of each layer."""
    layers: int = 1
    """How many, one on top of the other."""
    shared: bool = False
    """One memory for actor and critic, instead of one each."""
    context: int = 32
    """How many earlier steps each layer of a transformer sees."""
    heads: int = 4
    """Of a transformer's attention; they share its size."""

    def __post_init__(self) -> None:
        """Refuse sizes that have no meaning."""
        for name in ("size", "layers", "context", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory.{name} must be at least 1, got {getattr(self, name)}")
        if self.kind not in ("gru", "lstm", "transformer"):
            raise ValueError(f"memory.kind must be one of gru, lstm, transformer; got {self.kind!r}")
        if self.kind == "transformer" and self.size % self.heads:
            raise ValueError(
                "the heads of a transformer share its size: set memory.size to a multiple of "
                f"memory.heads={self.heads}, got {self.size}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorCriticConfig:
    """Networks, distribution and normalisers of a control policy."""

    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers, after the encoder; empty puts the outputs directly on the encoder's features."""
    activation: ActivationName = "tanh"
    """Between the hidden layers."""
    shared: bool = False
    """One encoder and one set of hidden layers for actor and critic, instead of one each."""
    critic: bool = True
    """Whether there is a critic at all."""
    memory: MemoryConfig | None = None
    """What is remembered of the episode so far; None for nothing: the policy acts on what it sees now."""
    encoder: EncoderName = "auto"
    """What images go through: "auto" takes nature_cnn from 36 x 36 pixels of bytes, small_cnn from 5 x 5."""
    image_layout: ImageLayout = "auto"
    """Where an image's channels are; "auto" takes the smaller of its outer dimensions for them."""
    distribution: Literal[
        "auto", "categorical", "multi_categorical", "bernoulli", "gaussian", "squashed_gaussian", "beta"
    ] = "auto"
    """Family of the actions; "auto" takes the one that fits the action space, gaussian for real numbers."""
    log_std_init: float = 0.0
    """Logarithm of a Gaussian's standard deviation before training."""
    log_std_bounds: tuple[float, float] | None = None
    """Keep the log_std smoothly within these bounds."""
    state_dependent_std: bool = False
    """Let the network put out log_std, instead of one learned vector for all states."""
    normalize_observation: bool = False
    """Standardise observations by their running mean and variance (images, choices and bits excepted)."""
    normalize_reward: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    observation_clip: float = 10.0
    """Largest absolute value of a standardised observation."""
    reward_clip: float = 10.0
    """Largest absolute value of a scaled reward."""
    orthogonal: bool = True
    """Orthogonal initial weights with the gains below and zero biases; False for PyTorch's defaults."""
    hidden_gain: float = math.sqrt(2.0)
    """Gain of encoder and hidden layers."""
    policy_gain: float = 0.01
    """Gain of the actor's output layer: small, so that the first policy is nearly uniform."""
    value_gain: float = 1.0
    """Gain of the critic's output layer."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if any(size < 1 for size in self.hidden):
            raise ValueError(f"hidden layers need at least one unit each, got hidden={self.hidden}")
        if not (self.observation_clip > 0.0 and self.reward_clip > 0.0):
            raise ValueError(
                "observation_clip and reward_clip must be positive (inf for no clipping), "
                f"got {self.observation_clip} and {self.reward_clip}"
            )
        gains = {name: getattr(self, name) for name in ("hidden_gain", "policy_gain", "value_gain")}
        for name, value in {"log_std_init": self.log_std_init, **gains}.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
        if self.log_std_bounds is not None and not all(map(math.isfinite, self.log_std_bounds)):
            raise ValueError(f"log_std_bounds must be finite, or None for no bounds, got {self.log_std_bounds}")


def config_to_tree(config: ActorCriticConfig) -> dict[str, Any]:
    """As plain nested dicts: `config_from_tree` reads them."""
    tree = asdict(config)
    return tree if config.memory is None else {**tree, "memory": {"class": "MemoryConfig", **asdict(config.memory)}}


def config_from_tree(tree: Mapping[str, Any], numbers: int) -> ActorCriticConfig:
    """The inverse of `config_to_tree`; lists may stand for tuples.

    Args:
        tree: of `config_to_tree`.
        numbers: how many the saved tensors hold; every hidden unit has one at least.

    Raises:
        ValueError: naming the setting that is missing, unknown or none that these tensors can have.
    """
    config = read_fields(ActorCriticConfig, _mapping(tree, "config"), "config")
    if max(config.hidden, default=0) > numbers:
        raise ValueError(f"config.hidden is {config.hidden}, but the saved tensors hold {numbers} numbers altogether")
    memory = config.memory
    if memory is not None and max(memory.size, memory.layers, memory.heads) > numbers:
        raise ValueError(f"config.memory is {memory}, but the saved tensors hold {numbers} numbers altogether")
    if memory is not None and memory.kind == "transformer" and memory.context > numbers:
        raise ValueError(f"config.memory is {memory}, but the saved tensors hold {numbers} numbers altogether")
    return config


_LARGEST_OBSERVATION = 1 << 28


def read_policy_tree(
    tree: Mapping[str, Any], numbers: int, *, encoder_given: bool
) -> tuple[Space, Space, ActorCriticConfig]:
    """Observation space, action space and configuration of a saved policy, with every value checked.

    Args:
        tree: of `ActorCritic.config_tree`; lists may stand for tuples.
        numbers: how many its tensors hold.
        encoder_given: whether the user passes an encoder to load it with.

    Raises:
        ValueError: naming what is missing, unknown, of the wrong type or too large; or if an encoder is missing or too
            many.
    """
    expected = {"observation_space", "action_space", "config", "own_encoder"}
    if not isinstance(tree, Mapping) or set(tree) != expected:
        raise ValueError(f"a policy is described by a mapping with {sorted(expected)}, got {tree!r}")
    own = read_value(str | None, tree["own_encoder"], "own_encoder")
    if own is not None and not encoder_given:
        raise ValueError(f"this policy was made with an encoder of its own, {own}: pass a new one as `encoder`")
    if own is None and encoder_given:
        raise ValueError("this policy was made with a built-in encoder: leave `encoder` out")
    return (
        saved_space(tree["observation_space"], "observation_space", _LARGEST_OBSERVATION),
        saved_space(tree["action_space"], "action_space", numbers),
        config_from_tree(tree["config"], numbers),
    )


def saved_space(tree: Mapping[str, Any], where: str, largest: int) -> Space:
    """The space of a saved policy, by the inverse of `upslope.spaces.space_to_tree`, with every value checked.

    Args:
        tree: of `space_to_tree`; lists may stand for tuples.
        where: its name, for the error.
        largest: how many numbers one element may have, choices counted one by one.

    Raises:
        ValueError: naming what is missing, unknown, of the wrong type or too large.
    """
    try:
        space = space_from_tree(_mapping(tree, where))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if isinstance(space, Composite):
        leaves = [(name, _checked(leaf, f"{where}.{name}", largest)) for name, leaf in space.entries]
        return Composite(tuple(leaves))
    return _checked_leaf(space, where, largest)


def _mapping(tree: object, where: str) -> Mapping[str, Any]:
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where} must be a mapping, got {tree!r}")
    return cast("Mapping[str, Any]", tree)


def _checked(leaf: ObservationLeaf, where: str, largest: int) -> ObservationLeaf:
    if not isinstance(leaf, ActionMask):
        return _checked_leaf(leaf, where, largest)
    mask = read_fields(ActionMask, asdict(leaf), where)
    if not mask.sizes or any(size < 0 for size in mask.sizes) or sum(mask.sizes) > largest:
        raise ValueError(f"{where} is no mask that the policy of these tensors can have: {mask}")
    return mask


def _checked_leaf(leaf: Leaf, where: str, largest: int) -> Leaf:
    leaf = read_fields(type(leaf), asdict(leaf), where)
    start: tuple[int, ...] = ()
    match leaf:
        case Box():
            sizes, size = leaf.shape, math.prod(leaf.shape)
            if leaf.dtype not in _NUMBERS:
                raise ValueError(f"{where}.dtype must be one of {', '.join(sorted(_NUMBERS))}, got {leaf.dtype!r}")
            for name, bound in (("low", leaf.low), ("high", leaf.high)):
                if isinstance(bound, tuple) and len(bound) != size:
                    raise ValueError(f"{where}.{name} must be one number or {size}, got {len(bound)}")
        case Discrete():
            sizes, size, start = (leaf.n,), leaf.n, (leaf.start,)
        case MultiDiscrete():
            sizes, size, start = leaf.choices, sum(leaf.choices), leaf.start
            if len(start) != len(sizes):
                raise ValueError(f"{where} must have one start per choice, got {len(start)} and {len(sizes)}")
        case MultiBinary():
            sizes, size = (leaf.n,), leaf.n
    if any(part < 0 for part in sizes) or size > largest or any(abs(offset) >= 1 << 62 for offset in start):
        raise ValueError(f"{where} is no space that the policy of these tensors can have: {leaf}")
    return leaf


_NUMBERS = {"bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))} | {
    "float16",
    "float32",
    "float64",
}

_FAMILIES: dict[type[Space], tuple[str, ...]] = {
    Discrete: ("categorical",),
    MultiDiscrete: ("multi_categorical",),
    MultiBinary: ("bernoulli",),
    Box: ("gaussian", "squashed_gaussian", "beta"),
}


def build_head(space: Space, config: ActorCriticConfig) -> Head:
    """The family of distributions for an action space.

    Raises:
        ValueError: if the space is none that a policy can act in, or the distribution asked for does not fit it.
    """
    if isinstance(space, Composite):
        raise ValueError(
            "Dict and Tuple action spaces are not supported: wrap the environment so that its actions are one Box, "
            "Discrete, MultiDiscrete or MultiBinary"
        )
    if isinstance(space, Box) and not space.dtype.startswith("float"):
        raise ValueError(f"actions of type {space.dtype} are not supported: make the space MultiDiscrete, or float32")
    fitting = _FAMILIES[type(space)]
    if config.distribution not in ("auto", *fitting):
        raise ValueError(
            f"distribution={config.distribution!r} does not fit {space}: use one of auto, {', '.join(fitting)}"
        )
    match space:
        case Discrete():
            return Categorical(space.n, space.start)
        case MultiDiscrete():
            return MultiCategorical(space.choices, space.start)
        case MultiBinary():
            return Bernoulli(space.n)
        case Box():
            return _build_continuous(space, config)


def _build_continuous(space: Box, config: ActorCriticConfig) -> Head:
    low, high = (_bound(bound, space) for bound in (space.low, space.high))
    if config.distribution == "beta":
        return Beta(low, high)
    family = SquashedGaussian if config.distribution == "squashed_gaussian" else Gaussian
    return family(
        low,
        high,
        log_std_init=config.log_std_init,
        log_std_bounds=config.log_std_bounds,
        state_dependent_std=config.state_dependent_std,
    )


def _bound(bound: float | tuple[float, ...], space: Box) -> np.ndarray:
    if isinstance(bound, tuple):
        return np.array(bound, dtype=space.dtype).reshape(space.shape)
    return np.full(space.shape, bound, dtype=space.dtype)

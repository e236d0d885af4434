"""The settings of a control policy, and the family of distributions they ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import numpy as np

from upslope.policies.continuous import Beta, Gaussian, SquashedGaussian
from upslope.policies.distributions import Bernoulli, Categorical, Head, MultiCategorical
from upslope.policies.networks import ActivationName, EncoderName, ImageLayout
from upslope.spaces import Box, Composite, Discrete, MultiBinary, MultiDiscrete, Space


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
        if self.observation_clip <= 0.0 or self.reward_clip <= 0.0:
            raise ValueError(
                "observation_clip and reward_clip must be positive (inf for no clipping), "
                f"got {self.observation_clip} and {self.reward_clip}"
            )


def config_from_tree(tree: Mapping[str, Any]) -> ActorCriticConfig:
    """The inverse of `dataclasses.asdict`; lists stand for tuples.

    Raises:
        ValueError: if a setting is missing or unknown.
    """
    names = {field.name for field in fields(ActorCriticConfig)}
    if set(tree) != names:
        missing, unknown = sorted(names - set(tree)), sorted(set(tree) - names)
        raise ValueError(f"the policy's configuration does not fit this version: missing {missing}, unknown {unknown}")
    settings: dict[str, Any] = {n: tuple(cast("list[Any]", v)) if isinstance(v, list) else v for n, v in tree.items()}
    return ActorCriticConfig(**settings)


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

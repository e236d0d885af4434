"""A policy with masks, as a user holds it: acting, saving, its own encoders, and what it says of impossible actions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from upslope import ActorCriticConfig, load
from upslope.policies import ActorCritic
from upslope.policies.masking import Masking
from upslope.spaces import (
    ACTION_MASK,
    OBSERVATION,
    ActionMask,
    Box,
    Composite,
    Discrete,
    MultiBinary,
    MultiDiscrete,
    Space,
    space_from_tree,
    space_to_tree,
    without_mask,
)
from upslope.train.checkpoint import save_policy_folder

VECTOR = Box((2,), -1.0, 1.0)
IMAGE = Box((6, 6, 1), 0.0, 255.0, "uint8")
ONE = Composite(((ACTION_MASK, ActionMask((3,))), (OBSERVATION, VECTOR)))
SEVERAL = Composite(((ACTION_MASK, ActionMask((2, 3))), ("camera", IMAGE), ("speed", VECTOR)))
PAIR = MultiDiscrete((2, 3), (0, 0))


def policy(space: Space = ONE, actions: Space = Discrete(3), **settings: Any) -> ActorCritic:  # noqa: B008
    generator = torch.Generator().manual_seed(0)
    return ActorCritic(space, actions, ActorCriticConfig(hidden=(8,), **settings), generator=generator)


def test_what_the_networks_see_is_the_rest() -> None:
    assert without_mask(ONE) == VECTOR
    assert without_mask(SEVERAL) == Composite((("camera", IMAGE), ("speed", VECTOR)))
    assert without_mask(VECTOR) == VECTOR
    assert space_from_tree(json.loads(json.dumps(space_to_tree(SEVERAL)))) == SEVERAL


def test_a_mask_that_does_not_fit_the_actions_is_refused() -> None:
    for actions in (Discrete(4), PAIR, VECTOR, MultiBinary(3)):
        with pytest.raises(ValueError, match="does not fit the actions"):
            policy(ONE, actions)
    with pytest.raises(ValueError, match="an ActionMask is an entry of a Composite"):
        space_from_tree(space_to_tree(ActionMask((3,))))


MASKS = {
    "int8": np.array([0, 0, 1], np.int8),
    "bool": np.array([False, False, True]),
    "list": [0, 0, 1],
}


@pytest.mark.parametrize("form", MASKS)
def test_act_takes_a_mask_beside_the_observation(form: str) -> None:
    ours, seen = policy(), np.array([0.3, -0.2], np.float32)
    assert ours.act(seen, action_mask=MASKS[form]) == 2
    assert ours.act({OBSERVATION: seen, ACTION_MASK: MASKS[form]}) == 2
    assert all(ours.act(seen, action_mask=MASKS[form], deterministic=False) == 2 for _ in range(20))


def test_act_takes_masks_of_a_batch_and_of_several_choices() -> None:
    batch = np.zeros((3, 2), np.float32)
    assert policy().act(batch, action_mask=np.eye(3, dtype=np.int8)).tolist() == [0, 1, 2]
    seen = {"camera": np.zeros((6, 6, 1), np.uint8), "speed": np.zeros(2, np.float32)}
    ours = policy(SEVERAL, PAIR)
    flat = np.array([0, 1, 0, 0, 1], np.int8)
    assert ours.act(seen, action_mask=flat).tolist() == [1, 2]
    assert ours.act(seen, action_mask=(flat[:2], flat[2:])).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (None, r"got none: pass act\(observation, action_mask="),
        ([0, 0, 0], "leaves no valid action"),
        ([1, 1], r"one entry for each of 3 choices, shape \(3,\), got shape \(2,\)"),
        ([0.5, 1.0, 1.0], "must hold bool, or whole numbers 0 and 1"),
        ((np.ones(2), np.ones(1)), r"one array for each of the choices \(3,\), got arrays of the shapes"),
    ],
    ids=["none", "empty", "short", "real", "parts"],
)
def test_act_refuses_masks_that_are_none(mask: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        policy().act(np.zeros(2, np.float32), action_mask=mask)


def test_a_policy_without_masks_refuses_one() -> None:
    with pytest.raises(ValueError, match="made without action masks"):
        policy(VECTOR).act(np.zeros(2, np.float32), action_mask=[1, 1, 1])


def test_a_saved_policy_keeps_its_masks(tmp_path: Path) -> None:
    ours = policy(SEVERAL, PAIR, normalize_observation=True)
    save_policy_folder(tmp_path / "policy", ours.state_dict(), ours.config_tree())
    again = load(tmp_path / "policy")
    assert again.observation_space == SEVERAL
    seen = {"camera": np.zeros((6, 6, 1), np.uint8), "speed": np.zeros(2, np.float32)}
    assert again.act(seen, action_mask=[1, 0, 0, 1, 0]).tolist() == [0, 1]


class Own(nn.Module):
    """Sees what is seen, without the mask."""

    features = 2

    def forward(self, observation: Tensor) -> Tensor:
        assert isinstance(observation, Tensor)
        return observation.sin().float()


def steps(count: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(count, 3, generator=generator) < 0.5
    mask[:, 1] = True
    return {ACTION_MASK: mask, OBSERVATION: torch.rand(count, 2, generator=generator)}


@pytest.mark.parametrize("settings", [{}, {"shared": True}, {"normalize_observation": True}], ids=str)
def test_what_acts_is_what_learns_with_an_encoder_of_ones_own(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    config = ActorCriticConfig(hidden=(8,), **settings)
    for encoder in (None, Own()):
        ours = ActorCritic(ONE, Discrete(3), config, generator=generator, encoder=encoder)
        observation = steps()
        arrays = {name: entry.numpy() for name, entry in observation.items()}
        parameters = torch.from_numpy(ours.sampler().parameters(arrays))
        action = parameters.argmax(-1)
        expected = parameters.log_softmax(-1).gather(-1, action[:, None])[:, 0]
        assert torch.allclose(ours.log_prob(observation, action), expected, atol=1e-6)
        assert torch.equal(parameters.isneginf(), ~observation[ACTION_MASK])


def test_an_invalid_action_has_no_chance_and_a_single_valid_one_has_all() -> None:
    ours, observation = policy(), steps(3)
    observation[ACTION_MASK] = torch.tensor([[True, True, False], [False, True, False], [True, True, True]])
    log_prob = ours.log_prob(observation, torch.tensor([2, 1, 0]))
    assert log_prob[0] == -torch.inf
    assert log_prob[1] == 0.0
    single = {name: entry[1:2] for name, entry in observation.items()}
    evaluation = ours.evaluate(Steps(single, torch.tensor([1])))
    assert evaluation.entropy.item() == 0.0
    (evaluation.entropy.sum() + evaluation.log_prob.sum()).backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in ours.actor.parameters())


class Steps:
    """What `evaluate` reads."""

    time = memory = None

    def __init__(self, observation: Any, action: Tensor) -> None:
        self.observation, self.action = observation, action
        self.mask = torch.ones(action.shape[:1], dtype=torch.bool)


def test_without_a_mask_nothing_is_touched() -> None:
    masking, logits = Masking.of(VECTOR, Discrete(3)), torch.zeros(2, 3)
    assert masking.apply(logits, torch.zeros(2, 2)) is logits
    assert masking.seen(logits) is logits

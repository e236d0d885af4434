"""A policy's memory in rollouts: carried on, reset, recorded at the start of every row, and replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from small_worlds import Walk

from upslope import ActorCritic, ActorCriticConfig, EnvironmentConfig, MemoryConfig, Trajectory
from upslope.collect import EnvironmentCollector, GymnasiumVector, SyncEnvironments, evaluate_policy, make_environments
from upslope.collect.errors import UnsupportedSpaceError
from upslope.collect.evaluation import environment_seeds
from upslope.collect.vector import VectorEnvironment
from upslope.policies import ActorSampler, RewardNormalizer
from upslope.spaces import ActionMask, Box, Composite, Discrete, MultiDiscrete
from upslope.streams import Purpose
from upslope.trajectory import ObservationArrays, map_observation

KINDS = {
    "gru": MemoryConfig(kind="gru", size=6),
    "lstm-shared": MemoryConfig(kind="lstm", size=6, shared=True, layers=2),
    "transformer": MemoryConfig(kind="transformer", size=8, heads=2, context=4, layers=2),
}


def remembering(environments: VectorEnvironment, memory: MemoryConfig | None, **config: object) -> ActorCritic:
    settings = ActorCriticConfig(hidden=(8,), memory=memory, policy_gain=1.0, **config)  # type: ignore[arg-type]
    spaces = (environments.observation_space, environments.action_space)
    return ActorCritic(*spaces, settings, generator=torch.Generator().manual_seed(0)).double()


def cartpoles(count: int = 3) -> VectorEnvironment:
    return make_environments(EnvironmentConfig(count=count, vectorization="sync", observation_entries=(0, 2)))


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The parameters of the distributions that actions were drawn from, in order."""
    seen: list[np.ndarray] = []
    parameters = ActorSampler.parameters

    def recorded(self: ActorSampler, observation: ObservationArrays) -> np.ndarray:
        found = parameters(self, observation)
        seen.append(found.copy())
        return found

    monkeypatch.setattr(ActorSampler, "parameters", recorded)
    return seen


def ways() -> dict[str, Callable[[], VectorEnvironment]]:
    made: dict[str, Callable[[], VectorEnvironment]] = {"sync": lambda: SyncEnvironments([Walk] * 3)}
    for mode in AutoresetMode:
        made[mode.name] = lambda mode=mode: GymnasiumVector(SyncVectorEnv([Walk] * 3, autoreset_mode=mode))
    return made


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("kind", KINDS)
def test_what_acts_is_what_is_replayed(kind: str, way: str, acted: list[np.ndarray]) -> None:
    """Over two updates, through ends of episodes and steps that only reset."""
    environments = ways()[way]()
    policy = remembering(environments, KINDS[kind])
    collector = EnvironmentCollector(environments, steps=23, seed=3)
    for update in range(2):
        acted.clear()
        trajectory = collector.collect(policy, update)
        replayed = policy.evaluate(trajectory).distribution.parameters.detach().numpy()
        expected = np.stack(acted[-23:], axis=1)
        mask = trajectory.mask.numpy()
        assert (trajectory.time[:, 1:] == 0).any()
        np.testing.assert_allclose(replayed[mask], expected[mask], rtol=0, atol=1e-6)
    assert trajectory.memory is not None
    collector.close()


@pytest.mark.parametrize("kind", KINDS)
def test_whole_episodes_begin_with_nothing(kind: str, acted: list[np.ndarray]) -> None:
    environments = cartpoles()
    policy = remembering(environments, KINDS[kind])
    trajectory = EnvironmentCollector(environments, episodes=7, seed=0).collect(policy, 0)
    assert trajectory.memory is None
    first = policy.evaluate(trajectory).distribution.parameters[0].detach()[trajectory.mask[0]].numpy()
    steps = len(first)
    # One example is drawn before the first rollout, to see shapes.
    drawn = [each[0] for each in acted[1:]]
    np.testing.assert_allclose(first, np.array(drawn[:steps]), rtol=0, atol=1e-6)


def rows_of(steps: int, row_steps: int | None, *, kind: str = "gru", update: int = 1) -> tuple[ActorCritic, Trajectory]:
    environments = cartpoles()
    policy = remembering(environments, KINDS[kind])
    collector = EnvironmentCollector(environments, steps=steps, seed=1, row_steps=row_steps)
    for number in range(update + 1):
        trajectory = collector.collect(policy, number)
    return policy, replace(trajectory, reward=trajectory.reward.double())


@pytest.mark.parametrize("kind", KINDS)
def test_cut_rows_say_the_same(kind: str) -> None:
    policy, whole = rows_of(40, None, kind=kind)
    _, cut = rows_of(40, 8, kind=kind)
    assert cut.shape == (15, 8)
    ours, theirs = policy.evaluate(cut), policy.evaluate(whole)
    assert ours.value is not None
    assert theirs.value is not None
    torch.testing.assert_close(ours.log_prob.view(3, 40), theirs.log_prob, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.value.view(3, 40), theirs.value, rtol=0, atol=1e-6)
    value, following = policy.values(cut)
    _, expected = policy.values(whole)
    torch.testing.assert_close(value, ours.value, rtol=0, atol=1e-6)
    torch.testing.assert_close(following.view(3, 40), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_final_observation_is_seen_with_the_memory_of_its_episode(kind: str) -> None:
    """V' where a row is cut is V there, had the row gone on by that step."""
    policy, trajectory = rows_of(40, None, kind=kind)
    following = policy.values(trajectory)[1]
    assert isinstance(trajectory.observation, torch.Tensor)
    assert isinstance(trajectory.final_observation, torch.Tensor)
    for entry, index in enumerate(trajectory.final_index.tolist()):
        row, position = divmod(index, 40)
        longer = torch.cat([trajectory.observation[row, : position + 1], trajectory.final_observation[[entry]]])
        time = torch.cat([trajectory.time[row, : position + 1], trajectory.time[row, [position]] + 1])
        alone = replace(
            trajectory,
            observation=longer.unsqueeze(0),
            action=torch.zeros(1, position + 2, dtype=torch.long),
            mask=torch.ones(1, position + 2, dtype=torch.bool),
            time=time.unsqueeze(0),
            memory=map_observation(lambda m, row=row: m[[row]], trajectory.memory),
        )
        value = policy.evaluate(alone).value
        assert value is not None
        torch.testing.assert_close(value[0, -1], following[row, position], rtol=0, atol=1e-6)


def test_nothing_leaks_from_row_to_row_or_from_episode_to_episode() -> None:
    policy, trajectory = rows_of(40, None)
    assert isinstance(trajectory.observation, torch.Tensor)
    before = policy.evaluate(trajectory).log_prob
    begins = (trajectory.time[1, 1:] == 0).nonzero()[0, 0] + 1
    changed = trajectory.observation.clone()
    changed[1, begins - 1] += 1.0
    after = policy.evaluate(replace(trajectory, observation=changed)).log_prob
    moved = (after != before).nonzero().tolist()
    assert moved == [[1, int(begins) - 1]]
    changed = trajectory.observation.clone()
    changed[1, begins] += 1.0
    assert (policy.evaluate(replace(trajectory, observation=changed)).log_prob != before)[1, begins + 1]
    without = policy.evaluate(replace(trajectory, memory=None)).log_prob
    going_on = trajectory.time[:, 0] > 0
    assert (without[:, 0] != before[:, 0]).tolist() == going_on.tolist()


def test_a_reward_normaliser_follows_environments_through_their_rows() -> None:
    scaled = []
    for row_steps in (None, 8):
        normalizer = RewardNormalizer(clip=10.0)
        for update in range(2):
            _, trajectory = rows_of(40, row_steps, update=update)
            scaled.append(normalizer.scale(trajectory, 0.9, rows_each=1 if row_steps is None else 5).view(3, 40))
    assert torch.equal(scaled[0], scaled[2])
    assert torch.equal(scaled[1], scaled[3])


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_from_a_snapshot_is_going_on(kind: str) -> None:
    environments = cartpoles()
    policy = remembering(environments, KINDS[kind])
    one, other = (
        EnvironmentCollector(environments, steps=16, seed=5),
        EnvironmentCollector(cartpoles(), steps=16, seed=5),
    )
    one.collect(policy, 0)
    other.restore(one.snapshot())
    ours, theirs = one.collect(policy, 1), other.collect(policy, 1)
    assert isinstance(ours.memory, dict)
    assert isinstance(theirs.memory, dict)
    assert any(float(part.abs().sum()) > 0.0 for part in ours.memory.values())
    assert all(torch.equal(part, theirs.memory[name]) for name, part in ours.memory.items())
    assert torch.equal(ours.action, theirs.action)


def test_environments_made_anew_are_met_with_nothing_in_mind() -> None:
    environments = cartpoles()
    policy = remembering(environments, KINDS["gru"])
    collector = EnvironmentCollector(environments, steps=5, seed=0)
    collector.collect(policy, 0)
    collector.rebuild(1)
    memory = collector.collect(policy, 1).memory
    assert isinstance(memory, dict)
    assert not any(bool(part.any()) for part in memory.values())


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_act_carry_memory(kind: str) -> None:
    """An episode stepped by hand with `act` is the one that evaluation plays."""
    environments = cartpoles(1)
    policy = remembering(environments, KINDS[kind])
    result = evaluate_policy(policy, cartpoles(2), episodes=4, seed=0, update=7)
    lengths = result.lengths.tolist()
    vector = cartpoles(2)
    observation = vector.reset(environment_seeds(0, Purpose.EVALUATION_ENVIRONMENT, 0, 7, 2))
    memory, counts, found = policy.start(), [0, 0], ([], [])
    while min(map(len, found)) < 2:
        step = vector.step(policy.act(observation, memory=memory))
        observation, counts = step.observation, [count + 1 for count in counts]
        if step.finished is not None:
            memory.restart(step.finished)
            for index in step.finished:
                found[index].append(counts[index])
                counts[index] = 0
    assert [*found[0][:2], *found[1][:2]] == lengths


def test_act_without_memory_says_how() -> None:
    policy = remembering(cartpoles(), KINDS["gru"])
    single = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"memory = policy.start\(\)"):
        policy.act(single)
    memory = policy.start()
    policy.act(single, memory=memory)
    with pytest.raises(ValueError, match="the memory is of 1 environments, and there are observations of 2"):
        policy.act(np.zeros((2, 2), np.float32), memory=memory)
    memory.restart()
    policy.act(np.zeros((2, 2), np.float32), memory=memory)
    memoryless = remembering(cartpoles(), None)
    assert memoryless.act(single, memory=memoryless.start()) == memoryless.act(single)


def test_another_policys_memory_is_refused() -> None:
    policy, trajectory = rows_of(16, None)
    with pytest.raises(ValueError, match="it is another policy's"):
        policy.evaluate(replace(trajectory, memory={"shared/hidden": torch.zeros(3, 1, 6)}))
    with pytest.raises(ValueError, match="whole rows"):
        policy.evaluate(replace(trajectory, mask=trajectory.mask[0], time=trajectory.time[0]))
    with pytest.raises(ValueError, match="begin with an empty memory"):
        policy.sampler().begin({"actor/hidden": np.zeros((3, 1, 9))}, 3)


def test_images_masks_and_several_choices() -> None:
    """All at once, with a critic that looks by itself."""
    seen = Composite(
        (
            ("camera", Box((12, 12, 3), 0.0, 255.0, "uint8")),
            ("place", Discrete(3)),
            ("action_mask", ActionMask((2, 3))),
        )
    )
    config = ActorCriticConfig(memory=KINDS["gru"], hidden=(8,), policy_gain=1.0)
    policy = ActorCritic(seen, MultiDiscrete((2, 3), (0, 0)), config, generator=torch.Generator().manual_seed(0))
    chance = np.random.default_rng(0)
    mask = np.tile(np.array([[True, False, True, False, True]]), (2, 6, 1)).reshape(2, 6, 5)
    rows = {
        "camera": chance.integers(0, 256, (2, 6, 12, 12, 3), dtype=np.uint8),
        "place": chance.integers(0, 3, (2, 6)),
        "action_mask": mask,
    }
    sampler, acted = policy.sampler(), []
    sampler.begin(None, 2)
    noise = sampler.noise(chance, 6, 2)
    for t in range(6):
        acted.append(sampler.sample({name: array[:, t] for name, array in rows.items()}, noise[t]))
    action = torch.from_numpy(np.stack(acted, axis=1))
    assert not action[..., 0].any()
    assert not (action[..., 1] == 1).any()
    observation = {name: torch.from_numpy(array) for name, array in rows.items()}
    assert policy.log_prob(observation, action).exp().min() > 0.0
    assert policy.critic_encoder is not None
    last = sampler.memory
    assert isinstance(last, dict)
    assert set(last) == {"actor/hidden", "critic/hidden"}


def test_parts_of_an_observation() -> None:
    environments = cartpoles(1)
    assert environments.observation_space.shape == (2,)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="different entries"):
        EnvironmentConfig(observation_entries=(0, 0))
    with pytest.raises(UnsupportedSpaceError, match="entries 0 to 3"):
        make_environments(EnvironmentConfig(observation_entries=(4,), vectorization="sync", resume="rebuild"))

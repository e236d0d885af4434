import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from small_worlds import Faulty, Walk

from upslope.collect import (
    EndlessEpisodeError,
    EnvironmentCollector,
    EnvironmentFailureError,
    GymnasiumVector,
    NonFiniteError,
    SyncEnvironments,
    Tick,
    evaluate_policy,
)
from upslope.collect.actions import RandomPolicy
from upslope.collect.conformance import TickPolicy
from upslope.collect.evaluation import environment_seeds
from upslope.collect.rollout import Rollout
from upslope.streams import Purpose


class Diverged(RandomPolicy):
    """A policy whose actions stop being numbers."""

    def noise(self, generator, steps, environments):
        noise = np.zeros((steps, environments, 2), np.float32)
        noise[5, 1, 0] = np.nan
        return noise


class Certain(RandomPolicy):
    """A policy that calls its own action impossible."""

    def log_prob(self, observation, action):
        log_prob = torch.zeros(action.shape)
        log_prob[0, 2] = -torch.inf
        return log_prob


def _naive(factory, seed, actions):
    """One environment's life, step by step: observation, reward, flags, what really followed, time."""
    environment = factory()
    observation, _ = environment.reset(seed=seed)
    time = 0
    for action in actions:
        following, reward, terminated, truncated, _ = environment.step(action)
        yield observation.astype(np.float32), reward, terminated, truncated, following.astype(np.float32), time
        observation, time = following, time + 1
        if terminated or truncated:
            observation, time = environment.reset()[0], 0


def _ways(count):
    yield "sync", SyncEnvironments([Walk] * count)
    for mode in AutoresetMode:
        yield mode.name, GymnasiumVector(SyncVectorEnv([Walk] * count, autoreset_mode=mode))


@settings(max_examples=8, deadline=None)
@given(count=st.integers(1, 3), steps=st.integers(1, 17), updates=st.integers(1, 5), seed=st.integers(0, 1000))
def test_every_step_and_what_followed_it_are_those_of_a_plain_loop(count, steps, updates, seed):
    for _, environments in _ways(count):
        collector = EnvironmentCollector(environments, steps=steps, seed=seed)
        policy = RandomPolicy(collector.action_space)
        trajectories = [collector.collect(policy, update) for update in range(updates)]
        seeds = environment_seeds(seed, Purpose.ENVIRONMENT, 0, 0, count)
        totals, total = [], 0.0
        for row in range(count):
            chosen = np.concatenate([t.action[row][t.mask[row]].numpy() for t in trajectories])
            life = iter(list(_naive(Walk, seeds[row], chosen)))
            total, length = 0.0, 0
            for trajectory in trajectories:
                final = dict(zip(trajectory.final_index.tolist(), trajectory.final_observation, strict=True))
                for t in torch.nonzero(trajectory.mask[row])[:, 0].tolist():
                    observation, reward, terminated, truncated, following, time = next(life)
                    assert np.array_equal(trajectory.observation[row, t].numpy(), observation)
                    assert trajectory.reward[row, t].item() == np.float32(reward)
                    assert trajectory.terminated[row, t].item() == terminated
                    assert trajectory.truncated[row, t].item() == truncated
                    assert trajectory.time[row, t].item() == time
                    key = row * steps + t
                    assert (key in final) == (not terminated and (truncated or t == steps - 1))
                    if key in final:
                        assert np.array_equal(final[key].numpy(), following)
                    elif not terminated:
                        assert np.array_equal(trajectory.observation[row, t + 1].numpy(), following)
                    total, length = total + reward, length + 1
                    if terminated or truncated:
                        totals.append((total, length))
                        total, length = 0.0, 0
        finished = collector.finished()
        assert sorted(length for _, length in finished) == sorted(length for _, length in totals)
        assert sorted(value for value, _ in finished) == pytest.approx(sorted(value for value, _ in totals))
        assert collector.finished() == []


def test_the_same_seed_brings_the_same_and_another_another():
    def first(seed):
        collector = EnvironmentCollector(SyncEnvironments([Walk] * 2), steps=20, seed=seed)
        return collector.collect(RandomPolicy(collector.action_space), 0)

    one, again, other = first(3), first(3), first(4)
    assert torch.equal(one.observation, again.observation)
    assert torch.equal(one.action, again.action)
    assert not torch.equal(one.observation, other.observation)
    assert not torch.equal(one.observation[0], one.observation[1])


def test_a_trajectory_is_not_written_on_by_the_next_rollout():
    collector = EnvironmentCollector(SyncEnvironments([Walk] * 2), steps=8, seed=0)
    policy = RandomPolicy(collector.action_space)
    first = collector.collect(policy, 0)
    kept = [first.observation.clone(), first.reward.clone(), first.final_observation.clone()]
    collector.collect(policy, 1)
    assert all(
        torch.equal(a, b) for a, b in zip(kept, [first.observation, first.reward, first.final_observation], strict=True)
    )


@pytest.mark.parametrize("episodes", [3, 6, 7])
def test_whole_episodes_a_number_fixed_for_each_environment(episodes):
    for _, environments in _ways(3):
        collector = EnvironmentCollector(environments, episodes=episodes, seed=2)
        policy = RandomPolicy(collector.action_space)
        trajectory = collector.collect(policy, 4)
        quota = [episodes // 3 + (row < episodes % 3) for row in range(3)]
        assert trajectory.shape[0] == episodes
        seeds = environment_seeds(2, Purpose.ENVIRONMENT, 0, 4, 3)
        starts = np.cumsum([0, *quota])
        lengths = trajectory.mask.sum(1)
        final = dict(zip(trajectory.final_index.tolist(), trajectory.final_observation, strict=True))
        for row in range(3):
            rows = range(starts[row], starts[row + 1])
            chosen = np.concatenate([trajectory.action[k][trajectory.mask[k]].numpy() for k in rows])
            life = iter(list(_naive(Walk, seeds[row], chosen)))
            for k in rows:
                for t in range(int(lengths[k])):
                    observation, reward, terminated, truncated, following, time = next(life)
                    assert np.array_equal(trajectory.observation[k, t].numpy(), observation)
                    assert trajectory.reward[k, t].item() == np.float32(reward)
                    assert trajectory.time[k, t].item() == time
                    assert (terminated or truncated) == (t == lengths[k] - 1)
                    assert ((k * trajectory.shape[1] + t) in final) == (truncated and not terminated)
                    if truncated:
                        assert np.array_equal(final[k * trajectory.shape[1] + t].numpy(), following)
        padding = ~trajectory.mask
        assert not (trajectory.terminated | trajectory.truncated)[padding].any()
        assert not trajectory.reward[padding].any()
        assert [length for _, length in collector.finished()] != []


def test_returns_of_whole_episodes_are_reported_once():
    collector = EnvironmentCollector(SyncEnvironments([Tick] * 2), episodes=4, seed=0)
    collector.collect(TickPolicy(), 0)
    assert collector.finished() == [(5.0, 5)] * 4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("observation", r"environment 1, step 7 of update 0: the observation 'a' is nan \(element 1\)"),
        ("reward", r"environment 1, step 6 of update 0: the reward is inf"),
        ("large", r"environment 1, step 6 of update 0: the reward is 1e\+300"),
        ("final", r"environment 1, step 6 of update 0: the final observation 'a' is -inf"),
    ],
)
def test_values_that_are_not_finite_are_named(fault, message):
    environments = SyncEnvironments([lambda: Faulty("nothing"), lambda: Faulty(fault)])
    collector = EnvironmentCollector(environments, steps=12, seed=0)
    with pytest.raises(NonFiniteError, match=message):
        collector.collect(RandomPolicy(collector.action_space), 0)


def test_a_nan_in_the_very_last_observation_is_named():
    collector = EnvironmentCollector(SyncEnvironments([lambda: Faulty("observation")]), steps=7, seed=0)
    with pytest.raises(NonFiniteError, match="environment 0, step 7 of update 3"):
        collector.collect(RandomPolicy(collector.action_space), 3)


def test_an_action_that_is_not_finite_is_the_policys_fault():
    environments = SyncEnvironments([lambda: Walk(action_space=spaces.Box(-1, 1, (2,)))] * 2)
    with pytest.raises(NonFiniteError, match=r"environment 1, step 5 .*the action is nan.*The policy has diverged"):
        EnvironmentCollector(environments, steps=8, seed=0).collect(Diverged(environments.action_space), 0)


def test_an_impossible_action_is_the_policys_fault():
    environments = SyncEnvironments([Walk] * 2)
    with pytest.raises(NonFiniteError, match="log-probability of the action taken is -inf in row 0, step 2"):
        EnvironmentCollector(environments, steps=8, seed=0).collect(Certain(environments.action_space), 0)


def test_an_environment_that_raises_is_reported_as_such():
    collector = EnvironmentCollector(SyncEnvironments([lambda: Faulty("raise")]), steps=12, seed=0)
    with pytest.raises(EnvironmentFailureError, match="the door is stuck"):
        collector.collect(RandomPolicy(collector.action_space), 0)


@pytest.mark.parametrize("lengths", [{}, {"steps": 3, "episodes": 2}, {"steps": 0}, {"episodes": -1}])
def test_either_steps_or_episodes(lengths):
    with pytest.raises(ValueError, match="steps"):
        EnvironmentCollector(SyncEnvironments([Walk]), seed=0, **lengths)


def test_fewer_episodes_than_environments_are_refused():
    with pytest.raises(ValueError, match="at least 3 episodes"):
        EnvironmentCollector(SyncEnvironments([Walk] * 3), episodes=2, seed=0)


def test_evaluation_counts_a_fixed_number_of_whole_episodes():
    for name, environments in _ways(3):
        policy = RandomPolicy(environments.action_space)
        one = evaluate_policy(policy, environments, episodes=8, seed=0, deterministic=False)
        again = evaluate_policy(policy, environments, episodes=8, seed=0, deterministic=False)
        other = evaluate_policy(policy, environments, episodes=8, seed=0, deterministic=False, update=1)
        assert one.returns.shape == one.lengths.shape == (8,), name
        assert np.array_equal(one.returns, again.returns)
        assert not np.array_equal(one.returns, other.returns)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_evaluation_is_exact_whatever_the_way_to_reset(mode):
    environments = GymnasiumVector(SyncVectorEnv([Tick] * 2, autoreset_mode=mode))
    result = evaluate_policy(TickPolicy(), environments, episodes=5, seed=0)
    assert result.returns.tolist() == [5.0] * 5
    assert result.lengths.tolist() == [5] * 5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("observation", r"environment 1, step 7: the observation 'a' is nan \(element 1\)\..*check-env"),
        ("reward", r"environment 1, step 6: the reward is inf\."),
    ],
)
def test_evaluation_names_values_that_are_not_finite(fault, message):
    environments = SyncEnvironments([lambda: Faulty("nothing"), lambda: Faulty(fault)])
    with pytest.raises(NonFiniteError, match=message):
        evaluate_policy(RandomPolicy(environments.action_space), environments, episodes=2, seed=0, episode_limit=50)


def test_evaluation_names_actions_that_are_not_finite():
    environments = SyncEnvironments([lambda: Walk(action_space=spaces.Box(-1, 1, (2,)))] * 2)
    policy = Diverged(environments.action_space)
    with pytest.raises(NonFiniteError, match=r"environment 1, step 5: the action is nan.*The policy has diverged"):
        evaluate_policy(policy, environments, episodes=100, seed=0, deterministic=False)


def test_evaluation_gives_up_on_episodes_that_do_not_end():
    environments = SyncEnvironments([lambda: Faulty("nothing")])
    with pytest.raises(EndlessEpisodeError, match=r"environment 0 has not ended after 50 steps.*time_limit") as caught:
        evaluate_policy(RandomPolicy(environments.action_space), environments, episodes=1, seed=0, episode_limit=50)
    assert caught.value.index == 0


def test_collecting_episodes_gives_up_on_those_that_do_not_end():
    environments = SyncEnvironments([lambda: Faulty("nothing")] * 2)
    collector = EnvironmentCollector(environments, episodes=2, seed=0, episode_limit=50)
    with pytest.raises(EndlessEpisodeError, match="environment 0 has not ended after 64 steps"):
        collector.collect(RandomPolicy(collector.action_space), 0)


def test_many_short_episodes_are_not_one_endless_one():
    environments = SyncEnvironments([Tick] * 2)
    result = evaluate_policy(TickPolicy(), environments, episodes=20, seed=0, episode_limit=6)
    assert result.lengths.tolist() == [5] * 20
    collector = EnvironmentCollector(SyncEnvironments([Tick]), episodes=20, seed=0, episode_limit=6)
    assert collector.collect(TickPolicy(), 0).shape == (20, 5)


@pytest.mark.parametrize(("count", "threads"), [(2, 1), (16, 2), (40, 2)])
def test_acting_uses_no_more_threads_than_there_is_work_for(count, threads):
    seen = set()

    class Counting(RandomPolicy):
        @property
        def sequential(self) -> bool:
            return False

        def sampler(self):
            return self

        def sample(self, observation, noise):
            seen.add(torch.get_num_threads())
            return noise

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        environments = SyncEnvironments([Tick] * count)
        policy = Counting(environments.action_space)
        evaluate_policy(policy, environments, episodes=count, seed=0, deterministic=False)
        EnvironmentCollector(environments, episodes=count, seed=0).collect(policy, 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {threads}


def test_times_go_on_through_rollouts_in_which_nothing_ends() -> None:
    action, observation = np.zeros(2, dtype=np.int64), np.zeros((2, 1), dtype=np.float32)
    rollout = Rollout.allocate(observation, action, 3)
    rollout.live[1, 0] = False
    assert rollout.decision_times(np.array([4, 9])).tolist() == [[4, 5, 6, 7], [9, 9, 10, 11]]

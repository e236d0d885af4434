"""Who acts, and what is learnt from: an older policy, another one, several rollouts at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import COMPLETIONS, some_task, tiny_language
from tiny_runs import NORMALISED, bits, remains, tiny

from upslope import A2C, PPO, ActorCriticConfig, EnvironmentConfig, ImportanceSampled, Run, StaleData, VTraceActorCritic
from upslope.errors import OffPolicyError, UsageError
from upslope.policies import MemoryConfig
from upslope.train import RolloutConfig, Snapshot, load, resume, save, train
from upslope.train.acting import joined
from upslope.train.log import read_metrics
from upslope.trajectory import Trajectory

STEPS = RolloutConfig(steps=16)
NO_CRITIC = ActorCriticConfig(hidden=(16,), critic=False)


def watched(run: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Trajectory], list[dict[str, torch.Tensor]]]:
    """What each update learnt from, and the policy as each began."""
    from upslope.train.learner import GradientLearner

    seen: list[Trajectory] = []
    began: list[dict[str, torch.Tensor]] = []
    learn = GradientLearner.learn

    def spy(self: Any, trajectory: Trajectory, **rest: Any) -> Any:
        seen.append(trajectory)
        began.append({name: tensor.detach().clone() for name, tensor in self._policy.state_dict().items()})
        return learn(self, trajectory, **rest)

    monkeypatch.setattr(GradientLearner, "learn", spy)
    train(run)
    return seen, began


@pytest.mark.parametrize("lag", [1, 3])
def test_the_policy_of_lag_updates_ago_acts(lag: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its parameters and the statistics of its normaliser; b_t is of that policy, and the ratio is not 1."""
    run = tiny(tmp_path, VTraceActorCritic(), policy=NORMALISED, rollout=replace(STEPS, lag=lag), steps=256)
    seen, began = watched(run, monkeypatch)
    assert [trajectory.policy_version for trajectory in seen] == [max(0, update - lag) for update in range(8)]
    policy = load(tmp_path / "run")
    for update, trajectory in enumerate(seen):
        for version, exact in ((trajectory.policy_version, True), (update, update == 0)):
            policy.load_state_dict(began[version])
            with torch.no_grad():
                log_prob = policy.log_prob(trajectory.observation, trajectory.action)
            assert torch.equal(log_prob, trajectory.behaviour_log_prob) == exact, (update, version)


@pytest.mark.parametrize("policy", [NORMALISED, ActorCriticConfig(hidden=(16,))], ids=["normalised", "plain"])
def test_the_last_rollouts_are_learnt_from_together(
    policy: ActorCriticConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny(tmp_path, A2C(), policy=policy, rollout=replace(STEPS, batches=3), steps=160)
    seen, _ = watched(run, monkeypatch)
    assert [trajectory.shape for trajectory in seen] == [(2, 16), (4, 16), (6, 16), (6, 16), (6, 16)]
    assert isinstance(seen[3].observation, torch.Tensor)
    assert isinstance(seen[4].observation, torch.Tensor)
    assert torch.equal(seen[3].observation[2:], seen[4].observation[:4])
    assert torch.equal(seen[3].behaviour_log_prob[2:], seen[4].behaviour_log_prob[:4])
    assert torch.equal(
        seen[3].terminated, torch.cat([seen[1].terminated[2:], seen[2].terminated[4:], seen[3].terminated[4:]])
    )
    assert (seen[3].reward[2:] == seen[4].reward[:4]).all() == (policy is not NORMALISED)
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert 0.0 < float([record for record in metrics if record["kind"] == "train"][-1]["staleness"]) <= 1.0


def test_rows_of_unequal_length_are_joined_and_their_ends_found() -> None:
    def rows(count: int, steps: int, ends: list[int]) -> Trajectory:
        step = torch.arange(count * steps).view(count, steps)
        return Trajectory(
            observation={"place": step.to(torch.float32), "pair": torch.stack([step, -step], -1)},
            action=step,
            reward=step + 0.5,
            terminated=step == 1,
            truncated=step == 2,
            mask=step >= 0,
            behaviour_log_prob=-step.to(torch.float32),
            time=step % steps,
            final_observation={
                "place": 100.0 + torch.tensor(ends),
                "pair": torch.zeros(len(ends), 2, dtype=torch.long),
            },
            final_index=torch.tensor(ends),
            group=torch.arange(count) // 2,
            policy_version=count,
            memory={"h": torch.full((count, 3), float(steps))},
        )

    both = joined([rows(4, 2, [1, 6]), rows(2, 5, [4, 9])])
    assert both.shape == (6, 5)
    assert both.final_index.tolist() == [1, 15, 24, 29]
    value = both.next_value(both.behaviour_log_prob, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert [float(value[row, time]) for row, time in ((0, 1), (3, 0), (4, 4), (5, 4))] == [1.0, 2.0, 3.0, 4.0]
    assert both.mask.sum(1).tolist() == [2, 2, 2, 2, 5, 5]
    assert both.group is not None
    assert both.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert isinstance(both.observation, dict)
    assert both.observation["pair"].shape == (6, 5, 2)
    assert isinstance(both.memory, dict)
    assert both.memory["h"][:, 0].tolist() == [2.0] * 4 + [5.0] * 2
    assert both.policy_version == 2
    alone = rows(4, 2, [1, 6])
    assert joined([alone]) is alone


class PulledPlugError(RuntimeError):
    pass


def stop_after(update: int) -> Callable[[Snapshot[Any, Any]], None]:
    def callback(snapshot: Snapshot[Any, Any]) -> None:
        if snapshot.update == update:
            raise PulledPlugError

    return callback


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run directory of a policy that acts for others."""
    return str(train(tiny(tmp_path_factory.mktemp("other"), A2C(), steps=256, seed=9)).directory)


EPISODES = RolloutConfig(steps=None, episodes=3)
PENDULUM = EnvironmentConfig(id="Pendulum-v1", count=2, vectorization="sync", time_limit=40)
CASES: dict[str, dict[str, Any]] = {
    "lag": {"algorithm": VTraceActorCritic(), "policy": NORMALISED, "rollout": replace(STEPS, lag=3)},
    "batches": {"algorithm": PPO(epochs=2, minibatches=2), "policy": NORMALISED, "rollout": replace(STEPS, batches=3)},
    "lagging batches of episodes": {
        "algorithm": PPO(stale=StaleData(anchor="proximal", importance_cap=2.0, advantage="vtrace")),
        "rollout": replace(EPISODES, lag=2, batches=2),
    },
    "continuous": {
        "algorithm": VTraceActorCritic(normalize_advantage=True),
        "policy": NORMALISED,
        "environment": PENDULUM,
        "rollout": replace(STEPS, lag=2, batches=2),
    },
    "memory": {
        "algorithm": VTraceActorCritic(),
        "policy": replace(NORMALISED, memory=MemoryConfig(kind="gru", size=8)),
        "rollout": replace(STEPS, lag=2, batches=2),
    },
    "another": {"algorithm": ImportanceSampled(fewest_effective=0.0), "policy": NO_CRITIC, "rollout": EPISODES},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_killed_goes_on_to_the_bit(case: str, tmp_path: Path, other: str) -> None:
    settings = dict(CASES[case])
    if case == "another":
        settings["rollout"] = replace(EPISODES, behaviour=other)
    straight, killed = (tiny(tmp_path / name, **settings, steps=400) for name in ("straight", "killed"))
    updates: list[int] = []
    train(straight, callbacks=[lambda snapshot: updates.append(snapshot.update)])
    with pytest.raises(PulledPlugError):
        train(killed, callbacks=[stop_after(updates[-1] - 1)])
    resume(killed.directory / "run")
    assert remains(killed.directory / "run") == remains(straight.directory / "run")


def test_a_run_of_another_policy_keeps_it_and_refuses_a_changed_one(tmp_path: Path, other: str) -> None:
    rollout = replace(EPISODES, behaviour=other)
    algorithm = ImportanceSampled(fewest_effective=0.0)
    run = tiny(tmp_path, algorithm, policy=NO_CRITIC, rollout=rollout, steps=400)
    with pytest.raises(PulledPlugError):
        train(run, callbacks=[stop_after(3)])
    trained = train(tiny(tmp_path / "changed", A2C(), steps=64)).policy
    save(trained, tmp_path / "run" / "behaviour")
    with pytest.raises(RuntimeError, match="behaviour in the run directory are not what the run began with"):
        resume(tmp_path / "run")


def test_a_given_policy_acts_throughout(tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = replace(EPISODES, behaviour=other)
    run = tiny(tmp_path, ImportanceSampled(fewest_effective=0.0), policy=NO_CRITIC, rollout=rollout, steps=300)
    seen, _ = watched(run, monkeypatch)
    acting = load(other)
    for trajectory in seen:
        with torch.no_grad():
            expected = acting.log_prob(trajectory.observation, trajectory.action).masked_fill(~trajectory.mask, 0.0)
        assert torch.equal(expected, trajectory.behaviour_log_prob)


def test_an_update_that_is_begun_again_acts_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It learnt nothing the first time: who acts is as many updates old as ever, and nothing else moves."""
    from upslope.train.learner import GradientLearner

    run = tiny(tmp_path, VTraceActorCritic(), policy=NORMALISED, rollout=replace(STEPS, lag=2), steps=256)
    learn, failing = GradientLearner.learn, 5

    def fails_once(self: Any, trajectory: Trajectory, **rest: Any) -> Any:
        versions.append(trajectory.policy_version)
        if len(versions) == failing + 1:
            raise OffPolicyError("once")
        return learn(self, trajectory, **rest)

    versions: list[int] = []
    monkeypatch.setattr(GradientLearner, "learn", fails_once)
    with pytest.raises(OffPolicyError, match="once"):
        train(run)
    resume(tmp_path / "run")
    assert versions == [0, 0, 0, 1, 2, 3, 3, 4, 5]


def test_lag_0_and_one_batch_are_the_ordinary_run(tmp_path: Path) -> None:
    """The first update of a lagging run, too: there is nothing older yet."""
    plain, lagging = (tiny(tmp_path / str(lag), A2C(), rollout=replace(STEPS, lag=lag), steps=128) for lag in (0, 3))
    after: list[Any] = []
    for run in (plain, lagging):
        train(run, callbacks=[lambda snapshot: after.append(bits(snapshot.policy.state_dict()))])
    assert len(after) == 8
    assert after[0] == after[4]
    assert after[3] != after[7]


def test_v_trace_without_lag_is_the_ordinary_actor_critic_up_to_rounding(tmp_path: Path) -> None:
    """At lambda = 0 Psi is not the TD residual: v_{t+1} is a TD target itself. At lambda = 1 both are the returns."""
    results = [
        train(tiny(tmp_path / str(number), algorithm, rollout=STEPS, steps=256)).policy.state_dict()
        for number, algorithm in enumerate((VTraceActorCritic(), A2C()))
    ]
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-3, atol=1e-4)


def test_a_collapsed_sample_is_refused_and_what_was_learnt_is_saved(tmp_path: Path, other: str) -> None:
    rollout = RolloutConfig(steps=None, episodes=8, behaviour=other)
    algorithm = ImportanceSampled(weights="trajectory", fewest_effective=0.999)
    run = tiny(tmp_path, algorithm, policy=NO_CRITIC, rollout=rollout, steps=10_000)
    with pytest.raises(OffPolicyError, match=r"effective sample size.*fewest_effective") as caught:
        train(run)
    assert any("Everything learnt is saved" in note for note in caught.value.__notes__)
    assert (tmp_path / "run" / "policy").is_dir()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lag": -1}, "lag must be at least 0"),
        ({"batches": 0}, "batches must be at least 1"),
        ({"lag": 1, "behaviour": "somewhere"}, "grows no older: set lag to 0"),
    ],
    ids=["lag", "batches", "both"],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RolloutConfig(**settings)


def test_a_policy_that_does_not_fit_is_refused(tmp_path: Path, other: str) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        train(tiny(tmp_path, rollout=replace(STEPS, behaviour=str(tmp_path / "nowhere"))))
    with pytest.raises(UsageError, match="sees other observations"):
        train(tiny(tmp_path, environment=PENDULUM, rollout=replace(STEPS, behaviour=other)))


def test_where_another_policy_acts_a_memory_needs_whole_episodes(tmp_path: Path, other: str) -> None:
    recurrent = ActorCriticConfig(hidden=(8,), memory=MemoryConfig(kind="gru", size=8))
    algorithm = ImportanceSampled(baseline="critic", fewest_effective=0.0)
    with pytest.raises(UsageError, match="learn from whole episodes"):
        train(tiny(tmp_path / "fragments", A2C(), policy=recurrent, rollout=replace(STEPS, behaviour=other)))
    whole = replace(EPISODES, behaviour=other)
    train(tiny(tmp_path / "whole", algorithm, policy=recurrent, rollout=whole, steps=200))


def test_completions_are_learnt_from_with_importance_weights(tmp_path: Path) -> None:
    algorithm = ImportanceSampled(gamma=1.0, weights="trajectory", cap=2.0, self_normalised=True)
    run = tiny_language(tmp_path, algorithm=algorithm, experience=COMPLETIONS, steps=3)
    train(run, task=some_task())
    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"]
    assert all(float(record["effective_sample_size"]) == pytest.approx(1.0, abs=1e-3) for record in records)

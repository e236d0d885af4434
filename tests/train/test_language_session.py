"""Runs that train language models from their start to their end: what they leave, say, measure and refuse."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_language import COMPLETIONS, SHAPE, digits, folder_hashes, language_cases, some_task, tiny_language

from upslope.algorithms import GRPO, KTO, SFT
from upslope.collect.experience import CompletionConfig, DemonstrationConfig, PairConfig
from upslope.collect.pairs import PairCollector
from upslope.collect.rewards.pool import RewardPool
from upslope.collect.rewards.protocol import Reward
from upslope.errors import UsageError
from upslope.policies.language.config import LanguageModelConfig
from upslope.policies.language.sampling import Sampling
from upslope.report import compare
from upslope.report.language import evaluation_rows, evaluations, evaluations_among
from upslope.train import OptimizerConfig, evaluate_language_run, load, load_language, save, train
from upslope.train.language import LanguageEvaluationConfig
from upslope.train.language import evaluate as evaluate_module
from upslope.train.language import frozen as frozen_module
from upslope.train.language import session as session_module
from upslope.train.language.evaluate import pass_at
from upslope.train.log import read_metrics
from upslope.train.loop import Snapshot
from upslope.train.run_directory import RunDirectory


def of_kind(path: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(path / "metrics.jsonl") if record["kind"] == kind]


def test_supervised_fine_tuning_learns_answers_by_heart(tmp_path: Path) -> None:
    run = tiny_language(
        tmp_path,
        steps=120,
        experience=DemonstrationConfig(rows=16),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        evaluation=LanguageEvaluationConfig(times=1, prompts=8, samples=2, pass_at=(1,), limit=6),
        checkpoint=replace(tiny_language(tmp_path).checkpoint, times=0),
    )
    result = train(run, task=some_task())
    losses = [record["nll"] for record in of_kind(tmp_path / "run", "train")]
    assert losses[0] > 2.0
    assert losses[-1] < 0.35
    assert result.steps == 120
    assert not result.interrupted


def test_a_run_is_judged_before_and_after_and_keeps_completions_of_both(tmp_path: Path) -> None:
    train(language_cases(tmp_path)["grpo"], task=some_task())
    evaluations = of_kind(tmp_path / "run", "evaluation")
    assert [record["update"] for record in evaluations] == [0, 4, 8]
    expected = {"greedy_accuracy", "sampled_accuracy", "pass@1", "pass@3", "sampled_length", "sampled_truncated"}
    assert all(expected <= set(record) for record in evaluations)
    kept = json.loads((tmp_path / "run/samples.json").read_text())["evaluations"]
    assert [one["update"] for one in kept] == [0, 8]
    assert [one["prompt"] for one in kept[0]["samples"]] == ["16+16=", "17+17=", "18+18=", "19+19="]


def test_an_update_reports_its_rewards_its_speed_and_how_far_generation_and_learning_are_apart(tmp_path: Path) -> None:
    run = language_cases(tmp_path)["grpo"]
    train(run, task=some_task())
    records = of_kind(tmp_path / "run", "train")
    names = {"reward", "reward/digits", "accuracy", "length", "truncated", "live_groups", "entropy", "reference_kl"}
    names |= {"tokens_per_second", "generate_seconds", "reward_seconds", "learn_seconds", "mismatch", "kl"}
    for record in records:
        assert names <= set(record)
        assert record["mismatch"] < 1e-5
    assert [record["update"] for record in records] == list(range(1, 9))
    assert "gradient_snr" in records[-2] or "gradient_snr" in records[-1]


def test_completions_are_kept_with_rewards_advantages_and_log_probs(tmp_path: Path) -> None:
    train(language_cases(tmp_path)["grpo"], task=some_task())
    lines = [json.loads(line) for line in (tmp_path / "run/completions.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [update for update in range(8) for _ in range(2)]
    for line in lines:
        assert line["total"] == line["reward"]["digits"]
        assert len(line["log_prob"]) == len(line["tokens"])
        assert isinstance(line["advantage"], float)


def test_the_policy_is_a_folder_that_loads_again(tmp_path: Path) -> None:
    result = train(tiny_language(tmp_path), task=some_task())
    again = load_language(tmp_path / "run")
    for one, other in zip(result.policy.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    manifest = json.loads((tmp_path / "run/policy/MANIFEST.json").read_text())
    assert manifest["format"] == "upslope-language-policy"
    hashes = folder_hashes(tmp_path / "run/policy")
    assert {name: entry[1] for name, entry in manifest["files"].items()} == {
        name: digest for name, digest in hashes.items() if name != "MANIFEST.json"
    }
    save(again, tmp_path / "run/policy")
    assert folder_hashes(tmp_path / "run/policy") == hashes
    with pytest.raises(UsageError, match="load_language"):
        load(tmp_path / "run")


def test_what_a_run_left_is_judged_as_at_its_end(tmp_path: Path) -> None:
    result = train(language_cases(tmp_path)["grpo"], task=some_task())
    assert result.evaluation is not None
    again = evaluate_language_run(tmp_path / "run", prompts=4, samples=3, task=some_task())
    greedy = [name for name in again.figures if name.startswith("greedy")]
    assert {name: again.figures[name] for name in greedy} == {name: result.evaluation.figures[name] for name in greedy}
    assert again.figures["pass@1"] <= again.figures["pass@3"]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "gpt2"])
def test_what_generates_what_learns_and_what_is_saved_have_one_set_of_weights(
    architecture: Any, tmp_path: Path
) -> None:
    model = LanguageModelConfig(shape=replace(SHAPE, architecture=architecture))
    run = replace(language_cases(tmp_path)["grpo"], model=model, steps=4)
    result = train(run, task=some_task())
    records = of_kind(tmp_path / "run", "train")
    assert records[-1]["reference_kl"] > 1e-4
    assert max(record["mismatch"] for record in records) < 1e-5
    again = load_language(tmp_path / "run")
    tokens = torch.arange(1, 13).view(2, 6) % again.tokenizer.size
    with torch.no_grad():
        ours, theirs = (policy.log_prob(tokens[:, :-1], tokens[:, 1:]) for policy in (result.policy, again))
    torch.testing.assert_close(ours, theirs)


def test_a_run_starts_from_the_policy_of_another(tmp_path: Path) -> None:
    first = train(tiny_language(tmp_path, name="first"), task=some_task())
    seen: list[dict[str, torch.Tensor]] = []

    def look(snapshot: Snapshot[Any, Any]) -> None:
        seen.append({name: value.clone() for name, value in snapshot.policy.state_dict().items()})

    still = OptimizerConfig(learning_rate=0.0)
    second = tiny_language(tmp_path, name="second", start_from="a-recipe", optimizer=still, steps=1)
    train(second, task=some_task(), start=tmp_path / "first", callbacks=[look])
    for name, value in first.policy.state_dict().items():
        assert torch.equal(value, seen[0][name]), name
    recorded = json.loads((tmp_path / "second/config.json").read_text())
    assert recorded["run"]["start_from"] == "a-recipe"
    assert len(recorded["frozen"]["start"]) == 64


def test_the_first_sequence_is_shown_with_its_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(sys.modules["upslope.train.progress"], "Console", lambda **_: console)
    run = tiny_language(tmp_path, steps=1)
    train(replace(run, log=replace(run.log, progress=True)), task=some_task())
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert "them learnt [in brackets]" in said
    assert "[<|end|>]" in said
    assert "1 of 1 updates" in said


def test_the_length_of_a_run_is_counted_in_updates(tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []

    def look(snapshot: Snapshot[Any, Any]) -> bool:
        seen.append((snapshot.update, snapshot.steps, snapshot.episodes))
        return snapshot.update == 3

    result = train(language_cases(tmp_path)["grpo"], task=some_task(), callbacks=[look])
    assert seen == [(1, 1, 12), (2, 2, 24), (3, 3, 36)]
    assert result.steps == 3


@pytest.mark.parametrize("count", [1, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(count: int) -> None:
    for right in range(count + 1):
        for k in range(1, count + 1):
            subsets = list(combinations([place < right for place in range(count)], k))
            assert math.isclose(pass_at(count, right, k), sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("start", ["nowhere", None])
def test_a_start_that_is_no_folder_is_refused(start: str | None, tmp_path: Path) -> None:
    run = tiny_language(tmp_path, start_from="some-recipe")
    with pytest.raises(UsageError, match=r"start_from='some-recipe' is no folder.*for the name of a recipe"):
        train(run, task=some_task(), start=start)
    assert not (tmp_path / "run").exists()


def test_a_task_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    task, grpo = some_task(), tiny_language(tmp_path, algorithm=GRPO(), experience=COMPLETIONS)
    silent = replace(task, rewards=(replace(task.rewards[0], weight=0.0),))
    with pytest.raises(UsageError, match="all rewards of task 'doubles' have weight 0"):
        train(grpo, task=silent)
    with pytest.raises(UsageError, match="GRPO learns from rewards, and the task 'doubles' has none"):
        train(grpo, task=replace(task, rewards=()))
    with pytest.raises(UsageError, match="holds out no examples"):
        train(grpo, task=replace(task, held_out=()))
    with pytest.raises(UsageError, match="has no alphabet to build a tokenizer from"):
        train(grpo, task=replace(task, alphabet=None))


def test_a_reward_that_fails_is_no_number_and_what_was_learnt_is_saved(tmp_path: Path) -> None:
    calls: list[int] = []

    def breaks(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) > 3:
            raise RuntimeError("the grader is gone")
        return [float(len(text)) for text in completions]

    task = replace(some_task(), rewards=(Reward(name="digits", function=breaks, inline=True),))
    never = LanguageEvaluationConfig(times=0, prompts=4, samples=3, pass_at=(1,))
    run = tiny_language(tmp_path, algorithm=GRPO(), experience=COMPLETIONS, evaluation=never)
    with pytest.raises(UsageError, match="the grader is gone") as caught:
        train(run, task=task)
    assert any("upslope resume" in note for note in caught.value.__notes__)
    assert len(of_kind(tmp_path / "run", "train")) == 3
    with RunDirectory.open(tmp_path / "run") as directory:
        assert directory.policy.is_dir()


def test_an_update_with_fewer_rows_than_minibatches_takes_as_many_steps_as_it_has_rows(tmp_path: Path) -> None:
    def breaks(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        if len(completions) > 1 or len(completions[0]) % 2:
            raise RuntimeError("an odd one")
        return [float(len(completions[0]))]

    task = replace(some_task(), rewards=(Reward(name="digits", function=breaks, inline=True),))
    never = LanguageEvaluationConfig(times=0, prompts=4, samples=3, pass_at=(1,))
    run = tiny_language(tmp_path, algorithm=GRPO(minibatches=12), experience=COMPLETIONS, evaluation=never)
    train(run, task=task)
    records = of_kind(tmp_path / "run", "train")
    assert min(record["rows"] for record in records) < 12.0
    assert all(record["optimizer_steps"] == record["rows"] for record in records)


def test_truncated_sampling_and_masked_truncation_train(tmp_path: Path) -> None:
    experience = CompletionConfig(
        prompts=2, group=3, limit=2, mask_truncated=True, sampling=Sampling(temperature=0.8, top_p=0.9)
    )
    train(tiny_language(tmp_path, algorithm=GRPO(), experience=experience, steps=3), task=some_task())
    for record in of_kind(tmp_path / "run", "train"):
        assert math.isfinite(record["gradient_norm"])


def test_demonstrations_without_rewards_are_judged_by_their_loss(tmp_path: Path) -> None:
    result = train(tiny_language(tmp_path, algorithm=SFT()), task=replace(some_task(), rewards=()))
    assert result.evaluation is not None
    assert result.evaluation.score == -result.evaluation.figures["nll"]
    assert "greedy_accuracy" not in result.evaluation.figures


def test_bad_answers_are_not_what_a_policy_is_judged_by(tmp_path: Path) -> None:
    task = replace(some_task(), rewards=())
    good = tuple(example for example in task.held_out if example.columns["label"])
    found = [
        train(
            tiny_language(tmp_path, algorithm=KTO(), reference="start", steps=1, name=name),
            task=replace(task, held_out=held_out),
        ).evaluation
        for name, held_out in (("all", (*good[:2], *task.held_out[1:8:2])), ("good", good[:2]))
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].score == found[1].score


def above_one(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """From 2 to 3: no accuracy."""
    return [2.0 + share for share in digits(prompts, completions)]


def test_a_reward_that_leaves_0_to_1_has_a_score_and_no_accuracy(tmp_path: Path) -> None:
    task = replace(some_task(), rewards=(Reward(name="digits", function=above_one, inline=True),))
    train(language_cases(tmp_path)["grpo"], task=task)
    for record in of_kind(tmp_path / "run", "evaluation"):
        assert record["greedy_score"] == record["greedy/digits"]
        assert "sampled_score" in record
        assert not [name for name in record if "accuracy" in name or name.startswith("pass@")]
    assert all("score" in record and "accuracy" not in record for record in of_kind(tmp_path / "run", "train"))
    shown = {words for words, _, _ in evaluation_rows(evaluations(tmp_path / "run"))}
    assert "score, likeliest completion" in shown
    assert compare([tmp_path / "run"]).metric == "greedy_score"


def test_one_evaluation_with_a_score_makes_the_others_scores() -> None:
    records: list[dict[str, Any]] = [
        {"kind": "evaluation", "greedy_accuracy": 1.0, "sampled_accuracy": 0.5, "pass@4": 1.0},
        {"kind": "evaluation", "greedy_score": 1.5, "sampled_score": 0.5},
    ]
    first, second = evaluations_among(records)
    assert first == {"kind": "evaluation", "greedy_score": 1.0, "sampled_score": 0.5}
    assert second == records[1]
    assert evaluations_among(records[:1]) == records[:1]


def test_a_short_run_is_judged_less_often(tmp_path: Path) -> None:
    run = language_cases(tmp_path)["grpo"]
    settings = replace(run.evaluation, times=8, updates_between=4)
    train(replace(run, evaluation=settings), task=some_task())
    assert [record["update"] for record in of_kind(tmp_path / "run", "evaluation")] == [0, 4, 8]
    train(replace(run, evaluation=replace(settings, updates_between=20), name="short"), task=some_task())
    assert [record["update"] for record in of_kind(tmp_path / "short", "evaluation")] == [0, 8]


def test_the_copy_of_the_weights_for_an_evaluation_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    engine_of = evaluate_module.engine_of
    monkeypatch.setattr(evaluate_module, "engine_of", lambda *given: made.append(engine_of(*given)) or made[-1])
    result = train(language_cases(tmp_path)["grpo"], task=some_task())
    assert result.evaluation is not None
    assert made
    assert all(engine._prepared is None for engine in made)


def test_all_held_out_pairs_are_judged(tmp_path: Path) -> None:
    few = some_task()
    task = replace(few, held_out=(*few.training, *few.held_out) * 2)
    run = language_cases(tmp_path)["dpo"]
    run = replace(run, evaluation=replace(run.evaluation, prompts=45), steps=1)
    result = train(run, task=task)
    assert result.evaluation is not None
    assert result.evaluation.figures["pairs"] == 45
    collector = PairCollector(task.held_out, result.policy.tokenizer, PairConfig(pairs=4), seed=0, context=32)
    right = 0
    reference = load_language(tmp_path / "run/start")
    for index in range(45):
        one = collector.take([index], version=0)
        gained = result.policy.evaluate(one).log_prob.sum(-1) - reference.evaluate(one).log_prob.sum(-1)
        right += int(gained[0] > gained[1])
    assert result.evaluation.figures["pair_accuracy"] == right / 45


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"no CUDA device here: set device to cpu"):
        train(tiny_language(tmp_path, device="cuda"), task=some_task())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("failing", ["frozen.draw", "session"])
def test_rewards_are_closed_when_a_run_cannot_begin(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[object] = []
    monkeypatch.setattr(RewardPool, "close", lambda pool: closed.append(pool))

    def fail(*_: Any) -> Any:
        raise UsageError("it cannot begin")

    if failing == "session":
        monkeypatch.setattr(session_module, "_collector", fail)
    else:
        monkeypatch.setattr(frozen_module, "_draw", fail)
    with pytest.raises(UsageError, match="it cannot begin"):
        train(language_cases(tmp_path)["drawn"], task=some_task())
    assert len(closed) == 1

"""Faults from end to end: processes killed while they generate, and models, data, templates and rewards that are bad.

What fails is said in words that name the culprit, before anything is trained where that can be told; what a reward
fails on is counted and never a number.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_language
import torch
from tiny_language import COMPLETIONS, MODEL, language_cases, language_remains, some_task

import upslope.collect.engines.torch as engine_module
from upslope.algorithms import GRPO, RLOO, SFT, ReferenceKL, Reinforce
from upslope.collect.dialogue import Dialogue
from upslope.collect.errors import NonFiniteError
from upslope.collect.experience import CompletionConfig, DemonstrationConfig
from upslope.collect.rewards.protocol import Reward
from upslope.collect.tasks.files import Files
from upslope.collect.tasks.protocol import Example, Message, Task
from upslope.errors import UsageError
from upslope.policies.language.config import LanguageModelConfig
from upslope.policies.language.tokenizer import train_tokenizer
from upslope.train import CheckpointConfig, OptimizerConfig, resume, train
from upslope.train.checkpoint import latest_checkpoint
from upslope.train.language import LanguageEvaluationConfig, LanguageRun, RewardConfig
from upslope.train.language import session as session_module
from upslope.train.log import read_metrics
from upslope.train.loop import Snapshot
from upslope.train.optimizer import NonFiniteGradientError

NEVER = LanguageEvaluationConfig(times=0, prompts=4, samples=3, pass_at=(1,), limit=6)


def tiny(directory: Path, **changes: Any) -> LanguageRun:
    """Two updates of GRPO, never judged."""
    settings = {"algorithm": GRPO(), "experience": COMPLETIONS, "evaluation": NEVER, "steps": 2, **changes}
    return tiny_language.tiny_language(directory, **settings)


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]


# Killed while it generates


def die_at(draw_number: int, directory: Path, *, begun: bool) -> None:
    """Train or go on, and be killed when so many sets of tokens were drawn; for a process of its own."""
    draw, seen = engine_module.draw, [0]

    def counted(*arguments: Any) -> Any:
        seen[0] += 1
        if seen[0] == draw_number:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(*arguments)

    engine_module.draw = counted
    if begun:
        tiny_language.resume_language_run(directory)
    else:
        tiny_language.start_language("grpo", directory)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that are forked from one which has imported everything, so that they begin at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["upslope", "upslope.train.language.session", "transformers.models.llama", "peft"])
    return context


def test_kill_9_at_random_moments_of_generation(
    tmp_path: Path, processes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    draw, draws = engine_module.draw, [0]

    def counted(*arguments: Any) -> Any:
        draws[0] += 1
        return draw(*arguments)

    monkeypatch.setattr(engine_module, "draw", counted)
    train(language_cases(straight)["grpo"], task=some_task())
    chance = random.SystemRandom()
    moments: list[int] = []
    for _ in range(3):
        moments.append(chance.randint(1, draws[0] // 2))
        begun = (killed / "run/config.json").exists()
        if not begun:
            shutil.rmtree(killed, ignore_errors=True)
        child = processes.Process(target=die_at, args=(moments[-1], killed), kwargs={"begun": begun})
        child.start()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        if child.exitcode == 0:
            break
    else:
        if not (killed / "run/config.json").exists():
            train(language_cases(killed)["grpo"], task=some_task())
        else:
            resume(killed / "run", task=some_task())
    left, right = language_remains(straight / "run"), language_remains(killed / "run")
    for name, value in left.items():
        assert value == right[name], f"{name}, killed at draws {moments} of {draws[0]}"


# Models and tokenizers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder."""
    return train(tiny_language.tiny_language(tmp_path, name="first", steps=1), task=some_task()).directory / "policy"


def test_a_model_folder_without_weights(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        train(tiny(tmp_path, model=LanguageModelConfig(source=str(folder))), task=some_task())
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_an_end_token(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        content = {key: value for key, value in content.items() if key not in ("eos_token", "eos_token_id")}
        (folder / name).write_text(json.dumps(content))
    (folder / "upslope.json").unlink(missing_ok=True)
    with pytest.raises(UsageError, match=r"no end token.*model\.end_token"):
        train(tiny(tmp_path, model=LanguageModelConfig(source=str(folder))), task=some_task())


def test_a_prompt_longer_than_the_context(tmp_path: Path) -> None:
    task = replace(some_task(), training=(Example(prompt="1+" * 20, completion="2"),))
    with pytest.raises(
        UsageError, match=r"the prompt of training example 0 .* 40 tokens.* up to 6 .* more than the 32"
    ):
        train(tiny(tmp_path), task=task)
    with pytest.raises(UsageError, match=r"40 tokens.*32"):
        train(tiny(tmp_path, name="sft", algorithm=SFT(), experience=DemonstrationConfig(rows=2)), task=task)


# Rewards

BAD = """
import time
def raises(prompts, completions, **_): raise RuntimeError("no grader today")
def hangs(prompts, completions, **_): time.sleep(600)
def nan(prompts, completions, **_): return [float("nan")] * len(completions)
def miscounts(prompts, completions, **_): return [1.0] * (len(completions) + 1)
def nothing(prompts, completions, **_): return [None] * len(completions)
def moody(prompts, completions, **_):
    if any(text.startswith("1") for text in completions): raise RuntimeError("I do not like ones")
    return [float(len(text)) for text in completions]
"""


def scored_by(name: str, directory: Path) -> Task:
    (directory / "bad.py").write_text(BAD)
    return replace(
        some_task(), rewards=(Reward(name="grade", function=f"{directory / 'bad.py'}:{name}"),), correct="grade"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "no grader today"),
        ("hangs", r"grade failed: it did not return within 0\.5 s and was killed"),
        ("nan", "grade failed: .*nan"),
        ("miscounts", "grade failed: it returned more scores for 2 completions"),
        ("nothing", "no reward applies"),
    ],
)
def test_rewards_that_leave_nothing_to_learn_from(name: str, said: str, tmp_path: Path) -> None:
    run = tiny(
        tmp_path,
        experience=CompletionConfig(prompts=1, group=2, limit=4),
        rewards=RewardConfig(workers=1, deadline=0.5),
    )
    with pytest.raises(UsageError, match=f"the rewards left nothing of 2 completions to learn from: (?s:.*){said}"):
        train(run, task=scored_by(name, tmp_path))


def test_a_reward_that_fails_on_some_is_counted_and_leaves_the_baseline(tmp_path: Path) -> None:
    run = tiny(tmp_path, rewards=RewardConfig(workers=1), experience=CompletionConfig(prompts=6, group=4, limit=6))
    run = replace(run, log=replace(run.log, completions=24))
    train(run, task=scored_by("moody", tmp_path))
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert sum(float(record["failed"]) for record in records) > 0
    for line in lines_of(tmp_path / "run"):
        refused = line["completion"].startswith("1")
        assert ("failed" in line["reward"]["grade"]) if refused else (line["total"] == len(line["completion"]))
        assert (line["advantage"] is None) is (line["left_out"] is not None)
        assert not refused or line["total"] is None


# Groups


@pytest.mark.parametrize("algorithm", [GRPO(), RLOO(), GRPO(reference_kl=ReferenceKL(coefficient=0.1))])
def test_equal_rewards_move_nothing(algorithm: Any, tmp_path: Path) -> None:
    def constant(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [0.3] * len(completions)

    task = replace(some_task(), rewards=(Reward(name="digits", function=constant, inline=True),))
    still = OptimizerConfig(kind="adamw", learning_rate=1e-2, weight_decay=0.0)
    few = CompletionConfig(prompts=2, group=3, limit=6)
    reference = "start" if algorithm.reference_kl.on else None
    run = tiny(tmp_path, algorithm=algorithm, optimizer=still, experience=few, reference=reference)
    trained = train(run, task=task)
    begun = train(tiny(tmp_path, name="begun", steps=1, optimizer=replace(still, learning_rate=1e-30)), task=task)
    for one, other in zip(trained.policy.parameters(), begun.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    for record in read_metrics(tmp_path / "run/metrics.jsonl"):
        assert record["live_groups"] == 0.0
        assert record["gradient_norm"] == 0.0


def test_a_group_of_one(tmp_path: Path) -> None:
    alone = CompletionConfig(prompts=4, group=1, limit=6)
    for algorithm in (GRPO(), RLOO()):
        with pytest.raises(ValueError, match=r"experience\.group=1 makes no groups"):
            tiny(tmp_path, algorithm=algorithm, experience=alone)
    train(tiny(tmp_path, algorithm=Reinforce(gamma=1.0), experience=alone), task=some_task())
    assert all("live_groups" not in record for record in read_metrics(tmp_path / "run/metrics.jsonl"))


def test_completions_without_text_are_learnt_like_others(tmp_path: Path) -> None:
    run = tiny(tmp_path, experience=CompletionConfig(prompts=16, group=8, limit=6), steps=1)
    train(replace(run, log=replace(run.log, completions=128)), task=some_task())
    empty = [line for line in lines_of(tmp_path / "run") if not line["completion"]]
    assert empty
    for line in empty:
        assert (len(line["tokens"]), line["ended"], line["total"]) == (1, True, 0.0)
        assert line["advantage"] is not None


# Data and templates


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "1+1=", "answer": "2"}\n\xff\xfe{}\n', r"data\.jsonl.*line 2.*UTF-8"),
        (b'{"prompt": "1+1=", "answer": "2"}\nprompt: 2\n', r"data\.jsonl.*line 2.*JSON"),
        (b'{"prompt": "' + b"1" * (80 << 20) + b'"}\n', r"data\.jsonl.*line 1"),
    ],
    ids=["bytes", "words", "endless"],
)
def test_a_bad_line_of_data(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=said):
        train(tiny(tmp_path, task=Files(training=tmp_path / "data.jsonl", characters=True)))
    assert not (tmp_path / "run").exists()


APPENDS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def again(prompts: list[str], completions: list[str], **_: Any) -> list[str | None]:
    return ["go on"] * len(completions)


@pytest.mark.parametrize("dialogue", [None, Dialogue(reply=again, turns=2, inline=True)], ids=["single", "dialogue"])
@pytest.mark.parametrize(
    ("template", "said"),
    [
        (APPENDS, None),
        (APPENDS.replace("in messages", "in messages[-1:]"), "drops|rewrites"),
        (APPENDS.replace("in messages", "in messages if m['role'] != 'system'"), "drops|rewrites"),
    ],
    ids=["appends", "last", "no-system"],
)
def test_a_chat_template_that_drops_turns(template: str, said: str | None, dialogue: Any, tmp_path: Path) -> None:
    from upslope.policies.language.folder import save_language_policy
    from upslope.policies.language.model import build_policy
    from upslope.policies.language.sampling import Sampling

    tokenizer = train_tokenizer([APPENDS], 280)
    tokenizer.backend.chat_template = template
    shape = replace(MODEL.shape, positions=200)
    built = build_policy(LanguageModelConfig(shape=shape), tokenizer=tokenizer, seed=0, sampling=Sampling())
    save_language_policy(built, tmp_path / "model")
    prompt = (Message(role="system", content="You add."), Message(role="user", content="1+1?"))
    examples = tuple(Example(prompt=prompt) for _ in range(4))
    task = replace(some_task(), training=examples, held_out=examples, alphabet=None, dialogue=dialogue)
    run = tiny(tmp_path, model=LanguageModelConfig(source=str(tmp_path / "model")), steps=1)
    if said is None:
        train(run, task=task)
        return
    with pytest.raises(UsageError, match=said):
        train(run, task=task)


# Divergence


def resumable(run: Path) -> None:
    """Whether all that is saved is finite."""
    found = latest_checkpoint(run / "checkpoints", on_damaged=lambda place, error: pytest.fail(f"{place}: {error}"))
    assert found is not None
    assert all(bool(torch.isfinite(value).all()) for value in found.state["session"]["trainable"].values())


def test_weights_that_diverged_end_the_run_in_words_and_leave_the_last_good_checkpoint(tmp_path: Path) -> None:
    def spoil(snapshot: Snapshot[Any, Any]) -> None:
        if snapshot.update == 5:
            with torch.no_grad():
                for parameter in snapshot.policy.parameters():
                    parameter.fill_(torch.nan)

    run = tiny(tmp_path, steps=8, checkpoint=CheckpointConfig(times=8, keep=3))
    with pytest.raises(NonFiniteError, match="its weights have diverged") as caught:
        train(run, task=some_task(), callbacks=[spoil])
    assert any("could not be saved: the model's weights are NaN" in note for note in caught.value.__notes__)
    resumable(tmp_path / "run")
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["update"] == 5


def test_gradients_that_are_not_finite_end_the_run_with_everything_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = session_module.LanguageSession.advance

    def spoiled(session: Any) -> Any:
        if session.update == 3:
            raise NonFiniteGradientError("the gradient was not finite")
        return advance(session)

    monkeypatch.setattr(session_module.LanguageSession, "advance", spoiled)
    with pytest.raises(NonFiniteGradientError) as caught:
        train(tiny(tmp_path, steps=8, checkpoint=CheckpointConfig(times=0)), task=some_task())
    assert any("Everything learnt is saved" in note for note in caught.value.__notes__)
    resumable(tmp_path / "run")
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["update"] == 3

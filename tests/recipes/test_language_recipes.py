"""Recipes for language models: complete, in accord with each other, and clear about what they cannot have here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from upslope.collect.experience import CompletionConfig, DemonstrationConfig
from upslope.errors import UsageError
from upslope.policies.language.config import ModelShape
from upslope.policies.language.tokenizer import character_tokenizer
from upslope.recipes import RECIPES, load_recipe
from upslope.train import CheckpointConfig, train
from upslope.train.describe import describe_run
from upslope.train.language import LanguageEvaluationConfig, LanguageLogConfig, LanguageRun

RUNS = {name: run for name, recipe in RECIPES.items() if isinstance(run := recipe(), LanguageRun)}
REAL = [name for name in RUNS if name.startswith("gsm8k-")]
TINY = [name for name in RUNS if name not in REAL]
STARTED = [name for name, run in RUNS.items() if run.start_from is not None]


@pytest.mark.parametrize("name", RUNS)
def test_it_is_whole_and_says_what_it_does(name: str) -> None:
    run = RUNS[name]
    assert run.recipe == name
    described = describe_run(run)
    assert "experience" in described
    assert set(run.algorithm.describe()) <= set(described)
    assert (RECIPES[name].__doc__ or "").strip()


@pytest.mark.parametrize("name", STARTED)
def test_what_it_starts_from_is_a_recipe_of_the_same_task(name: str) -> None:
    run = RUNS[name]
    assert run.start_from is not None
    start = load_recipe(run.start_from)
    assert isinstance(start, LanguageRun)
    assert start.task == run.task
    assert start.start_from is None
    assert run.model.shape == ModelShape(), "the shape is the starting policy's"


@pytest.mark.parametrize("name", TINY)
def test_every_prompt_and_answer_has_room(name: str) -> None:
    run = RUNS[name]
    task = run.task.build(1)
    assert task.alphabet is not None
    tokenizer = character_tokenizer(task.alphabet)
    first = run if run.start_from is None else RUNS[run.start_from]
    limit = run.experience.limit if isinstance(run.experience, CompletionConfig) else run.evaluation.limit
    for example in [task.training[i] for i in range(300)] + [task.held_out[i] for i in range(200)]:
        assert isinstance(example.prompt, str)
        assert example.completion is not None
        prompt, answer = tokenizer.encode(example.prompt), tokenizer.encode(example.completion)
        assert len(answer) + 1 <= limit
        assert len(prompt) + limit <= first.model.shape.positions


@pytest.mark.parametrize("name", REAL)
def test_without_data_it_names_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"there is no file 'gsm8k/t\w+.jsonl'"):
        train(replace(RUNS[name], device="cpu"))
    assert not list(tmp_path.glob("runs/*"))


def data(folder: Path) -> None:
    (folder / "gsm8k").mkdir()
    for part, start in (("train", 0), ("test", 50)):
        rows = [
            {"question": f"What is {n} + 2?", "answer": f"{n} + 2 = {n + 2}\n#### {n + 2}"}
            for n in range(start, start + 20)
        ]
        (folder / "gsm8k" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", REAL)
def test_without_weights_it_says_what_to_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    def unreachable(name: str, **_: object) -> None:
        raise OSError("we could not connect")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    data(tmp_path)
    with pytest.raises(UsageError, match=rf"hub name .{RUNS[name].model.source}.*could not connect"):
        train(replace(RUNS[name], device="cpu"))
    assert not list(tmp_path.glob("runs/*"))


@pytest.fixture(scope="module")
def small_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like those of the hub, with random weights: Qwen2's architecture and its way to write messages."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model") / "small-qwen"
    tokenizer = character_tokenizer("".join(chr(code) for code in range(32, 127)) + "\n")
    tokenizer.backend.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.backend.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=tokenizer.end_token,
        bos_token_id=tokenizer.end_token,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.backend.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in REAL if "dpo" not in name])
def test_with_weights_and_data_it_learns(
    name: str, small_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only sizes and the device are others here."""
    monkeypatch.chdir(tmp_path)
    data(tmp_path)
    run = RUNS[name]
    experience = run.experience
    if isinstance(experience, CompletionConfig):
        experience = replace(experience, prompts=2, limit=8, slots=16)
    else:
        assert isinstance(experience, DemonstrationConfig)
        experience = replace(experience, rows=4)
    result = train(
        replace(
            run,
            model=replace(run.model, source=str(small_qwen), precision="float32"),
            experience=experience,
            evaluation=LanguageEvaluationConfig(times=1, prompts=2, samples=1, pass_at=(1,), limit=8),
            checkpoint=CheckpointConfig(times=0),
            log=LanguageLogConfig(progress=False, tensorboard=False),
            device="cpu",
            threads=1,
            steps=1,
        )
    )
    assert result.steps == 1
    assert (result.directory / "policy" / "model.safetensors").is_file()

"""Models are built from a seed or loaded whole; nothing is random by accident."""

import json
from pathlib import Path

import pytest
import torch
from language_models import ALPHABET, ARCHITECTURES, TOKENS, build, logits, save_foreign, small_shape
from safetensors.torch import load_file, save_file
from torch import nn

from upslope.errors import UsageError
from upslope.policies.language.config import LanguageModelConfig, LoraConfig
from upslope.policies.language.model import build_policy
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.tokenizer import character_tokenizer


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_built_model_depends_on_the_seed_and_on_nothing_else(architecture: str, tied: bool) -> None:
    shape = small_shape(architecture, tied=tied)
    torch.manual_seed(5)
    first = build(shape=shape)
    state = torch.get_rng_state()
    second = build(shape=shape)
    assert torch.equal(torch.get_rng_state(), state)
    other = build(shape=shape, seed=2)
    assert torch.equal(logits(first), logits(second))
    assert not torch.allclose(logits(first), logits(other), atol=0.1)
    assert first.architecture is not None
    assert first.architecture.tied is tied
    assert (first.context, logits(first).shape[-1]) == (32, len(ALPHABET) + 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_initial_weights_keep_sizes(architecture: str) -> None:
    policy = build(shape=small_shape(architecture, layers=12))
    assert 0.5 < float(logits(policy).std()) < 2.0
    for name, parameter in policy.model.named_parameters():
        assert parameter.dtype == torch.float32
        if name.endswith(".bias"):
            assert not parameter.any()
        elif name.split(".")[-2] in ("o_proj", "down_proj", "c_proj"):
            inputs = parameter.shape[0 if architecture == "gpt2" else 1]
            assert float(parameter.detach().std()) == pytest.approx((inputs * 24) ** -0.5, rel=0.2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"heads": 3}, "heads must divide"),
        ({"key_value_heads": 3, "heads": 4}, "key_value_heads must divide"),
        ({"architecture": "gpt2", "key_value_heads": 1}, "leave shape.key_value_heads out"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"width": 6}, "must be even"),
    ],
    ids=["heads", "groups", "gpt2", "layers", "odd"],
)
def test_shapes_that_fit_no_model_are_refused(more: dict, message: str) -> None:
    shape = small_shape()
    values = {name: getattr(shape, name) for name in shape.__dataclass_fields__}
    with pytest.raises(UsageError, match=message):
        build(shape=type(shape)(**{**values, **more}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_folder_of_transformers_is_loaded(tmp_path: Path, architecture: str, tied: bool) -> None:
    written = save_foreign(tmp_path, architecture=architecture, tied=tied)
    assert torch.equal(logits(build(source=tmp_path)), logits(written))


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    written = save_foreign(tmp_path, dtype=torch.bfloat16)
    loaded = build(source=tmp_path, precision="bfloat16")
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.lm_head.weight, written.model.lm_head.weight.float())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_end_token_is_learnt_like_any_other(tmp_path: Path, architecture: str) -> None:
    save_foreign(tmp_path, architecture=architecture, tied=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 0}))
    for policy in (build(source=tmp_path), build(shape=small_shape(architecture, tied=False))):
        policy.model(input_ids=torch.tensor([[0, 1]])).logits.square().sum().backward()
        assert policy.model.get_input_embeddings().weight.grad[0].any()


@pytest.mark.parametrize(
    ("architecture", "dropout"), [("gpt2", {"resid_pdrop": 0.5}), ("llama", {"attention_dropout": 0.5})]
)
def test_dropout_is_off(tmp_path: Path, architecture: str, dropout: dict) -> None:
    save_foreign(tmp_path, architecture=architecture)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **dropout}))
    policy = build(source=tmp_path)
    assert {module.p for module in policy.modules() if isinstance(module, nn.Dropout)} <= {0.0}
    policy.model.train()
    assert torch.equal(logits(policy), logits(policy))


def test_a_run_directory_gives_its_policy(tmp_path: Path) -> None:
    written = save_foreign(tmp_path / "policy")
    assert torch.equal(logits(build(source=tmp_path)), logits(written))


def test_a_folder_without_weights_is_never_random(tmp_path: Path) -> None:
    save_foreign(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="has no weights"):
        build(source=tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"as pickle \(pytorch_model.bin\).*convert"):
        build(source=tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has no config\.json"):
        build(source=tmp_path)


def test_missing_weights_are_named_and_unused_ones_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_foreign(tmp_path, tied=False)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.layers.7.extra.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    build(source=tmp_path)
    assert "model.layers.7.extra.weight" in caplog.text
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        save_file({key: tensors[key] for key in tensors if key != name}, path, metadata={"format": "pt"})
        with pytest.raises(UsageError, match=f"incomplete: {name} would be random"):
            build(source=tmp_path)


@pytest.mark.parametrize("kind", ["garbage", "truncated", "shape", "architecture", "quantised", "adapter"])
def test_damaged_folders_are_refused(tmp_path: Path, kind: str) -> None:
    save_foreign(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    settings = json.loads(config.read_text())
    if kind == "garbage":
        weights.write_bytes(b"no safetensors")
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "shape":
        config.write_text(json.dumps({**settings, "intermediate_size": 40}))
    elif kind == "architecture":
        config.write_text(json.dumps({**settings, "model_type": "unheard-of"}))
    elif kind == "quantised":
        config.write_text(json.dumps({**settings, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    else:
        (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=str(tmp_path)):
        build(source=tmp_path)


def test_a_name_that_is_no_folder_is_asked_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    asked: list[tuple[str, bool]] = []

    def unreachable(name: str, *, local_files_only: bool, trust_remote_code: bool) -> None:
        asked.append((name, local_files_only))
        raise OSError("we could not connect")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(UsageError, match=r"'some/model' is no folder here, and as a hub name .*could not connect"):
        build_policy(
            LanguageModelConfig(source="some/model"),
            tokenizer=character_tokenizer("ab"),
            seed=1,
            sampling=Sampling(),
        )
    assert asked == [("some/model", False)]
    with pytest.raises(UsageError, match="there is no folder"):
        build(source="./some/model")


def test_a_tokenizer_must_fit_its_model(tmp_path: Path) -> None:
    save_foreign(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    character_tokenizer(ALPHABET + "x").save(tmp_path)
    with pytest.raises(UsageError, match="15 tokens and the model embeddings for 14"):
        build(source=tmp_path)
    with pytest.raises(UsageError, match="needs a tokenizer"):
        build_policy(LanguageModelConfig(), tokenizer=None, seed=1, sampling=Sampling())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_train_alone_and_start_without_effect(architecture: str) -> None:
    shape = small_shape(architecture)
    plain, policy = build(shape=shape), build(shape=shape, lora=LoraConfig(rank=2), value_head=True)
    assert torch.equal(logits(policy), logits(plain))
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if "lora_" not in name} == {"value_head.weight", "value_head.bias"}
    assert len(trainable) > 2
    again = build(shape=shape, lora=LoraConfig(rank=2))
    assert all(torch.equal(parameter, policy.get_parameter(name)) for name, parameter in again.named_parameters())


def test_adapters_that_fit_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match=r"lora\.targets="):
        build(lora=LoraConfig(targets=("nowhere",)))
    with pytest.raises(UsageError, match="on the output embeddings"):
        build(shape=small_shape("llama", tied=False), lora=LoraConfig(targets=("q_proj", "lm_head")))
    with pytest.raises(UsageError, match="rank of at least 1"):
        build(lora=LoraConfig(rank=0))


def test_a_generated_text_ends_where_the_tokenizer_says(tmp_path: Path) -> None:
    save_foreign(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
    policy = build(source=tmp_path)
    assert policy.tokenizer.end == {0, 3}
    out = policy.model.generate(TOKENS[:1, :2], do_sample=True, max_new_tokens=30, top_k=0)
    new = out[0, 2:].tolist()
    assert not {0, 3} & set(new[:-1])


def test_loading_leaves_the_process_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    save_foreign(tmp_path)
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_rng_state())
    capfd.readouterr()
    build(source=tmp_path)
    build(lora=LoraConfig(rank=2))
    after = (logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_rng_state())
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert capfd.readouterr() == ("", "")

"""A saved policy is a Hugging Face folder, and comes back as it was."""

import json
from pathlib import Path

import pytest
import torch
from language_models import ARCHITECTURES, TOKENS, build, logits, save_foreign, small_shape
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from upslope.errors import UsageError
from upslope.policies.language.config import LoraConfig
from upslope.policies.language.folder import language_policy_files, load_language_policy, save_language_policy
from upslope.policies.language.library import quietly
from upslope.policies.language.sampling import Sampling
from upslope.train.config import OptimizerConfig
from upslope.train.optimizer import FlatOptimizer


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_loads_a_policy_in_training(tmp_path: Path, architecture: str, tied: bool) -> None:
    policy = build(shape=small_shape(architecture, tied=tied), value_head=True)
    FlatOptimizer(policy, OptimizerConfig()).flat.data.mul_(1.5)
    save_language_policy(policy, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, logits(policy))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = model.generate(**tokenizer("1+2=", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(ids[0]).startswith("1+2=")
    names = set(load_file(tmp_path / "model.safetensors"))
    assert ("lm_head.weight" in names) is not tied


def test_a_policy_comes_back_whole(tmp_path: Path) -> None:
    policy = build(value_head=True, precision="bfloat16", sampling=Sampling(temperature=0.5, top_k=3, top_p=0.9))
    assert policy.value_head is not None
    policy.value_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    save_language_policy(policy, tmp_path / "policy")
    loaded = load_language_policy(tmp_path)
    assert (loaded.sampling, loaded.precision) == (policy.sampling, "bfloat16")
    assert loaded.value_head is not None
    theirs, ours = loaded.state_dict(), policy.state_dict()
    assert {name: tensor.tolist() for name, tensor in theirs.items()} == {
        name: tensor.tolist() for name, tensor in ours.items()
    }
    assert loaded.tokenizer.encode("1+1=2") == policy.tokenizer.encode("1+1=2")
    assert load_language_policy(tmp_path, precision="float32").precision == "float32"
    start = build(source=tmp_path, value_head=True)
    assert start.value_head is not None
    assert torch.equal(start.value_head.weight, loaded.value_head.weight)
    assert build(source=tmp_path).value_head is None


def test_adapters_are_merged_and_stand_beside(tmp_path: Path) -> None:
    policy = build(lora=LoraConfig(rank=2, alpha=3.0))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    save_language_policy(policy, tmp_path)
    assert torch.allclose(logits(load_language_policy(tmp_path)), logits(policy), atol=1e-4)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (tmp_path / "lora.safetensors").rename(adapter / "adapter_model.safetensors")
    (tmp_path / "lora.json").rename(adapter / "adapter_config.json")
    with quietly():
        again = PeftModel.from_pretrained(build().model, str(adapter))
    with torch.no_grad():
        assert torch.allclose(again(input_ids=TOKENS).logits, logits(policy), atol=1e-5)


def test_files_are_what_is_saved(tmp_path: Path) -> None:
    policy = build(value_head=True)
    files = language_policy_files(policy)
    save_language_policy(policy, tmp_path)
    assert files == {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "value_head.safetensors", "upslope.json"} <= set(
        files
    )
    assert files == language_policy_files(policy)
    with pytest.raises(UsageError, match="not empty"):
        save_language_policy(policy, tmp_path)


def test_a_foreign_folder_is_loaded_with_plain_sampling(tmp_path: Path) -> None:
    written = save_foreign(tmp_path)
    loaded = load_language_policy(tmp_path)
    assert (loaded.sampling, loaded.precision, loaded.value_head) == (Sampling(), "float32", None)
    assert torch.equal(logits(loaded), logits(written))
    with pytest.raises(UsageError, match="is no folder"):
        load_language_policy(tmp_path / "nowhere")


def test_other_weights_than_those_written_are_noticed(tmp_path: Path) -> None:
    save_language_policy(build(value_head=True), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="not those that were written"):
        load_language_policy(tmp_path)
    (tmp_path / "upslope.json").unlink()
    load_language_policy(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "upgrade upslope"),
        ({"format": "other"}, "not what upslope wrote"),
        ({"content_hash": 5}, "not what upslope wrote"),
        ({"sampling": {"temperature": -1.0}}, "temperature must be"),
        ({"sampling": {"warmth": 1.0}}, "not what upslope wrote"),
        ({"precision": "int8"}, "not what upslope wrote"),
    ],
    ids=["newer", "format", "hash", "temperature", "unknown", "precision"],
)
def test_a_damaged_description_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    save_language_policy(build(), tmp_path)
    path = tmp_path / "upslope.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=message):
        load_language_policy(tmp_path)
    path.write_bytes(b"\xff{")
    with pytest.raises(UsageError, match="not what upslope wrote"):
        load_language_policy(tmp_path)


def test_a_damaged_critic_is_refused(tmp_path: Path) -> None:
    save_language_policy(build(value_head=True), tmp_path)
    path = tmp_path / "value_head.safetensors"
    save_file({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="where the model needs"):
        load_language_policy(tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="is not a safetensors file"):
        load_language_policy(tmp_path)
    path.unlink()
    with pytest.raises(UsageError, match="is missing"):
        load_language_policy(tmp_path)

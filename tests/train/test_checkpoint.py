import json
import math
import re
import subprocess
from collections import OrderedDict
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from upslope.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    load_policy_folder,
    save_checkpoint,
    save_policy_folder,
    write_file_atomically,
)
from upslope.train.tensor_file import TORCH_DTYPES


def refuse_damage(path: Path, fault: CheckpointError) -> None:
    raise AssertionError(f"{path} should be whole") from fault


def assert_same(got: Any, expected: Any) -> None:
    """Equal with types, order, bits of floats, shapes and data types."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(got, torch.Tensor)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        expected = expected.detach().contiguous()
        assert got.reshape(-1).view(torch.uint8).tolist() == expected.reshape(-1).view(torch.uint8).tolist()
        return
    assert type(got) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert got.tobytes() == expected.tobytes()
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        assert [type(key) for key in got] == [type(key) for key in expected]
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert got.hex() == expected.hex()
    else:
        assert got == expected


def through_disk(state: Any, directory: Path) -> Any:
    return load_checkpoint(save_checkpoint(directory, 1, state, keep=1)).state


TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(TORCH_DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 99),
)
ARRAYS = hypothesis_numpy.arrays(
    dtype=st.sampled_from(["?", "u1", "i2", "u4", "i8", "u8", "f2", "f4", "f8", "c8"]),
    shape=hypothesis_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
INTEGERS = st.integers() | st.integers(-(2**54), 2**54) | st.integers(-(10**5000), 10**5000)
KEYS = st.text(max_size=4) | st.sampled_from(["$int", "$tensor", "/", "~1", "#1", "__metadata__", "", "\ud800", "1"])
TREES = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | st.text(max_size=5) | TENSORS | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(KEYS | st.integers(-1, 10**20), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(state=TREES)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tree_comes_back_as_it_was(tmp_path: Path, state: Any) -> None:
    assert_same(through_disk(state, tmp_path), state)


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_data_type_survives_in_every_form(tmp_path: Path, dtype: torch.dtype) -> None:
    grid = torch.arange(12).reshape(3, 4).to(dtype)
    state = {
        "plain": grid,
        "scalar": grid[1, 1],
        "transposed": grid.T,
        "strided": grid[:, ::2],
        "expanded": torch.ones(1, dtype=dtype).expand(5),
        "empty": grid[:0],
    }
    assert_same(through_disk(state, tmp_path), state)


def test_extreme_values_keep_their_bits(tmp_path: Path) -> None:
    floats = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 5e-324], dtype=torch.float64)
    unsigned = np.array([2**64 - 1, 2**63], dtype=np.uint64)
    state = [floats, floats.to(torch.bfloat16), unsigned, np.array(7, dtype=np.uint32), -0.0, 2**53, 2**53 + 1]
    assert_same(through_disk(state, tmp_path), state)


def test_views_of_numpy_arrays_come_back_writable_and_separate(tmp_path: Path) -> None:
    whole = np.arange(6.0)
    whole.flags.writeable = False
    got = through_disk({"even": whole[::2], "backwards": whole[::-1]}, tmp_path)
    got["even"][0] = 9.0
    assert got["even"].tolist() == [9.0, 2.0, 4.0]
    assert got["backwards"].tolist() == [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(1000))
    path = save_checkpoint(tmp_path, 1, {"embedding": weight, "head": weight.detach()}, keep=None)
    state = load_checkpoint(path).state
    assert (path / "tensors.safetensors").stat().st_size < 2 * 4000
    assert state["head"] is state["embedding"]
    assert not state["head"].requires_grad


def test_overlapping_views_come_back_separate(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    got = through_disk({"left": whole[:4], "right": whole[2:], "whole": whole}, tmp_path)
    got["left"].zero_()
    assert got["right"].tolist() == [2.0, 3.0, 4.0, 5.0]
    assert got["whole"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_two_shapes_of_one_storage_are_both_stored(tmp_path: Path) -> None:
    flat = torch.arange(6.0)
    shapes = {"flat": flat, "grid": flat.view(2, 3), "again": flat}
    assert_same(through_disk(shapes, tmp_path), shapes)
    save_policy_folder(tmp_path / "policy", shapes, {})
    assert_same(dict(sorted(load_policy_folder(tmp_path / "policy")[0].items())), dict(sorted(shapes.items())))


def test_tensors_at_places_with_confusable_names_stay_apart(tmp_path: Path) -> None:
    keys = ["a/b", "a~1b", "a~01b", "#1", 1, "1", "~21", "\\n", "\n", "\ud800", "\\ud800"]
    state: dict[Any, Any] = {key: torch.tensor(index) for index, key in enumerate(keys)}
    state["a"] = {"b": torch.tensor(-1)}
    assert_same(through_disk(state, tmp_path), state)


def test_lazy_negation_and_conjugation_are_carried_out(tmp_path: Path) -> None:
    complex_ = torch.tensor([1 + 2j], dtype=torch.complex64)
    got = through_disk([complex_.conj(), complex_.conj().imag], tmp_path)
    assert got[0].tolist() == [1 - 2j]
    assert got[1].tolist() == [-2.0]


def test_a_module_and_its_optimizer_go_on_as_if_never_stopped(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        return module, torch.optim.Adam(module.parameters(), lr=0.1)

    def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer, updates: int) -> None:
        for _ in range(updates):
            optimizer.zero_grad()
            module(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()

    straight, straight_optimizer = build()
    train(straight, straight_optimizer, 6)
    first, first_optimizer = build()
    train(first, first_optimizer, 3)
    state = {"policy": first.state_dict(), "optimizer": first_optimizer.state_dict()}
    state = through_disk(state, tmp_path)
    second, second_optimizer = build()
    second.load_state_dict(state["policy"])
    second_optimizer.load_state_dict(state["optimizer"])
    train(second, second_optimizer, 3)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


class Colour(IntEnum):
    RED = 1


def self_containing() -> list[Any]:
    inside: list[Any] = []
    inside.append(inside)
    return inside


@pytest.mark.parametrize(
    "value",
    [
        b"bytes",
        {1, 2},
        object(),
        Path("x"),
        Colour.RED,
        np.float64(1.0),
        np.int32(1),
        1 + 2j,
        range(3),
        torch.float32,
        np.array(["text"]),
        np.array([object()]),
        np.array([1], dtype=">i4"),
        np.array([1.0], dtype=np.longdouble),
        np.ma.masked_array([1.0], [True]),
        torch.zeros(2, device="meta"),
        torch.zeros(2, dtype=torch.complex128),
        torch.eye(2).to_sparse(),
        {(1, 2): 3},
        {True: 1},
        {None: 1},
        self_containing(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_stored_is_refused_by_its_place(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"/loop/extra/1"):
        save_checkpoint(tmp_path, 3, {"loop": {"extra": [0, value]}}, keep=None)
    assert list(tmp_path.iterdir()) == []


def test_an_ordered_dict_comes_back_as_a_dict(tmp_path: Path) -> None:
    assert_same(through_disk(OrderedDict(b=1, a=2), tmp_path), {"b": 1, "a": 2})


def test_a_long_list_of_numbers_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep long sequences of numbers in tensors"):
        save_checkpoint(tmp_path, 0, [0.1] * 700_000, keep=None)


def test_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "deep" / "checkpoints", 60, {"rate": 0.5}, keep=None)
    assert path == tmp_path / "deep" / "checkpoints" / "step-000000060"
    assert {file.name for file in path.iterdir()} == {"MANIFEST.json", "state.json", "tensors.safetensors"}
    assert json.loads((path / "state.json").read_text()) == {"rate": {"$float": "0x1.0000000000000p-1"}}
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert (manifest["format"], manifest["format_version"], manifest["step"]) == ("upslope-checkpoint", 1, 60)
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["files"]["state.json"][0] == (path / "state.json").stat().st_size


@pytest.mark.parametrize(("step", "keep"), [(-1, None), (True, None), (10**18, None), (1, 0), (1, -2)])
def test_senseless_arguments_are_refused(tmp_path: Path, step: int, keep: int | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        save_checkpoint(tmp_path, step, {}, keep=keep)


# Rotation and the newest checkpoint


def steps(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 30, 1_000_000_000):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert steps(tmp_path) == ["step-000000030", "step-1000000000"]
    found = latest_checkpoint(tmp_path, on_damaged=refuse_damage)
    assert found == Checkpoint(step=10**9, state={"step": 10**9}, path=tmp_path / "step-1000000000")


def test_rotation_never_deletes_the_checkpoint_just_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 60, {}, keep=None)
    save_checkpoint(tmp_path, 55, {}, keep=1)
    assert steps(tmp_path) == ["step-000000055"]


def test_rotation_leaves_what_is_not_ours(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 10, {}, keep=None)
    (tmp_path / "step-000000010" / "notes.txt").write_text("keep me")
    (tmp_path / "step-000000011").mkdir()
    (tmp_path / "step-000000011" / "thesis.txt").write_text("keep me")
    (tmp_path / "step-000000012").symlink_to(tmp_path / "step-000000010")
    (tmp_path / "step-000000013").write_text("keep me")
    (tmp_path / ".tmp-step-000000014-999999999").mkdir()
    (tmp_path / ".tmp-step-000000014-999999999" / "thesis.txt").write_text("keep me")
    (tmp_path / ".tmp-mine-999999999").mkdir()
    copied = tmp_path / "step-000000015"
    save_checkpoint(tmp_path, 14, {}, keep=None).rename(copied)
    before = steps(tmp_path)
    save_checkpoint(tmp_path, 20, {}, keep=1)
    assert steps(tmp_path) == sorted([*before, "step-000000020"])
    assert (tmp_path / "step-000000010" / "notes.txt").read_text() == "keep me"


def test_what_a_dead_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as writer:
        dead = tmp_path / ".tmp-step-000000005-999999999"
        living = tmp_path / f".tmp-step-000000005-{writer.pid}"
        for path in (dead, living):
            path.mkdir()
            (path / "state.json").write_text("half")
        save_checkpoint(tmp_path, 6, {}, keep=None)
        writer.kill()
    assert steps(tmp_path) == [living.name, "step-000000006"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, {"value": 1}, keep=None)
    save_checkpoint(tmp_path, 5, {"value": 2}, keep=None)
    assert steps(tmp_path) == ["step-000000005"]
    assert load_checkpoint(tmp_path / "step-000000005").state == {"value": 2}


def test_a_strange_directory_in_the_place_of_a_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    strange = tmp_path / "step-000000005"
    strange.mkdir()
    (strange / "thesis.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="will not be replaced"):
        save_checkpoint(tmp_path, 5, {}, keep=None)
    assert steps(tmp_path) == ["step-000000005"]
    assert (strange / "thesis.txt").read_text() == "keep me"


def test_the_newest_whole_checkpoint_wins_and_each_damaged_one_is_told(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, {"step": step}, keep=None)
    (tmp_path / "step-000000004" / "state.json").unlink()
    (tmp_path / "step-000000003" / "MANIFEST.json").write_text("{}")
    (tmp_path / "step-000000009").mkdir()
    (tmp_path / "elsewhere").mkdir()
    told: list[tuple[str, str]] = []
    found = latest_checkpoint(tmp_path, on_damaged=lambda path, fault: told.append((path.name, str(fault))))
    assert found is not None
    assert found.step == 2
    assert [name for name, _ in told] == ["step-000000009", "step-000000004", "step-000000003"]
    assert re.search(r"step-000000004/state.json is missing\. Nothing was loaded from it", told[1][1])


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none", on_damaged=refuse_damage) is None
    assert latest_checkpoint(tmp_path, on_damaged=refuse_damage) is None
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is no directory"):
        latest_checkpoint(tmp_path / "file", on_damaged=refuse_damage)


def test_a_renamed_copy_of_a_checkpoint_loads_but_not_under_the_number_of_another(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 5, {"value": 1}, keep=None)
    kept = path.rename(tmp_path / "before-the-change")
    assert load_checkpoint(kept).state == {"value": 1}
    wrong = kept.rename(tmp_path / "step-000000006")
    with pytest.raises(CheckpointError, match="is for step 5, unlike the name"):
        load_checkpoint(wrong)


# Policy folders and single files


def test_a_policy_folder_is_readable_by_people_and_by_safetensors(tmp_path: Path) -> None:
    config = {"hidden": [64, 64], "gain": 0.1, "bound": math.inf, "shape": (4,)}
    weights = {"trunk.weight": torch.ones(2, 3), "größe": torch.tensor(3)}
    save_policy_folder(tmp_path / "policy", weights, config)
    tensors, got = load_policy_folder(tmp_path / "policy")
    assert_same(got, config)
    assert set(tensors) == set(weights)
    assert_same(tensors["trunk.weight"], weights["trunk.weight"])
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["gain"] == 0.1
    from safetensors import safe_open

    with safe_open(tmp_path / "policy" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_policy_folder_is_replaced_whole(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save_policy_folder(tmp_path / "policy", {"weight": torch.tensor(value)}, {"value": value})
    tensors, config = load_policy_folder(tmp_path / "policy")
    assert (tensors["weight"].item(), config) == (2.0, {"value": 2.0})
    assert steps(tmp_path) == ["policy"]


def test_a_policy_folder_opens_through_a_link_of_the_user(tmp_path: Path) -> None:
    save_policy_folder(tmp_path / "policy", {}, {"value": 1})
    (tmp_path / "mine").symlink_to(tmp_path / "policy")
    assert load_policy_folder(tmp_path / "mine") == ({}, {"value": 1})


def test_a_policy_folder_with_files_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    save_policy_folder(tmp_path / "policy", {}, {"value": 1})
    (tmp_path / "policy" / "README.md").write_text("mine")
    with pytest.raises(CheckpointError, match="will not be replaced"):
        save_policy_folder(tmp_path / "policy", {}, {"value": 2})
    assert load_policy_folder(tmp_path / "policy") == ({}, {"value": 1})


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_an_impossible_tensor_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be the name of a tensor"):
        save_policy_folder(tmp_path / "policy", {name: torch.zeros(1)}, {})


def test_tensors_do_not_belong_in_the_config_of_a_policy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="/low"):
        save_policy_folder(tmp_path / "policy", {}, {"low": np.zeros(2)})


def test_a_checkpoint_is_no_policy_and_a_missing_one_says_so(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {}, keep=None)
    with pytest.raises(CheckpointError, match="is not the manifest of an upslope-policy"):
        load_policy_folder(path)
    with pytest.raises(CheckpointError, match=r"cannot be opened as a folder: No such file.*Check the path"):
        load_policy_folder(tmp_path / "policy")


def test_a_file_is_replaced_and_the_remains_of_a_dead_writer_go(tmp_path: Path) -> None:
    (tmp_path / ".tmp-config.json-999999999").write_text("half")
    write_file_atomically(tmp_path / "config.json", b"one")
    write_file_atomically(tmp_path / "config.json", b"two")
    assert steps(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == b"two"


def test_checkpoints_known_to_be_damaged_take_no_place_and_stay(tmp_path: Path) -> None:
    for step in (1, 2, 9):
        save_checkpoint(tmp_path, step, {"step": step}, keep=None)
    damaged = {tmp_path / "step-000000009"}
    for step in (3, 4):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2, uncounted=damaged)
    assert sorted(int(path.name[-9:]) for path in tmp_path.iterdir()) == [3, 4, 9]

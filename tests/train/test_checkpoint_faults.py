"""Kills, full disks, flipped bits and hostile files: what is on disk stays whole, what is read is verified."""

import errno
import hashlib
import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from upslope.train import storage
from upslope.train.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    load_policy_folder,
    save_checkpoint,
    save_policy_folder,
    write_file_atomically,
)
from upslope.train.manifest import FolderKind, write_manifest

STATE = {"weight": torch.arange(5.0), "flags": torch.tensor([True, False]), "epoch": 3, "rate": 0.1}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass
class FaultySystem:
    """Stands before the module `os` of the writer and meets it at every call that changes the disk.

    Moments are counted: one before and one after each call, and one in the middle of each write.
    """

    at: int
    fault: Callable[[], None]
    seen: int = 0
    names: list[str] = field(default_factory=list)

    def moment(self, name: str) -> None:
        self.names.append(name)
        self.seen += 1
        if self.seen - 1 == self.at:
            self.fault()

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        if name not in ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir"):
            return call

        def met(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return call(*arguments, **options)
            self.moment(f"before {name}")
            if name == "write":
                descriptor, data = arguments
                half = call(descriptor, data[: len(data) // 2])
                self.moment("half of write")
                return half + call(descriptor, data[half:])
            result = call(*arguments, **options)
            self.moment(f"after {name}")
            return result

        return met


@contextmanager
def system(faulty: FaultySystem) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "os", faulty)
        yield


def in_a_fork(action: Callable[[], None]) -> int:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
        pid = os.fork()
    if pid == 0:
        code = 99
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# What is on disk before, what is written, what must be seen: the old or the new


def refuse_damage(path: Path, fault: CheckpointError) -> None:
    raise AssertionError(f"{path} should be whole") from fault


def newest(directory: Path) -> Any:
    found = latest_checkpoint(directory, on_damaged=refuse_damage)
    return None if found is None else (found.step, found.state["value"].tolist())


def checkpoint(directory: Path, step: int, value: float, keep: int | None) -> None:
    save_checkpoint(directory, step, {"value": torch.full((4,), value)}, keep=keep)


def policy(directory: Path, value: float) -> None:
    save_policy_folder(directory / "policy", {"weight": torch.tensor(value)}, {"value": value})


def read_policy(directory: Path) -> Any:
    tensors, config = load_policy_folder(directory / "policy")
    assert tensors["weight"].item() == config["value"]
    return config["value"]


@dataclass(frozen=True)
class Scenario:
    prepare: Callable[[Path], None]
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    old: Any
    new: Any
    final: set[str]


def two_checkpoints(directory: Path) -> None:
    checkpoint(directory, 10, 1.0, None)
    checkpoint(directory, 20, 2.0, None)


def left_by_the_dead(directory: Path) -> None:
    two_checkpoints(directory)
    for place in (".tmp-step-000000015-999999999", ".previous-step-000000020"):
        shutil.copytree(directory / "step-000000010", directory / place)
    (directory / "step-000000010").rename(directory / ".previous-step-000000010")


SCENARIOS = {
    "the first checkpoint": Scenario(
        prepare=lambda directory: None,
        write=lambda directory: checkpoint(directory / "run" / "checkpoints", 30, 3.0, 2),
        read=lambda directory: newest(directory / "run" / "checkpoints"),
        old=None,
        new=(30, [3.0] * 4),
        final={"run"},
    ),
    "the next checkpoint, rotating": Scenario(
        prepare=two_checkpoints,
        write=lambda directory: checkpoint(directory, 30, 3.0, 2),
        read=newest,
        old=(20, [2.0] * 4),
        new=(30, [3.0] * 4),
        final={"step-000000020", "step-000000030"},
    ),
    "the same checkpoint again": Scenario(
        prepare=two_checkpoints,
        write=lambda directory: checkpoint(directory, 20, 3.0, None),
        read=newest,
        old=(20, [2.0] * 4),
        new=(20, [3.0] * 4),
        final={"step-000000010", "step-000000020"},
    ),
    "the only checkpoint again": Scenario(
        prepare=lambda directory: checkpoint(directory, 20, 2.0, None),
        write=lambda directory: checkpoint(directory, 20, 3.0, 1),
        read=newest,
        old=(20, [2.0] * 4),
        new=(20, [3.0] * 4),
        final={"step-000000020"},
    ),
    "after a killed writer": Scenario(
        prepare=left_by_the_dead,
        write=lambda directory: checkpoint(directory, 30, 3.0, 3),
        read=newest,
        old=(20, [2.0] * 4),
        new=(30, [3.0] * 4),
        final={"step-000000010", "step-000000020", "step-000000030"},
    ),
    "a policy": Scenario(
        prepare=lambda directory: policy(directory, 1.0),
        write=lambda directory: policy(directory, 2.0),
        read=read_policy,
        old=1.0,
        new=2.0,
        final={"policy"},
    ),
    "a file": Scenario(
        prepare=lambda directory: write_file_atomically(directory / "config.json", b"old"),
        write=lambda directory: write_file_atomically(directory / "config.json", b"new"),
        read=lambda directory: (directory / "config.json").read_bytes(),
        old=b"old",
        new=b"new",
        final={"config.json"},
    ),
}


def moments(scenario: Scenario, directory: Path) -> list[str]:
    """The moments of an undisturbed writing, which also shows that it works."""
    faulty = FaultySystem(at=-1, fault=lambda: None)
    with system(faulty):
        scenario.write(directory)
    assert scenario.read(directory) == scenario.new
    assert {path.name for path in directory.iterdir()} == scenario.final
    return faulty.names


def fresh(scenario: Scenario, directory: Path) -> Path:
    directory.mkdir()
    scenario.prepare(directory)
    return directory


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_any_moment_the_old_or_the_new_is_whole(name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    names = moments(scenario, fresh(scenario, tmp_path / "undisturbed"))
    assert {"half of write", "before fsync", "after fsync"} <= set(names)
    seen = []
    for at in range(len(names)):
        directory = fresh(scenario, tmp_path / f"killed-{at}")

        def dies(directory: Path = directory, at: int = at) -> None:
            with system(FaultySystem(at=at, fault=lambda: os._exit(77))):
                scenario.write(directory)

        assert exit_code(in_a_fork(dies)) == 77
        seen.append(scenario.read(directory))
        assert seen[-1] in (scenario.old, scenario.new)
        scenario.write(directory)
        assert scenario.read(directory) == scenario.new
        assert {path.name for path in directory.iterdir()} == scenario.final
    assert seen == sorted(seen, key=lambda value: value == scenario.new)
    assert seen[0] == scenario.old
    assert seen[-1] == scenario.new


def test_everything_is_forced_to_disk_before_it_is_renamed_into_place(tmp_path: Path) -> None:
    names = moments(SCENARIOS["a policy"], fresh(SCENARIOS["a policy"], tmp_path / "policy"))
    file = ["after open", "half of write", "after fsync"]
    folder = ["after mkdir", *file, *file, *file, "after fsync"]
    exchange = ["after rename", "after rename", "after fsync"]
    removal = ["after unlink", "after unlink", "after unlink", "after rmdir"]
    assert [name for name in names if not name.startswith("before")] == [*folder, *exchange, *removal]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_full_disk_at_any_call_is_told_and_harms_nothing(name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    names = moments(scenario, fresh(scenario, tmp_path / "undisturbed"))

    def fails() -> None:
        raise FULL

    for at, moment in enumerate(names):
        if moment.startswith("after"):
            continue
        directory = fresh(scenario, tmp_path / f"full-{at}")
        with system(FaultySystem(at=at, fault=fails)), pytest.raises(CheckpointError, match="No space left") as told:
            scenario.write(directory)
        assert "free space or repair the file system" in str(told.value)
        seen = scenario.read(directory)
        assert seen in (scenario.old, scenario.new)
        if seen == scenario.old and name != "after a killed writer":
            assert not [path for path in directory.rglob(".*") if path.name.startswith((".tmp", ".previous"))]
        scenario.write(directory)
        assert scenario.read(directory) == scenario.new
        assert {path.name for path in directory.iterdir()} == scenario.final


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_disk_that_dies_and_stays_dead_harms_nothing(name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    names = moments(scenario, fresh(scenario, tmp_path / "undisturbed"))
    for at in range(0, len(names), 2):
        directory = fresh(scenario, tmp_path / f"dead-{at}")
        faulty = FaultySystem(at=at, fault=lambda: None)

        def fails(faulty: FaultySystem = faulty) -> None:
            faulty.at = faulty.seen
            raise FULL

        faulty.fault = fails
        with system(faulty), pytest.raises(CheckpointError):
            scenario.write(directory)
        assert scenario.read(directory) in (scenario.old, scenario.new)


def test_a_full_disk_leaves_older_checkpoints_byte_for_byte(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    before = content(tmp_path)

    def fails() -> None:
        raise FULL

    with system(FaultySystem(at=5, fault=fails)), pytest.raises(CheckpointError):
        checkpoint(tmp_path, 30, 3.0, 1)
    assert content(tmp_path) == before


def test_killed_at_random_times_the_newest_finished_checkpoint_is_found(tmp_path: Path) -> None:
    def saves_for_ever() -> None:
        found = latest_checkpoint(tmp_path, on_damaged=refuse_damage)
        step = 0 if found is None else found.step
        while True:
            step += 1
            checkpoint(tmp_path, step, float(step), 2)

    last = 0
    for kill in range(12):
        pid = in_a_fork(saves_for_ever)
        time.sleep(0.02 + 0.013 * (kill * 7 % 12))
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL
        found = newest(tmp_path)
        if found is not None:
            assert found == (found[0], [float(found[0])] * 4)
            assert found[0] >= last
            last = found[0]
    assert last > 0


def test_a_reader_always_finds_a_policy_while_it_is_being_replaced(tmp_path: Path) -> None:
    policy(tmp_path, 0.0)

    def replaces() -> None:
        for value in range(1, 100):
            policy(tmp_path, float(value))

    pid = in_a_fork(replaces)
    seen = []
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        seen.append(read_policy(tmp_path))
    assert seen == sorted(seen)
    assert read_policy(tmp_path) == 99.0


def test_an_error_that_is_not_of_the_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    before = content(tmp_path)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with system(FaultySystem(at=5, fault=interrupted)), pytest.raises(KeyboardInterrupt):
        checkpoint(tmp_path, 30, 3.0, 1)
    assert content(tmp_path) == before


# Damage


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "tensors.safetensors"])
def test_every_flipped_bit_and_every_truncation_is_found_out(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, 60, STATE, keep=None)
    raw = (path / name).read_bytes()
    corruptions = [raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :] for at in range(len(raw))]
    corruptions += [raw[:length] for length in range(len(raw))] + [raw + b" ", raw + b"\0", raw * 2]
    for corrupted in corruptions:
        (path / name).write_bytes(corrupted)
        with pytest.raises(CheckpointError, match=f"{path.name}/{name}"):
            load_checkpoint(path)
    (path / name).write_bytes(raw)
    assert load_checkpoint(path).step == 60


@pytest.mark.parametrize("name", ["MANIFEST.json", "config.json", "model.safetensors"])
def test_a_damaged_policy_folder_is_found_out(tmp_path: Path, name: str) -> None:
    policy(tmp_path, 1.0)
    raw = (tmp_path / "policy" / name).read_bytes()
    for at in range(0, len(raw), 7):
        (tmp_path / "policy" / name).write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        with pytest.raises(CheckpointError, match=f"policy/{name}"):
            load_policy_folder(tmp_path / "policy")


# Hostile files: the manifest is right, so that only our own checks stand in the way

KIND = FolderKind(format="upslope-checkpoint", files=frozenset({"state.json", "tensors.safetensors"}))
NO_TENSORS = safetensors.torch.save({})


def sealed(directory: Path, state: bytes = b"{}", tensors: bytes = NO_TENSORS) -> Path:
    path = directory / "step-000000001"
    path.mkdir()
    files = {"state.json": state, "tensors.safetensors": tensors}
    for name, data in files.items():
        (path / name).write_bytes(data)
    (path / "MANIFEST.json").write_bytes(write_manifest(KIND, files, 1))
    return path


def safetensors_file(header: str | bytes, data: bytes = b"", size: int | None = None) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if size is None else size).to_bytes(8, "little") + raw + data


def entry(dtype: str = "U8", shape: object = (1,), offsets: object = (0, 1)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


def test_the_hostile_corpus_starts_from_something_that_loads(tmp_path: Path) -> None:
    path = sealed(tmp_path, b'{"a":{"$tensor":"/a"}}', safetensors_file(f'{{"/a":{entry()}}}', b"\7"))
    assert load_checkpoint(path).state["a"].tolist() == [7]


@pytest.mark.parametrize(
    "tensors",
    {
        "pickle": b"cos\nsystem\n(S'touch hostile'\ntR.",
        "zip": b"PK\x03\x04" + bytes(100),
        "empty": b"",
        "seven bytes": bytes(7),
        "header of 2^40": safetensors_file("{}", size=2**40),
        "header of 2^64 - 1": safetensors_file("{}", size=2**64 - 1),
        "header over the limit": safetensors_file(b" " * (17 * 2**20) + b"{}"),
        "header is a list": safetensors_file("[]"),
        "header too deep": safetensors_file("[" * 100_000),
        "duplicate name": safetensors_file(f'{{"/a":{entry()},"/a":{entry()}}}', b"\0"),
        "overlap": safetensors_file(f'{{"/a":{entry()},"/b":{entry()}}}', b"\0"),
        "gap": safetensors_file(f'{{"/a":{entry(offsets=[1, 2])}}}', b"\0\0"),
        "trailing bytes": safetensors_file("{}", b"hidden"),
        "outside the file": safetensors_file(f'{{"/a":{entry(shape=[2**50], offsets=[0, 2**50])}}}', b"\0"),
        "huge shape": safetensors_file(f'{{"/a":{entry(shape=[2**40, 2**40], offsets=[0, 0])}}}'),
        "huge empty shape": safetensors_file(f'{{"/a":{entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}}}'),
        "many dimensions": safetensors_file(f'{{"/a":{entry(shape=[1] * 1000)}}}', b"\0"),
        "negative shape": safetensors_file(f'{{"/a":{entry(shape=[-1, -1])}}}', b"\0"),
        "shape of text": safetensors_file(f'{{"/a":{entry(shape=["1"])}}}', b"\0"),
        "unknown type": safetensors_file(f'{{"/a":{entry(dtype="F8_E4M3")}}}', b"\0"),
        "three offsets": safetensors_file(f'{{"/a":{entry(offsets=[0, 1, 1])}}}', b"\0"),
        "another field": safetensors_file('{"/a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}}', b"\0"),
        "no truth value": safetensors_file(f'{{"/a":{entry(dtype="BOOL")}}}', b"\2"),
        "metadata of numbers": safetensors_file('{"__metadata__":{"a":1}}'),
        "not UTF-8": safetensors_file(b'{"\xff":1}'),
    }.items(),
    ids=lambda case: case[0],
)
def test_hostile_tensors_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: tuple[str, bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = sealed(tmp_path, b'{"a":{"$tensor":"/a"}}', tensors[1])
    with pytest.raises(CheckpointError, match=r"step-000000001/tensors.safetensors .*Nothing was loaded from it"):
        load_checkpoint(path)
    assert os.listdir() == ["step-000000001"]


@pytest.mark.parametrize(
    "state",
    {
        "pickle": b"cos\nsystem\n(S'touch hostile'\ntR.",
        "too deep for the reader": b"[" * 100_000 + b"]" * 100_000,
        "too deep for a tree": b"[" * 66 + b"]" * 66,
        "too long": b'"' + b"x" * (17 * 2**20) + b'"',
        "duplicate key": b'{"a":1,"a":2}',
        "NaN": b'{"a":NaN}',
        "overflow": b'{"a":1e999}',
        "long integer": b'{"a":%s}' % (b"9" * 5000),
        "integer beyond 2^53": b'{"a":9007199254740993}',
        "unknown tag": b'{"$object":"os.system"}',
        "two tags": b'{"$int":"0x1","$float":"nan"}',
        "tag of another type": b'{"$int":1}',
        "integer that is none": b'{"$int":"0x_1"}',
        "float that is none": b'{"$float":"1.5"}',
        "float beyond all": b'{"$float":"0x1.0p+9999"}',
        "pair of three": b'{"$dict":[["a",1,2]]}',
        "twice in a dict": b'{"$dict":[["a",1],["a",2]]}',
        "list as a key": b'{"$dict":[[[],1]]}',
        "true as a key": b'{"$dict":[[true,1]]}',
        "tensor that is not there": b'{"a":{"$tensor":"/b"}}',
        "not UTF-8": b'"\xff"',
        "UTF-16": '{"a":1}'.encode("utf-16"),
        "two documents": b"{}{}",
        "nothing": b"",
    }.items(),
    ids=lambda case: case[0],
)
def test_hostile_states_are_refused(tmp_path: Path, state: tuple[str, bytes]) -> None:
    path = sealed(tmp_path, state[1])
    with pytest.raises(CheckpointError, match=r"step-000000001/state.json .*Nothing was loaded from it"):
        load_checkpoint(path)


def test_a_tensor_that_the_state_does_not_mention_is_refused(tmp_path: Path) -> None:
    path = sealed(tmp_path, b"{}", safetensors_file(f'{{"/a":{entry()}}}', b"\0"))
    with pytest.raises(CheckpointError, match="does not mention the tensor '/a'"):
        load_checkpoint(path)


def test_a_tensor_that_numpy_cannot_hold_is_refused_as_an_array(tmp_path: Path) -> None:
    tensors = safetensors.torch.save({"/a": torch.zeros(1, dtype=torch.bfloat16)})
    path = sealed(tmp_path, b'{"a":{"$array":"/a"}}', tensors)
    with pytest.raises(CheckpointError, match="asks for '/a' as an array"):
        load_checkpoint(path)


def resealed(path: Path, **changes: Any) -> None:
    """Rewrite the manifest with other fields and a right digest of its own."""
    text = {**json.loads((path / "MANIFEST.json").read_text()), **changes}
    text.pop("digest")
    digest = hashlib.sha256((json.dumps(text, indent=1, sort_keys=True) + "\n").encode()).hexdigest()
    text["digest"] = digest
    (path / "MANIFEST.json").write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"format_version": 2}, "upgrade upslope"),
        ({"format_version": 0}, "which no upslope writes"),
        ({"format": "zip"}, "is not the manifest of an upslope-checkpoint"),
        ({"step": -1}, "which no upslope writes"),
        ({"step": True}, "which no upslope writes"),
        ({"step": None}, "unlike the name"),
        ({"extra": 1}, "was changed after it was written"),
        ({"files": {}}, "lists other files"),
        ({"files": []}, "lists other files"),
        ({"files": {"../../secret": [1, ""], "state.json": [2, ""]}}, "lists other files"),
        ({"files": {"state.json": [2, ""], "tensors.safetensors": [-1, ""]}}, "does not give the size"),
        ({"files": {"state.json": [2, ""], "tensors.safetensors": ["8", ""]}}, "does not give the size"),
        ({"files": {"state.json": [2, ""], "tensors.safetensors": {}}}, "does not give the size"),
        ({"versions": {"long": "x" * 70_000}}, "more than the limit"),
    ],
)
def test_hostile_manifests_are_refused(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    path = sealed(tmp_path)
    resealed(path, **changes)
    with pytest.raises(CheckpointError, match=fault) as told:
        load_checkpoint(path)
    assert "step-000000001/MANIFEST.json" in str(told.value)


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "tensors.safetensors"])
def test_links_pipes_and_directories_are_refused(tmp_path: Path, name: str) -> None:
    path = sealed(tmp_path)
    (path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_checkpoint(path)
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link"):
        load_checkpoint(path)
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
        load_checkpoint(path)
    (path / name).unlink()
    (path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name} (is not a regular file|cannot be read)"):
        load_checkpoint(path)


def test_a_link_to_a_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-000000002").symlink_to(sealed(tmp_path))
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        load_checkpoint(tmp_path / "step-000000002")
    told: list[Path] = []
    found = latest_checkpoint(tmp_path, on_damaged=lambda path, fault: told.append(path))
    assert found is not None
    assert (found.step, [path.name for path in told]) == (1, ["step-000000002"])


def test_a_file_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = sealed(tmp_path)
    os.truncate(path / "tensors.safetensors", 2**42)
    files = json.loads((path / "MANIFEST.json").read_text())["files"]
    resealed(path, files={**files, "tensors.safetensors": [2**42, "0" * 64]})
    with pytest.raises(CheckpointError, match="more than the memory of this machine"):
        load_checkpoint(path)

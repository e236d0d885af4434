import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from upslope.train.run_directory import RunDirectory, RunDirectoryError, run_name


def started(run: RunDirectory) -> RunDirectory:
    run.config_path.write_text("{}")
    return run


def test_the_files_of_a_run(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "runs", "mine") as run:
        assert run.path == tmp_path / "runs" / "mine"
        assert run.name == "mine"
        names = {"config.json", "metrics.jsonl", "checkpoints", "policy", "best", "tensorboard"}
        paths = (run.config_path, run.metrics_path, run.checkpoints, run.policy, run.best, run.tensorboard)
        assert {path.relative_to(run.path).as_posix() for path in paths} == names
        assert [path.name for path in run.path.iterdir()] == [".lock"]


def test_the_directory_stays_the_same_when_the_process_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunDirectory.create(Path("runs"), "mine") as run:
        monkeypatch.chdir("/")
        assert run.checkpoints == tmp_path / "runs" / "mine" / "checkpoints"


def test_a_second_user_is_refused_with_pid_host_and_remedy(tmp_path: Path) -> None:
    with started(RunDirectory.create(tmp_path, "mine")) as run:
        for second in (lambda: RunDirectory.open(run.path), lambda: RunDirectory.create(tmp_path, "mine")):
            with pytest.raises(RunDirectoryError, match="is in use by process") as told:
                second()
            assert f"process {os.getpid()} on host {socket.gethostname()!r}" in str(told.value)
            assert "choose another --name" in str(told.value)
        assert RunDirectory.view(run.path).path == run.path
    RunDirectory.open(run.path).close()


def test_a_torn_lock_file_still_refuses(tmp_path: Path) -> None:
    with started(RunDirectory.create(tmp_path, "mine")) as run:
        for text in ("", "{", "[]", '{"pid": "x", "host": 1}', "[" * 3000):
            (run.path / ".lock").write_text(text)
            with pytest.raises(RunDirectoryError, match="another process that has just started"):
                RunDirectory.open(run.path)


def test_a_new_run_never_goes_into_an_old_one(tmp_path: Path) -> None:
    started(RunDirectory.create(tmp_path, "mine")).close()
    with pytest.raises(RunDirectoryError, match=r"already holds a run: go on with it by `upslope resume .*/mine`"):
        RunDirectory.create(tmp_path, "mine")
    RunDirectory.open(tmp_path / "mine").close()


@pytest.mark.parametrize("trace", ["config.json", "metrics.jsonl", "checkpoints", "policy", "best"])
def test_any_trace_of_a_run_counts(tmp_path: Path, trace: str) -> None:
    (tmp_path / "mine" / trace).mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        RunDirectory.create(tmp_path, "mine")


def test_a_directory_without_a_run_may_become_one(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("an idea")
    RunDirectory.create(tmp_path, "mine").close()
    RunDirectory.create(tmp_path, "mine").close()
    assert (tmp_path / "mine" / "notes.txt").read_text() == "an idea"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", ".hidden", "-option", "a b", "a\n", "x" * 201, "ä"])
def test_a_name_is_a_plain_name(tmp_path: Path, name: str) -> None:
    for create in (RunDirectory.create, RunDirectory.create_numbered):
        with pytest.raises(RunDirectoryError, match="is no name for a run"):
            create(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_numbered_runs_take_the_next_free_name(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        with RunDirectory.create_numbered(tmp_path / "runs", "cartpole-ppo-seed1") as run:
            names.append(run.name)
    assert names == ["cartpole-ppo-seed1", "cartpole-ppo-seed1-2", "cartpole-ppo-seed1-3"]


def test_a_file_in_the_place_of_a_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunDirectoryError, match=r"Choose another|choose another"):
        RunDirectory.create(tmp_path / "runs", "mine")
    with pytest.raises(RunDirectoryError, match="is a file: choose another directory"):
        RunDirectory.create_numbered(tmp_path / "runs", "mine")


def test_there_must_be_a_run_to_open(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        for read in (RunDirectory.open, RunDirectory.view):
            with pytest.raises(RunDirectoryError, match=r"holds no run \(config.json is missing there\)"):
                read(path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(RunDirectoryError, match="cannot be opened"):
        RunDirectory.create(tmp_path, "mine")
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("cartpole-ppo", "cartpole-ppo-seed3"),
        ("path/to/my_recipe.py:function", "my_recipe-function-seed3"),
        ("../../etc/passwd", "etc-passwd-seed3"),
        ("ALE/Pong-v5 (fast)", "ALE-Pong-v5-fast-seed3"),
        ("...", "run-seed3"),
        ("x" * 300, "x" * 150 + "-seed3"),
    ],
)
def test_default_names(recipe: str, name: str, tmp_path: Path) -> None:
    assert run_name(recipe, 3) == name
    RunDirectory.create(tmp_path, name).close()


HOLDER = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from upslope.train.run_directory import RunDirectory

    run = RunDirectory.open(Path(sys.argv[1]))
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
    """
)


def test_a_killed_run_frees_its_directory_although_its_worker_lives_on(tmp_path: Path) -> None:
    run = started(RunDirectory.create(tmp_path, "mine"))
    run.close()
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        worker = int(holder.stdout.readline())
        try:
            with pytest.raises(RunDirectoryError, match=f"process {holder.pid} on host"):
                RunDirectory.open(run.path)
            holder.kill()
            holder.wait()
            os.kill(worker, 0)
            with RunDirectory.open(run.path):
                owner = json.loads((run.path / ".lock").read_text())
                assert owner == {"pid": os.getpid(), "host": socket.gethostname()}
        finally:
            os.kill(worker, signal.SIGKILL)

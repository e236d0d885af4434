import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from small_worlds import Faulty, Walk

from upslope.collect import AsyncEnvironments, EnvironmentFailureError, SyncEnvironments
from upslope.collect.actions import random_action


def _alive(environments):
    return [process.is_alive() for process in environments._processes]


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_worker_processes_bring_the_same_as_one_process(processes):
    ours, theirs = SyncEnvironments([Walk] * 5), AsyncEnvironments([Walk] * 5, processes=processes)
    generator = np.random.default_rng(0)
    assert np.array_equal(ours.reset(range(5)), theirs.reset(range(5)))
    for _ in range(60):
        action = random_action(ours.action_space, generator, 5)
        left, right = ours.step(action), theirs.step(action)
        assert np.array_equal(left.observation, right.observation)
        assert np.array_equal(left.reward, right.reward)
        assert (left.finished is None) == (right.finished is None)
        if left.finished is not None:
            assert np.array_equal(left.finished, right.finished)
            assert np.array_equal(left.final, right.final)
            assert np.array_equal(left.truncated, right.truncated)
    theirs.close()
    assert not any(_alive(theirs))


def _step(environments, times):
    for _ in range(times):
        environments.step(np.zeros(environments.num_envs, dtype=np.int64))


def _until_it_fails(fault, deadline):
    factories = [partial(Faulty, "nothing")] * 3 + [partial(Faulty, fault)]
    environments = AsyncEnvironments(factories, deadline=deadline, processes=2)
    environments.reset([10, 11, 12, 13])
    processes = list(environments._processes)
    with pytest.raises(EnvironmentFailureError) as caught:
        _step(environments, 7)
    assert caught.value.index == 3
    assert not any(process.is_alive() for process in processes)
    with pytest.raises(EnvironmentFailureError, match="make the environments again"):
        environments.step(np.zeros(4, dtype=np.int64))
    return str(caught.value)


def test_a_worker_that_raises_is_shown_with_index_seed_and_traceback():
    text = _until_it_fails("raise", 60.0)
    assert "environment 3 raised" in text
    assert "seeded with 13" in text
    assert "the door is stuck" in text
    assert "small_worlds.py" in text


def test_a_worker_that_segfaults_is_named():
    text = _until_it_fails("segfault", 60.0)
    assert "environment 3 " in text
    assert "SIGSEGV" in text


def test_a_worker_that_hangs_is_ended_at_the_deadline():
    text = _until_it_fails("hang", 2.0)
    assert "environment 3 " in text
    assert "did not answer within 2 s" in text
    assert "EnvironmentConfig.deadline" in text


def test_a_worker_killed_from_outside_is_reported():
    environments = AsyncEnvironments([Walk] * 2, processes=2)
    environments.reset([0, 1])
    os.kill(environments._processes[1].pid, signal.SIGKILL)
    with pytest.raises(EnvironmentFailureError, match=r"SIGKILL.*out of memory"):
        _step(environments, 50)


def test_an_environment_that_cannot_be_made_in_a_worker_is_reported():
    made = []

    def second_time_fails():
        made.append(1)
        if len(made) > 1:
            raise OSError("no more licences")
        return Walk()

    with pytest.raises(EnvironmentFailureError, match=r"could not be made.*no more licences"):
        AsyncEnvironments([second_time_fails])


def test_a_deadline_must_be_positive():
    with pytest.raises(ValueError, match="deadline"):
        AsyncEnvironments([Walk], deadline=0.0)


def test_stop_signals_to_the_whole_group_leave_the_workers_to_their_parent():
    environments = AsyncEnvironments([Walk] * 2, processes=2)
    environments.reset([0, 1])
    for process in environments._processes:
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
    _step(environments, 20)
    assert all(_alive(environments))
    environments.close()


ORPHANS = """
import os, signal, sys, time
sys.path.insert(0, {path!r})
from small_worlds import Walk
from upslope.collect import AsyncEnvironments
environments = AsyncEnvironments([Walk] * 3, processes=3)
environments.reset([0, 1, 2])
print(*[process.pid for process in environments._processes], flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "raise KeyboardInterrupt"])
def test_no_worker_outlives_its_parent(end):
    script = ORPHANS.format(path=os.path.dirname(__file__), end=end)
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    workers = [int(word) for word in output.stdout.split()]
    assert len(workers) == 3
    limit = time.monotonic() + 20
    while any(_exists(worker) for worker in workers):
        assert time.monotonic() < limit, "a worker is still there"
        time.sleep(0.05)


def _exists(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reward_examples

from upslope.collect.rewards import dispatch
from upslope.collect.rewards.calling import CallError, shorten
from upslope.collect.rewards.pool import RewardPool
from upslope.collect.rewards.protocol import NOT_APPLICABLE, Failed, Reward
from upslope.collect.rewards.splitting import divide, score_in_parts
from upslope.errors import UsageError

EXAMPLES = Path(reward_examples.__file__)


def in_file(name, weight=1.0):
    return Reward(name=name, function=f"{EXAMPLES}:{name}", weight=weight)


def inline(name, weight=1.0):
    return Reward(name=name, function=getattr(reward_examples, name), weight=weight, inline=True)


def score(rewards, completions, columns=None, *, workers=1, deadline=60.0):
    with RewardPool(rewards, workers=workers, deadline=deadline) as pool:
        return pool.score(["p"] * len(completions), completions, columns or [{}] * len(completions))


def gone(process):
    """Whether no such process runs; a dead one that nobody has reaped counts as gone, once its last thread has ended.

    Until then its connections are open, though its first thread may be a zombie already.
    """
    try:
        dead = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return dead and len(list(Path(f"/proc/{process}/task").iterdir())) == 1
    except OSError:
        return True


def wait_until(true, seconds=30.0):
    limit = time.monotonic() + seconds
    while not true() and time.monotonic() < limit:
        time.sleep(0.02)
    return true()


@pytest.mark.parametrize("kind", [in_file, inline], ids=["worker", "inline"])
def test_functions_get_columns_as_lists_and_only_those_they_accept(kind):
    columns = [{"answer": "a", "level": 1}, {"answer": "x"}, {"level": 3}]
    scores = score([kind("correct", 2.0), kind("length", 0.5), kind("names")], ["a", "bb", "ccc"], columns)
    assert scores.parts["correct"] == (1.0, 0.0, NOT_APPLICABLE)
    assert scores.parts["names"] == (0.0, 1.0, 1.0)
    assert scores.total == (2.0 + 0.5 + 0.0, 0.0 + 1.0 + 1.0, 1.5 + 1.0)


def test_a_function_may_be_async_or_an_object_from_an_importable_module():
    rewards = [in_file("later"), Reward(name="object", function=reward_examples.length)]
    assert score(rewards, ["a", "bb"]).total == (2.0, 4.0)


def test_a_file_may_import_what_stands_beside_it(tmp_path):
    (tmp_path / "beside_the_reward.py").write_text("VALUE = 3.0\n")
    (tmp_path / "own.py").write_text("from beside_the_reward import VALUE\ndef f(completions): return [VALUE]\n")
    assert score([Reward(name="own", function=f"{tmp_path}/own.py:f")], ["a"]).total == (3.0,)


def test_long_texts_and_many_rows_arrive():
    assert score([in_file("length")], ["a" * 5_000_000, "b"]).total == (5_000_000.0, 1.0)
    assert score([in_file("length")], ["ab"] * 20_000, workers=2).total == (2.0,) * 20_000


def test_where_nothing_applies_there_is_no_total_and_an_empty_batch_is_scored():
    with RewardPool([in_file("nothing")], workers=1, deadline=60.0) as pool:
        assert pool.score(["p"], ["a"], [{}]).total == (None,)
        assert pool.score([], [], []).parts == {"nothing": ()}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise", "ValueError: this one is bad .*reward_examples.py:[0-9]+, in _fault: raise ValueError"),
        ("exit", "it raised SystemExit: 4"),
        ("vanish", "exited with status 5"),
        ("crash", "killed by signal 11 .SIGSEGV.; native code crashed"),
        ("memory", "MemoryError"),
        ("single", "returned a float instead of a list of 1 scores"),
        ("nan", "returned nan"),
        ("inf", "returned -inf"),
        ("text", "returned a str instead of a number"),
        ("list", "returned a list instead of a number"),
    ],
)
def test_only_the_culprit_fails_and_it_is_no_number(fault, reason):
    scores = score([in_file("faulty"), inline("length")], ["a", "b", fault, "c"])
    failed = scores.parts["faulty"][2]
    assert isinstance(failed, Failed)
    assert re.search(reason, failed.reason), failed.reason
    assert len(failed.reason) < 800
    assert scores.total == (2.0, 2.0, None, 2.0)
    assert scores.parts["length"][2] == len(fault)


@pytest.mark.parametrize("inline_too", [False, True])
def test_another_number_of_scores_fails_for_the_whole_call_and_is_not_tried_again(inline_too):
    for fault, found in (("count", "more"), ("endless", "more"), ("huge", "more"), ("one", "1")):
        part = inline("faulty") if inline_too else in_file("faulty")
        scores = score([part], ["a", fault, "c"], workers=1)
        assert scores.parts["faulty"] == (Failed(f"it returned {found} scores for 3 completions"),) * 3


def test_a_call_that_hangs_is_killed_and_the_next_one_finds_a_fresh_worker():
    with RewardPool([in_file("faulty"), in_file("length")], workers=2, deadline=2.0) as pool:
        scores = pool.score(["p"] * 4, ["a", "hang", "b", "c"], [{}] * 4)
        assert scores.parts["length"] == (1.0, 4.0, 1.0, 1.0)
        assert scores.parts["faulty"] == (1.0, Failed("it did not return within 2 s and was killed"), 1.0, 1.0)
        assert pool.score(["p"], ["a"], [{}]).total == (2.0,)


def test_time_for_finding_culprits_is_bounded(monkeypatch):
    monkeypatch.setattr(dispatch, "RETRIES", 0)
    scores = score([in_file("faulty"), in_file("constant")], ["raise", "a", "b", "c"])
    assert scores.parts["constant"] == (1.0,) * 4
    assert all("this one is bad" in part.reason and "used up" in part.reason for part in scores.parts["faulty"])


def test_an_inline_batch_is_divided_down_to_its_culprits_and_no_further_than_the_time_allows():
    calls = []

    def attempt(rows):
        calls.append(rows)
        if 5 in rows:
            raise CallError("five")
        return [float(row) for row in rows]

    assert score_in_parts(attempt, 64, budget=60.0) == [float(row) if row != 5 else Failed("five") for row in range(64)]
    assert [len(rows) for rows in calls] == [64] + [8] * 8 + [1] * 8
    assert all("used up" in outcome.reason for outcome in score_in_parts(attempt, 8, budget=0.0))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 100])
def test_parts_are_all_rows_once(count):
    parts = divide(range(3, 3 + count))
    assert [row for part in parts for row in part] == list(range(3, 3 + count))
    assert all(parts)
    assert len(parts) == min(count, 8)


def test_a_failure_that_smaller_parts_cannot_help_is_not_tried_again():
    calls = []

    def attempt(rows):
        calls.append(rows)
        raise CallError("unreachable", divisible=False)

    assert score_in_parts(attempt, 3, budget=60.0) == [Failed("unreachable")] * 3
    assert len(calls) == 1


def test_scores_do_not_depend_on_the_number_of_workers_nor_on_which_one_answers():
    completions = ["a", "bb", "raise", "dddd", "eeeee"]
    results = [score([in_file("faulty"), in_file("length")], completions, workers=count) for count in (1, 2, 3)]
    assert results[0].total == results[1].total == results[2].total
    with RewardPool([in_file("chance"), in_file("process")], workers=1, deadline=60.0) as pool:
        first = pool.score(["p"], ["a"], [{}]).parts
        os.kill(int(first["process"][0]), signal.SIGKILL)
        assert wait_until(lambda: gone(int(first["process"][0])))
        second = pool.score(["p"], ["a"], [{}]).parts
    assert first["chance"] == second["chance"]
    assert first["process"] != second["process"]


def test_workers_start_late_are_used_again_and_none_remains():
    pool = RewardPool([in_file("process"), in_file("with_child")], workers=1, deadline=60.0)
    assert not pool._dispatcher.workers
    first, again = (pool.score(["p"], ["a"], [{}]).parts for _ in range(2))
    assert first["process"] == again["process"]
    pool.close()
    pool.close()
    for parts in (first, again):
        assert wait_until(lambda parts=parts: gone(int(parts["with_child"][0])))
        assert gone(int(parts["process"][0]))


def test_what_a_function_prints_does_not_reach_standard_output(capfd):
    assert score([in_file("talks")], ["a"]).total == (1.0,)
    output = capfd.readouterr()
    assert output.out == ""
    assert len(output.err) >= 200_000


def test_a_worker_imports_the_library_only_where_a_function_uses_it():
    assert score([in_file("heavy_modules")], ["a"]).total == (0.0,)
    assert score([in_file("whole_library")], ["a"]).total == (0.99,)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda completions: [1.0], "cannot be sent to a worker process.*path/to/file.py:function"),
        ("nowhere.py:function", "there is no file 'nowhere.py'"),
        ("function", "give path/to/file.py:function"),
        ("ftp://example.org", "http://host:port/path"),
        ("http://name:word@example.org/", "no user name or password"),
        (3, "is int; give a function"),
    ],
    ids=["lambda", "no-file", "no-colon", "ftp", "password", "number"],
)
def test_what_cannot_be_a_reward_is_refused_at_once(function, text):
    with pytest.raises(UsageError, match=text):
        RewardPool([Reward(name="reward", function=function)], workers=1, deadline=1.0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("absent", "has no function 'absent'"),
        ("correct", "needs the column answer; the data has none"),
        ("positional", "cannot be given by name"),
    ],
)
def test_a_function_that_cannot_be_loaded_or_lacks_a_column_is_refused_with_the_first_call(name, text):
    with pytest.raises(UsageError, match=text):
        score([in_file(name)], ["a"])


def test_a_file_that_fails_or_hangs_on_import_is_refused(tmp_path):
    broken, slow = tmp_path / "broken.py", tmp_path / "slow.py"
    broken.write_text("import no_such_package\n")
    slow.write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(UsageError, match=r"No module named 'no_such_package' \(.*broken.py:1"):
        score([Reward(name="broken", function=f"{broken}:f")], ["a"])
    reward = Reward(name="slow", function=f"{slow}:f")
    with (
        RewardPool([reward], workers=1, deadline=1.0, load_deadline=1.0) as pool,
        pytest.raises(UsageError, match="was not there within 1 s"),
    ):
        pool.score(["p"], ["a"], [{}])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rewards": []}, "at least one reward"),
        ({"rewards": [inline("length"), inline("length")]}, "length more than once"),
        ({"rewards": [inline("length", float("nan"))]}, "finite number"),
        ({"rewards": [inline("later")]}, "plain function"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"deadline": 0.0}, "deadline must be a positive number"),
    ],
    ids=["none", "twice", "weight", "inline-async", "workers", "deadline"],
)
def test_settings_without_meaning_are_refused(changes, text):
    settings = {"rewards": [inline("length")], "workers": 1, "deadline": 1.0}
    with pytest.raises(UsageError, match=text):
        RewardPool(**(settings | changes))


def test_data_that_cannot_be_given_to_functions_is_refused():
    with RewardPool([in_file("length")], workers=1, deadline=60.0) as pool:
        with pytest.raises(ValueError, match="one length, got 1, 2 and 1"):
            pool.score(["p"], ["a", "b"], [{}])
        with pytest.raises(UsageError, match="a column 'prompts'"):
            pool.score(["p"], ["a"], [{"prompts": 1}])
        with pytest.raises(UsageError, match=r"columns for reward 'length' \(callback\) cannot be sent"):
            pool.score(["p"], ["a"], [{"callback": lambda: None}])
        assert pool.score(["p"], ["a"], [{}]).total == (1.0,)


SCRIPT = """
import os, signal
from upslope.collect.rewards.pool import RewardPool
from upslope.collect.rewards.protocol import Reward

def process(completions):
    return [float(os.getpid())] * len(completions)

def main():
    pool = RewardPool([Reward(name="process", function=process)], workers=2, deadline=60.0)
    print(*pool.score(["p"] * 2, ["a"] * 2, [{}] * 2).total, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_script_may_hold_its_own_functions_and_a_killed_one_leaves_no_worker(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + '\nif __name__ == "__main__":\n    main()\n')
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    workers = {int(float(process)) for process in ended.stdout.split()}
    assert len(workers) == 2
    assert all(wait_until(lambda process=process: gone(process)) for process in workers)


def test_a_script_that_starts_on_import_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "\nmain()\n")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert 'Put that under `if __name__ == "__main__":`' in ended.stderr


def test_reasons_are_short_and_in_one_line():
    assert shorten("a\n  b") == "a b"
    assert len(shorten("x" * 10**7)) == 500

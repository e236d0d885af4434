import csv
import io
import json
import logging
import tracemalloc
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from upslope.collect.rewards.protocol import Reward
from upslope.collect.tasks.files import Files, named_rewards, task_from_rows
from upslope.collect.tasks.records import LONGEST_LINE, open_records
from upslope.collect.tasks.rows import RowFormat
from upslope.errors import UsageError

ROWS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i), "answer": str(2 * i), "level": i % 3} for i in range(60)]
FORMAT = RowFormat(completion="completion", answer="answer")


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def written(folder, suffix, rows):
    path = folder / f"data{suffix}"
    table = arrow.Table.from_pylist(rows)
    if suffix == ".jsonl":
        path.write_text(lines(rows), "utf-8")
    elif suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    elif suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=7)
    elif suffix == ".arrow":
        with arrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    else:
        path.mkdir()
        names = [f"data-0000{part}-of-00002.arrow" for part in range(2)]
        for name, part in zip(names, (table.slice(0, 25), table.slice(25)), strict=True):
            with arrow.ipc.new_stream(path / name, table.schema) as writer:
                writer.write_table(part, max_chunksize=9)
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".arrow", ""])
def test_every_kind_gives_the_same_examples_in_any_order(tmp_path, suffix):
    visited = []
    records = open_records(written(tmp_path, suffix, ROWS), lambda row, where: visited.append((dict(row), where)))
    expected = [{**row, "level": str(row["level"])} for row in ROWS] if suffix == ".csv" else ROWS
    assert [row for row, _ in visited] == expected
    assert visited[2][1].endswith({".jsonl": "line 3", ".csv": "line 4"}.get(suffix, "row 3"))
    assert len(records) == 60
    assert [records[i] for i in (59, 0, 24, 25, 7, 6)] == [expected[i] for i in (59, 0, 24, 25, 7, 6)]
    for index in (60, -1):
        with pytest.raises(IndexError):
            records[index]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(st.lists(st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\x00"))] * 2), min_size=1))
def test_any_text_survives_both_text_formats(tmp_path, pairs):
    rows = [{"prompt": one, "completion": other} for one, other in pairs]
    for suffix in (".jsonl", ".csv"):
        records = open_records(written(tmp_path, suffix, rows), lambda row, where: None)
        assert [records[i] for i in range(len(records))] == rows


def test_without_held_out_data_a_tenth_of_the_prompts_is_held_out(tmp_path):
    rows = [{"prompt": str(i % 40), "answer": str(i)} for i in range(400)]
    format = RowFormat(answer="answer")
    config = Files(training=written(tmp_path, ".jsonl", rows), format=format, rewards=("exact_match",))
    task = config.build(1)
    parts = [[task.training[i] for i in range(len(task.training))], [*map(task.held_out.__getitem__, range(20))]]
    assert len(task.training) + len(task.held_out) == 400
    trained, judged = ({example.prompt for example in part} for part in parts)
    assert judged
    assert not trained & judged
    assert task.correct == "exact_match"
    assert task.rewards[0].inline
    assert task.alphabet is None


def test_gsm8k_rows_into_a_chat(tmp_path):
    row = {"question": "Half of 84?", "answer": "84 / 2 = <<84/2=42>>42\n#### 42"}
    format = RowFormat(
        prompt="question", completion="answer", answer="answer", answer_mark="####", chat=True,
        system="Think.", template="{prompt} End with ####.",
    )  # fmt: skip
    training, held_out = written(tmp_path, ".jsonl", [row]), tmp_path / "test.jsonl"
    held_out.write_text(lines([{**row, "question": "Other?"}]))
    task = Files(training=training, held_out=held_out, format=format, rewards=("math_verify", "last_number")).build(0)
    example = task.training[0]
    assert example.prompt == (
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "Half of 84? End with ####."},
    )
    assert example.completion == row["answer"]
    assert example.columns == {"answer": "42"}
    assert [reward.name for reward in task.rewards] == ["math_verify", "last_number"]


def test_messages_pairs_and_labels():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    example = RowFormat(prompt="messages").example({"messages": messages})
    assert (example.prompt, example.completion) == ((messages[0],), "Hello")
    pair = RowFormat(completion="chosen", rejected="rejected").example(
        {"prompt": "Hi", "chosen": [messages[1]], "rejected": "No", "margin": 2.0}
    )
    assert (pair.completion, pair.rejected, pair.columns) == ("Hello", "No", {"margin": 2.0})
    labelled = RowFormat(completion="text", label="good")
    for value, label in ((True, True), (0, False), ("false", False), ("1", True), (1.0, True)):
        assert labelled.example({"prompt": "a", "text": "x", "good": value}).columns["label"] is label
    with pytest.raises(ValueError, match="must be true or false"):
        labelled.example({"prompt": "a", "text": "x", "good": 2})


def test_pairs_of_whole_conversations_part_where_they_differ():
    format = RowFormat(completion="chosen", rejected="rejected")
    begin = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    good, bad = ({"role": "assistant", "content": content} for content in ("good", "bad"))
    pair = format.example({"chosen": [*begin, good], "rejected": [*begin, bad], "margin": 1})
    assert (pair.prompt, pair.completion, pair.rejected) == (tuple(begin), "good", "bad")
    assert (pair.columns, pair.turns) == ({"margin": 1}, None)
    for chosen, rejected, message in (
        ("H: Hi A: a", "H: Hi A: b", "no column 'prompt', and 'chosen' and 'rejected' are text: .*name its column"),
        ([good], [bad], "no first message in common"),
        (
            [*begin, good],
            [*begin, bad, begin[1], bad],
            "'rejected' must go on with one message .* after the 4 messages",
        ),
        ([*begin, good], begin, "'chosen' must go on .* got user, assistant"),
        ([*begin, good], 3, "'rejected' must be text or a list of messages"),
    ):
        with pytest.raises(ValueError, match=message):
            format.example({"chosen": chosen, "rejected": rejected})


def test_all_turns_of_the_assistant_are_answers():
    roles = ("system", "user", "assistant", "user", "assistant", "tool", "assistant")
    messages = [{"role": role, "content": str(number)} for number, role in enumerate(roles)]
    example = RowFormat(prompt="messages").example({"messages": messages, "id": 7})
    assert example.prompt == tuple(messages[:2])
    assert (example.turns, example.roles) == (("2", "3", "4", "5", "6"), ("user", "tool"))
    assert (example.completion, example.columns) == ("23456", {"id": 7})
    asked = RowFormat(prompt="messages").example({"messages": messages[:4]})
    assert (asked.prompt, asked.completion, asked.turns) == (tuple(messages[:4]), None, None)
    for wrong, message in (
        ([*messages, messages[-1]], "take turns; got system, .*, tool, assistant, assistant: join"),
        ([*messages[:4], *messages[3:]], "take turns; got system, user, assistant, user, user, assistant"),
        (messages[2:], "an answer and no prompt before it"),
    ):
        with pytest.raises(ValueError, match=message):
            RowFormat(prompt="messages").example({"messages": wrong})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        (b'{"prompt": "a"}\n\n\xff\xfe\n', "line 3: not UTF-8: byte 0 is ff"),
        (b'{"prompt": "a"}\n[1]\n', "line 2: expected one JSON object per line"),
        (b'{"prompt": "a"}\n{"question": "b"}\n', "line 2: there is no column 'prompt'; there are 'question'"),
        (b'{"prompt": "a"}\n{"prompt": ""}\n', "line 2: column 'prompt' is empty: .*begin such prompts with"),
        (b'{"prompt": 3}\n', "line 1: column 'prompt' must be text or a list of messages, got 3"),
        (b'{"prompt": [{"role": "user"}]}\n', "line 1: column 'prompt': a message has"),
        (b'{"prompt": "a", "answer": NaN}\n', "line 1: not JSON: NaN is no JSON number"),
        (b'{"prompt": "a", "x": ' + b"[" * 100_000, "line 1: not JSON"),
        (b'{"prompt": "\\ud83d"}\n', "line 1: holds half of a surrogate pair"),
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
    ],
    ids=[
        "json",
        "utf8",
        "array",
        "column",
        "no-prompt",
        "number",
        "message",
        "nan",
        "deep",
        "surrogate",
        "empty",
        "blank",
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        Files(training=path).build(0)
    assert "bad.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,answer\na,1\nb\n", "line 3: expected 2 values as in the header, got 1"),
        (b"prompt,prompt\na,1\n", "line 1: the header must name every column once"),
        (b'prompt\n"a"b\n', "line 2: "),
        (b'prompt\n"a\n', "line 2: "),
        (b"prompt\na\n\xff\n", "line 3: not UTF-8"),
        (b"prompt\n" + b"a" * 200_000 + b"\n", "line 2: field larger than field limit .*JSON lines"),
        (b"question\na\n", "line 2: there is no column 'prompt'"),
        (b"prompt\n", "holds no rows"),
    ],
    ids=["values", "header", "quote", "open", "utf8", "field", "column", "empty"],
)
def test_a_bad_record_is_named(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        Files(training=path).build(0)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_an_endless_line_is_refused_and_not_held(tmp_path, suffix):
    path = tmp_path / f"huge{suffix}"
    with path.open("wb") as file:
        file.write(b'"p"\n"' if suffix == ".csv" else b'{"prompt": "a"}\n{"prompt": "')
        file.seek(2**30)
        file.write(b'"}\n')
    tracemalloc.start()
    with pytest.raises(UsageError, match=f"line 2: .*longer than {LONGEST_LINE} bytes"):
        Files(training=path).build(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * LONGEST_LINE


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.parquet", b"PAR1 not"), ("a.arrow", b"ARROW1 not"), ("b.arrow", b"not"), ("c.txt", b"x"), ("d.arrow", b"")],
)
def test_what_cannot_be_read_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        Files(training=tmp_path / name).build(0)


def test_folders_that_are_no_single_saved_dataset_are_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        Files(training=tmp_path / "nothing.jsonl").build(0)
    with pytest.raises(UsageError, match=r"no state\.json"):
        Files(training=tmp_path).build(0)
    state = tmp_path / "state.json"
    for tree in ([], {}, {"_data_files": [{"filename": "../secret.arrow"}]}, {"_data_files": [{}]}):
        state.write_text(json.dumps(tree))
        with pytest.raises(UsageError, match="names no data files within its folder"):
            Files(training=tmp_path).build(0)
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UsageError, match=r"give the folder of one of them \(train\)"):
        Files(training=tmp_path).build(0)


def test_a_file_that_changes_under_the_run_is_noticed(tmp_path):
    path = written(tmp_path, ".jsonl", ROWS)
    task = Files(training=path, format=FORMAT).build(0)
    path.write_text(lines(ROWS[1:]))
    with pytest.raises(RuntimeError, match="has changed since it was opened"):
        task.training[0]


def test_training_data_is_not_taken_for_held_out_data_unawares(tmp_path, caplog):
    path = written(tmp_path, ".jsonl", ROWS)
    with pytest.raises(ValueError, match="both to train on and to judge by"):
        Files(training=path, held_out=path)
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(UsageError, match="the same file"):
        Files(training=path, held_out=tmp_path / "link.jsonl").build(0)
    with caplog.at_level(logging.WARNING):
        task = Files(training=path, held_out=path, train_on_held_out=True, format=FORMAT, characters=True).build(0)
    assert "60 of 60 prompts" in caplog.text
    assert task.alphabet == "+0123456789="
    assert len(task.training) == len(task.held_out) == 60


def test_rewards_by_name_place_and_address():
    config = Files(
        training=Path("x.jsonl"),
        rewards=("exact_match", "my/rewards.py:brevity", "https://host/score/"),
        weights=(1.0, 0.1, 2.0),
        correct="brevity",
    )
    made, correct = named_rewards(config.rewards, config.weights, config.correct)
    assert [(reward.name, reward.weight, reward.inline) for reward in made] == [
        ("exact_match", 1.0, True),
        ("brevity", 0.1, False),
        ("host/score", 2.0, False),
    ]
    assert correct == "brevity"
    for settings_, message in (
        ({"rewards": ("exact",)}, "there is no reward 'exact': expected exact_match"),
        ({"rewards": (), "correct": "exact_match"}, "correct must name one of the rewards .none., got 'exact_match'"),
        ({"rewards": ("exact_match", "exact_match")}, "two rewards have one name"),
        ({"weights": (1.0,)}, "expected 0, got 1"),
        ({"rewards": ("exact_match",), "weights": (1.0, 2.0)}, "expected 1, got 2"),
        ({"rewards": ("exact_match",), "correct": "brevity"}, "one of the rewards exact_match, got 'brevity'"),
    ):
        with pytest.raises(ValueError, match=message):
            Files(training=Path("x.jsonl"), **settings_)


def test_what_is_only_imitated_needs_no_reward(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}=", "completion": str(n)}) + "\n" for n in range(60)))
    config = Files(training=str(path), format=RowFormat(completion="completion"))  # type: ignore[arg-type]
    assert config.training == path
    task = config.build(0)
    assert task.rewards == ()
    assert task.training[0].completion is not None
    assert task_from_rows(ROWS[:9], ROWS[9:], format=FORMAT, rewards=()).rewards == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "no place"}, "template must hold"),
        ({"system": "x"}, "set chat to True"),
        ({"answer_mark": "####"}, "set both"),
        ({"rejected": "r"}, "set completion"),
        ({"completion": "c", "rejected": "r", "label": "l"}, "set one of the two"),
    ],
    ids=["template", "system", "mark", "rejected", "label"],
)
def test_formats_that_go_nowhere_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RowFormat(**arguments)


def test_rows_that_a_program_holds():
    rewards = [Reward(name="long", function=lambda prompts, completions: [float(len(text)) for text in completions])]
    task = task_from_rows((row for row in ROWS[:9]), ROWS[9:], format=FORMAT, rewards=rewards)
    assert (len(task.training), task.training[3].columns["level"], task.correct) == (9, 0, "long")
    with pytest.raises(UsageError, match="training row 1: there is no column 'prompt'"):
        task_from_rows([ROWS[0], {}], ROWS, rewards=rewards)
    with pytest.raises(UsageError, match="held_out holds no rows"):
        task_from_rows(ROWS, [], rewards=rewards)
    with pytest.raises(UsageError, match="held_out row 0: expected a mapping"):
        task_from_rows(ROWS, ["text"], rewards=rewards)

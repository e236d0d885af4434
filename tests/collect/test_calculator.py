"""The calculator: what it answers, and the task around it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.collect.tasks.calculator import Calculator, calculate, calls_tool, correct, final_answer, reply_to


@pytest.mark.parametrize(
    ("call", "reply"),
    [
        ("[47*86]", "4042;"),
        ("47*86=[2*(3-5)]", "-4;"),
        ("[1/3]", "1/3;"),
        ("[7*7][1+1]", "2;"),
        ("[47*]", "?;"),
        ("[]", "?;"),
        ("47*86]", "?;"),
        ("[1/0]", "?;"),
        ("[2;2]", "?;"),
        (f"[{'9' * 18}*{'9' * 18}]", "?;"),
        (f"[{'(' * 60}1{')' * 60}]", "?;"),
        (f"[{'9*' * 490}9]", "?;"),
    ],
)
def test_replies_by_hand(call, reply):
    assert reply_to(call) == reply


def test_only_a_turn_that_ends_with_a_call_is_answered():
    assert calculate(turns=[["4042"], ["[1+1]"], ["[1+1]", "2;", "[2*3]"], ["[1+1]", "2;", "2"], [""]]) == [
        None,
        "2;",
        "6;",
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4042", "4042"),
        ("[47*86]4042;4042", "4042"),
        ("[1+1]2;[2*3]6;-7", "-7"),
        ("[47*86]4042;", None),
        ("[47*86", None),
        ("4042;40 42", None),
        ("", None),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


@given(st.sampled_from("*+-"), st.integers(1, 4), st.integers(0, 10**6))
def test_every_demonstration_is_right_and_its_turns_are_the_completion(operator, digits, index):
    task = Calculator(digits=digits, operator=operator, calls=0.5, held_out=1).build(3)
    example = task.training[index]
    assert correct([example.prompt], [example.completion], answer=[example.columns["answer"]]) == [1.0]
    assert set(f"{example.prompt}{example.completion}") <= set(task.alphabet)
    assert calls_tool([], [example.completion]) == [float(example.turns is not None)]
    if example.turns is not None:
        assert "".join(example.turns) == example.completion
        assert task.dialogue.reply(turns=[example.turns[:1], example.turns]) == [example.turns[1], None]


def test_the_share_of_calls_and_the_held_out_problems():
    task = Calculator(calls=0.3, held_out=64).build(0)
    examples = [task.training[index] for index in range(2000)]
    share = np.mean([example.turns is not None for example in examples])
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 2000)
    trained = {frozenset(example.prompt[:-1].split("*")) for example in examples}
    assert not trained & {frozenset(example.prompt[:-1].split("*")) for example in task.held_out}
    assert Calculator(held_out=64).build(1).held_out == task.held_out


def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match="digits must be from 1 to 8, got 9"):
        Calculator(digits=9)
    with pytest.raises(ValueError, match="operator is one of"):
        Calculator(operator="**")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"calls is a share from 0 to 1, got -0\.1"):
        Calculator(calls=-0.1)
    with pytest.raises(ValueError, match="turns must be at least 1"):
        Calculator(turns=0)

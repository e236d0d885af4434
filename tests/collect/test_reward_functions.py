import threading
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.collect.rewards.calling import LONGEST_REASON, Accepted, CallError, call
from upslope.collect.rewards.functions import (
    exact_match,
    last_number,
    matches,
    math_verify,
    number_of,
    overlong_penalty,
)
from upslope.collect.rewards.pool import RewardPool
from upslope.collect.rewards.protocol import NOT_APPLICABLE, Failed, Reward
from upslope.errors import UsageError


def score(function, completions, answers, *, deadline=60.0, inline=False):
    reward = Reward(name="reward", function=function, inline=inline)
    with RewardPool([reward], workers=1, deadline=deadline) as pool:
        columns = [{"answer": answer} for answer in answers]
        return pool.score(["p"] * len(completions), completions, columns).parts["reward"]


def test_exact_match_forgives_white_space_around_the_answer_alone():
    assert exact_match(["42\n", " 42", "4 2", "42", ""], ["42", 42, "42", None, ""]) == [1.0, 1.0, 0.0, None, 1.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 apples and 4 pears make 7.", "7"),
        ("so it costs $1,234.50", "1234.50"),
        ("a temperature of -3", "-3"),
        ("a temperature of −3", "-3"),
        ("a debt of -$5", "-5"),
        ("5-2", "2"),
        ("x = .5", "0.5"),
        ("between -.5", "-0.5"),
        ("the pair (1,2)", "2"),
        ("12,3456", "3456"),
        ("1,000,000 people", "1000000"),
        ("#### 42 (from 6 times 7)", "42"),
        ("#### 1\nno, wait\n#### 1,042", "1042"),
        ("7 #### none", None),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_ends_on(text, number):
    assert number_of(text) == (None if number is None else Decimal(number))


@given(number=st.integers(-(10**30), 10**30), before=st.text(alphabet="ab 1,.-\n"))
def test_a_number_is_read_back_with_and_without_commas_and_mark(number, before):
    answer = f"{before}\n#### {number:,}"
    assert last_number([f"{before} {number}", answer, f"it is {number + 1}"], [answer] * 3) == [1.0, 1.0, 0.0]
    assert last_number([f"{number}.0", "none"], [number, number]) == [1.0, 0.0]


def test_large_and_missing_answers():
    assert last_number(["100000000000000000000", "1", "x"], [1e20, None, 3.5]) == [1.0, None, 0.0]


@pytest.mark.parametrize("function", [last_number, math_verify], ids=["last_number", "math_verify"])
def test_an_answer_without_a_number_has_failed_and_is_not_0(function):
    outcomes = score(function, ["1", "2", "3"], ["1", "", None], inline=True)
    assert outcomes[0] == 1.0
    assert isinstance(outcomes[1], Failed)
    assert "holds no" in outcomes[1].reason
    assert outcomes[2] is NOT_APPLICABLE


MATH = [
    (r"so \boxed{0.5}", r"\frac{1}{2}", 1.0),
    (r"The answer is $\frac{2}{4}$.", "$0.5$", 1.0),
    ("it is 42", "6 times 7 is <<6*7=42>>42\n#### 42", 1.0),
    ("1,234", "1234", 1.0),
    (r"$(x+1)^2$", "x^2+2x+1", 1.0),
    (r"$x+1$", "x+2", 0.0),
    ("nothing here", "3", 0.0),
    ("", "3", 0.0),
    ("3", None, None),
]


def test_math_verify_compares_expressions_off_the_main_thread_where_its_own_time_limits_raise():
    import math_verify as library

    raised, found = [], []

    def run():
        try:
            library.parse("1")
        except ValueError as error:
            raised.append(str(error))
        found.extend(math_verify([text for text, _, _ in MATH], [answer for _, answer, _ in MATH]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "threaded environment" in raised[0]
    assert found == [expected for _, _, expected in MATH]


def test_math_verify_in_a_worker_is_ended_by_the_deadline_even_where_no_signal_handler_could_run():
    (outcome,) = score(math_verify, ["$9^{9^{9}}$"], ["2"], deadline=1.0)
    assert outcome == Failed("it did not return within 1 s and was killed")


def test_what_math_verify_cannot_compare_has_failed(monkeypatch):
    import math_verify as library

    def verify(gold, target, **settings):
        raise RecursionError("too deep")

    monkeypatch.setattr(library, "verify", verify)
    (outcome,) = score(math_verify, ["1"], ["1"], inline=True)
    assert isinstance(outcome, Failed)
    assert "RecursionError: too deep" in outcome.reason


def test_a_format_is_matched_in_a_worker_and_a_careless_pattern_is_ended_by_the_deadline():
    think = matches(r"(?s)^<think>.*</think>.+\Z")
    assert score(think, ["<think>a\n</think>b", "<think>a</think>", "b"], [None] * 3) == (1.0, 0.0, 0.0)
    (outcome,) = score(matches(r"^(a+)+$"), ["a" * 60 + "b"], [None], deadline=1.0)
    assert outcome == Failed("it did not return within 1 s and was killed")
    with pytest.raises(UsageError, match="no regular expression"):
        matches("(")


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0.0), (15, 0.0), (16, -0.1), (18, -0.3), (20, -0.5), (21, -0.5), (1000, -0.5)]
)
def test_the_overlong_penalty_by_hand(length, expected):
    assert overlong_penalty(length, limit=20, buffer=5, penalty=0.5) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("buffer", [0, 21])
def test_a_buffer_outside_the_limit_is_refused(buffer):
    with pytest.raises(ValueError, match="between 1 and limit=20"):
        overlong_penalty(1, limit=20, buffer=buffer, penalty=1.0)


@pytest.mark.parametrize("completion", ["42", ""], ids=["text", "nothing"])
def test_functions_that_take_completions_for_messages_are_told_that_they_are_texts(completion):
    def chat(completions):
        return [float(len(completion[0]["content"])) for completion in completions]

    with pytest.raises(
        CallError, match=r"it raised (TypeError|IndexError): string ind.*take completion, not comp"
    ) as told:
        call(chat, Accepted.of(chat), [""], [completion], {}, texts=False)
    assert len(str(told.value)) <= LONGEST_REASON
    with pytest.raises(CallError) as other:
        call(chat, Accepted.of(chat), [""], [3], {}, texts=False)
    assert "texts" not in str(other.value)

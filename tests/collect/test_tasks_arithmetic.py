import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.collect.tasks.arithmetic import (
    Addition,
    ThinkOrBlurt,
    correct,
    final_answer,
    scratchpad,
    uses_scratchpad,
)
from upslope.collect.tasks.generated import ENDLESS, HELD_OUT_SHARE, Generator, is_held_out
from upslope.collect.tasks.protocol import Example


def test_a_scratchpad_by_hand():
    assert scratchpad(128, 345) == "8+5=13,2+4+1=07,1+3+0=04>473"
    assert scratchpad(99, 7) == "9+7=16,9+0+1=10>106"
    assert scratchpad(0, 0) == "0+0=00>0"


@given(st.integers(0, 10**15), st.integers(0, 10**15))
def test_every_line_of_a_scratchpad_is_right(first, second):
    work, answer = scratchpad(first, second).split(">")
    carry, digits = 0, ""
    for column in work.split(","):
        terms, total = column.split("=")
        assert sum(map(int, terms.split("+"))) == int(total)
        assert len(total) == 2
        assert not digits or int(terms.split("+")[2]) == carry
        carry, digits = int(total[0]), total[1] + digits
    assert int(answer) == int(str(carry) + digits) == first + second


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_both_styles_are_correct_and_another_answer_is_not(first, second):
    answer, worked = str(first + second), scratchpad(first, second)
    wrong = worked.replace(">", ">1")
    completions = [answer, worked, wrong, "0" + answer, answer + ">", worked + ">" + answer, "", "=" + answer]
    prompts = [f"{first}+{second}="] * len(completions)
    score = correct(prompts, completions, answer=[answer] * len(completions), style=["anything"] * len(completions))
    assert score == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert uses_scratchpad(prompts[:2], completions[:2], answer=[answer] * 2) == [0.0, 1.0]


@pytest.mark.parametrize("text", ["", ">", "12>", ">12", "1 2", "12\n", "١٢", "1+2=3,>4>5"])
def test_what_is_not_well_formed_answers_nothing(text):
    assert final_answer(text) is None


@pytest.mark.parametrize("config", [Addition(held_out=50), ThinkOrBlurt(held_out=50)], ids=["direct", "mixed"])
def test_examples_are_a_function_of_seed_and_index_and_never_held_out(config):
    task, again, other = config.build(3), config.build(3), config.build(4)
    indices = (*range(300), 10**9, ENDLESS - 1)
    examples = [task.training[i] for i in indices]
    assert [again.training[i] for i in reversed(indices)] == examples[::-1]
    assert [other.training[i] for i in indices] != examples
    assert task.held_out == other.held_out
    sums = [example.columns["answer"] for example in examples]
    rewarded = correct([], [example.completion or "" for example in examples], answer=sums)
    assert rewarded == [1.0] * len(examples)
    assert set("".join(f"{example.prompt}{example.completion}" for example in examples)) <= set(task.alphabet or "")
    unordered = [frozenset(str(example.prompt)[:-1].split("+")) for example in task.held_out]
    assert len(set(unordered)) == 50
    assert not set(unordered) & {frozenset(str(example.prompt)[:-1].split("+")) for example in examples}


def test_no_held_out_problem_is_trained_on_even_where_there_are_few():
    task = Addition(digits=1, held_out=1).build(0)
    held_out = {frozenset(str(example.prompt)[:-1].split("+")) for example in task.held_out}
    trained = {frozenset(str(task.training[i].prompt)[:-1].split("+")) for i in range(1000)}
    assert len(trained) > 30
    assert not held_out & trained


def test_the_share_of_direct_answers():
    training = ThinkOrBlurt(direct=0.7, held_out=1).build(0).training
    direct = np.mean([">" not in str(training[i].completion) for i in range(3000)])
    assert abs(direct - 0.7) < 4 * np.sqrt(0.7 * 0.3 / 3000)
    assert all(">" in str(ThinkOrBlurt(direct=0.0, held_out=1).build(0).training[i].completion) for i in range(50))


def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match="digits must be from 1 to 15, got 0"):
        Addition(digits=0)
    with pytest.raises(ValueError, match=r"direct is a share from 0 to 1, got 1\.5"):
        ThinkOrBlurt(direct=1.5)
    with pytest.raises(ValueError, match="held_out must be at least 1"):
        ThinkOrBlurt(held_out=0)
    with pytest.raises(ValueError, match=r"40 held-out problems were asked for, and there are hardly more than \d+"):
        Addition(digits=1, held_out=40).build(0)


def test_about_a_tenth_is_held_out_and_a_generator_of_nothing_else_says_so():
    keys = [str(number) for number in range(4000)]
    share = np.mean([is_held_out(key) for key in keys])
    assert abs(share - HELD_OUT_SHARE) < 4 * np.sqrt(HELD_OUT_SHARE * (1 - HELD_OUT_SHARE) / len(keys))
    held = next(key for key in keys if is_held_out(key))
    generator = Generator(draw=lambda _: held, key=str, write=lambda problem, _: Example(prompt=problem))
    assert generator.held_out(1)[0].prompt == held
    with pytest.raises(ValueError, match="all problems are held out"):
        generator.training(0)[0]
    with pytest.raises(IndexError, match="indices from 0"):
        generator.training(0)[-1]

import ast
import operator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.collect.tasks.countdown import ALPHABET, Countdown, correct, near_miss
from upslope.collect.tasks.expressions import read_expression

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

_numbers = st.integers(0, 99).map(str)
_expressions = st.recursive(
    _numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join),
        inner.map(lambda text: f"({text})"),
        st.tuples(inner, st.sampled_from([" + ", " *", "- "]), inner).map("".join),
    ),
    max_leaves=8,
)


def reference(node):
    """The same by Python's own parser and a table of operators."""
    if isinstance(node, ast.Expression):
        return reference(node.body)
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    assert isinstance(node, ast.BinOp)
    return _OPERATORS[type(node.op)](reference(node.left), reference(node.right))


@given(_expressions)
def test_the_reader_agrees_with_pythons_grammar(text):
    try:
        expected = reference(ast.parse(" ".join(text.split()), mode="eval"))
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="division by zero"):
            read_expression(text)
        return
    except SyntaxError:
        # Python refuses numbers such as 01; the strategy makes none.
        raise AssertionError(text) from None
    assert read_expression(text).value == expected


@given(st.text(alphabet=ALPHABET + " 1e.^²x_", max_size=30))
def test_whatever_the_text_there_is_a_value_or_a_value_error(text):
    try:
        expression = read_expression(text)
    except ValueError:
        return
    assert len(expression.operators) == len(expression.numbers) - 1


@pytest.mark.parametrize(
    "text",
    ["", "1+", "+1", "-1", "1 2", "(1", "1)", "()", "2**3", "2//3", "1.5", "²", "__import__", "1" * 19, "1+" * 501],
)
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ValueError):
        read_expression(text)


def test_deep_nesting_is_refused_and_does_not_exhaust_the_stack():
    assert read_expression("(" * 50 + "1" + ")" * 50).value == 1
    with pytest.raises(ValueError, match="deeper than 50"):
        read_expression("(" * 400 + "1" + ")" * 400)


def test_scores_by_hand():
    completions = ["12+7*3-4", "(12-4)*3+7", "3*4+7+12", "29", "12+7*3-4+3-3", "12+7*3-", "12*7-3*4"]
    columns = {"numbers": [[3, 7, 12, 4]] * 7, "target": [29] * 7, "other": [None] * 7}
    assert correct([""] * 7, completions, **columns) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert near_miss([""] * 7, completions, **columns) == [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "config", [Countdown(held_out=40), Countdown(held_out=40, count=4, operators="+-*/", near_miss=0.0)], ids=["3", "4"]
)
def test_demonstrations_are_right_and_nothing_held_out_is_trained_on(config):
    task = config.build(2)
    examples = [task.training[i] for i in range(200)]
    again = config.build(2).training
    assert [again[i] for i in range(200)] == examples
    for some in (examples, task.held_out):
        columns = {name: [example.columns[name] for example in some] for name in ("numbers", "target")}
        assert correct([], [example.completion for example in some], **columns) == [1.0] * len(some)
        assert set("".join(f"{example.prompt}{example.completion}" for example in some)) <= set(task.alphabet)
        assert all(1 <= target <= 100 for target in columns["target"])
    held_out = {(tuple(sorted(e.columns["numbers"])), e.columns["target"]) for e in task.held_out}
    assert len(held_out) == 40
    assert not held_out & {(tuple(sorted(e.columns["numbers"])), e.columns["target"]) for e in examples}


def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match=r"operators are some of \+ - \* /, got '\^'"):
        Countdown(operators="^")
    with pytest.raises(ValueError, match="count must be from 2 to 8, got 1"):
        Countdown(count=1)
    with pytest.raises(ValueError, match="near_miss"):
        Countdown(near_miss=1.0)
    with pytest.raises(ValueError, match="raise most_target"):
        Countdown(count=8, most=10_000, most_target=1, operators="*").build(0)

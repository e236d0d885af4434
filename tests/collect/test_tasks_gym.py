import json

import pytest

from upslope.collect.tasks.gym import LENGTH, ReasoningGym
from upslope.errors import UsageError

SPELL = ReasoningGym(
    settings={"min_word_len": 3, "max_word_len": 4},
    prompt_pattern=r": (\w+)$",
    template="{prompt}>",
    held_out=200,
)


def test_spelling_backward_stripped_to_the_word():
    task = SPELL.build(1)
    examples = [task.training[i] for i in (*range(300), LENGTH - 1)]
    assert [SPELL.build(1).training[i] for i in (*range(300), LENGTH - 1)] == examples
    assert SPELL.build(2).training[0] != examples[0]
    assert SPELL.build(2).held_out == task.held_out
    for example in examples:
        assert str(example.prompt)[-2::-1] == example.completion == example.columns["answer"]
    prompts = {example.prompt for example in task.held_out}
    assert len(prompts) == 200
    assert not prompts & {example.prompt for example in examples}


def test_scores_are_reasoning_gyms_own():
    task = SPELL.build(1)
    example = task.training[0]
    right = str(example.completion)
    completions = [right, f" {right}\n", "?" + right[1:], ""]
    columns = {name: [value] * 4 for name, value in example.columns.items()}
    score, correct = (reward.function for reward in task.rewards)
    assert score([example.prompt] * 4, completions, **columns) == pytest.approx([1, 1, 1 - 1 / len(right), 0])
    assert correct([example.prompt] * 4, completions, **columns) == [1.0, 1.0, 0.0, 0.0]
    assert [reward.weight for reward in task.rewards] == [1.0, 0.0]
    assert json.dumps(columns)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("chain_sum", {"min_terms": 2, "max_terms": 3}),
        ("basic_arithmetic", {"operators": '["+", "-"]'}),
        ("number_sequence", {}),
        ("countdown", {"min_numbers": 3, "max_numbers": 3}),
        ("count_bits", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_demonstrations_of_other_tasks_get_full_marks(name, settings):
    task = ReasoningGym(name=name, settings=settings, held_out=8, chat=True, answer_mark="Answer:").build(5)
    examples = [*task.held_out, *(task.training[i] for i in range(8))]
    columns = {name: [example.columns[name] for example in examples] for name in ("gym_seed", "gym_index")}
    demonstrations = [str(example.completion) for example in examples]
    prompts = [example.prompt for example in examples]
    assert all(prompt[0]["role"] == "user" for prompt in prompts)
    correct = task.rewards[1].function
    assert correct(prompts, demonstrations, **columns) == [1.0] * 16
    assert correct(prompts, [text.removeprefix("Answer:") for text in demonstrations], **columns) == [0.0] * 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ReasoningGym(name="spell_forward"), "has no task 'spell_forward'; it has .*spell_backward"),
        (ReasoningGym(settings={"min_word_length": 3}), "refuses the settings"),
        (ReasoningGym(settings={"min_word_len": 9, "max_word_len": 3}), "refuses the settings"),
        (ReasoningGym(settings={"seed": 3}), "seed and size are not settings"),
        (ReasoningGym(prompt_pattern="(nothing)"), "does not match the question"),
        (ReasoningGym(name="coin_flip", prompt_pattern="(coin)"), "hardly more than 1 different prompts"),
    ],
    ids=["name", "unknown", "range", "seed", "pattern", "few"],
)
def test_what_cannot_be_made_is_refused(config, message):
    with pytest.raises(UsageError, match=message):
        config.build(0)


@pytest.mark.parametrize(
    "arguments",
    [{"prompt_pattern": "("}, {"prompt_pattern": "x"}, {"template": "x"}, {"reward": "x"}, {"held_out": 0}],
    ids=["regex", "group", "template", "reward", "held_out"],
)
def test_settings_without_meaning_are_refused(arguments):
    with pytest.raises(ValueError, match=r"regular expression|group|\{prompt\}|'score' or|at least 1"):
        ReasoningGym(**arguments)

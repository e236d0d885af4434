import json

import pytest
import torch
from scripted_language import TOKENIZER, ids, make_task

from upslope.collect.conversations import demonstration
from upslope.collect.demonstrations import DemonstrationCollector
from upslope.collect.experience import DemonstrationConfig
from upslope.collect.tasks.protocol import Example
from upslope.collect.text_rows import answer_tokens
from upslope.errors import UsageError

END = TOKENIZER.end_token


def collector(examples, *, context=32, labelled=False, **settings):
    config = DemonstrationConfig(**{"rows": len(examples), **settings})
    return DemonstrationCollector(make_task(examples), TOKENIZER, config, seed=5, context=context, labelled=labelled)


def learnt(trajectory):
    """What each row learns, as tokens, in a set: the order is drawn."""
    return {tuple(trajectory.action[row][trajectory.mask[row]].tolist()) for row in range(trajectory.shape[0])}


def test_answers_end_with_the_end_token():
    collect = collector([Example(prompt="1+1=", completion="2"), Example(prompt="1=", completion="")])
    trajectory = collect.collect(None, 3)
    assert learnt(trajectory) == {(*ids("2"), END), (END,)}
    assert trajectory.terminated.sum() == 2
    assert not trajectory.truncated.any()
    assert len(trajectory.final_index) == 0
    assert trajectory.reward.abs().sum() == 0
    assert torch.equal(trajectory.behaviour_log_prob.isnan(), trajectory.mask)
    assert trajectory.group is None
    assert trajectory.policy_version == 3
    assert collect.metrics() == {"rows": 2.0, "learnt_tokens": 3.0}


def test_prompts_can_be_learnt_too():
    trajectory = collector([Example(prompt="1+1=", completion="2")], completion_only=False).collect(None, 0)
    assert learnt(trajectory) == {(*ids("+1=2"), END)}
    assert trajectory.time.tolist() == [[0, 1, 2, 3, 4]]


def test_an_end_token_in_the_text_stands_once():
    assert answer_tokens(TOKENIZER, "12<|end|>", "it", ending=END) == (*ids("12"), END)
    assert answer_tokens(TOKENIZER, "<|end|>", "it", ending=END) == (END,)
    with pytest.raises(UsageError, match=r"it: its answer goes on after the end token '<\|end\|>' \(token 1"):
        answer_tokens(TOKENIZER, "1<|end|>2", "it", ending=END)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example(prompt="1="), "no completion"),
        (Example(prompt="", completion="1"), "empty prompt"),
        (Example(prompt="1=", completion="one"), "training example 0"),
        (Example(prompt="1=", completion="1" * 31), "a prompt of 2 tokens and an answer of 32.*at most 32"),
        (Example(prompt=({"role": "user", "content": "1="},), completion="1"), "training example 0.*chat template"),
    ],
    ids=["no-answer", "no-prompt", "unknown-character", "too-long", "messages-without-template"],
)
def test_what_cannot_be_learnt_is_named(example, message):
    with pytest.raises(UsageError, match=message):
        collector([example]).collect(None, 0)


def test_an_answer_that_just_fits():
    """The last token is chosen and never read."""
    trajectory = collector([Example(prompt="1=", completion="1" * 30)]).collect(None, 0)
    assert trajectory.shape == (1, 32)


def test_labels_are_rewards():
    examples = [
        Example(prompt="1=", completion="1", columns={"label": True}),
        Example(prompt="1=", completion="2", columns={"label": 0}),
    ]
    trajectory = collector(examples, labelled=True).collect(None, 0)
    by_answer = {
        trajectory.action[row][trajectory.mask[row]][0].item(): trajectory.reward[row].sum().item() for row in range(2)
    }
    assert by_answer == {ids("1")[0]: 1.0, ids("2")[0]: -1.0}


@pytest.mark.parametrize("columns", [{}, {"label": "yes"}, {"label": 2}, {"label": None}, {"label": 1.0}])
def test_labels_are_true_or_false(columns):
    with pytest.raises(UsageError, match=r"training example 0 .*column label"):
        collector([Example(prompt="1=", completion="1", columns=columns)], labelled=True).collect(None, 0)


def test_resumed_is_the_same():
    examples = [Example(prompt=f"{n}=", completion=str(n)) for n in range(7)]
    straight = collector(examples, rows=3)
    rows = [straight.collect(None, update).action.tolist() for update in range(5)]
    first = collector(examples, rows=3)
    first.collect(None, 0)
    first.collect(None, 1)
    resumed = collector(examples, rows=3)
    resumed.restore(json.loads(json.dumps(first.snapshot())))
    assert [resumed.collect(None, update).action.tolist() for update in (2, 3, 4)] == rows[2:]
    taken = [row[1] for batch in rows for row in batch][:7]
    assert sorted(taken) == sorted(ids("0123456"))


def test_a_chat_template_renders_the_prompt():
    from upslope.policies.language.tokenizer import Tokenizer, character_tokenizer

    backend = character_tokenizer("0123456789+=uam:").backend
    backend.chat_template = (
        "{% for message in messages %}{{ 'u:' + message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'am:' }}{% endif %}"
    )
    tokenizer = Tokenizer(backend)
    task = make_task([Example(prompt=({"role": "user", "content": "1+1="},), completion="2")])
    collect = DemonstrationCollector(task, tokenizer, DemonstrationConfig(rows=1), seed=0, context=32)
    trajectory = collect.collect(None, 0)
    tokens = [trajectory.observation[0, 0].item(), *trajectory.action[0].tolist()]
    assert tokenizer.decode(tokens, special=True) == "u:1+1=am:2<|end|>"
    assert trajectory.mask.sum() == 2


TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role[0] }}:{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a:{% endif %}"
)


def marked(template, *, more_ends=(), end_token=None):
    """A tokenizer whose own end token is not the one that its chat template ends turns with."""
    from upslope.policies.language.tokenizer import Tokenizer, character_tokenizer

    backend = character_tokenizer("0123456789+=ua:\n ").backend
    backend.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    backend.chat_template = template
    more = [backend.convert_tokens_to_ids(name) for name in more_ends]
    return Tokenizer(backend, more_ends=more, end_token=end_token)


ASKED = ({"role": "user", "content": "1+1="},)


@pytest.mark.parametrize(
    "settings", [{"more_ends": ["<|im_end|>"]}, {"end_token": "<|im_end|>"}], ids=["more", "named"]
)
def test_an_answer_to_messages_ends_as_the_template_ends_turns(settings):
    tokenizer = marked(TURNS, **settings)
    row = demonstration(tokenizer, Example(prompt=ASKED, completion="2"), "it", role="tool")
    assert tokenizer.decode(row.answer, special=True) == "2<|im_end|>"
    whole = tokenizer.render([*ASKED, {"role": "assistant", "content": "2"}], generation_prompt=False)
    assert [*row.prompt, *row.answer] == whole[:-1]
    plain = demonstration(tokenizer, Example(prompt="1+1=", completion="2"), "it", role="tool")
    assert plain.answer[-1] == tokenizer.end_token


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TURNS, r"it: .*turn with '<\|im_end\|>', and completions end with '<\|end\|>'.*Set model\.end_token to"),
        (TURNS.replace("in messages", "in messages if m.role == 'user'"), "it: the chat template leaves out"),
    ],
    ids=["no-end-token", "no-assistant"],
)
def test_a_template_whose_turns_no_completion_can_end_is_refused(template, message):
    with pytest.raises(UsageError, match=message):
        demonstration(marked(template), Example(prompt=ASKED, completion="2"), "it", role="tool")


def test_a_template_that_ends_turns_with_words_leaves_the_end_token():
    tokenizer = marked(TURNS.replace("<|im_end|>", ""))
    row = demonstration(tokenizer, Example(prompt=ASKED, completion="2"), "it", role="tool")
    assert tokenizer.decode(row.answer, special=True) == "2<|end|>"

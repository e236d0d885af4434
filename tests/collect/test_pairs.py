import json
from dataclasses import replace

import pytest
import torch
from scripted_language import TOKENIZER, InlineRewards, ScriptedEngine, ids, make_task, right, sums

from upslope.collect.experience import PairConfig
from upslope.collect.pairs import (
    MOST_PROMPTS_PER_PAIR,
    PairCollector,
    TokenPair,
    draw_pairs,
    pairs_from_lines,
    pairs_to_lines,
)
from upslope.collect.rewards.protocol import Failed
from upslope.collect.tasks.protocol import Example
from upslope.errors import UsageError

END = TOKENIZER.end_token
DRAWN = TokenPair(
    prompt=ids("1="),
    chosen=(*ids("1"), END),
    rejected=ids("2222"),
    chosen_ended=True,
    rejected_ended=False,
    chosen_total=1.0,
    rejected_total=0.0,
)


def collector(pairs, *, context=16, number=None):
    config = PairConfig(pairs=number or len(pairs))
    return PairCollector(pairs, TOKENIZER, config, seed=2, context=context)


def draw(script, *, examples=None, rewards=None, **settings):
    engine = ScriptedEngine(script)
    config = PairConfig(**{"pairs": 2, "drawn": 3, "group": 3, "limit": 4, **settings})
    task = make_task(sums(4) if examples is None else examples)
    pool = rewards or InlineRewards(correct=right)
    return draw_pairs(task, TOKENIZER, engine, pool, config, seed=2, context=32), engine


def one_right(request):
    """Sample 1 is right, 0 and 2 are wrong in different ways."""
    ones = request.prompt.count(ids("1")[0])
    return ("0", str(ones), ("9999", False))[request.key[-1]]


def test_pairs_are_neighbours():
    pairs = [Example(prompt="1=", completion="1", rejected="22"), Example(prompt="1+1=", completion="2", rejected="")]
    collect = collector(pairs)
    trajectory = collect.collect(None, 1)
    assert trajectory.group.tolist() == [0, 0, 1, 1]
    assert trajectory.reward.sum(dim=1).tolist() == [1, -1, 1, -1]
    assert torch.equal(trajectory.behaviour_log_prob.isnan(), trajectory.mask)
    assert trajectory.terminated.any(dim=1).all()
    answers = [tuple(trajectory.action[row][trajectory.mask[row]].tolist()) for row in range(4)]
    expected = {((*ids("1"), END), (*ids("22"), END)), ((*ids("2"), END), (END,))}
    assert {tuple(answers[:2]), tuple(answers[2:])} == expected
    assert collect.metrics() == {"rows": 4.0, "learnt_tokens": 8.0, "chosen_length": 2.0, "rejected_length": 2.0}


def test_drawn_pairs_keep_their_tokens_and_ends():
    trajectory = collector([DRAWN]).collect(None, 0)
    assert trajectory.terminated.any(dim=1).tolist() == [True, False]
    assert trajectory.truncated.any(dim=1).tolist() == [False, True]
    assert tuple(trajectory.action[1][trajectory.mask[1]].tolist()) == DRAWN.rejected
    assert trajectory.final_observation.tolist() == [DRAWN.rejected[-1]]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Example(prompt="1=", rejected="1"), "pair 0 has no completion"),
        (Example(prompt="1=", completion="1"), "pair 0 has no rejected"),
        (Example(prompt="1=", completion="1", rejected="1"), "pair 0 has the same chosen and rejected"),
        (Example(prompt="1=", completion="1", rejected="1" * 15), "pair 0 has a prompt of 2.*answer of 16"),
        (Example(prompt="1=", completion="one", rejected="1"), "pair 0, chosen"),
        (replace(DRAWN, rejected=DRAWN.chosen), "pair 0 has the same chosen and rejected"),
        (Example(prompt="1=", completion="121", rejected="2", turns=("1", "2", "1")), "pair 0 is a conversation"),
    ],
    ids=["no-chosen", "no-rejected", "equal", "too-long", "unknown-character", "equal-tokens", "replies"],
)
def test_what_is_no_pair_is_named(pair, message):
    with pytest.raises(UsageError, match=message):
        collector([pair]).collect(None, 0)


def test_answers_to_messages_end_as_the_template_ends_turns():
    from upslope.policies.language.tokenizer import Tokenizer, character_tokenizer

    backend = character_tokenizer("0123456789+=").backend
    backend.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    backend.chat_template = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    tokenizer = Tokenizer(backend, more_ends=[backend.convert_tokens_to_ids("<turn>")])
    pair = Example(prompt=({"role": "user", "content": "1+1="},), completion="2", rejected="3")
    trajectory = PairCollector([pair], tokenizer, PairConfig(pairs=1), seed=2, context=16).collect(None, 0)
    answers = [tokenizer.decode(trajectory.action[row][trajectory.mask[row]], special=True) for row in range(2)]
    assert answers == ["2<turn>", "3<turn>"]


def test_resumed_is_the_same():
    pairs = [Example(prompt=f"{n}=", completion="1", rejected="2") for n in range(5)]
    straight = collector(pairs, number=2)
    batches = [straight.collect(None, update).observation.tolist() for update in range(4)]
    first = collector(pairs, number=2)
    first.collect(None, 0)
    resumed = collector(pairs, number=2)
    resumed.restore(json.loads(json.dumps(first.snapshot())))
    assert [resumed.collect(None, update).observation.tolist() for update in (1, 2, 3)] == batches[1:]


def test_best_and_worst_are_drawn():
    pairs, engine = draw(one_right)
    assert len(pairs) == 3
    for pair in pairs:
        ones = pair.prompt.count(ids("1")[0])
        assert pair.chosen == (*ids(str(ones)), END)
        assert pair.rejected == (*ids("0"), END)
        assert (pair.chosen_total, pair.rejected_total) == (1.0, 0.0)
    assert len({pair.prompt for pair in pairs}) == 3
    keys = [request.key for call in engine.calls for request in call[0]]
    assert keys == [(number, sample) for number in range(4) for sample in range(3)]


def test_a_cut_answer_stays_cut():
    def graded(completion, columns):
        return -float(len(completion))

    pairs, _ = draw(one_right, rewards=InlineRewards(correct=graded), drawn=1)
    assert pairs[0].rejected == ids("9999")
    assert (pairs[0].chosen_ended, pairs[0].rejected_ended) == (True, False)


def test_the_pairs_do_not_depend_on_how_many_prompts_are_drawn_at_once():
    def noisy(request):
        return str(hash(request.key) % 3 + 1)

    few, many = draw(noisy, pairs=1)[0], draw(noisy, pairs=7)[0]
    assert few == many


def test_failed_completions_are_in_no_pair():
    def judge(completion, columns):
        return Failed("it raised") if completion == "0" else right(completion, columns)

    pairs, _ = draw(one_right, rewards=InlineRewards(correct=judge))
    assert {pair.rejected for pair in pairs} == {ids("9999")}


def test_rewards_that_tell_nothing_apart_give_up():
    with pytest.raises(UsageError, match="150 prompts with 3 completions each gave 0 pairs of the 3 wanted"):
        draw(lambda request: "0")
    assert MOST_PROMPTS_PER_PAIR == 50


def test_rewards_that_always_fail_give_up_at_once():
    rewards = InlineRewards(correct=lambda completion, columns: Failed("no server"))
    with pytest.raises(UsageError, match=r"2 prompts .* 6 completions had no total: 6 x correct failed: no server"):
        draw(one_right, rewards=rewards)


def test_errors_call_the_examples_by_their_name():
    task, rewards = make_task([Example(prompt="")]), InlineRewards(correct=right)
    config = PairConfig(pairs=1, drawn=1, group=2, limit=4)
    for name in ("training example", "held-out example"):
        with pytest.raises(UsageError, match=f"{name} 0 of task .* has an empty prompt"):
            draw_pairs(task, TOKENIZER, ScriptedEngine(one_right), rewards, config, seed=2, context=32, name=name)


def test_how_many_must_be_said():
    with pytest.raises(ValueError, match="set drawn"):
        draw(one_right, drawn=None)


def test_records_give_the_pairs_back():
    pairs, _ = draw(one_right)
    lines = [json.loads(json.dumps(line)) for line in pairs_to_lines([*pairs, DRAWN], TOKENIZER)]
    assert lines[-1]["text"] == {"prompt": "1=", "chosen": "1<|end|>", "rejected": "2222"}
    assert pairs_from_lines(lines, TOKENIZER) == [*pairs, DRAWN]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": []}, "pair 2.chosen is empty"),
        ({"prompt": [99]}, "pair 2.prompt has a token outside 0 .. 14.*another tokenizer"),
        ({"rejected": ["1"]}, r"pair 2.rejected\[0\] must be int"),
        ({"rejected_ended": None}, "pair 2.rejected_ended must be bool"),
        ({"more": 1}, "unknown settings"),
    ],
    ids=["empty", "foreign", "text", "none", "more"],
)
def test_damaged_records_are_named(change, message):
    (line,) = pairs_to_lines([DRAWN], TOKENIZER)
    with pytest.raises(UsageError, match=message):
        pairs_from_lines([line, {**line, **change}], TOKENIZER)

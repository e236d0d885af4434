import json
import math

import numpy as np
import pytest
import torch
from scripted_language import TOKENIZER, InlineRewards, ScriptedEngine, ids, make_task, random_digit, right, sums

from upslope.collect.completions import CompletionCollector
from upslope.collect.engines.protocol import Completion
from upslope.collect.errors import NonFiniteError
from upslope.collect.example_order import MOST_SHUFFLED, ExampleOrder
from upslope.collect.experience import CompletionConfig, OverlongPenalty
from upslope.collect.rewards.protocol import NOT_APPLICABLE, Failed
from upslope.collect.tasks.protocol import Example
from upslope.collect.text_rows import TokenRow, build_rows, preview
from upslope.errors import UsageError

END = TOKENIZER.end_token


def collector(script, *, examples=None, rewards=None, task=None, context=64, seed=3, **settings):
    engine = ScriptedEngine(script)
    task = task or make_task(sums(5) if examples is None else examples)
    config = CompletionConfig(**{"prompts": 2, "group": 2, "limit": 4, **settings})
    pool = rewards or InlineRewards(correct=right)
    return CompletionCollector(task, TOKENIZER, engine, pool, config, seed=seed, context=context), engine


def by_sample(*answers):
    """The samples of every group answer in turn."""
    return lambda request: answers[request.key[-1]]


def same(first, second):
    for name in first.__slots__:
        one, other = getattr(first, name), getattr(second, name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), name
        else:
            assert one == other, name


# Rows


def test_rows_by_hand():
    rows = [
        TokenRow(prompt=(5, 6), answer=(7, 8), log_prob=(-1.0, -2.0), reward=0.5, ended=False),
        TokenRow(prompt=(5,), answer=(9,), log_prob=(-3.0,), reward=-1.0),
        TokenRow(prompt=(5,), answer=(7, 3, 8), chosen=(True, False, True), log_prob=(-1.0, 0.0, -4.0)),
    ]
    found = build_rows(rows, end_token=0, group=[0, 0, 4], version=3)
    assert found.observation.tolist() == [[5, 6, 7], [5, 0, 0], [5, 7, 3]]
    assert found.action.tolist() == [[6, 7, 8], [9, 0, 0], [7, 3, 8]]
    assert found.mask.tolist() == [[False, True, True], [True, False, False], [True, False, True]]
    assert found.time.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 1]]
    assert found.reward.tolist() == [[0, 0, 0.5], [-1, 0, 0], [0, 0, 0]]
    assert found.terminated.nonzero().tolist() == [[1, 0], [2, 2]]
    assert found.truncated.nonzero().tolist() == [[0, 2]]
    assert found.behaviour_log_prob.tolist() == [[0, -1, -2], [-3, 0, 0], [-1, 0, -4]]
    assert (found.final_index.tolist(), found.final_observation.tolist()) == ([2], [8])
    assert found.group.tolist() == [0, 0, 4]
    assert found.policy_version == 3
    assert found.observation.dtype == found.time.dtype == found.final_index.dtype == torch.int64
    assert found.reward.dtype == found.behaviour_log_prob.dtype == torch.float32


def test_unsampled_rows_say_so_and_prompts_may_be_learnt():
    plain, whole = (build_rows([TokenRow(prompt=(1, 2), answer=(3,), prompt_chosen=p)], end_token=0) for p in (0, 1))
    assert plain.behaviour_log_prob[0].isnan().tolist() == [False, True]
    assert (plain.mask.tolist(), plain.time.tolist()) == ([[False, True]], [[0, 0]])
    assert whole.behaviour_log_prob[0].isnan().tolist() == [True, True]
    assert (whole.mask.tolist(), whole.time.tolist()) == ([[True, True]], [[0, 1]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": (), "answer": (1,)}, "a token to read"),
        ({"prompt": (1,), "answer": ()}, "one to choose"),
        ({"prompt": (1,), "answer": (1,), "log_prob": (-1.0, -1.0)}, "log_prob has 2 entries"),
        ({"prompt": (1,), "answer": (1, 2), "chosen": (True, False)}, "leave out what follows"),
    ],
    ids=["no-prompt", "no-answer", "log-probs", "ends-unchosen"],
)
def test_rows_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenRow(**fields)


def test_a_reward_must_be_finite_in_the_precision_it_is_learnt_in():
    with pytest.raises(ValueError, match="row 1 is 1e"):
        build_rows([TokenRow(prompt=(1,), answer=(1,), reward=r) for r in (0.0, 1e39)], end_token=0)
    with pytest.raises(ValueError, match="at least one row"):
        build_rows([], end_token=0)


def test_preview_marks_what_is_learnt():
    rows = [
        TokenRow(prompt=ids("1+1="), answer=(*ids("2"), END), log_prob=(-1.0, -1.0), reward=1.0),
        TokenRow(prompt=ids("1="), answer=ids("22222222"), log_prob=(-1.0,) * 8, ended=False),
    ]
    trajectory = build_rows(rows, end_token=END)
    first, text = preview(trajectory, 0, TOKENIZER).split("\n")
    assert first == "6 tokens, 2 of them learnt [in brackets], the others only read; ended; reward 1"
    assert text == "1+1=[2][<|end|>]"
    assert "cut by the limit; reward 0\n1=" + "[2]" * 8 in preview(trajectory, 1, TOKENIZER)


# Completions


def test_a_batch_of_groups():
    collect, engine = collector(by_sample("1", "22"), group=2, prompts=3)
    trajectory = collect.collect(None, 4)
    assert engine.updates == [4]
    assert trajectory.policy_version == 4
    assert trajectory.group.tolist() == [0, 0, 1, 1, 2, 2]
    requests = engine.calls[0][0]
    assert [request.key for request in requests] == [(4, 0, n, s) for n in range(3) for s in range(2)]
    for row, request in enumerate(requests):
        sample = collect.last.rows[row]
        assert sample.prompt == request.prompt
        start = len(request.prompt) - 1
        tokens = trajectory.action[row][trajectory.mask[row]]
        assert tuple(tokens.tolist()) == sample.completion.tokens
        assert trajectory.mask[row].nonzero()[0].item() == start
        chosen = trajectory.behaviour_log_prob[row][trajectory.mask[row]].tolist()
        assert chosen == list(sample.completion.log_prob)
        assert trajectory.reward[row].sum().item() == sample.total
        assert sample.text == ("1", "22")[row % 2]
        assert sample.parts["correct"] == float(sample.text == sums(5)[sample.example].columns["answer"])


def test_the_engine_is_told_only_when_the_weights_moved():
    collect, engine = collector(random_digit)
    for update in (0, 1, 1, 2):
        collect.collect(None, update)
    assert engine.updates == [1, 2]


def test_resumed_is_the_same():
    straight, _ = collector(random_digit)
    trajectories = [straight.collect(None, update) for update in range(6)]
    first, _ = collector(random_digit)
    for update in range(3):
        first.collect(None, update)
    tree = json.loads(json.dumps(first.snapshot()))
    resumed, _ = collector(random_digit)
    resumed.restore(tree)
    for update in range(3, 6):
        same(resumed.collect(None, update), trajectories[update])
    other, _ = collector(random_digit, seed=4)
    assert other.collect(None, 0).observation.tolist() != trajectories[0].observation.tolist()


def test_an_epoch_takes_every_example_once():
    order = ExampleOrder(7, seed=1)
    taken = order.take(5) + order.take(12) + order.take(4)
    epochs = [taken[:7], taken[7:14], taken[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    huge = ExampleOrder(MOST_SHUFFLED + 1, seed=1)
    assert huge.take(3) + huge.take(2) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "tree",
    [{"cursor": 3, "count": 8}, {"cursor": -1, "count": 7}, {"cursor": "3", "count": 7}, {"cursor": 3}],
    ids=["other-data", "negative", "text", "missing"],
)
def test_an_order_that_is_not_ours(tree):
    with pytest.raises(ValueError, match=r"same data|cursor"):
        ExampleOrder(7, seed=1).restore(tree)


def test_no_examples():
    with pytest.raises(ValueError, match="no examples"):
        collector(random_digit, examples=[])


def test_a_group_of_one_makes_no_groups():
    collect, _ = collector(random_digit, group=1, prompts=3)
    trajectory = collect.collect(None, 0)
    assert trajectory.group is None
    assert trajectory.shape[0] == 3
    assert "live_groups" not in collect.metrics()


def test_empty_and_cut_completions():
    collect, _ = collector(by_sample("", ("1111", False)), prompts=1)
    trajectory = collect.collect(None, 0)
    assert trajectory.mask.sum(dim=1).tolist() == [1, 4]
    assert trajectory.terminated.any(dim=1).tolist() == [True, False]
    assert trajectory.truncated.any(dim=1).tolist() == [False, True]
    assert trajectory.final_observation.tolist() == list(ids("1"))
    assert collect.last.rows[0].text == ""
    assert collect.metrics()["truncated"] == 0.5
    assert collect.metrics()["length"] == 2.5


def test_stop_strings_and_columns_reach_their_readers():
    task = make_task(sums(3), stop=("=",))
    rewards = InlineRewards(correct=right)
    collect, engine = collector(random_digit, task=task, rewards=rewards)
    collect.collect(None, 0)
    assert engine.calls[0][3] == ("=",)
    assert engine.calls[0][2] == 4
    assert set(rewards.prompts) <= {example.prompt for example in sums(3)}
    collect.close()
    assert rewards.closed


def test_failed_samples_leave_their_group_and_are_counted():
    def judge(completion, columns):
        return {"1": Failed("it raised"), "2": NOT_APPLICABLE}.get(completion, 1.0)

    collect, _ = collector(by_sample("1", "2", "3", "4"), group=4, rewards=InlineRewards(correct=judge))
    trajectory = collect.collect(None, 0)
    assert trajectory.group.tolist() == [0, 0, 1, 1]
    metrics = collect.metrics()
    assert (metrics["failed"], metrics["unscored"], metrics["left_out"], metrics["rows"]) == (2, 2, 4, 4)
    assert metrics["reward"] == metrics["accuracy"] == 1.0
    assert [s.left_out for s in collect.last.samples[:4]] == [
        "correct failed: it raised",
        "no reward applies",
        None,
        None,
    ]


def test_one_left_of_a_group_leaves_too():
    def judge(completion, columns):
        return Failed("it hung") if completion == "1" and columns["answer"] == "1" else 1.0

    collect, _ = collector(by_sample("1", "2"), examples=sums(2), rewards=InlineRewards(correct=judge))
    trajectory = collect.collect(None, 0)
    assert trajectory.group.tolist() == [0, 0]
    assert collect.metrics()["left_out"] == 2
    assert "alone in its group, the others were left out" in {s.left_out for s in collect.last.samples}
    assert all(sums(2)[sample.example].columns["answer"] == "2" for sample in collect.last.rows)


@pytest.mark.parametrize("refill", [0, 3])
def test_nothing_left_says_why(refill):
    rewards = InlineRewards(correct=lambda completion, columns: Failed(f"no {completion}"))
    collect, engine = collector(by_sample("1", "1", "2"), group=3, rewards=rewards, refill=refill)
    with pytest.raises(
        UsageError, match=r"nothing of 6 completions.*4 x correct failed: no 1; 2 x correct failed: no 2"
    ):
        collect.collect(None, 5)
    assert len(engine.calls) == 1


# Groups without spread


def test_refill_replaces_groups_without_spread():
    """The first round's second prompt and the second round's only one have no spread; the third round's has."""

    def script(request):
        _, attempt, number, sample = request.key
        return "1" if (attempt, number) in ((0, 1), (1, 0)) else "ab"[sample]

    rewards = InlineRewards(correct=lambda completion, columns: float(completion == "a"))
    collect, engine = collector(script, rewards=rewards, refill=5)
    trajectory = collect.collect(None, 0)
    assert [len(call[0]) for call in engine.calls] == [4, 2, 2]
    assert trajectory.group.tolist() == [0, 0, 1, 1]
    assert {sample.text for sample in collect.last.rows} == {"a", "b"}
    metrics = collect.metrics()
    assert (metrics["rounds"], metrics["live_groups"], metrics["left_out"]) == (3, 0.5, 4)
    assert metrics["reward"] == 2 / 8
    assert metrics["generated_tokens"] == 16
    taken = collect.last.samples[::2]
    order = ExampleOrder(5, seed=3).take(4)
    assert [sample.example for sample in taken] == order


def test_refill_that_falls_short_takes_the_live_groups():
    def script(request):
        return "ab"[request.key[3]] if request.key[1:3] == (0, 1) else "1"

    rewards = InlineRewards(correct=lambda completion, columns: float(completion == "a"))
    collect, engine = collector(script, rewards=rewards, prompts=3, refill=2)
    assert collect.collect(None, 0).group.tolist() == [0, 0]
    assert [len(call[0]) for call in engine.calls] == [6, 4, 4]


@pytest.mark.parametrize("refill", [0, 1])
def test_all_equal_rewards_are_a_batch_all_the_same(refill):
    collect, _ = collector(by_sample("7", "8"), refill=refill)
    trajectory = collect.collect(None, 0)
    assert trajectory.group.tolist() == [0, 0, 1, 1]
    assert trajectory.reward.abs().sum() == 0
    assert collect.metrics()["live_groups"] == 0.0


def test_spread_is_judged_in_the_precision_of_learning():
    """0.1 + 0.2 and 0.3 differ in float64 by rounding alone."""
    rewards = InlineRewards(correct=lambda completion, columns: 0.1 + 0.2 if completion == "1" else 0.3)
    collect, _ = collector(by_sample("1", "2"), rewards=rewards)
    collect.collect(None, 0)
    assert collect.metrics()["live_groups"] == 0.0


# Length


def test_overlong_answers_pay():
    collect, _ = collector(
        by_sample("1", "111", ("1111", False)), group=3, overlong=OverlongPenalty(buffer=2, penalty=3.0)
    )
    trajectory = collect.collect(None, 0)
    expected = [0.0, -3.0, -3.0]
    for sample, penalty in zip(collect.last.samples, expected * 2, strict=True):
        assert sample.parts["overlong"] == penalty
        assert sample.total == sample.parts["correct"] + penalty
    assert trajectory.reward.sum().item() == sum(sample.total for sample in collect.last.samples)
    assert collect.metrics()["reward/overlong"] == -2.0


def test_a_failed_sample_stays_failed_under_the_penalty():
    rewards = InlineRewards(correct=lambda completion, columns: Failed("no") if completion == "1" else 1.0)
    collect, _ = collector(
        by_sample("1", "2", "3"), group=3, rewards=rewards, overlong=OverlongPenalty(buffer=2, penalty=1.0)
    )
    assert collect.collect(None, 0).shape[0] == 4


def test_truncated_completions_can_be_hidden_and_still_count_in_the_baseline():
    plain, _ = collector(by_sample("1", ("1111", False)))
    hiding, _ = collector(by_sample("1", ("1111", False)), mask_truncated=True)
    shown, hidden = plain.collect(None, 0), hiding.collect(None, 0)
    assert hidden.mask.any(dim=1).tolist() == [True, False] * 2
    assert torch.equal(hidden.reward, shown.reward)
    assert torch.equal(hidden.truncated, shown.truncated)
    assert torch.equal(hidden.group, shown.group)
    assert torch.equal(hidden.mask[::2], shown.mask[::2])
    assert hidden.behaviour_log_prob[1].abs().sum() == 0


# What must not happen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": [Example(prompt="1" * 61, columns={"answer": "1"})]}, "training example 0.*61 tokens.*64"),
        ({"examples": [Example(prompt="", columns={"answer": "1"})]}, "training example 0.*empty prompt"),
        ({"examples": [Example(prompt="x", columns={"answer": "1"})]}, "training example 0"),
        ({"task": make_task(sums(1), rewards=("other",))}, "'correct'.*other"),
        (
            {"task": make_task(sums(1), rewards=("correct", "overlong")), "overlong": OverlongPenalty(buffer=2)},
            "rename it",
        ),
        ({"rewards": InlineRewards(other=right)}, "'correct'.*gives other"),
    ],
    ids=["too-long", "empty", "unknown-character", "no-accuracy", "two-overlong", "other-rewards"],
)
def test_bad_tasks(settings, message):
    with pytest.raises(UsageError, match=message):
        collector(random_digit, **settings)[0].collect(None, 0)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_log_prob_must_be_finite(value):
    broken = Completion(tokens=(1, END), log_prob=(-1.0, value), ended=True, version=0)
    collect, _ = collector(lambda request: broken)
    with pytest.raises(NonFiniteError, match=r"token 1 of sample \(0, 0, 0, 0\)"):
        collect.collect(None, 0)


@pytest.mark.parametrize(("tokens", "log_prob"), [((), ()), ((1, 2), (-1.0,))], ids=["empty", "uneven"])
def test_an_engine_that_brings_too_little(tokens, log_prob):
    broken = Completion(tokens=tokens, log_prob=log_prob, ended=True, version=0)
    with pytest.raises(ValueError, match="at least one token"):
        collector(lambda request: broken)[0].collect(None, 0)


def test_a_total_that_is_no_number_is_refused():
    rewards = InlineRewards(correct=lambda completion, columns: math.inf)
    with pytest.raises(NonFiniteError, match="add up to inf"):
        collector(random_digit, rewards=rewards)[0].collect(None, 0)


# What people see


def test_lines_hold_every_sample():
    def judge(completion, columns):
        return {"1": Failed("it raised")}.get(completion, 1.0)

    rewards = InlineRewards(correct=judge, style=lambda completion, columns: NOT_APPLICABLE)
    task = make_task([Example(prompt="1+1=", columns={"answer": "2"})], rewards=("correct", "style"))
    collect, _ = collector(by_sample("1", "22", "3"), group=3, prompts=1, rewards=rewards, task=task)
    trajectory = collect.collect(None, 2)
    advantage = torch.zeros(trajectory.shape)
    advantage[0, 3:6] = torch.tensor([1.0, 2.0, 6.0])
    advantage[1, 3:5] = -0.5
    lines = [json.loads(json.dumps(line, allow_nan=False)) for line in collect.last.lines(TOKENIZER, advantage)]
    assert [line["prompt"] for line in lines] == ["1+1="] * 3
    assert [line["completion"] for line in lines] == ["1", "22", "3"]
    assert lines[0]["reward"] == {"correct": {"failed": "it raised"}, "style": None}
    assert lines[0]["left_out"] == "correct failed: it raised"
    assert [line["advantage"] for line in lines] == [None, 3.0, -0.5]
    assert [line["token_advantage"] for line in lines] == [None, [1.0, 2.0, 6.0], None]
    assert lines[1]["log_prob"] == [-0.5, -0.75, -1.0]
    assert [line["update"] for line in lines] == [2] * 3
    assert "advantage" in next(collect.last.lines(TOKENIZER))
    assert "reward/style" not in collect.metrics()


def test_metrics_before_the_first_update():
    collect, _ = collector(random_digit)
    assert collect.metrics() == {}
    assert collect.last is None


def test_metrics_are_means_over_everything_drawn():
    collect, _ = collector(random_digit, prompts=5, group=8)
    collect.collect(None, 0)
    samples, metrics = collect.last.samples, collect.metrics()
    assert len(samples) == 40
    assert metrics["accuracy"] == np.mean([sample.text == str(sample.example + 1) for sample in samples])
    assert metrics["length"] == 2.0
    assert metrics["generated_tokens"] == 80.0
    groups = np.array([sample.total for sample in samples]).reshape(5, 8)
    assert metrics["live_groups"] == np.mean(groups.max(1) != groups.min(1))

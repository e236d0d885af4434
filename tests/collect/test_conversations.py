"""Conversations with what answers the policy: tokens are only ever appended, and replies are never learnt."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dialogue_examples import hangs, numbers, picky, shout

from upslope.collect.completions import CompletionCollector
from upslope.collect.conversations import check_template, demonstration, reply_text, reply_tokens
from upslope.collect.demonstrations import DemonstrationCollector
from upslope.collect.dialogue import Dialogue
from upslope.collect.engines.protocol import Completion
from upslope.collect.engines.torch import TorchEngine
from upslope.collect.experience import CompletionConfig, DemonstrationConfig, PairConfig
from upslope.collect.pairs import PairCollector, draw_pairs, pairs_from_lines, pairs_to_lines
from upslope.collect.rewards.pool import RewardPool
from upslope.collect.rewards.protocol import NOT_APPLICABLE, Failed, Reward
from upslope.collect.tasks.calculator import ALPHABET, Calculator
from upslope.collect.tasks.protocol import Example, Task
from upslope.collect.text_rows import TokenRow, build_rows, preview
from upslope.errors import UsageError
from upslope.estimators.advantages import gae
from upslope.policies.language.config import LanguageModelConfig, ModelShape
from upslope.policies.language.model import build_policy
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.tokenizer import character_tokenizer

SEED = 5
TOKENIZER = character_tokenizer(ALPHABET + ".")
END = TOKENIZER.end_token


def ids(text):
    return tuple(TOKENIZER.encode(text))


class TurnEngine:
    """Says what a script makes of (request, its text so far); a turn that ends with "]" has no end token."""

    version = 0

    def __init__(self, script):
        self.script, self.calls = script, []

    def update(self, version):
        self.version = version

    def generate(self, requests, *, sampling, limit, stop=()):
        self.calls.append((list(requests), limit))
        return [self._say(request, limit) for request in requests]

    def _say(self, request, limit):
        text = self.script(request, TOKENIZER.decode(request.prompt))
        tokens = ids(text) if text.endswith("]") else (*ids(text), END)
        ended, tokens = len(tokens) <= limit, tokens[:limit]
        log_prob = tuple(-1.0 - place for place in range(len(tokens)))
        return Completion(tokens=tokens, log_prob=log_prob, ended=ended, version=self.version)


def ones(completions, **columns):
    return [float(len(text)) for text in completions]


def task_of(reply, *, turns=3, prompts=("1=", "22="), inline=True):
    examples = [Example(prompt=text, columns={"answer": text[0]}) for text in prompts]
    return Task(
        name="talk",
        training=examples,
        held_out=examples,
        rewards=(Reward(name="length", function=ones, inline=True),),
        correct="length",
        stop=("]",),
        dialogue=Dialogue(reply=reply, turns=turns, inline=inline),
    )


def collector(task, script, *, deadline=10.0, **settings):
    config = CompletionConfig(**{"prompts": 2, "group": 2, "limit": 20, **settings})
    pool = RewardPool(task.rewards, workers=1, deadline=deadline, dialogue=task.dialogue)
    engine = TurnEngine(script)
    return CompletionCollector(task, TOKENIZER, engine, pool, config, seed=SEED, context=32), engine


def call_once(request, text):
    """A call, and after the reply a goodbye; sample 1 says goodbye at once."""
    return "4." if request.key[3] == 1 or ";" in text else "[7]"


def test_tokens_are_appended_and_replies_are_not_learnt():
    collect, engine = collector(task_of(shout), call_once)
    trajectory = collect.collect(None, 0)
    samples = {sample.text: sample for sample in collect.last.rows if sample.prompt == ids("1=")}
    assert list(samples) == ["[7]11;4.", "4."]
    talk = samples["[7]11;4."]
    assert talk.completion.tokens == (*ids("[7]"), *ids("11;"), *ids("4."), END)
    assert talk.completion.chosen == (True,) * 3 + (False,) * 3 + (True,) * 3
    assert [value for value in talk.completion.log_prob if not math.isnan(value)] == [-1, -2, -3, -1, -2, -3]
    assert (talk.completion.turns, talk.completion.length, talk.completion.ended) == (2, 6, True)
    row, first = talk.row, len(talk.prompt) - 1
    assert trajectory.mask[row, first : first + 9].tolist() == list(talk.completion.chosen)
    assert trajectory.behaviour_log_prob[row, first : first + 9].tolist() == [-1, -2, -3, 0, 0, 0, -1, -2, -3]
    assert trajectory.time[row, first : first + 9].tolist() == [0, 1, 2, 0, 0, 0, 3, 4, 5]
    assert trajectory.reward[row].nonzero().flatten().tolist() == [first + 8]
    assert trajectory.terminated[row].nonzero().flatten().tolist() == [first + 8]
    assert "[4][.][<|end|>]" in preview(trajectory, row, TOKENIZER)
    assert "1=[[][7][]]11;[4][.]" in preview(trajectory, row, TOKENIZER)
    assert collect.metrics()["turns"] == 1.5
    assert collect.metrics()["generated_tokens"] == trajectory.mask.sum()
    every = [request for requests, _ in engine.calls for request in requests]
    second = [request for request in every if len(request.key) == 5]
    assert [request.key for request in second] == [(0, 0, 0, 0, 1), (0, 0, 1, 0, 1)]
    first_turns = {request.key: request for request in every if len(request.key) == 4}
    for request in second:
        before = first_turns[request.key[:4]].prompt
        assert request.prompt[: len(before) + 3] == (*before, *ids("[7]"))


def test_records_of_conversations_have_nothing_at_replies():
    collect, _ = collector(task_of(shout), call_once)
    trajectory = collect.collect(None, 0)
    advantage = torch.arange(trajectory.mask.numel(), dtype=torch.float32).view(trajectory.mask.shape)
    record = next(line for line in collect.last.lines(TOKENIZER, advantage) if line["completion"] == "[7]11;4.")
    sample = next(sample for sample in collect.last.rows if sample.text == "[7]11;4.")
    values = advantage[sample.row][trajectory.mask[sample.row]].tolist()
    assert record["advantage"] == sum(values) / 6
    assert record["token_advantage"] == [*values[:3], None, None, None, *values[3:]]
    assert record["log_prob"] == [-1, -2, -3, None, None, None, -1, -2, -3]


@pytest.mark.parametrize(
    ("limit", "turns", "text", "turns_taken"),
    [
        (30, 1, "[7]", 1),
        (30, 2, "[7]11;[7]", 2),
        (3, 9, "[7]", 1),
        (6, 9, "[7]", 1),
        (7, 9, "[7]11;[", 2),
        (2, 9, "[7", 1),
    ],
    ids=["one-turn", "two-turns", "full", "reply-fills", "cut-in-turn", "cut-in-first"],
)
def test_limits_truncate_after_the_last_chosen_token(limit, turns, text, turns_taken):
    """A policy that calls for ever."""
    task = task_of(shout, turns=turns, prompts=("1=",))
    collect, engine = collector(task, lambda request, text: "[7]", prompts=1, group=1, limit=limit)
    trajectory = collect.collect(None, 0)
    (sample,) = collect.last.rows
    assert (sample.text, sample.completion.ended, sample.completion.turns) == (text, False, turns_taken)
    last = 2 + len(text) - 2
    assert trajectory.truncated.nonzero().tolist() == [[0, last]]
    assert trajectory.final_observation.tolist() == [ids(text)[-1]]
    assert trajectory.mask[0, last]
    assert all(asked[0].prompt == ids("1=") or cap == limit - (len(asked[0].prompt) - 2) for asked, cap in engine.calls)


def test_conversations_of_different_lengths_fit_the_context():
    """The engine is never asked for more than the context holds, whatever was said before."""
    task = task_of(shout, turns=8, prompts=("1=", "2" * 11 + "="))
    generator = np.random.default_rng(0)

    def script(request, text):
        return "[" + "7" * int(generator.integers(3)) + "]"

    collect, engine = collector(task, script, group=8)
    collect.collect(None, 0)
    assert all(len(request.prompt) + limit <= 32 for requests, limit in engine.calls for request in requests)
    assert all(len(sample.completion.tokens) <= 20 for sample in collect.last.samples)
    assert max(sample.completion.turns for sample in collect.last.samples) > 2


@pytest.mark.parametrize(
    ("reply", "inline", "deadline", "reason"),
    [(picky, True, 10.0, "no threes"), (picky, False, 10.0, "no threes"), (hangs, False, 0.5, "did not return within")],
    ids=["raises-here", "raises-in-a-worker", "hangs"],
)
def test_what_fails_to_answer_is_a_failed_sample(reply, inline, deadline, reason):
    """One of two prompts: its samples leave and are counted, the others are learnt from."""
    task = task_of(reply, prompts=("1=", "3="), inline=inline)
    collect, _ = collector(task, call_once, deadline=deadline)
    trajectory = collect.collect(None, 0)
    broken = [sample for sample in collect.last.samples if sample.total is None]
    assert {sample.prompt for sample in broken} == {ids("3=")}
    assert all(reason in sample.left_out and isinstance(sample.parts["length"], Failed) for sample in broken)
    assert collect.metrics()["failed"] == 2
    assert len(trajectory.mask) == 2
    assert {sample.text for sample in collect.last.rows} == {"[7]11;4.", "4."}
    collect.close()


def test_replies_that_cannot_be_written_and_no_replies_at_all():
    def words(turns):
        return ["five"] * len(turns)

    for reply, reason in ((words, "cannot be written"), (numbers, "a float instead of a text or None")):
        collect, _ = collector(task_of(reply), call_once)
        with pytest.raises(UsageError, match=reason):
            collect.collect(None, 0)
    collect, _ = collector(replace(task_of(shout), training=[Example(prompt="1=")]), call_once)
    with pytest.raises(UsageError, match="policy's turns needs the column answer"):
        collect.collect(None, 0)


def test_a_pool_answers_from_a_file_beside_its_rewards():
    place = f"{Path(__file__).with_name('dialogue_examples.py')}:shout"
    rewards = (Reward(name="length", function=ones),)
    with RewardPool(rewards, workers=1, deadline=10.0, dialogue=Dialogue(reply=place, turns=2)) as pool:
        columns = [{"answer": "1"}, {"answer": "2"}]
        assert pool.reply(["", ""], ["a", "b."], [["a"], ["b."]], columns) == ["11;", NOT_APPLICABLE]
        assert pool.score(["", ""], ["a", "b."], columns).total == (1.0, 2.0)
        with pytest.raises(UsageError, match="column 'turns'"):
            pool.reply([""], ["a"], [["a"]], [{"turns": 1}])
    with pytest.raises(ValueError, match="made without a dialogue"):
        RewardPool(rewards, workers=1, deadline=1.0).reply([], [], [], [])
    with pytest.raises(ValueError, match="turns must be at least 1"):
        Dialogue(reply=shout, turns=0)
    with pytest.raises(ValueError, match="got 'http"):
        Dialogue(reply="http://localhost:1", turns=1)


# Chat templates

CHAT = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
FORGETS = CHAT.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
NO_TOOL = CHAT.replace("%}<{{", "%}{% if m.role != 'tool' %}<{{").replace("<|end|>{%", "<|end|>{% endif %}{%", 1)
MESSAGES = ({"role": "user", "content": "hi"},)


def chatting(template):
    tokenizer = character_tokenizer("<>/uathink\nresog w123[]")
    tokenizer.backend.chat_template = template
    return tokenizer


def test_a_chat_template_writes_what_stands_between_the_turns():
    tokenizer = chatting(CHAT)
    check_template(tokenizer, Example(prompt=MESSAGES), "tool")
    text = reply_text(tokenizer, MESSAGES, ["1", "2"], ["tool", "tool"])
    assert text == "<|end|><t>2<|end|><a>"
    after_end = reply_tokens(tokenizer, text, tokenizer.end_token)
    assert tokenizer.decode(after_end, special=True) == "<t>2<|end|><a>"
    assert tokenizer.decode(reply_tokens(tokenizer, text, tokenizer.encode("]")[0]), special=True) == text


@pytest.mark.parametrize(
    ("template", "message"), [(FORGETS, "rewrites history"), (NO_TOOL, "drops or rewrites")], ids=["reasoning", "tools"]
)
def test_a_template_that_rewrites_history_is_refused(template, message):
    with pytest.raises(UsageError, match=message):
        check_template(chatting(template), Example(prompt=MESSAGES), "tool")


def test_demonstrated_conversations_are_the_rendered_ones():
    tokenizer = chatting(CHAT)
    example = Example(prompt=MESSAGES, completion="[1]23", turns=("[1]", "2", "3"))
    row = demonstration(tokenizer, example, "it", role="tool")
    turns = [("user", "hi"), ("assistant", "[1]"), ("tool", "2"), ("assistant", "3")]
    rendered = tokenizer.render([{"role": r, "content": c} for r, c in turns], generation_prompt=False)
    assert [*row.prompt, *row.answer] == rendered
    own = [token for token, chosen in zip(row.answer, row.chosen, strict=True) if chosen]
    assert tokenizer.decode(own, special=True) == "[1]<|end|>3<|end|>"


def test_replies_have_the_roles_that_the_example_gives_them():
    tokenizer = chatting(CHAT)
    example = Example(prompt=MESSAGES, completion="12321", turns=("1", "2", "3", "2", "1"), roles=("user", "tool"))
    row = demonstration(tokenizer, example, "it", role="nobody")
    roles = ("user", "assistant", "user", "assistant", "tool", "assistant")
    turns = [{"role": role, "content": content} for role, content in zip(roles, "h12321", strict=True)]
    assert [*row.prompt, *row.answer] == tokenizer.render([MESSAGES[0], *turns[1:]], generation_prompt=False)
    with pytest.raises(ValueError, match="one for each reply"):
        replace(example, roles=("user",))


def test_demonstrated_conversations_under_templates_that_rewrite_or_drop():
    """Where there is no reasoning, a template that takes it out of earlier turns rewrites nothing."""
    example = Example(prompt=MESSAGES, completion="123", turns=("1", "2", "3"), roles=("tool",))
    assert demonstration(chatting(FORGETS), example, "it", role="tool") == demonstration(
        chatting(CHAT), example, "it", role="tool"
    )
    reasoned = replace(example, completion="<think>1</think>123", turns=("<think>1</think>1", "2", "3"))
    with pytest.raises(UsageError, match="it: the chat template rewrites history"):
        demonstration(chatting(FORGETS), reasoned, "it", role="tool")
    with pytest.raises(UsageError, match="it: the chat template drops or rewrites what the tool says: '2'"):
        demonstration(chatting(NO_TOOL), example, "it", role="tool")


def test_demonstrated_conversations_of_plain_text():
    example = Example(prompt="1=", completion="[1]2;3", turns=("[1]", "2;", "3"))
    row = demonstration(TOKENIZER, example, "it", role="tool")
    assert row.answer == (*ids("[1]2;3"), END)
    assert row.chosen == (True, True, True, False, False, True, True)
    for turns in (("[1]", "2;"), ("[1]", "2", "3")):
        with pytest.raises(ValueError, match="turns are the policy's"):
            replace(example, turns=turns)


# With the real model and engine


def world(**task):
    built = replace(Calculator(digits=2, calls=0.5, held_out=8).build(SEED), **task)
    shape = ModelShape(width=16, layers=1, heads=2, inner=32, positions=64)
    tokenizer = character_tokenizer(built.alphabet)
    sampling = Sampling(temperature=1.3)
    return built, build_policy(LanguageModelConfig(shape=shape), tokenizer=tokenizer, seed=SEED, sampling=sampling)


def drawn(task, policy, **settings):
    config = CompletionConfig(**{"prompts": 6, "group": 6, "limit": 24, "sampling": policy.sampling, **settings})
    engine = TorchEngine(policy, seed=SEED, slots=7)
    pool = RewardPool(task.rewards, workers=1, deadline=10.0, dialogue=task.dialogue)
    collect = CompletionCollector(task, policy.tokenizer, engine, pool, config, seed=SEED, context=policy.context)
    return collect, collect.collect(policy, 0)


def test_the_learner_agrees_with_what_was_drawn_over_several_turns():
    task, policy = world()
    collect, trajectory = drawn(task, policy)
    assert max(sample.completion.turns for sample in collect.last.rows) == 3
    log_prob = policy.evaluate(trajectory).log_prob.detach()
    assert (log_prob - trajectory.behaviour_log_prob).abs().max() < 1e-5
    assert not log_prob[~trajectory.mask].any()
    for sample in collect.last.rows:
        tokens, chosen = sample.completion.tokens, sample.completion.chosen
        if chosen is not None:
            assert "?;" in policy.tokenizer.decode([t for t, own in zip(tokens, chosen, strict=True) if not own])


def test_without_replies_it_is_a_plain_completion():
    task, policy = world(stop=())
    with_dialogue, plain = drawn(task, policy)[1], drawn(replace(task, dialogue=None), policy)[1]
    for name in ("observation", "action", "mask", "reward", "behaviour_log_prob", "terminated"):
        assert torch.equal(getattr(with_dialogue, name), getattr(plain, name)), name


def test_demonstrations_hide_replies_from_the_learner():
    task, policy = world()
    collect = DemonstrationCollector(
        task, policy.tokenizer, DemonstrationConfig(rows=12), seed=SEED, context=policy.context
    )
    trajectory = collect.collect(policy, 0)
    text = [preview(trajectory, row, policy.tokenizer) for row in range(12)]
    called = [one for one in text if "[]]" in one]
    assert 0 < len(called) < 12
    for one in called:
        answer = one.split("[]]")[1]
        reply, rest = answer.split(";")
        assert rest == "".join(f"[{digit}]" for digit in reply) + "[<|end|>]"


def test_drawn_pairs_of_conversations_hide_replies():
    def length(completions, **columns):
        return [float(len(text)) for text in completions]

    part = Reward(name="correct", function=length, inline=True)
    task, policy = world(rewards=(part,))
    config = PairConfig(pairs=8, drawn=8, group=6, limit=24)
    with RewardPool(task.rewards, workers=1, deadline=10.0, dialogue=task.dialogue) as pool:
        engine = TorchEngine(policy, seed=SEED)
        pairs = draw_pairs(task, policy.tokenizer, engine, pool, config, seed=SEED, context=policy.context)
    assert pairs_from_lines(pairs_to_lines(pairs, policy.tokenizer), policy.tokenizer) == pairs
    owned = [pair for pair in pairs if pair.chosen_own is not None]
    assert owned
    rows = PairCollector(pairs, policy.tokenizer, config, seed=SEED, context=policy.context).collect(policy, 0)
    own = [(sum(p.chosen_own or [1] * len(p.chosen)), sum(p.rejected_own or [1] * len(p.rejected))) for p in pairs]
    learnt = rows.mask.sum(dim=1).view(-1, 2).tolist()
    assert sorted(map(tuple, learnt)) == sorted(own)
    with pytest.raises(ValueError, match="whether the policy chose"):
        replace(owned[0], chosen_own=owned[0].chosen_own[:-1])


def test_advantages_pass_over_replies():
    """A chosen token, a reply of two, two chosen ones, with gamma = lambda = 0.5: as if the reply were not there."""
    talk = TokenRow(
        prompt=(1,), answer=(2, 8, 9, 3, 4), chosen=(True, False, False, True, True), log_prob=(-1.0,) * 5, reward=1.0
    )
    trajectory = build_rows([talk], end_token=0)
    value = torch.tensor([[0.1, 9.0, 9.0, 0.3, 0.7]])
    next_value = torch.tensor([[9.0, 9.0, 0.3, 0.7, 9.0]])
    discount = torch.where(trajectory.terminated, 0.0, 0.5)
    found = gae(
        trajectory.reward,
        discount,
        value,
        next_value,
        trajectory.terminated | trajectory.truncated,
        gae_lambda=0.5,
        mask=trajectory.mask,
    )
    third = 1.0 - 0.7
    second = 0.5 * 0.7 - 0.3 + 0.25 * third
    first = 0.5 * 0.3 - 0.1 + 0.25 * second
    assert found[0].tolist() == pytest.approx([first, 0, 0, second, third])

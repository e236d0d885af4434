"""The language collectors with the real tokenizer, model, engine, task and rewards."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from upslope.algorithms.grpo import GRPO
from upslope.algorithms.ppo import PPO
from upslope.algorithms.protocol import Now
from upslope.collect.completions import CompletionCollector
from upslope.collect.demonstrations import DemonstrationCollector
from upslope.collect.engines.torch import TorchEngine
from upslope.collect.experience import CompletionConfig, DemonstrationConfig, OverlongPenalty, PairConfig
from upslope.collect.pairs import PairCollector, draw_pairs, pairs_from_lines, pairs_to_lines
from upslope.collect.rewards.pool import RewardPool
from upslope.collect.rewards.protocol import Reward
from upslope.collect.tasks.arithmetic import ThinkOrBlurt
from upslope.collect.text_rows import TokenRow, build_rows, preview
from upslope.policies.language.config import LanguageModelConfig, ModelShape
from upslope.policies.language.model import build_policy
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.tokenizer import character_tokenizer
from upslope.train.step import learn

SEED = 11


def last_digit(completions, answer, **columns):
    """Something that a model which knows nothing is sometimes right about."""
    return [float(bool(text) and text[-1] == right[-1]) for text, right in zip(completions, answer, strict=True)]


def world(sampling, **task):
    built = ThinkOrBlurt(digits=2, held_out=8).build(SEED)
    part = Reward(name="digit", function=last_digit, inline=True)
    built = replace(built, rewards=(*built.rewards, part), **task)
    shape = ModelShape(width=16, layers=1, heads=2, inner=32, positions=64)
    tokenizer = character_tokenizer(built.alphabet)
    config = LanguageModelConfig(shape=shape, value_head=True)
    return built, build_policy(config, tokenizer=tokenizer, seed=SEED, sampling=sampling)


def collector(task, policy, **settings):
    config = CompletionConfig(**{"prompts": 6, "group": 4, "limit": 12, "sampling": policy.sampling, **settings})
    engine = TorchEngine(policy, seed=SEED, slots=5)
    pool = RewardPool(task.rewards, workers=1, deadline=10.0)
    return CompletionCollector(task, policy.tokenizer, engine, pool, config, seed=SEED, context=policy.context)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7, top_k=6, top_p=0.9)],
    ids=["plain", "truncated"],
)
def test_the_learner_agrees_with_what_was_drawn(sampling):
    task, policy = world(sampling)
    collect = collector(task, policy)
    trajectory = collect.collect(policy, 0)
    log_prob = policy.evaluate(trajectory).log_prob.detach()
    assert (log_prob - trajectory.behaviour_log_prob).abs().max() < 1e-5
    assert trajectory.mask.sum() == collect.metrics()["generated_tokens"]
    assert trajectory.truncated.any()
    for row, sample in enumerate(collect.last.rows):
        example = task.training[sample.example]
        assert policy.tokenizer.decode(sample.prompt) == example.prompt
        assert trajectory.reward[row].sum() == sample.parts["correct"] + sample.parts["digit"]
        assert sample.parts["digit"] == last_digit([sample.text], [example.columns["answer"]])[0]
    assert f"[{sample.text[0]}]" in preview(trajectory, row, policy.tokenizer)
    collect.close()


def test_a_resumed_update_is_drawn_again_exactly():
    task, policy = world(Sampling())
    straight = collector(task, policy, refill=2, overlong=OverlongPenalty(buffer=4))
    straight.collect(policy, 0)
    tree = json.loads(json.dumps(straight.snapshot()))
    with torch.no_grad():
        next(policy.parameters()).mul_(1.5)
    expected = straight.collect(policy, 1)
    resumed = collector(task, policy, refill=2, overlong=OverlongPenalty(buffer=4))
    resumed.restore(tree)
    found = resumed.collect(policy, 1)
    for name in ("observation", "action", "reward", "mask", "behaviour_log_prob", "group"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_hidden_rows_go_through_the_learner():
    """A row of which nothing is learnt has log-prob 0, and a critic's value is still asked for behind its cut."""
    task, policy = world(Sampling())
    trajectory = collector(task, policy, mask_truncated=True).collect(policy, 0)
    hidden = trajectory.truncated.any(dim=1)
    assert hidden.any()
    assert not hidden.all()
    evaluation = policy.evaluate(trajectory)
    assert evaluation.log_prob[hidden].abs().sum() == 0
    evaluation.log_prob.sum().backward()
    assert all(value.isfinite().all() for value in policy.values(trajectory))
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


def test_demonstrations_and_drawn_pairs_are_read_by_the_learner():
    task, policy = world(Sampling())
    demonstrations = DemonstrationCollector(
        task, policy.tokenizer, DemonstrationConfig(rows=8), seed=SEED, context=policy.context
    ).collect(policy, 0)
    assert policy.evaluate(demonstrations).log_prob.isfinite().all()
    config = PairConfig(pairs=4, drawn=8, group=6, limit=12)
    engine = TorchEngine(policy, seed=SEED)
    with RewardPool(task.rewards, workers=1, deadline=10.0) as pool:
        pairs = draw_pairs(task, policy.tokenizer, engine, pool, config, seed=SEED, context=policy.context)
    lines = [json.loads(json.dumps(line)) for line in pairs_to_lines(pairs, policy.tokenizer)]
    assert pairs_from_lines(lines, policy.tokenizer) == pairs
    collect = PairCollector(pairs, policy.tokenizer, config, seed=SEED, context=policy.context)
    rows = collect.collect(policy, 0)
    assert rows.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    log_prob = policy.evaluate(rows).log_prob
    assert log_prob.isfinite().all()
    assert np.array_equal(log_prob.detach().numpy() != 0, rows.mask.numpy())


class Descent:
    """Plain gradient descent."""

    micro_batches = 2

    def __init__(self, policy):
        self.parameters = list(policy.parameters())

    def zero_gradient(self):
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate):
        norms = [float(p.grad.norm()) for p in self.parameters if p.grad is not None]
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter -= learning_rate * parameter.grad
        return float(np.linalg.norm(norms))


def update(policy, trajectory, algorithm):
    return learn(
        policy,
        algorithm,
        Descent(policy),
        trajectory,
        now=Now(),
        learning_rate=0.1,
        generator=np.random.default_rng(0),
        meter=None,
    )


def test_a_hidden_row_counts_in_its_groups_baseline():
    """Of two completions that are worth 1 and -1 the second was cut and is hidden: the first is 1 above the mean."""
    rows = [
        TokenRow(prompt=(1, 2), answer=(3, 0), log_prob=(-1.0, -1.0), reward=1.0),
        TokenRow(prompt=(1, 2), answer=(3, 3, 3), log_prob=(-1.0,) * 3, reward=-1.0, ended=False, hidden=True),
    ]
    trajectory = build_rows(rows, end_token=0, group=[0, 0])
    signal = GRPO(scale="none").advantage(trajectory, None, None, Now())
    assert signal.advantage.tolist() == [[0.0, 1.0, 1.0, 0.0], [0.0] * 4]


@pytest.mark.parametrize("critic", [False, True], ids=["grpo", "ppo"])
@pytest.mark.parametrize("limit", [1, 4], ids=["all-cut", "some-cut"])
def test_learning_from_a_batch_with_hidden_rows(limit, critic):
    """A minibatch for each completion: those that are hidden take no optimiser step, and nothing becomes NaN."""
    task, policy = world(Sampling())
    collect = collector(task, policy, prompts=1, group=2 if limit == 1 else 24, limit=limit, mask_truncated=True)
    trajectory = collect.collect(policy, 0)
    hidden = ~trajectory.mask.any(dim=1)
    assert bool(hidden.all()) == (limit == 1)
    before = [parameter.clone() for parameter in policy.parameters()]
    many = min(len(hidden), 24)
    algorithm = PPO(epochs=1, minibatches=many) if critic else GRPO(minibatches=many)
    learned = update(policy, trajectory, algorithm)
    assert learned.metrics["optimizer_steps"] == int((~hidden).sum())
    assert all(parameter.isfinite().all() for parameter in policy.parameters())
    if limit == 1:
        assert all(torch.equal(*pair) for pair in zip(before, policy.parameters(), strict=True))

"""Completion problems: every row, its layout and its probability; samples and groups of rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from upslope.errors import UsageError
from upslope.exact import (
    TOKEN_PROBLEMS,
    PrefixTable,
    TinyTransformer,
    TokenMDP,
    TokenPolicy,
    Tokens,
    enumerate_completions,
    enumerate_groups,
    sample_completions,
    token_problem,
)
from upslope.trajectory import Trajectory


def zero(prompt: Tokens, completion: Tokens) -> float:
    return 0.0


def golden_problem() -> TokenMDP:
    """Prompts (1, 1) and (0,); end 0; completions (0), (1 0), (1 1)."""
    reward = {(0,): 0.0, (1, 0): 1.0, (1, 1): 0.5}
    return TokenMDP(
        vocabulary=2,
        end=0,
        limit=2,
        prompts=((1, 1), (0,)),
        prompt_probability=(0.25, 0.75),
        reward=lambda prompt, completion: reward[completion] + len(prompt),
    )


def random_table(problem: TokenMDP, seed: int = 0) -> PrefixTable:
    table = PrefixTable(problem)
    table.theta.data.copy_(torch.randn(table.theta.shape, generator=torch.Generator().manual_seed(seed)))
    return table


def policies(problem: TokenMDP) -> list[TokenPolicy]:
    return [random_table(problem), TinyTransformer(problem.vocabulary, problem.positions, seed=1)]


def columns(trajectory: Trajectory, row: int) -> dict[str, list[float]]:
    names = ("observation", "action", "reward", "terminated", "truncated", "mask", "time")
    return {name: getattr(trajectory, name)[row].tolist() for name in names}


def test_rows_of_two_prompts_are_laid_out_position_by_position() -> None:
    problem = golden_problem()
    table = PrefixTable(problem)
    table.theta.data[table.number[(1, 1)]] = torch.tensor([0.75, 0.25]).log()
    table.theta.data[table.number[(1, 1, 1)]] = torch.tensor([2 / 3, 1 / 3]).log()
    rows = enumerate_completions(problem, table)
    assert problem.completions == ((0,), (1, 0), (1, 1))
    assert columns(rows.trajectory, 0) == {
        "observation": [1, 1, 0],
        "action": [1, 0, 0],
        "reward": [0, 2, 0],
        "terminated": [False, True, False],
        "truncated": [False, False, False],
        "mask": [False, True, False],
        "time": [0, 0, 0],
    }
    assert columns(rows.trajectory, 1) == {
        "observation": [1, 1, 1],
        "action": [1, 1, 0],
        "reward": [0, 0, 3],
        "terminated": [False, False, True],
        "truncated": [False, False, False],
        "mask": [False, True, True],
        "time": [0, 0, 1],
    }
    assert columns(rows.trajectory, 5) == {
        "observation": [0, 1, 0],
        "action": [1, 1, 0],
        "reward": [0, 1.5, 0],
        "terminated": [False, False, False],
        "truncated": [False, True, False],
        "mask": [True, True, False],
        "time": [0, 1, 0],
    }
    assert rows.length.tolist() == [2, 3, 3, 1, 2, 2]
    assert rows.trajectory.final_index.tolist() == [2 * 3 + 2, 5 * 3 + 1]
    assert rows.trajectory.final_observation.tolist() == [1, 1]
    assert rows.trajectory.group is not None
    assert rows.trajectory.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert rows.luck.tolist() == [0.25] * 3 + [0.75] * 3
    expected = [0.25 * 3 / 4, 0.25 / 4 * 2 / 3, 0.25 / 4 / 3, 0.75 / 2, 0.75 / 4, 0.75 / 4]
    torch.testing.assert_close(rows.behaviour_probability, torch.tensor(expected, dtype=torch.float64))
    assert (rows.trajectory.behaviour_log_prob[~rows.trajectory.mask] == 0.0).all()


@pytest.mark.parametrize("name", sorted(TOKEN_PROBLEMS))
def test_probabilities_sum_to_one(name: str) -> None:
    problem = token_problem(name)
    for policy in policies(problem):
        probability = enumerate_completions(problem, policy).behaviour_probability
        assert probability.min() > 0.0
        assert float(probability.sum()) == pytest.approx(1.0, abs=1e-12)


@st.composite
def problems(draw: st.DrawFn) -> TokenMDP:
    vocabulary = draw(st.integers(2, 4))
    firsts = draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=3, unique=True))
    rest = st.lists(st.integers(0, vocabulary - 1), max_size=3)
    return TokenMDP(
        vocabulary=vocabulary,
        end=draw(st.integers(0, vocabulary - 1)),
        limit=draw(st.integers(1, 3)),
        prompts=tuple((first, *draw(rest)) for first in firsts),
        reward=lambda prompt, completion: float(sum(prompt) + 10 * sum(completion) + 100 * len(completion)),
    )


@settings(deadline=None, max_examples=40)
@given(problems())
def test_every_row_reads_back_as_its_prompt_and_completion(problem: TokenMDP) -> None:
    rows = enumerate_completions(problem, PrefixTable(problem))
    seen = rows.trajectory
    assert isinstance(seen.observation, Tensor)
    assert float(rows.behaviour_probability.sum()) == pytest.approx(1.0, abs=1e-12)
    assert len(set(problem.completions)) == len(problem.completions)
    for row in range(len(rows)):
        prompt = problem.prompts[row // len(problem.completions)]
        completion = problem.completions[row % len(problem.completions)]
        length, last = int(rows.length[row]), int(rows.length[row]) - 1
        assert (*seen.observation[row, :length].tolist(), int(seen.action[row, last])) == (*prompt, *completion)
        assert tuple(seen.action[row][seen.mask[row]].tolist()) == completion
        assert seen.time[row][seen.mask[row]].tolist() == list(range(len(completion)))
        assert float(seen.reward[row, last]) == problem.reward(prompt, completion) == float(seen.reward[row].sum())
        ended = completion[-1] == problem.end
        assert seen.terminated[row].nonzero().flatten().tolist() == ([last] if ended else [])
        assert seen.truncated[row].nonzero().flatten().tolist() == ([] if ended else [last])
        assert ended or len(completion) == problem.limit


def key_counts(problem: TokenMDP, trajectory: Trajectory) -> Tensor:
    """[prompts, completions] how often each came, by reading back the rows."""
    counts = torch.zeros(len(problem.prompts), len(problem.completions), dtype=torch.float64)
    place = {completion: number for number, completion in enumerate(problem.completions)}
    assert trajectory.group is not None
    chosen = zip(trajectory.group.tolist(), trajectory.action.tolist(), trajectory.mask.tolist(), strict=True)
    for group, action, mask in chosen:
        counts[group, place[tuple(token for token, counts_ in zip(action, mask, strict=True) if counts_)]] += 1
    return counts


def chi_square_score(counts: Tensor, probability: Tensor) -> float:
    """(chi^2 - df) / sqrt(2 df), about normal; cells that expect fewer than 5 are taken together."""
    expected = probability * counts.sum()
    rare = expected < 5.0
    if bool(rare.any()):
        expected = torch.cat([expected[~rare], expected[rare].sum().unsqueeze(0)])
        counts = torch.cat([counts[~rare], counts[rare].sum().unsqueeze(0)])
    degrees = len(expected) - 1
    return (float(((counts - expected).square() / expected).sum()) - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("name", ["tokens", "tokens-binary"])
def test_samples_come_as_often_as_their_probabilities_say(name: str) -> None:
    problem = token_problem(name)
    for policy in policies(problem):
        rows = enumerate_completions(problem, policy)
        sampled = sample_completions(problem, policy, 40_000, np.random.default_rng(3))
        counts = key_counts(problem, sampled).flatten()
        assert abs(chi_square_score(counts, rows.behaviour_probability)) < 3.0
        uniform = torch.full_like(counts, 1.0 / len(counts))
        assert chi_square_score(counts, uniform) > 100.0


@pytest.mark.parametrize("name", sorted(TOKEN_PROBLEMS))
def test_sampled_rows_equal_the_enumerated_rows_field_by_field(name: str) -> None:
    problem = token_problem(name)
    for policy in policies(problem):
        rows = enumerate_completions(problem, policy)
        assert isinstance(rows.trajectory.observation, Tensor)
        sampled = sample_completions(problem, policy, 50, np.random.default_rng(4))
        assert isinstance(sampled.observation, Tensor)
        assert sampled.group is not None
        place = {
            (prompt, completion): number
            for number, (prompt, completion) in enumerate(
                (prompt, completion) for prompt in range(len(problem.prompts)) for completion in problem.completions
            )
        }
        index = [
            place[group, tuple(sampled.action[row][sampled.mask[row]].tolist())]
            for row, group in enumerate(sampled.group.tolist())
        ]
        chosen = rows.select(index)
        for field in ("observation", "action", "reward", "terminated", "truncated", "mask", "time", "group"):
            assert torch.equal(getattr(sampled, field), getattr(chosen, field)), field
        assert torch.equal(sampled.final_index, chosen.final_index)
        assert torch.equal(sampled.final_observation, chosen.final_observation)
        torch.testing.assert_close(sampled.behaviour_log_prob, chosen.behaviour_log_prob, rtol=0, atol=1e-12)


def test_sampled_groups_share_their_prompt_and_differ_in_completions() -> None:
    problem = token_problem("tokens")
    policy = PrefixTable(problem)
    sampled = sample_completions(problem, policy, None, np.random.default_rng(0), groups=(500, 4))
    assert sampled.group is not None
    assert isinstance(sampled.observation, Tensor)
    assert sampled.group.tolist() == [number for number in range(500) for _ in range(4)]
    first = sampled.observation[:, 0].view(500, 4)
    assert (first == first[:, :1]).all()
    assert float((first[:, 0] == 2).double().mean()) == pytest.approx(0.6, abs=0.07)
    reward = sampled.reward.sum(-1).view(500, 4)
    assert float((reward != reward[:, :1]).any(-1).double().mean()) > 0.5


def test_the_same_generator_gives_the_same_samples() -> None:
    problem = token_problem("tokens")
    policy = TinyTransformer(problem.vocabulary, problem.positions)
    first, again = (sample_completions(problem, policy, 30, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(first.action, again.action)


def test_pairs_of_completions_are_as_likely_as_sampled_groups_of_two() -> None:
    problem = golden_problem()
    policy = random_table(problem)
    groups = enumerate_groups(problem, policy, 2)
    assert groups.member.shape == (2 * 3**2, 1, 2)
    assert float(groups.behaviour_probability.sum()) == pytest.approx(1.0, abs=1e-12)
    sampled = sample_completions(problem, policy, None, np.random.default_rng(6), groups=(20_000, 2))
    counts = torch.zeros(len(groups), dtype=torch.float64)
    place = {tuple(member[0]): number for number, member in enumerate(groups.member.tolist())}
    completion = {done: number for number, done in enumerate(problem.completions)}
    assert isinstance(sampled.observation, Tensor)
    row = [
        3 * (0 if begin == 1 else 1) + completion[tuple(action[mask].tolist())]
        for begin, action, mask in zip(sampled.observation[:, 0].tolist(), sampled.action, sampled.mask, strict=True)
    ]
    for pair in zip(row[::2], row[1::2], strict=True):
        counts[place[pair]] += 1
    assert abs(chi_square_score(counts, groups.behaviour_probability)) < 3.0


def test_batches_of_groups_number_their_groups_and_have_product_probabilities() -> None:
    problem = golden_problem()
    policy = random_table(problem)
    pairs = enumerate_groups(problem, policy, 2, groups=2)
    assert len(pairs) == (2 * 9) ** 2
    assert float(pairs.behaviour_probability.sum()) == pytest.approx(1.0, abs=1e-12)
    row = pairs.rows.behaviour_probability / pairs.rows.luck
    number = next(i for i, member in enumerate(pairs.member.tolist()) if member == [[0, 2], [4, 4]])
    expected = 0.25 * row[0] * row[2] * 0.75 * row[4] ** 2
    assert float(pairs.behaviour_probability[number]) == pytest.approx(float(expected), rel=1e-12)
    batch = pairs.batch(number)
    assert batch.group is not None
    assert batch.group.tolist() == [0, 0, 1, 1]
    assert torch.equal(batch.action, pairs.rows.select([0, 2, 4, 4]).action)
    assert sum(probability for probability, _ in pairs.batches()) == pytest.approx(1.0, abs=1e-12)


def test_selected_rows_are_no_wider_than_the_longest() -> None:
    problem = golden_problem()
    rows = enumerate_completions(problem, PrefixTable(problem))
    chosen = rows.select([3, 5, 5])
    assert chosen.shape == (3, 2)
    assert chosen.final_index.tolist() == [3, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": 1, "end": 0}, "at least 2 tokens"),
        ({"end": 3}, "no token of a vocabulary of 3"),
        ({"end": -1}, "no token of a vocabulary"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": 20}, "have 4194302 completions, more than 50000"),
        ({"prompts": ()}, "no prompts"),
        ({"prompts": ((1,), ())}, "a prompt is empty"),
        ({"prompts": ((1,), (3,))}, "outside the vocabulary 0 .. 2"),
        ({"prompts": ((1,), (1, 2))}, r"\(1, 2\) begins with prompt \(1,\)"),
        ({"prompts": ((1,), (1,))}, "begins with prompt"),
        ({"prompt_probability": (1.0,)}, "2 prompts have 1 probabilities"),
        ({"prompt_probability": (0.5, 0.6)}, "sum to 1"),
        ({"prompt_probability": (-0.5, 1.5)}, "non-negative"),
        ({"prompt_probability": (math.nan, 1.0)}, "non-negative"),
        ({"reward": lambda prompt, completion: math.nan if completion == (1, 0) else 0.0}, r"\(1, 0\)\) is nan"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    fitting = {"vocabulary": 3, "end": 0, "limit": 2, "prompts": ((1,), (2, 1)), "reward": zero}
    TokenMDP(**fitting)
    with pytest.raises(ValueError, match=message):
        TokenMDP(**{**fitting, **change})


def test_unclear_requests_are_refused() -> None:
    problem = token_problem("tokens")
    policy = PrefixTable(problem)
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="either count"):
        sample_completions(problem, policy, 3, generator, groups=(2, 2))
    with pytest.raises(ValueError, match="either count"):
        sample_completions(problem, policy, None, generator)
    with pytest.raises(ValueError, match="at least 1"):
        sample_completions(problem, policy, 0, generator)
    with pytest.raises(ValueError, match="at least 1"):
        enumerate_groups(problem, policy, 0)
    with pytest.raises(ValueError, match="more than 200000: take smaller groups"):
        enumerate_groups(problem, policy, 3, groups=2)
    with pytest.raises(UsageError, match="tokens, tokens-binary, tokens-longer"):
        token_problem("token")


def test_named_problems_cut_rows_and_grade_them() -> None:
    graded = token_problem("tokens")
    assert set(graded.rewards.flatten().tolist()) == {0.0, 0.5, 1.0}
    cut = torch.tensor([completion[-1] != graded.end for completion in graded.completions])
    assert graded.rewards[:, cut].unique().tolist() == [0.0, 0.5]
    assert set(token_problem("tokens-binary").rewards.flatten().tolist()) == {0.0, 1.0}
    for name in TOKEN_PROBLEMS:
        problem = token_problem(name)
        assert len({len(prompt) for prompt in problem.prompts}) > 1
        assert not torch.equal(problem.rewards[0], problem.rewards[1])

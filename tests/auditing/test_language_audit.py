"""A real language model under audit: transformers' own module in float64, the learner, the engine, the collector.

The rows of `upslope.auditing.cases.language_models` stand in the verification table. Here: what they rest on, and what
they must notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from upslope.algorithms import PPO, RLOO, Reinforce
from upslope.auditing import audit
from upslope.auditing.declared import Claim
from upslope.auditing.language import as_task, copy_of, engine_batches, language_policy, problem_tokenizer
from upslope.auditing.measuring import Drawing, measure, report
from upslope.auditing.source import AlgorithmSource
from upslope.auditing.tokens import TokenSetting
from upslope.errors import UsageError
from upslope.exact import TokenMDP, enumerate_completions, solve_tokens, token_gradient, token_problem
from upslope.trajectory import Trajectory


def test_all_completions_of_a_language_model_have_probability_1() -> None:
    for name in ("tokens", "tokens-binary", "tokens-longer"):
        problem = token_problem(name)
        rows = enumerate_completions(problem, language_policy(problem, 0, width=16))
        assert float(rows.behaviour_probability.sum()) == pytest.approx(1.0, abs=1e-12)


def test_a_linear_critic_can_be_exact_at_every_prefix() -> None:
    where = TokenSetting.build("tokens", size=1, network="language")
    rows = enumerate_completions(where.tokens, where.policy).trajectory
    with torch.no_grad():
        value, following = where.policy.values(rows)
        solution = solve_tokens(where.tokens, where.policy)
    every, first = torch.arange(len(value)), rows.mask.to(torch.long).argmax(-1)
    prompt = rows.group
    assert prompt is not None
    torch.testing.assert_close(value[every, first], solution.value[0].squeeze(-1)[prompt], rtol=0, atol=1e-9)
    one_step = (rows.reward + following)[every, first]
    q = solution.action_value[0].squeeze(1)[prompt, rows.action[every, first]]
    torch.testing.assert_close(one_step, q, rtol=0, atol=1e-9)
    assert float(following[rows.truncated].abs().max()) < 1e-9


def test_ppo_of_single_completions_is_its_formula() -> None:
    """Sum over completions of Pr / length * sum_t A_t grad l_t, with the exact A = q - v: the step mean's own mean."""
    algorithm = PPO(gamma=1.0, gae_lambda=0.0, epochs=1, minibatches=1, normalize_advantage=False, value_coefficient=0)
    where = TokenSetting.build("tokens", size=1, network="language")
    found, count = measure(where, AlgorithmSource(algorithm))
    rows = enumerate_completions(where.tokens, where.policy)
    seen, critic = rows.trajectory, solve_tokens(where.tokens, where.policy)
    advantage = torch.zeros(seen.shape, dtype=torch.float64)
    depth_of = {(d, b): i for d, level in enumerate(critic.beginnings) for i, b in enumerate(level)}
    assert seen.group is not None
    for row, position in seen.mask.nonzero().tolist():
        depth, prompt = int(seen.time[row, position]), int(seen.group[row])
        begun = tuple(seen.action[row, position - depth : position].tolist())
        place = depth_of[depth, begun]
        q = critic.action_value[depth][prompt, place, int(seen.action[row, position])]
        advantage[row, position] = float((q - critic.value[depth][prompt, place]).detach())
    weight = rows.behaviour_probability.detach() / seen.mask.sum(-1)
    log_prob = where.policy.log_prob(seen.observation, seen.action)
    surrogate = (weight.unsqueeze(-1) * advantage * log_prob.masked_fill(~seen.mask, 0.0)).sum()
    gradient = torch.autograd.grad(surrogate, where.parameters)
    expected = torch.cat([part.flatten() for part in gradient])
    assert count == 30
    assert float((found.mean - expected).norm() / expected.norm()) < 1e-9


def test_a_task_is_the_problem_in_text() -> None:
    problem = token_problem("tokens")
    task, tokenizer = as_task(problem), problem_tokenizer(problem)
    assert [example.prompt for example in task.training] == ["a", "a", "ba", "ba", "ba"]
    assert [tuple(tokenizer.encode_prompt(str(e.prompt))) for e in task.training] == [(1,)] * 2 + [(2, 1)] * 3
    unfair = TokenMDP(
        vocabulary=2,
        end=0,
        limit=1,
        prompts=((1,), (0,)),
        prompt_probability=(2**-0.5, 1 - 2**-0.5),
        reward=lambda *_: 1,
    )
    with pytest.raises(UsageError, match="take rounder numbers"):
        as_task(unfair)
    with pytest.raises(UsageError, match="number it 0"):
        problem_tokenizer(TokenMDP(vocabulary=2, end=1, limit=1, prompts=((0,),), reward=lambda *_: 1))


def test_batches_of_the_engine_are_rows_of_the_problem() -> None:
    """Token for token, with the rewards and log-probs that enumeration says."""
    problem = token_problem("tokens-binary")
    policy = language_policy(problem, 0)
    rows = enumerate_completions(problem, policy).trajectory
    known = {
        (tuple(row.tolist()), tuple(after[mask].tolist())): (float(reward.sum()), log_prob[mask], bool(cut.any()))
        for row, after, mask, reward, log_prob, cut in zip(
            rows.observation, rows.action, rows.mask, rows.reward, rows.behaviour_log_prob, rows.truncated, strict=True
        )
    }
    drawn = next(engine_batches(problem, policy, prompts=64, group=4, batches=1, seed=0))
    seen: set[object] = set()
    for row in range(256):
        tokens = drawn.observation[row]  # pyright: ignore
        tokens = torch.cat([tokens, tokens.new_zeros(rows.shape[1] - len(tokens))])
        key = (tuple(tokens.tolist()), tuple(drawn.action[row][drawn.mask[row]].tolist()))
        reward, log_prob, cut = known[key]
        assert float(drawn.reward[row].sum()) == reward
        assert bool(drawn.truncated[row].any()) is cut
        torch.testing.assert_close(
            drawn.behaviour_log_prob[row][drawn.mask[row]].double(), log_prob, rtol=0.0, atol=1e-6
        )
        seen.add(key)
    assert len(seen) == 6


def without_end(where: TokenSetting, batches: int) -> Iterator[Trajectory]:
    """A classic: end tokens are taken for padding and not learnt."""
    for drawn in where.drawn(batches, 3):
        yield replace(drawn, mask=drawn.mask & ~drawn.terminated)


def colder(where: TokenSetting, batches: int) -> Iterator[Trajectory]:
    """Another classic: what generates draws from sharper logits than what learns knows of."""
    cold = copy_of(where.policy)  # pyright: ignore
    with torch.no_grad():
        cold.model.transformer.ln_f.weight.mul_(1.6)  # pyright: ignore
    yield from engine_batches(where.tokens, cold, prompts=where.rows, group=where.size, batches=batches, seed=3)


@pytest.mark.parametrize(("wrong", "verdict"), [(None, "unbiased"), (without_end, "biased"), (colder, "biased")])
def test_generated_batches_follow_the_gradient_and_broken_ones_are_noticed(wrong, verdict) -> None:  # type: ignore
    algorithm = RLOO()
    where = TokenSetting.build("tokens-binary", size=4, rows=32, network="language")
    drawing = where if wrong is None else Broken(where, wrong)
    found = report(
        drawing,
        AlgorithmSource(algorithm),
        Claim(target=where.exact_gradient(algorithm.target), target_name=""),
        subject="",
        drawing=Drawing(samples=8_000),
    )
    assert found.verdict == verdict, str(found)
    if verdict == "unbiased":
        assert found.cosine > 0.99


class Broken:
    """A setting whose batches come from a broken pipeline."""

    def __init__(self, where: TokenSetting, wrong) -> None:  # type: ignore
        self.name, self.policy, self.parameters, self.rows = "broken", where.policy, where.parameters, where.rows
        self.trajectories_per_row, self.steps_per_row = where.trajectories_per_row, where.steps_per_row
        self._where, self._wrong = where, wrong

    def every(self) -> Iterator[tuple[float, Trajectory]]:
        return self._where.every()

    def drawn(self, batches: int, seed: int) -> Iterator[Trajectory]:
        return self._wrong(self._where, batches)


def test_a_critic_that_shares_the_model_adds_its_own_gradient_unless_it_is_exact() -> None:
    with_loss = Reinforce(gamma=1.0, psi="baselined")
    alone = replace(with_loss, value_coefficient=0.0)
    for critic, adds in (("exact", False), ("perturbed", True)):
        where = TokenSetting.build("tokens-binary", size=1, network="language", critic=critic)  # pyright: ignore
        means = [measure(where, AlgorithmSource(algorithm))[0].mean for algorithm in (with_loss, alone)]
        assert (float((means[0] - means[1]).norm() / means[1].norm()) > 0.01) is adds


def test_gradients_of_tables_and_language_models_are_of_one_function() -> None:
    problem = token_problem("tokens-binary")
    policy = language_policy(problem, 0, architecture="llama")
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    where = replace(TokenSetting.build("tokens-binary", size=2), policy=policy, behaviour=policy)
    found, _ = measure(where, AlgorithmSource(RLOO()))
    expected = token_gradient(problem, policy, parameters)
    assert float((found.mean - expected).norm() / expected.norm()) < 1e-9


def test_network_is_of_completions() -> None:
    with pytest.raises(UsageError, match="network says what completes prompts"):
        audit(Reinforce(gamma=0.9), "six-state", network="language")

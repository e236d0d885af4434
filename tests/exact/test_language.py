"""The two language policies: causal, one sequence per row, and trained by the step that trains everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from upslope.algorithms import Reinforce
from upslope.algorithms.protocol import Algorithm, Now
from upslope.exact import (
    TOKEN_PROBLEMS,
    PrefixTable,
    TinyTransformer,
    TokenMDP,
    TokenPolicy,
    enumerate_completions,
    enumerate_groups,
    exact_critic,
    next_log_prob,
    sample_completions,
    solve_tokens,
    token_gradient,
    token_problem,
    token_theorem_gradient,
)
from upslope.train.step import learn
from upslope.trajectory import Policy, Trajectory


def table_for(problem: TokenMDP) -> PrefixTable:
    generator = torch.Generator().manual_seed(0)
    table = PrefixTable(problem)
    table.theta.data.copy_(torch.randn(table.theta.shape, generator=generator))
    table.value.data.copy_(torch.randn(table.value.shape, generator=generator))
    return table


def transformer_for(problem: TokenMDP, layers: int = 1) -> TinyTransformer:
    return TinyTransformer(problem.vocabulary, problem.positions, layers=layers, seed=3)


MAKERS = [table_for, transformer_for, partial(transformer_for, layers=2)]
NAMES = ["table", "one layer", "two layers"]
every_policy = pytest.mark.parametrize("make", MAKERS, ids=NAMES)


@dataclass
class Recorder:
    """A stepper that keeps gradients and moves nothing."""

    parameters: Sequence[Tensor]
    micro_batches: int = 1
    seen: list[Tensor] = field(default_factory=list)

    def zero_gradient(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, learning_rate: float) -> float:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.seen.append(torch.cat([part.flatten() for part in parts]))
        return float(self.seen[-1].norm())


def ascent(policy: TokenPolicy, algorithm: Algorithm, trajectory: Trajectory, micro_batches: int = 1) -> Tensor:
    """What the training step makes of a batch: the negative gradient of its loss."""
    recorder = Recorder(list(policy.parameters()), micro_batches)
    learn(
        policy,
        algorithm,
        recorder,
        trajectory,
        now=Now(),
        learning_rate=0.0,
        generator=np.random.default_rng(0),
    )
    assert len(recorder.seen) == 1
    return -recorder.seen[0]


def rows_of_tokens(problem: TokenMDP, count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(problem.vocabulary, (count, problem.positions - 1), generator=generator)


@every_policy
def test_later_tokens_change_no_bit_of_earlier_distributions_or_values(make) -> None:
    problem = token_problem("tokens-longer")
    policy = make(problem)
    tokens = enumerate_completions(problem, policy).trajectory.observation[::20]
    logits, value = policy.logits_and_value(tokens)
    for position in range(tokens.shape[1] - 1):
        changed = tokens.clone()
        changed[:, position + 1 :] = (changed[:, position + 1 :] + 1) % problem.vocabulary
        changed_logits, changed_value = policy.logits_and_value(changed)
        assert torch.equal(changed_logits[:, : position + 1], logits[:, : position + 1])
        assert torch.equal(changed_value[:, : position + 1], value[:, : position + 1])
        assert not torch.equal(changed_logits, logits)


@every_policy
def test_every_earlier_token_the_prompt_included_matters(make) -> None:
    problem = token_problem("tokens-longer")
    policy = make(problem)
    rows = enumerate_completions(problem, policy)
    tokens = rows.trajectory.observation
    assert isinstance(tokens, Tensor)
    row = next(i for i, length in enumerate(rows.length.tolist()) if length == tokens.shape[1])
    tokens = tokens[row : row + 1]
    last = next_log_prob(policy, tokens, problem.vocabulary)[0, -1]
    for position in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % problem.vocabulary
        moved = next_log_prob(policy, changed, problem.vocabulary)[0, -1]
        assert (moved - last).abs().max() > 1e-4


@every_policy
def test_the_order_of_earlier_tokens_matters(make) -> None:
    problem = token_problem("tokens-longer")
    policy = make(problem)
    tokens = torch.tensor([[3, 1, 2, 1, 2, 3], [3, 1, 2, 2, 1, 3]])
    last = next_log_prob(policy, tokens, problem.vocabulary)[:, -1]
    assert (last[0] - last[1]).abs().max() > 1e-2


@every_policy
def test_padding_after_the_end_changes_nothing(make) -> None:
    problem = token_problem("tokens")
    policy = make(problem)
    seen = enumerate_completions(problem, policy).trajectory
    tokens = seen.observation
    assert isinstance(tokens, Tensor)
    position = torch.arange(tokens.shape[1])
    after = position > (seen.mask * position).amax(-1, keepdim=True)
    assert after.any()
    noise = torch.where(after, (tokens + 2) % problem.vocabulary, tokens)
    assert not torch.equal(noise, tokens)
    log_prob = policy.log_prob(tokens, seen.action)
    assert torch.equal(policy.log_prob(noise, seen.action)[seen.mask], log_prob[seen.mask])
    value, next_value = policy.values(seen)
    noisy = policy.values(replace(seen, observation=noise))
    assert torch.equal(noisy[0][seen.mask], value[seen.mask])
    assert torch.equal(noisy[1][seen.mask], next_value[seen.mask])
    wider = torch.cat([tokens, tokens[:, :1]], dim=1)
    longer = policy.logits_and_value(wider)[0][:, :-1].log_softmax(-1)
    torch.testing.assert_close(longer, next_log_prob(policy, tokens, problem.vocabulary), rtol=0, atol=1e-13)


@every_policy
def test_the_order_of_rows_does_not_matter(make) -> None:
    problem = token_problem("tokens-longer")
    policy = make(problem)
    seen = enumerate_completions(problem, policy).trajectory
    assert isinstance(seen.observation, Tensor)
    order = torch.randperm(len(seen.action), generator=torch.Generator().manual_seed(0))
    log_prob = policy.log_prob(seen.observation, seen.action)
    permuted = policy.log_prob(seen.observation[order], seen.action[order])
    torch.testing.assert_close(permuted, log_prob[order], rtol=0, atol=1e-13)


@every_policy
def test_evaluation_agrees_with_itself(make) -> None:
    problem = token_problem("tokens")
    policy = make(problem)
    protocol: Policy = policy
    assert protocol.sequential
    seen = enumerate_completions(problem, policy).trajectory
    evaluation = policy.evaluate(seen)
    assert torch.equal(evaluation.log_prob, policy.log_prob(seen.observation, seen.action))
    assert torch.equal(evaluation.log_prob[seen.mask], seen.behaviour_log_prob[seen.mask])
    log_policy = next_log_prob(policy, seen.observation, problem.vocabulary)
    torch.testing.assert_close(log_policy.exp().sum(-1), torch.ones(seen.shape, dtype=torch.float64))
    torch.testing.assert_close(evaluation.entropy, -(log_policy.exp() * log_policy).sum(-1), rtol=0, atol=1e-13)
    kl = evaluation.distribution.kl(evaluation.distribution)
    torch.testing.assert_close(kl, torch.zeros(seen.shape, dtype=torch.float64))
    assert evaluation.value is not None
    torch.testing.assert_close(evaluation.value, policy.values(seen)[0], rtol=0, atol=1e-13)
    assert isinstance(seen.observation, Tensor)
    leading = policy.log_prob(seen.observation.unsqueeze(0), seen.action.unsqueeze(0))
    assert torch.equal(leading[0], evaluation.log_prob)


@every_policy
def test_a_truncated_row_is_valued_at_its_last_token_and_a_terminated_one_not_at_all(make) -> None:
    problem = token_problem("tokens")
    policy = make(problem)
    rows = enumerate_completions(problem, policy)
    with torch.no_grad():
        value, next_value = policy.values(rows.trajectory)
        for row in range(len(rows)):
            prompt = problem.prompts[row // len(problem.completions)]
            completion = problem.completions[row % len(problem.completions)]
            for time in range(len(completion)):
                position = len(prompt) - 1 + time
                followed = torch.tensor([[*prompt, *completion[: time + 1]]])
                expected = policy.logits_and_value(followed)[1][0]
                assert float(value[row, position]) == pytest.approx(float(expected[position]), abs=1e-12)
                if completion[time] == problem.end:
                    assert float(next_value[row, position]) == 0.0
                else:
                    assert float(next_value[row, position]) == pytest.approx(float(expected[-1]), abs=1e-12)


@every_policy
def test_there_is_no_sampler_of_environment_steps(make) -> None:
    with pytest.raises(TypeError, match="sample_completions"):
        make(token_problem("tokens")).sampler()


def test_tables_of_the_wrong_shape_and_rows_too_long_are_refused() -> None:
    problem = token_problem("tokens-binary")
    with pytest.raises(ValueError, match=r"theta must have shape \(9, 2\)"):
        PrefixTable(problem, torch.zeros(8, 2))
    with pytest.raises(ValueError, match="value must have shape"):
        PrefixTable(problem, value=torch.zeros(8))
    with pytest.raises(ValueError, match="this transformer has 4"):
        transformer_for(problem).logits_and_value(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="3 heads"):
        TinyTransformer(2, 4, width=8, heads=3)


def test_the_transformer_is_small_and_the_same_for_the_same_seed() -> None:
    problem = token_problem("tokens-longer")
    for layers in (1, 2):
        size = sum(parameter.numel() for parameter in transformer_for(problem, layers).parameters())
        assert 1000 <= size <= 3000
    tokens = rows_of_tokens(problem)
    first, again, other = (TinyTransformer(4, 8, seed=seed).logits_and_value(tokens)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every_policy
@pytest.mark.parametrize("name", ["tokens", "tokens-binary"])
def test_the_training_step_follows_the_exact_gradient_on_average(make, name: str) -> None:
    """sum_rows Pr(row) (ascent of that row) = grad J, exactly."""
    problem = token_problem(name)
    policy = make(problem)
    rows = enumerate_completions(problem, policy)
    algorithm = Reinforce(psi="reward_to_go", gamma=1.0)
    mean = torch.zeros(())
    for row, probability in enumerate(rows.behaviour_probability.tolist()):
        mean = mean + probability * ascent(policy, algorithm, rows.select([row]))
    exact = token_gradient(problem, policy, list(policy.parameters()))
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-9)
    assert exact.norm() > 0.05


@every_policy
@pytest.mark.parametrize("discounted_states", [True, False])
def test_with_a_discount_it_follows_the_gradient_it_declares(make, discounted_states: bool) -> None:
    problem = token_problem("tokens")
    policy = make(problem)
    rows = enumerate_completions(problem, policy)
    algorithm = Reinforce(psi="reward_to_go", gamma=0.7, discounted_states=discounted_states)
    mean = torch.zeros(())
    for row, probability in enumerate(rows.behaviour_probability.tolist()):
        mean = mean + probability * ascent(policy, algorithm, rows.select([row]))
    exact = token_theorem_gradient(
        problem, policy, list(policy.parameters()), gamma=0.7, discounted_states=discounted_states
    )
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-9)


@every_policy
def test_ragged_batches_of_groups_average_to_the_same_gradient(make) -> None:
    problem = token_problem("tokens-binary")
    policy = make(problem)
    algorithm = Reinforce(psi="reward_to_go", gamma=1.0)
    mean = torch.zeros(())
    for probability, batch in enumerate_groups(problem, policy, 2, groups=2).batches():
        mean = mean + probability * ascent(policy, algorithm, batch)
    exact = token_gradient(problem, policy, list(policy.parameters()))
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("psi", ["baselined", "advantage", "td_residual"])
def test_a_critic_of_prefixes_leaves_the_mean_alone(psi) -> None:
    """GAE and TD residuals over tokens, with the critic's own gradient on its own parameters."""
    problem = token_problem("tokens")
    policy = table_for(problem)
    policy.value.data.copy_(exact_critic(problem, policy, solve_tokens(problem, policy)))
    rows = enumerate_completions(problem, policy)
    algorithm = Reinforce(psi=psi, gamma=1.0)
    mean = torch.zeros(())
    for row, probability in enumerate(rows.behaviour_probability.tolist()):
        mean = mean + probability * ascent(policy, algorithm, rows.select([row]))
    exact = token_gradient(problem, policy, [policy.theta])
    torch.testing.assert_close(mean[: len(exact)], exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(mean[len(exact) :], torch.zeros_like(policy.value), rtol=0, atol=1e-9)


@every_policy
def test_micro_batches_of_ragged_rows_add_up(make) -> None:
    problem = token_problem("tokens-longer")
    policy = make(problem)
    batch = sample_completions(problem, policy, 23, np.random.default_rng(0))
    algorithm = Reinforce(psi="reward_to_go", gamma=1.0, entropy_coefficient=0.1)
    whole = ascent(policy, algorithm, batch)
    for parts in (2, 5, 23):
        torch.testing.assert_close(ascent(policy, algorithm, batch, parts), whole, rtol=0, atol=1e-12)


@every_policy
def test_what_was_not_chosen_has_no_gradient(make) -> None:
    """Prompt tokens and padding: a table's rows of such prefixes stay where they are, whatever the algorithm says."""
    problem = token_problem("tokens")
    policy = make(problem)
    batch = sample_completions(problem, policy, 40, np.random.default_rng(1))
    algorithm = Reinforce(psi="reward_to_go", gamma=1.0, entropy_coefficient=0.1)
    direction = ascent(policy, algorithm, batch)
    spoiled = replace(
        batch,
        action=torch.where(batch.mask, batch.action, (batch.action + 1) % problem.vocabulary),
        behaviour_log_prob=torch.where(batch.mask, batch.behaviour_log_prob, 5.0),
    )
    torch.testing.assert_close(ascent(policy, algorithm, spoiled), direction, rtol=0, atol=1e-12)
    if isinstance(policy, PrefixTable):
        table = direction[: policy.theta.numel()].view_as(policy.theta)
        chosen_at = set(problem.prompts)
        for prefix, number in policy.number.items():
            if prefix in chosen_at:
                assert table[number].norm() > 0.0
        assert table[0].norm() == 0.0
        assert table[policy.number[(2,)]].norm() == 0.0


@pytest.mark.parametrize("name", sorted(TOKEN_PROBLEMS))
def test_a_table_is_every_policy_on_its_problem(name: str) -> None:
    """A table that copies a transformer's distributions gives every completion the same probability."""
    problem = token_problem(name)
    transformer, table = transformer_for(problem), PrefixTable(problem)
    for prefix, number in table.number.items():
        if prefix:
            logits = transformer.logits_and_value(torch.tensor([prefix]))[0][0, -1]
            table.theta.data[number] = logits.detach()
    ours, theirs = (enumerate_completions(problem, policy).behaviour_probability for policy in (table, transformer))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

"""A language policy says what transformers says, whatever is packed, shared, shuffled or cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_language_models import KINDS, Rows, policy_on, sample_rows, tiny_model, tiny_policy
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from upslope.policies.language import attention, decoder, packing
from upslope.policies.language.architecture import UnsupportedArchitectureError
from upslope.policies.language.sampling import Sampling
from upslope.trajectory import Trajectory


def dense(model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [B, T] by transformers, unpadded because rows are filled from the left."""
    log_policy = model(input_ids=rows.observation).logits.log_softmax(-1)
    log_prob = log_policy.gather(-1, rows.action.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_policy.exp() * log_policy).sum(-1)
    return log_prob * rows.mask, entropy * rows.mask


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weights(rows: Rows) -> Tensor:
    return torch.linspace(-1.0, 2.0, rows.mask.numel()).view(rows.mask.shape)


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "ragged"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind: str, tied: bool, equal: bool) -> None:
    """Also in layers with a sliding window shorter than the rows, and with shared prompts."""
    policy, rows = tiny_policy(kind, tied=tied), sample_rows(equal=equal)
    assert policy.architecture is not None
    evaluation = policy.evaluate(rows)
    log_prob, entropy = dense(policy.model, rows)
    torch.testing.assert_close(evaluation.log_prob, log_prob, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(evaluation.entropy, entropy, atol=1e-5, rtol=0.0)
    found = gradients(policy.model, (weights(rows) * (evaluation.log_prob + 0.5 * evaluation.entropy)).sum())
    expected = gradients(policy.model, (weights(rows) * (log_prob + 0.5 * entropy)).sum())
    assert_equal_gradients(found, expected, 1e-5)


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "ragged"])
def test_equals_transformers_in_float64(equal: bool) -> None:
    """GPT-2, since the other architectures of transformers norm in float32."""
    policy, rows = tiny_policy("gpt2", dtype=torch.float64), sample_rows(equal=equal)
    evaluation, (log_prob, _) = policy.evaluate(rows), dense(policy.model, rows)
    torch.testing.assert_close(evaluation.log_prob, log_prob, atol=1e-13, rtol=0.0)
    found = gradients(policy.model, (weights(rows) * evaluation.log_prob).sum())
    expected = gradients(policy.model, (weights(rows) * log_prob).sum())
    assert_equal_gradients(found, expected, 1e-13)


def evaluated(policy: Any, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    log_prob = policy.evaluate(rows).log_prob
    return log_prob.detach(), gradients(policy, (weights(rows) * log_prob).sum())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_sharing_beginnings_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, rows = tiny_policy(kind, dtype=torch.float64), sample_rows()
    shared = evaluated(policy, rows)
    monkeypatch.setattr(packing, "WORTHWHILE", 2.0)
    alone = evaluated(policy, rows)
    torch.testing.assert_close(shared[0], alone[0], atol=1e-13, rtol=0.0)
    assert_equal_gradients(shared[1], alone[1], 1e-13)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_runs_and_buckets_are_the_same_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, rows = tiny_policy(kind, dtype=torch.float64), sample_rows(group=6)
    assert packing.pack(rows.observation, torch.arange(2, 14)).buckets
    buckets = evaluated(policy, rows)
    monkeypatch.setattr(packing, "PAIRS_PER_RUN", -(10**9))
    assert not packing.pack(rows.observation, torch.arange(2, 14)).buckets
    runs = evaluated(policy, rows)
    torch.testing.assert_close(buckets[0], runs[0], atol=1e-13, rtol=0.0)
    assert_equal_gradients(buckets[1], runs[1], 1e-13)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_neither_padding_nor_order_nor_batches_change_anything(kind: str) -> None:
    policy, rows = tiny_policy(kind, dtype=torch.float64), sample_rows()
    log_prob, gradient = evaluated(policy, rows)
    behind = torch.arange(rows.mask.shape[1]) > (rows.mask * torch.arange(rows.mask.shape[1])).amax(1, keepdim=True)
    padded = Rows(
        observation=torch.cat([rows.observation.masked_fill(behind, 7), torch.full((6, 30), 9)], 1),
        action=torch.cat([rows.action.masked_fill(behind, 3), torch.zeros(6, 30, dtype=torch.long)], 1),
        mask=torch.cat([rows.mask, torch.zeros(6, 30, dtype=torch.bool)], 1),
    )
    torch.testing.assert_close(policy.evaluate(padded).log_prob[:, :14], log_prob, atol=1e-13, rtol=0.0)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    pieces, weight = order.split(2), weights(rows)
    policy.zero_grad(set_to_none=True)
    for piece in pieces:
        part = Rows(rows.observation[piece], rows.action[piece], rows.mask[piece])
        found = policy.evaluate(part).log_prob
        torch.testing.assert_close(found.detach(), log_prob[piece], atol=1e-13, rtol=0.0)
        (weight[piece] * found).sum().backward()
    assert_equal_gradients({n: p.grad for n, p in policy.named_parameters() if p.grad is not None}, gradient, 1e-13)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("equal", [True, False], ids=["runs", "buckets"])
def test_gradients_can_be_differentiated(kind: str, equal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As curvature needs; the closed forms against plain operations."""

    def twice() -> dict[str, Tensor]:
        policy, rows = tiny_policy(kind, dtype=torch.float64, layers=1), sample_rows(equal=equal)
        parameters = list(policy.parameters())
        loss = (weights(rows) * policy.evaluate(rows).log_prob).sum()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        return gradients(policy, torch.stack([gradient.square().sum() for gradient in first]).sum())

    found = twice()
    monkeypatch.setattr(decoder, "direct", lambda _: False)
    with sdpa_kernel(SDPBackend.MATH):
        expected = twice()
    assert_equal_gradients(found, expected, 1e-12)


def test_what_was_not_chosen_is_zero_and_rows_without_a_choice_are_left_out() -> None:
    policy, rows = tiny_policy(value_head=True), sample_rows()
    rows.mask[2] = False
    evaluation = policy.evaluate(rows)
    assert evaluation.value is not None
    for found in (evaluation.log_prob, evaluation.entropy, evaluation.value):
        assert bool((found[~rows.mask] == 0.0).all())
        assert bool((found[rows.mask] != 0.0).all())
    assert policy.sequential


def test_log_prob_is_of_every_position_and_takes_any_leading_shape() -> None:
    policy, rows = tiny_policy(), sample_rows()
    everywhere = Rows(rows.observation, rows.action, torch.ones_like(rows.mask))
    expected, _ = dense(policy.model, everywhere)
    found = policy.log_prob(rows.observation.view(2, 3, -1), rows.action.view(2, 3, -1))
    torch.testing.assert_close(found, expected.view(2, 3, -1), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_activations_computed_again_give_the_same_gradient(kind: str) -> None:
    kept = evaluated(tiny_policy(kind, dtype=torch.float64), sample_rows())
    again = evaluated(tiny_policy(kind, dtype=torch.float64, checkpoint_activations=True), sample_rows())
    torch.testing.assert_close(again[0], kept[0], atol=1e-13, rtol=0.0)
    assert_equal_gradients(again[1], kept[1], 1e-13)


def test_sampling_is_part_of_the_policy() -> None:
    sampling = Sampling(temperature=0.7, top_k=9, top_p=0.8)
    policy, rows = tiny_policy(sampling=sampling), sample_rows()
    logits = policy.model(input_ids=rows.observation).logits
    log_policy = sampling.logits(logits, rows.action).log_softmax(-1)
    expected = log_policy.gather(-1, rows.action.unsqueeze(-1)).squeeze(-1) * rows.mask
    evaluation = policy.evaluate(rows)
    torch.testing.assert_close(evaluation.log_prob, expected, atol=1e-5, rtol=0.0)
    assert float(evaluation.entropy.detach().max()) <= np.log(10) + 1e-6


def cut_trajectory(rows: Rows) -> Trajectory:
    """Each row ends at its last chosen position: even rows are cut open there, odd ones end."""
    steps = torch.arange(rows.mask.shape[1])
    last = (rows.mask * steps).amax(1)
    at_last = steps == last.unsqueeze(-1)
    odd = torch.arange(len(last)).unsqueeze(-1) % 2 == 1
    index = (torch.arange(len(last)) * rows.mask.shape[1] + last)[::2]
    return Trajectory(
        observation=rows.observation,
        action=rows.action,
        reward=torch.zeros(rows.mask.shape),
        terminated=at_last & odd,
        truncated=at_last & ~odd,
        mask=rows.mask,
        behaviour_log_prob=torch.zeros(rows.mask.shape),
        time=torch.zeros(rows.mask.shape, dtype=torch.long),
        final_observation=rows.action.flatten()[index],
        final_index=index,
    )


def test_values_of_every_position_and_of_open_ends() -> None:
    policy, rows = tiny_policy("gpt2", value_head=True, dtype=torch.float64), sample_rows()
    trajectory = cut_trajectory(rows)
    value, following = policy.values(trajectory)
    whole = torch.cat([rows.observation, rows.action[:, -1:]], 1)
    assert policy.value_head is not None
    expected = policy.value_head(policy.model.transformer(input_ids=whole).last_hidden_state).squeeze(-1)
    for row in range(len(rows.mask)):
        last = int(rows.mask[row].nonzero().max())
        torch.testing.assert_close(value[row, : last + 1], expected[row, : last + 1])
        torch.testing.assert_close(following[row, :last], expected[row, 1 : last + 1])
        at_end = expected[row, last + 1] if row % 2 == 0 else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(following[row, last], at_end)
    chosen = policy.evaluate(rows).value
    assert chosen is not None
    torch.testing.assert_close(chosen[rows.mask], value[rows.mask])


def test_values_need_a_critic() -> None:
    with pytest.raises(TypeError, match="value_head=True"):
        tiny_policy().values(cut_trajectory(sample_rows()))


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "ragged"])
@pytest.mark.parametrize("again", [True, False], ids=["recomputed", "kept"])
def test_other_architectures_run_through_transformers(again: bool, equal: bool) -> None:
    with pytest.warns(UserWarning, match="GPTNeoX.* transformers' own forward pass.*'gpt_neox'"):
        policy = tiny_policy("neox", tied=False, value_head=True, checkpoint_activations=again)
    assert policy.architecture is None
    rows = sample_rows(equal=equal)
    evaluation, (log_prob, _) = policy.evaluate(rows), dense(policy.model, rows)
    torch.testing.assert_close(evaluation.log_prob, log_prob, atol=1e-5, rtol=0.0)
    found = gradients(policy.model, (weights(rows) * evaluation.log_prob).sum())
    assert_equal_gradients(found, gradients(policy.model, (weights(rows) * log_prob).sum()), 1e-5)
    policy.values(cut_trajectory(rows))
    calls: list[int] = []
    layer = policy.model.gpt_neox.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    policy.evaluate(rows).log_prob.sum().backward()
    assert len(calls) == (2 if again else 1)
    assert not layer.training


def test_capped_scores_run_through_transformers_with_capped_logits() -> None:
    with pytest.warns(UserWarning, match="soft caps"):
        policy = tiny_policy("gemma2", attn_logit_softcapping=50.0, final_logit_softcapping=3.0)
    rows = sample_rows()
    torch.testing.assert_close(policy.evaluate(rows).log_prob, dense(policy.model, rows)[0], atol=1e-5, rtol=0.0)


def test_a_model_that_computes_something_else_is_found_out() -> None:
    model = tiny_model("llama")
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda x, **more: forward(x, **more) + 0.1 * x.roll(1, -1)
    with pytest.warns(UserWarning, match="logits differ"):
        policy = policy_on(model)
    assert policy.architecture is None
    outer = model.forward

    def scaled(**arguments: Any) -> Any:
        output = outer(**arguments)
        output.logits = output.logits * 2.0
        return output

    model.forward = scaled
    with pytest.warns(UserWarning, match="logits differ"), pytest.raises(UnsupportedArchitectureError, match="between"):
        policy_on(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_are_part_of_the_parts(kind: str) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, lora_alpha=6.0, target_modules="all-linear", fan_in_fan_out=kind == "gpt2")
    model = peft.get_peft_model(tiny_model(kind), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    policy, rows = policy_on(model), sample_rows()
    assert policy.architecture is not None
    evaluation, (log_prob, _) = policy.evaluate(rows), dense(model, rows)
    torch.testing.assert_close(evaluation.log_prob, log_prob, atol=1e-5, rtol=0.0)
    found = gradients(model, (weights(rows) * evaluation.log_prob).sum())
    assert all("lora" in name for name in found)
    assert_equal_gradients(found, gradients(model, (weights(rows) * log_prob).sum()), 1e-5)


def test_bfloat16_is_near_float32() -> None:
    rows = sample_rows()
    exact = evaluated(tiny_policy(), rows)
    rounded = evaluated(tiny_policy(precision="bfloat16"), rows)
    assert rounded[0].dtype == torch.float32
    assert 0.0 < float((rounded[0] - exact[0]).abs().max()) < 0.1
    assert_equal_gradients(rounded[1], exact[1], 0.1)


def test_dropout_stays_off_in_training_mode() -> None:
    policy, rows = tiny_policy("gpt2", attn_pdrop=0.5), sample_rows()
    assert not policy.train().model.training
    assert torch.equal(policy.evaluate(rows).log_prob, policy.evaluate(rows).log_prob)


def test_rows_beyond_the_context_and_rows_without_tokens_are_refused() -> None:
    policy = tiny_policy()
    tokens = torch.zeros(1, 41, dtype=torch.long)
    with pytest.raises(ValueError, match="41 tokens and the model reads at most 40"):
        policy.log_prob(tokens, tokens)
    with pytest.raises(ValueError, match="every row is empty"):
        policy.evaluate(Rows(tokens, tokens, torch.zeros(1, 41, dtype=torch.bool)))
    with pytest.raises(TypeError, match="engine"):
        policy.sampler()


def test_exact_divergence_is_the_dense_one() -> None:
    policy, rows = tiny_policy("gpt2", dtype=torch.float64), sample_rows()
    other = tiny_policy("gpt2", dtype=torch.float64, layers=1)

    def exact() -> Tensor:
        return policy.evaluate(rows).distribution.kl(other.evaluate(rows).distribution)

    def by_all_logits() -> Tensor:
        log_p, log_q = (of.model(input_ids=rows.observation).logits.log_softmax(-1) for of in (policy, other))
        return (log_p.exp() * (log_p - log_q)).sum(-1) * rows.mask

    found = exact().detach()
    torch.testing.assert_close(found, by_all_logits(), atol=1e-12, rtol=0.0)
    for model in (policy.model, other.model):
        expected = gradients(model, (weights(rows) * by_all_logits()).sum())
        assert_equal_gradients(gradients(model, (weights(rows) * exact()).sum()), expected, 1e-12)
    mine, theirs = policy.evaluate(rows).distribution, other.evaluate(rows).distribution
    for index in (torch.tensor([4, 0, 2]), slice(1, 4)):
        torch.testing.assert_close(mine.select(index).kl(theirs.select(index)).detach(), found[index])
        with pytest.raises(ValueError, match="same positions"):
            mine.select(index).kl(theirs)


def test_a_detached_distribution_stays_when_the_policy_moves() -> None:
    policy, rows = tiny_policy(), sample_rows()
    before = policy.evaluate(rows).distribution.detach()
    assert float(before.kl(policy.evaluate(rows).distribution).detach().abs().max()) < 1e-6
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    assert float(before.kl(before).abs().max()) < 1e-6
    assert float(before.kl(policy.evaluate(rows).distribution).detach().max()) > 1e-3


def test_packing_holds_shared_beginnings_once_and_every_row_whole() -> None:
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 9], [1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 8]])
    length = torch.tensor([4, 3, 2, 4, 0])
    layout = packing.pack(tokens, length)
    assert len(layout.token) == 4 + 1 + 2
    for row, count in enumerate(length.tolist()):
        assert layout.token[layout.index[row, :count]].tolist() == tokens[row, :count].tolist()
        assert layout.position[layout.index[row, :count]].tolist() == list(range(count))
    assert sum(run.rows * run.own for run in layout.runs) == len(layout.token)
    alone = packing.pack(tokens[:3], torch.tensor([4, 4, 4]), share=False)
    assert alone.plain
    assert torch.equal(alone.token, tokens[:3].flatten())


def test_attention_sees_nothing_behind_a_row() -> None:
    """Numbers there may be anything, even infinite."""
    layout = packing.pack(torch.arange(8).view(2, 4), torch.tensor([4, 2]), share=False)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(6, 2, 3, generator=generator) for _ in range(3))
    before = attention.attention(query, key, value, layout, scale=1.0, window=None)
    first = packing.pack(torch.arange(2).view(1, 2), torch.tensor([2]), share=False)
    short = layout.index[1, :2]
    alone = attention.attention(query[short], key[short], value[short], first, scale=1.0, window=None)
    torch.testing.assert_close(before[short], alone)

"""The embedded engine draws from the learner's distribution, whatever else it generates."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch

from upslope.collect.engines.protocol import Completion, Request
from upslope.collect.engines.torch import TorchEngine
from upslope.collect.errors import NonFiniteError
from upslope.errors import UsageError
from upslope.policies.language.config import LanguageModelConfig, LoraConfig, ModelShape
from upslope.policies.language.model import build_policy
from upslope.policies.language.policy import LanguagePolicy
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.tokenizer import character_tokenizer
from upslope.streams import Purpose, stream
from upslope.trajectory import Trajectory

ALPHABET = "0123456789+-= abcdef"
ARCHITECTURES = ("llama", "qwen3", "gemma", "gpt2")


def policy_of(
    architecture: str = "llama", *, sampling: Sampling | None = None, precision: Any = "float32", **settings: Any
) -> LanguagePolicy:
    shape = {"width": 32, "layers": 2, "heads": 4, "key_value_heads": 2, "inner": 48, "positions": 64}
    if architecture == "gpt2":
        shape["key_value_heads"] = 4
    config = LanguageModelConfig(
        shape=ModelShape(architecture=architecture, **shape),  # pyright: ignore[reportArgumentType]
        precision=precision,
        **settings,
    )
    policy = build_policy(config, tokenizer=character_tokenizer(ALPHABET), seed=3, sampling=sampling or Sampling())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return policy


def requests_of(lengths: list[int], group: int = 1) -> list[Request]:
    draw = random.Random(1)
    prompts = [tuple(draw.randint(1, len(ALPHABET)) for _ in range(length)) for length in lengths]
    return [
        Request(prompt=prompt, key=(7, number, sample))
        for number, prompt in enumerate(prompts)
        for sample in range(group)
    ]


def as_trajectory(requests: list[Request], completions: list[Completion]) -> Trajectory:
    """Rows as a collector lays them out."""
    steps = max(len(r.prompt) + len(c.tokens) for r, c in zip(requests, completions, strict=True)) - 1
    shape = (len(requests), steps)
    observation, action = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask, behaviour = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    for row, (request, completion) in enumerate(zip(requests, completions, strict=True)):
        tokens = torch.tensor([*request.prompt, *completion.tokens])
        begin, end = len(request.prompt) - 1, len(tokens) - 1
        observation[row, :end], action[row, :end] = tokens[:-1], tokens[1:]
        mask[row, begin:end] = True
        behaviour[row, begin:end] = torch.tensor(completion.log_prob)
    nothing = torch.zeros(shape, dtype=torch.bool)
    return Trajectory(
        observation=observation,
        action=action,
        reward=torch.zeros(shape),
        terminated=nothing,
        truncated=nothing,
        mask=mask,
        behaviour_log_prob=behaviour,
        time=torch.zeros(shape, dtype=torch.long),
        final_observation=torch.zeros(0, dtype=torch.long),
        final_index=torch.zeros(0, dtype=torch.long),
    )


def difference(policy: LanguagePolicy, requests: list[Request], completions: list[Completion]) -> float:
    rows = as_trajectory(requests, completions)
    with torch.no_grad():
        learner = policy.evaluate(rows).log_prob
    return float(((learner - rows.behaviour_log_prob) * rows.mask).abs().max())


SETTINGS = (
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.3, top_k=5),
    Sampling(top_p=0.7),
    Sampling(temperature=0.8, top_k=9, top_p=0.9),
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_log_probs_are_the_learners(architecture: str, number: int) -> None:
    """Ragged prompts, groups, and fewer slots than requests, so that slots are filled again."""
    policy = policy_of(architecture, sampling=SETTINGS[number])
    requests = requests_of([3, 8, 1, 5, 8, 12], group=3)
    completions = TorchEngine(policy, seed=0, slots=5).generate(requests, sampling=SETTINGS[number], limit=20)
    assert {len(completion.tokens) for completion in completions} != {20}
    assert difference(policy, requests, completions) < 1e-5


def test_critic_adapters_and_training_mode_make_no_difference() -> None:
    policy = policy_of(lora=LoraConfig(rank=4), value_head=True)
    policy.train()
    before = {name: module.training for name, module in policy.named_modules()}
    requests = requests_of([4, 9], group=4)
    completions = TorchEngine(policy, seed=0).generate(requests, sampling=Sampling(), limit=12)
    assert difference(policy, requests, completions) < 1e-5
    assert {name: module.training for name, module in policy.named_modules()} == before
    policy.evaluate(as_trajectory(requests, completions)).log_prob.sum().backward()
    assert any(parameter.grad is not None for parameter in policy.parameters())


def test_sliding_windows() -> None:
    """Of a layer that sees 5 positions, with prompts and completions longer than that."""
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        vocab_size=21,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        sliding_window=5,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    policy = LanguagePolicy(
        model,
        character_tokenizer(ALPHABET),
        sampling=Sampling(),
        value_head=False,
        precision="float32",
        checkpoint_activations=False,
    )
    assert policy.architecture is not None
    requests = requests_of([3, 8, 1, 12], group=6)
    completions = TorchEngine(policy, seed=0, slots=17).generate(requests, sampling=Sampling(), limit=14)
    assert difference(policy, requests, completions) < 1e-5


def test_bfloat16_is_the_learners_bfloat16() -> None:
    policy = policy_of(precision="bfloat16")
    requests = requests_of([4, 9, 2], group=4)
    completions = TorchEngine(policy, seed=0, slots=5).generate(requests, sampling=Sampling(), limit=12)
    assert 1e-5 < difference(policy, requests, completions) < 0.15


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sample_does_not_depend_on_its_company(architecture: str) -> None:
    """Slots, order of the requests, and what else is generated."""
    policy = policy_of(architecture).double()
    requests = requests_of([3, 8, 1, 5], group=4)
    engine = TorchEngine(policy, seed=5, slots=64)
    expected = {
        r.key: c for r, c in zip(requests, engine.generate(requests, sampling=Sampling(), limit=15), strict=True)
    }
    shuffled = random.Random(0).sample(requests, len(requests))
    for slots, chosen in itertools.product((1, 3, 16), (requests, shuffled, requests[5:9])):
        again = TorchEngine(policy, seed=5, slots=slots).generate(chosen, sampling=Sampling(), limit=15)
        for request, completion in zip(chosen, again, strict=True):
            assert completion.tokens == expected[request.key].tokens
            assert completion.log_prob == pytest.approx(expected[request.key].log_prob, abs=1e-9)
    other = TorchEngine(policy, seed=6).generate(requests, sampling=Sampling(), limit=15)
    assert [c.tokens for c in other] != [expected[r.key].tokens for r in requests]


def test_long_generations_with_many_refills() -> None:
    """The clock outgrows the cache again and again; prompts longer than what is kept wait to the end."""
    policy = policy_of(sampling=Sampling(temperature=0.7)).double()
    policy.tokenizer.end = frozenset(range(6))
    requests = requests_of([2, 30, 4, 7] * 30 + [44] * 3)
    completions = TorchEngine(policy, seed=0, slots=3).generate(requests, sampling=Sampling(temperature=0.7), limit=20)
    alone = TorchEngine(policy, seed=0, slots=64).generate(requests[::-1], sampling=Sampling(temperature=0.7), limit=20)
    assert [c.tokens for c in completions] == [c.tokens for c in alone[::-1]]
    assert difference(policy, requests, completions) < 1e-5


def test_tokens_are_the_inverse_of_the_cumulative_distribution() -> None:
    policy = policy_of().double()
    request = Request(prompt=(3, 1, 4), key=(2, 0, 9))
    (completion,) = TorchEngine(policy, seed=11).generate([request], sampling=Sampling(), limit=10)
    uniform = stream(11, Purpose.GENERATION, 2, 0, 9).random(10)
    tokens = list(request.prompt)
    for u, token in zip(uniform, completion.tokens, strict=False):
        logits = policy.model(input_ids=torch.tensor([tokens])).logits[0, -1]
        cumulative = logits.softmax(-1).cumsum(0)
        assert token == int((cumulative <= u * cumulative[-1]).sum())
        tokens.append(token)


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_frequencies_are_the_models(number: int) -> None:
    """Chi-square of the first and second tokens of 4000 samples against the model's probabilities."""
    sampling = SETTINGS[number]
    policy = policy_of("qwen3", sampling=sampling)
    requests = [Request(prompt=(5, 2), key=(0, 0, sample)) for sample in range(4000)]
    completions = TorchEngine(policy, seed=number, slots=4000).generate(requests, sampling=sampling, limit=2)
    logits = policy.model(input_ids=torch.tensor([[5, 2]])).logits[0, -1]
    first = sampling.logits(logits).softmax(-1).double()
    assert chi_square_tail([c.tokens[0] for c in completions], first) > 1e-4
    likeliest = int(first.argmax()) or int(first.argsort()[-2])
    logits = policy.model(input_ids=torch.tensor([[5, 2, likeliest]])).logits[0, -1]
    second = [c.tokens[1] for c in completions if c.tokens[0] == likeliest]
    assert chi_square_tail(second, sampling.logits(logits).softmax(-1).double()) > 1e-4


def chi_square_tail(tokens: list[int], probability: torch.Tensor) -> float:
    """P(chi-square >= the one observed); cells that expect less than 5 are one. An impossible token gives 0."""
    count = np.bincount(tokens, minlength=len(probability))
    expected = probability.detach().numpy() * len(tokens)
    if count[expected == 0].any():
        return 0.0
    small = expected < 5
    observed = np.append(count[~small], count[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    half = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, torch.tensor(statistic / 2, dtype=torch.float64)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_transformers_greedy(architecture: str) -> None:
    policy = policy_of(architecture, sampling=Sampling(temperature=0.0))
    requests = requests_of([6] * 5)
    completions = TorchEngine(policy, seed=0, slots=3).generate(requests, sampling=Sampling(temperature=0.0), limit=16)
    prompts = torch.tensor([request.prompt for request in requests])
    theirs = policy.model.generate(  # pyright: ignore[reportCallIssue]
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=16, do_sample=False, pad_token_id=0
    )
    for row, completion in zip(theirs[:, 6:].tolist(), completions, strict=True):
        assert list(completion.tokens) == row[: len(completion.tokens)]
        assert completion.ended == (completion.tokens[-1] in policy.tokenizer.end)
        assert completion.ended or len(completion.tokens) == 16
    assert difference(policy_of(architecture), requests, completions) < 1e-5


def test_how_completions_end() -> None:
    policy = policy_of()
    requests = requests_of([3, 5], group=32)
    completions = TorchEngine(policy, seed=0, slots=16).generate(requests, sampling=Sampling(), limit=6)
    assert {len(c.tokens) for c in completions} >= {1, 3, 6}
    for completion in completions:
        assert not policy.tokenizer.end.intersection(completion.tokens[:-1])
        assert completion.ended == (completion.tokens[-1] in policy.tokenizer.end)
        assert completion.ended or len(completion.tokens) == 6
        assert len(completion.log_prob) == len(completion.tokens)
    single = TorchEngine(policy, seed=0).generate(requests, sampling=Sampling(), limit=1)
    assert [c.tokens for c in single] == [c.tokens[:1] for c in completions]


def test_stop_strings_keep_the_tokens_up_to_there() -> None:
    policy = policy_of()
    policy.tokenizer.end = frozenset()
    requests = requests_of([3, 5], group=64)
    free = TorchEngine(policy, seed=0).generate(requests, sampling=Sampling(temperature=1.5), limit=24)
    stop = ("1", "ab", "3 ")
    stopped = TorchEngine(policy, seed=0).generate(requests, sampling=Sampling(temperature=1.5), limit=24, stop=stop)
    reasons = set()
    for whole, part in zip(free, stopped, strict=True):
        texts = [policy.tokenizer.decode(whole.tokens[:length]) for length in range(1, 25)]
        ends = [length for length, text in enumerate(texts, start=1) if any(one in text for one in stop)]
        assert part.tokens == whole.tokens[: min(ends, default=24)]
        assert part.ended == bool(ends)
        reasons.update(one for one in stop if policy.tokenizer.decode(part.tokens).endswith(one))
    assert reasons == set(stop)


def test_each_prompt_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from upslope.policies.language.decoding import Decoder

    read: list[tuple[int, ...]] = []
    original = Decoder.read

    def counting(self: Decoder, prompts: Any) -> Any:
        read.extend(prompts)
        return original(self, prompts)

    monkeypatch.setattr(Decoder, "read", counting)
    requests = requests_of([3, 8, 1], group=6)
    TorchEngine(policy_of(), seed=0, slots=4).generate(requests[::2] + requests[1::2], sampling=Sampling(), limit=5)
    assert sorted(read) == sorted({request.prompt for request in requests})


def test_weights_count_from_the_update_on() -> None:
    policy = policy_of()
    requests = requests_of([3, 5], group=8)
    engine = TorchEngine(policy, seed=0)
    engine.update(4)
    before = engine.generate(requests, sampling=Sampling(), limit=8)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter *= 1.3
    assert engine.generate(requests, sampling=Sampling(), limit=8) == before
    engine.update(5)
    after = engine.generate(requests, sampling=Sampling(), limit=8)
    assert [c.version for c in before + after] == [4] * 16 + [5] * 16
    assert difference(policy, requests, after) < 1e-5
    assert difference(policy, requests, before) > 1e-2


def test_weights_may_be_views_of_one_buffer() -> None:
    policy = policy_of()
    requests = requests_of([3, 5], group=8)
    expected = TorchEngine(policy, seed=0).generate(requests, sampling=Sampling(), limit=8)
    parameters = list(policy.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    engine, begin = TorchEngine(policy, seed=0), 0
    for parameter in parameters:
        parameter.data = flat[begin : begin + parameter.numel()].view(parameter.shape)
        begin += parameter.numel()
    assert engine.generate(requests, sampling=Sampling(), limit=8) == expected
    flat *= 1.3
    engine.update(1)
    assert difference(policy, requests, engine.generate(requests, sampling=Sampling(), limit=8)) < 1e-5


def test_what_cannot_be_generated_is_refused() -> None:
    engine = TorchEngine(policy_of(), seed=0)
    fine = Request(prompt=(1, 2), key=(0,))
    assert engine.generate([], sampling=Sampling(), limit=4) == []
    with pytest.raises(UsageError, match=r"60 tokens and a completion of up to 5 need 65 positions, the model has 64"):
        engine.generate([fine, Request(prompt=(1,) * 60, key=(1,))], sampling=Sampling(), limit=5)
    with pytest.raises(UsageError, match="prompt is empty"):
        engine.generate([fine, Request(prompt=(), key=(1,))], sampling=Sampling(), limit=5)
    with pytest.raises(UsageError, match=r"from 1 to 99, the model's go from 0 to 20"):
        engine.generate([Request(prompt=(1, 99), key=(1,))], sampling=Sampling(), limit=5)
    with pytest.raises(UsageError, match="at least 1 token"):
        engine.generate([fine], sampling=Sampling(), limit=0)
    with pytest.raises(UsageError, match="empty stop string"):
        engine.generate([fine], sampling=Sampling(), limit=3, stop=("",))
    with pytest.raises(ValueError, match="slots must be at least 1"):
        TorchEngine(policy_of(), seed=0, slots=0)


def test_diverged_weights_are_told() -> None:
    policy = policy_of()
    with torch.no_grad():
        next(policy.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="logits are NaN"):
        TorchEngine(policy, seed=0).generate(requests_of([3]), sampling=Sampling(), limit=4)


def test_an_architecture_without_parts_generates_through_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    requests = requests_of([3, 8, 3, 8, 5], group=3)
    expected = TorchEngine(policy, seed=0).generate(requests, sampling=Sampling(), limit=12)
    monkeypatch.setattr(policy, "architecture", None)
    engine = TorchEngine(policy, seed=0, slots=4)
    engine.update(3)
    completions = engine.generate(requests, sampling=Sampling(), limit=12)
    assert [c.tokens for c in completions] == [c.tokens for c in expected]
    assert {c.version for c in completions} == {3}
    assert difference(policy, requests, completions) < 1e-5
    greedy = engine.generate(requests, sampling=Sampling(temperature=0.0), limit=3)
    assert difference(policy, requests, greedy) < 1e-5

"""A real language model on a completion problem: the policy, its exact critic, and batches by the engine that trains.

The model is one of transformers' in float64 over the problem's own tokens, small enough that every completion can be
enumerated, and everything that trains is used as it trains: `LanguagePolicy` learns, `TorchEngine` generates, and
`CompletionCollector` and `RewardPool` make its completions into trajectories.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from upslope.collect.completions import CompletionCollector
from upslope.collect.engines.torch import TorchEngine
from upslope.collect.experience import CompletionConfig
from upslope.collect.rewards.pool import RewardPool
from upslope.collect.rewards.protocol import Reward
from upslope.collect.tasks.protocol import Example, Task
from upslope.errors import UsageError
from upslope.exact import TokenMDP, TokenSolution, enumerate_completions
from upslope.policies.language.config import ModelShape
from upslope.policies.language.policy import LanguagePolicy
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.shapes import build_model
from upslope.policies.language.tokenizer import Tokenizer, character_tokenizer
from upslope.trajectory import Trajectory

_FIRST_LETTER = ord("a")
_MOST_EXAMPLES = 1_000
"""Prompts of unequal probability stand in a task's data in proportion to it: in so many lines at most."""
_UNREACHED = 1e-9


def language_policy(
    problem: TokenMDP, seed: int, *, architecture: str = "gpt2", width: int | None = None
) -> LanguagePolicy:
    """A transformer with a critic over the tokens of a problem, in float64, with random weights.

    Args:
        problem: what it completes.
        seed: of its weights.
        architecture: one of `ModelShape.architecture`.
        width: of its hidden states; None makes them wide enough for the linear critic to have any value at every
            prefix. (That takes learned positions, too: without those a model cannot count equal tokens.)

    Raises:
        UsageError: if the problem's end token is not 0, as that of the tokenizer is.
    """
    prefixes = len(problem.prompts) * len(problem.completions)
    width = 8 * math.ceil(prefixes / 8) if width is None else width
    shape = ModelShape(
        architecture=architecture,  # pyright: ignore[reportArgumentType]  # checked where it is built
        width=width,
        layers=1,
        heads=2,
        inner=16,
        positions=problem.positions + 1,
    )
    tokenizer = problem_tokenizer(problem)
    policy = _policy(build_model(shape, tokenizer, seed).double(), tokenizer)
    assert policy.value_head is not None
    with torch.no_grad():
        policy.value_head.weight.copy_(0.1 * torch.cos(1.0 + 3.0 * torch.arange(width, dtype=torch.float64)))
    return policy


def copy_of(policy: LanguagePolicy) -> LanguagePolicy:
    """The same policy, sharing nothing."""
    twin = _policy(copy.deepcopy(policy.model), policy.tokenizer)
    twin.load_state_dict(policy.state_dict())
    return twin


def _policy(model: Any, tokenizer: Tokenizer) -> LanguagePolicy:
    return LanguagePolicy(
        model,
        tokenizer,
        sampling=Sampling(),
        value_head=True,
        precision="float32",
        checkpoint_activations=False,
    )


def problem_tokenizer(problem: TokenMDP) -> Tokenizer:
    """The tokens of a problem as letters: 1 is a, 2 is b, and 0 the end.

    Raises:
        UsageError: if its end token is not 0.
    """
    if problem.end != 0:
        raise UsageError(f"a language model's end token is 0 here, and the problem's is {problem.end}: number it 0")
    return character_tokenizer("".join(chr(_FIRST_LETTER + token) for token in range(problem.vocabulary - 1)))


def set_exact_critic(problem: TokenMDP, policy: LanguagePolicy, solution: TokenSolution) -> None:
    """Let the critic be v at every prefix at which a token is chosen, and 0 after a completion that was cut.

    Args:
        problem: what is completed.
        policy: its value head is set; nothing else moves.
        solution: with the values.

    Raises:
        ValueError: if its hidden states do not tell the prefixes apart, so that no linear critic is exact.
    """
    head = policy.value_head
    assert head is not None
    value = _values_by_prefix(problem, solution)
    rows = enumerate_completions(problem, policy).trajectory
    prefixes, places = _prefixes(rows)
    wanted = torch.tensor([value.get(prefix, 0.0) for prefix in prefixes], dtype=torch.float64)
    hidden = torch.stack([_with_head(policy, rows, unit)[places] for unit in range(head.in_features)], dim=-1)
    features = torch.cat([hidden, torch.ones(len(hidden), 1, dtype=torch.float64)], dim=-1)
    found = torch.linalg.lstsq(features, wanted.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    apart = float((features @ found - wanted).abs().max())
    if apart > _UNREACHED:
        raise ValueError(f"no linear critic of these hidden states is exact: the best one is off by {apart:.1e}")
    with torch.no_grad():
        head.weight.copy_(found[:-1])
        head.bias.copy_(found[-1:])


def _values_by_prefix(problem: TokenMDP, solution: TokenSolution) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], float] = {}
    for begun, level in zip(solution.beginnings, solution.value, strict=True):
        for prompt, row in zip(problem.prompts, level.tolist(), strict=True):
            found.update({(*prompt, *tokens): value for tokens, value in zip(begun, row, strict=True)})
    return found


def _prefixes(rows: Trajectory) -> tuple[list[tuple[int, ...]], Tensor]:
    """What was read at each position where a value counts, and where it stands in present and following values."""
    tokens = rows.observation
    assert isinstance(tokens, Tensor)
    prefixes: dict[tuple[int, ...], int] = {}
    count = rows.mask.numel()
    for row, position in rows.mask.nonzero().tolist():
        prefixes[tuple(tokens[row, : position + 1].tolist())] = row * rows.shape[1] + position
    for place, last in zip(rows.final_index.tolist(), rows.final_observation.tolist(), strict=True):  # pyright: ignore
        row, position = divmod(place, rows.shape[1])
        prefixes[*tokens[row, : position + 1].tolist(), last] = count + place
    return list(prefixes), torch.tensor(list(prefixes.values()))


@torch.no_grad()
def _with_head(policy: LanguagePolicy, rows: Trajectory, unit: int) -> Tensor:
    """Present and following values, flat, if the critic were one coordinate of the hidden state."""
    head = policy.value_head
    assert head is not None
    head.weight.zero_()
    head.weight[0, unit] = 1.0
    head.bias.zero_()
    return torch.cat([values.flatten() for values in policy.values(rows)])


def as_task(problem: TokenMDP) -> Task:
    """A completion problem as a task: prompts as text, in proportion to their probability, and a reward on text.

    Raises:
        UsageError: if the probabilities are no shares of at most 1,000 lines.
    """
    tokenizer = problem_tokenizer(problem)
    shares = [Fraction(chance).limit_denominator(_MOST_EXAMPLES) for chance in problem.chance]
    lines = math.lcm(*(share.denominator for share in shares))
    apart = max(abs(float(share) - chance) for share, chance in zip(shares, problem.chance, strict=True))
    if lines > _MOST_EXAMPLES or sum(shares) != 1 or apart > 1e-12:
        raise UsageError(
            f"prompts with probabilities {problem.chance} are no data of {_MOST_EXAMPLES} lines: take rounder numbers"
        )
    examples = [
        Example(prompt=tokenizer.decode(prompt, special=True), columns={"number": number})
        for number, (prompt, share) in enumerate(zip(problem.prompts, shares, strict=True))
        for _ in range(int(share * lines))
    ]

    def worth(prompts: Sequence[str], completions: Sequence[str], number: Sequence[int]) -> list[float]:
        index = {done: place for place, done in enumerate(problem.completions)}
        found: list[float] = []
        for which, text in zip(number, completions, strict=True):
            tokens = tuple(tokenizer.encode(text))
            done = tokens if len(tokens) == problem.limit else (*tokens, problem.end)
            found.append(float(problem.rewards[which, index[done]]))
        return found

    reward = Reward(name="worth", function=worth, inline=True)
    return Task(name="completions", training=examples, held_out=examples, rewards=(reward,), correct="worth")


def engine_batches(
    problem: TokenMDP, policy: LanguagePolicy, *, prompts: int, group: int, batches: int, seed: int
) -> Iterator[Trajectory]:
    """Batches as a language run gets them: tokens of the engine, scored as text, sealed by the collector.

    Args:
        problem: whose prompts are completed and whose rewards count.
        policy: completes; its critic is not asked.
        prompts: per batch.
        group: completions of each; 1 for single ones, which belong to no group.
        batches: how many.
        seed: of the drawing.
    """
    task = as_task(problem)
    collector = CompletionCollector(
        task,
        policy.tokenizer,
        TorchEngine(policy, seed=seed),
        RewardPool(task.rewards, workers=1, deadline=10.0),
        CompletionConfig(prompts=prompts, group=group, limit=problem.limit),
        seed=seed,
        context=policy.context,
    )
    try:
        for number in range(batches):
            yield collector.collect(policy, number)
    finally:
        collector.close()

"""Completion of prompts over a tiny vocabulary: language problems small enough to write down every completion.

One sequence per row, as in `Trajectory`. For the prompt (5, 6) and the completion (7, 8), limit 2:

| position | 0 | 1 | 2 |
|---|---|---|---|
| `observation`: token read | 5 | 6 | 7 |
| `action`: token that follows | 6 | 7 | 8 |
| `mask`: the policy chose it | no | yes | yes |
| `time` | 0 | 0 | 1 |
| `reward` | 0 | 0 | r(prompt, completion) |

Positions after a row's end hold the end token in `observation` and `action` and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from upslope.exact.enumeration import Rows
from upslope.trajectory import Policy, Trajectory

Tokens: TypeAlias = tuple[int, ...]

MOST_COMPLETIONS = 50_000
"""Problems with more completions, over all prompts, are refused."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenMDP:
    """A prompt is drawn, the policy adds token after token until it chooses the end or `limit` tokens are there.

    Attributes:
        vocabulary: V; tokens are 0 .. V-1.
        end: the token that ends a completion: the last step is terminated.
        limit: most tokens of a completion, the end included; one that has not ended by then is truncated.
        prompts: token sequences, none of which begins another one, so that what was read so far says how much of the
            limit is left.
        prompt_probability: of each prompt; None for equal ones.
        reward: of (prompt, completion), the end token included where there is one; received with the last token.

    Raises:
        ValueError: if the pieces do not fit each other, or there are more than `MOST_COMPLETIONS` completions.
    """

    vocabulary: int
    end: int
    limit: int
    prompts: tuple[Tokens, ...]
    prompt_probability: tuple[float, ...] | None = None
    reward: Callable[[Tokens, Tokens], float]
    _completions: tuple[Tokens, ...] = field(init=False, repr=False)
    _rewards: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check everything, and ask for every reward once."""
        self._check_sizes()
        self._check_prompts()
        object.__setattr__(self, "_completions", tuple(self._enumerate()))
        rewards = [[float(self.reward(prompt, done)) for done in self._completions] for prompt in self.prompts]
        for prompt, row in zip(self.prompts, rewards, strict=True):
            for completion, value in zip(self._completions, row, strict=True):
                if not math.isfinite(value):
                    raise ValueError(f"reward({prompt}, {completion}) is {value}: every completion needs a finite one")
        object.__setattr__(self, "_rewards", torch.tensor(rewards, dtype=torch.float64))

    def _check_sizes(self) -> None:
        if self.vocabulary < 2:
            raise ValueError(f"vocabulary is {self.vocabulary}: a choice needs at least 2 tokens")
        if not 0 <= self.end < self.vocabulary:
            raise ValueError(f"end is {self.end}, which is no token of a vocabulary of {self.vocabulary}")
        if self.limit < 1:
            raise ValueError(f"limit is {self.limit}: a completion has at least 1 token")
        others = self.vocabulary - 1
        count = len(self.prompts) * (sum(others**length for length in range(self.limit)) + others**self.limit)
        if count > MOST_COMPLETIONS:
            raise ValueError(
                f"{len(self.prompts)} prompts with a vocabulary of {self.vocabulary} and a limit of {self.limit} have "
                f"{count} completions, more than {MOST_COMPLETIONS}: take a smaller vocabulary, limit or prompt set"
            )

    def _check_prompts(self) -> None:
        if not self.prompts:
            raise ValueError("there are no prompts: give at least one")
        for prompt in self.prompts:
            if not prompt:
                raise ValueError("a prompt is empty: the policy needs at least one token to read before it chooses")
            if min(prompt) < 0 or max(prompt) >= self.vocabulary:
                raise ValueError(f"prompt {prompt} has a token outside the vocabulary 0 .. {self.vocabulary - 1}")
        for first, second in product(range(len(self.prompts)), repeat=2):
            if first != second and self.prompts[second][: len(self.prompts[first])] == self.prompts[first]:
                raise ValueError(
                    f"prompt {self.prompts[second]} begins with prompt {self.prompts[first]}, so that a prefix would "
                    "not say how much of the limit is left: let prompts differ from their first tokens on"
                )
        chance = self.prompt_probability
        if chance is None:
            return
        if len(chance) != len(self.prompts):
            raise ValueError(f"{len(self.prompts)} prompts have {len(chance)} probabilities: give one for each")
        if not all(p >= 0.0 for p in chance) or abs(sum(chance) - 1.0) > 1e-9:
            raise ValueError(
                f"prompt_probability must be non-negative and sum to 1, got {chance} with sum {sum(chance)}"
            )

    def _enumerate(self) -> list[Tokens]:
        others = [token for token in range(self.vocabulary) if token != self.end]
        ended = [(*begin, self.end) for length in range(self.limit) for begin in product(others, repeat=length)]
        return ended + list(product(others, repeat=self.limit))

    @property
    def chance(self) -> tuple[float, ...]:
        """Probability of each prompt."""
        if self.prompt_probability is None:
            return (1.0 / len(self.prompts),) * len(self.prompts)
        return self.prompt_probability

    @property
    def positions(self) -> int:
        """Tokens of the longest prompt with the longest completion."""
        return max(len(prompt) for prompt in self.prompts) + self.limit

    @property
    def completions(self) -> tuple[Tokens, ...]:
        """Every completion, shortest ended ones first, then the truncated ones; the same for every prompt."""
        return self._completions

    @property
    def rewards(self) -> Tensor:
        """[prompts, completions] float64."""
        return self._rewards


def enumerate_completions(problem: TokenMDP, policy: Policy) -> Rows:
    """Every completion of every prompt, one row each: prompt by prompt, in the order of `problem.completions`.

        Pr(row) = Pr(prompt) * prod_t pi(a_t | tokens so far)^{m_t}

    Args:
        problem: what to complete.
        policy: `behaviour_log_prob` is its own.

    Returns:
        Rows whose `luck` is Pr(prompt), `group` the number of the prompt, `state` empty.
    """
    count, prompts = len(problem.completions), len(problem.prompts)
    prompt = torch.arange(prompts).repeat_interleave(count)
    length = torch.tensor([len(completion) for completion in problem.completions]).repeat(prompts)
    padded = [[*done, *[problem.end] * (problem.limit - len(done))] for done in problem.completions]
    trajectory, steps = _seal(
        problem, policy, prompt, torch.tensor(padded).repeat(prompts, 1), length, problem.rewards.flatten(), prompt
    )
    luck = torch.tensor(problem.chance, dtype=torch.float64)[prompt]
    return Rows(trajectory=trajectory, luck=luck, length=steps, state=torch.zeros(0, dtype=torch.long))


def sample_completions(
    problem: TokenMDP,
    policy: Policy,
    count: int | None,
    generator: np.random.Generator,
    *,
    groups: tuple[int, int] | None = None,
) -> Trajectory:
    """Draw prompts, and completions of them from the policy, in the row layout of `enumerate_completions`.

    Args:
        problem: what to complete.
        policy: who completes; asked once per position and distinct beginning.
        count: rows, each with a prompt of its own; `group` is the number of the prompt. None with `groups`.
        generator: where the randomness comes from.
        groups: (number, size) instead of `count`: rows of one group are neighbours and share the prompt, and `group`
            is the number of the group.

    Raises:
        ValueError: unless exactly one of `count` and `groups` is given and positive.
    """
    if (count is None) == (groups is None):
        raise ValueError("give either count (rows) or groups=(number, size), and None for count with groups")
    number, size = groups if groups is not None else (count or 0, 1)
    if number < 1 or size < 1:
        raise ValueError(f"asked for {number} draws of {size} rows: both must be at least 1")
    drawn = torch.from_numpy(generator.choice(len(problem.prompts), size=number, p=problem.chance))
    prompt = drawn.repeat_interleave(size)
    completion, length = _draw(
        problem, policy, prompt, torch.from_numpy(generator.random((problem.limit, len(prompt))))
    )
    index = {done: place for place, done in enumerate(problem.completions)}
    kept = [tuple(row[:end]) for row, end in zip(completion.tolist(), length.tolist(), strict=True)]
    reward = problem.rewards[prompt, torch.tensor([index[done] for done in kept])]
    group = prompt if groups is None else torch.arange(number).repeat_interleave(size)
    return _seal(problem, policy, prompt, completion, length, reward, group)[0]


def next_log_prob(policy: Policy, observation: Tensor, vocabulary: int) -> Tensor:
    """log pi(a | tokens up to t) of every token a at every position, [B, T, V], differentiable.

    Args:
        policy: any that gives the log-prob of one action per position.
        observation: [B, T] tokens.
        vocabulary: V.
    """
    rows, steps = observation.shape
    action = torch.arange(vocabulary).view(-1, 1, 1).expand(vocabulary, rows, steps)
    log_prob = policy.log_prob(observation.repeat(vocabulary, 1), action.reshape(-1, steps))
    return log_prob.view(vocabulary, rows, steps).permute(1, 2, 0)


def lay_out(problem: TokenMDP, beginnings: Sequence[tuple[int, Tokens]]) -> tuple[Tensor, Tensor]:
    """Token rows [N, W] of (prompt number, beginning of a completion), and where each row's last token stands, [N]."""
    rows = [(*problem.prompts[prompt], *begin) for prompt, begin in beginnings]
    width = max(len(row) for row in rows)
    padded = torch.tensor([[*row, *[problem.end] * (width - len(row))] for row in rows])
    return padded, torch.tensor([len(row) - 1 for row in rows])


def _draw(problem: TokenMDP, policy: Policy, prompt: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Completions [B, limit] padded by the end token, and their lengths [B], from uniform numbers [limit, B]."""
    completion = torch.full((len(prompt), problem.limit), problem.end)
    length = torch.zeros(len(prompt), dtype=torch.long)
    going = torch.ones(len(prompt), dtype=torch.bool)
    for step in range(problem.limit):
        begun = torch.cat([prompt[going].unsqueeze(-1), completion[going, :step]], dim=-1)
        distinct, which = torch.unique(begun, dim=0, return_inverse=True)
        tokens, last = lay_out(problem, [(row[0], tuple(row[1:])) for row in distinct.tolist()])
        with torch.no_grad():
            log_prob = next_log_prob(policy, tokens, problem.vocabulary)[torch.arange(len(tokens)), last]
        below = log_prob.exp().cumsum(-1)[which, :-1]
        token = (uniform[step, going].unsqueeze(-1) >= below).sum(-1)
        completion[going, step] = token
        length[going] += 1
        going[going.clone()] = token != problem.end
        if not bool(going.any()):
            break
    return completion, length


def _seal(
    problem: TokenMDP,
    policy: Policy,
    prompt: Tensor,
    completion: Tensor,
    length: Tensor,
    reward: Tensor,
    group: Tensor,
) -> tuple[Trajectory, Tensor]:
    """The rows of completions [R, limit] of given lengths, and how many positions each row has."""
    longest = max(len(tokens) for tokens in problem.prompts)
    prompts = torch.tensor([[*tokens, *[problem.end] * (longest - len(tokens))] for tokens in problem.prompts])
    start = torch.tensor([len(tokens) for tokens in problem.prompts])[prompt].unsqueeze(-1)
    sequence = torch.full((len(prompt), problem.positions), problem.end)
    sequence[:, :longest] = prompts[prompt]
    sequence.scatter_(1, start + torch.arange(problem.limit), completion)
    steps = start.squeeze(-1) + length - 1
    width = int(steps.max())
    position = torch.arange(width)
    inside = position < steps.unsqueeze(-1)
    mask = inside & (position >= start - 1)
    last = position == steps.unsqueeze(-1) - 1
    observation = sequence[:, :width].masked_fill(~inside, problem.end)
    action = sequence[:, 1 : width + 1].masked_fill(~inside, problem.end)
    truncated = last & (action != problem.end)
    with torch.no_grad():
        log_prob = policy.log_prob(observation, action)
    trajectory = Trajectory(
        observation=observation,
        action=action,
        reward=reward.unsqueeze(-1) * last,
        terminated=last & ~truncated,
        truncated=truncated,
        mask=mask,
        behaviour_log_prob=log_prob.masked_fill(~mask, 0.0),
        time=(position - start + 1).masked_fill(~mask, 0),
        final_observation=action[truncated],
        final_index=truncated.flatten().nonzero().squeeze(-1),
        group=group,
    )
    return trajectory, steps

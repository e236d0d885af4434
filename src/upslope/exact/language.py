"""Language policies small enough to be looked at whole: a table over prefixes, and a tiny causal transformer. float64.

Both read rows of tokens [..., T] from their first position on: what stands at a position depends on it and on earlier
ones, never on later ones, so that padding after a row's end changes nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import product
from typing import NoReturn, final

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from upslope.exact.tokens import TokenMDP, Tokens
from upslope.policies import Categorical, HeadDistribution
from upslope.trajectory import AskedTwice, Evaluation, Observation, Steps, Trajectory


class TokenPolicy(AskedTwice, nn.Module):
    """A distribution over the next token at every position of a row, with a critic; a `Policy`.

    Args:
        vocabulary: V.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.head = Categorical(vocabulary)

    @abstractmethod
    def logits_and_value(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] of the next token and the critic [B, T], for tokens [B, T]."""

    @property
    def sequential(self) -> bool:
        """Each step depends on all earlier positions of its row."""
        return True

    def sampler(self) -> NoReturn:
        """There is none.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a language policy completes prompts and takes no environment steps: use "
            "upslope.exact.sample_completions(problem, policy, count, generator)"
        )

    def log_prob(self, observation: Observation, action: Tensor) -> Tensor:
        """log pi(a_t | tokens up to t), [..., T]."""
        log_policy, _ = self._log_policy_and_value(observation)
        return log_policy.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def evaluate(self, steps: Steps) -> Evaluation:
        """log-prob, entropy, distribution and value at once, differentiable; [..., T]."""
        log_policy, value = self._log_policy_and_value(steps.observation)
        return Evaluation(
            log_prob=log_policy.gather(-1, steps.action.unsqueeze(-1)).squeeze(-1),
            entropy=-(log_policy.exp() * log_policy).sum(-1),
            distribution=HeadDistribution(self.head, log_policy),
            value=value,
        )

    def values(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """V_t and V'_t, both [B, T]: a row that is cut open is read once more, with its final token."""
        tokens, final = trajectory.observation, trajectory.final_observation
        assert isinstance(tokens, Tensor)
        assert isinstance(final, Tensor)
        rows, steps = tokens.shape
        row, after = trajectory.final_index // steps, trajectory.final_index % steps + 1
        longer = torch.cat([tokens, tokens[:, -1:]], dim=1)
        closed = longer[row].scatter(1, after.unsqueeze(-1), final.unsqueeze(-1))
        _, value = self.logits_and_value(torch.cat([longer, closed]))
        present = value[:rows, :steps]
        return present, trajectory.next_value(present, value[rows:].gather(1, after.unsqueeze(-1)).squeeze(-1))

    def _log_policy_and_value(self, observation: Observation) -> tuple[Tensor, Tensor]:
        assert isinstance(observation, Tensor)
        rows = observation.reshape(-1, observation.shape[-1])
        logits, value = self.logits_and_value(rows)
        return logits.log_softmax(-1).view(*observation.shape, -1), value.view(observation.shape)


@final
class PrefixTable(TokenPolicy):
    """A free row of logits and a free value for every prefix a problem has: every policy on it, exactly.

    Row 0 stands for whatever is no prefix of the problem (what follows an end), row 1 for the empty prefix. Rows of
    prefixes at which nothing is chosen never matter.

    Args:
        problem: whose prompts and completions give the prefixes.
        theta: [N, V] logits to begin with; zeros (the uniform policy) if None.
        value: [N] critic to begin with; zeros if None.

    Raises:
        ValueError: if a tensor does not have a row per prefix.
    """

    following: Tensor

    def __init__(self, problem: TokenMDP, theta: Tensor | None = None, value: Tensor | None = None) -> None:
        super().__init__(problem.vocabulary)
        self.number = _prefix_numbers(problem)
        count = len(self.number) + 1
        following = torch.zeros(count, problem.vocabulary, dtype=torch.long)
        for prefix, number in self.number.items():
            if prefix:
                following[self.number[prefix[:-1]], prefix[-1]] = number
        self.register_buffer("following", following)
        self.theta = nn.Parameter(_table("theta", theta, (count, problem.vocabulary)))
        self.value = nn.Parameter(_table("value", value, (count,)))

    def logits_and_value(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the table."""
        node = torch.ones(len(tokens), dtype=torch.long)
        nodes: list[Tensor] = []
        for position in range(tokens.shape[1]):
            node = self.following[node, tokens[:, position]]
            nodes.append(node)
        index = torch.stack(nodes, dim=1)
        return self.theta[index], self.value[index]


def _prefix_numbers(problem: TokenMDP) -> dict[Tokens, int]:
    """A number from 1 on for every beginning of a prompt, and for every prompt with a completion that has not ended."""
    others = [token for token in range(problem.vocabulary) if token != problem.end]
    beginnings = {prompt[:length]: None for prompt in problem.prompts for length in range(len(prompt))}
    open_ones = {
        (*prompt, *begun): None
        for prompt in problem.prompts
        for length in range(problem.limit + 1)
        for begun in product(others, repeat=length)
    }
    ordered = sorted({**beginnings, **open_ones}, key=lambda prefix: (len(prefix), prefix))
    return {prefix: number for number, prefix in enumerate(ordered, start=1)}


def _table(name: str, given: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if given is None:
        return torch.zeros(shape, dtype=torch.float64)
    if given.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape}, one row per prefix and one for the rest; got {tuple(given.shape)}"
        )
    return given.to(torch.float64).clone()


@final
class TinyTransformer(TokenPolicy):
    """A causal transformer in plain PyTorch: learned positions, pre-norm blocks, a critic.

    Args:
        vocabulary: V.
        positions: the longest row it can read, the final token of a truncated one included (`TokenMDP.positions`).
        width: of the residual stream.
        heads: of each attention.
        layers: blocks.
        seed: of the initial weights; not small, so that distributions differ from uniform ones.

    Raises:
        ValueError: if the heads do not divide the width.
    """

    def __init__(
        self, vocabulary: int, positions: int, *, width: int = 12, heads: int = 2, layers: int = 1, seed: int = 0
    ) -> None:
        if width % heads:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads: choose a multiple")
        super().__init__(vocabulary)
        self.positions = positions
        generator = torch.Generator().manual_seed(seed)
        self.embedding = _weight(generator, vocabulary, width, scale=1.0)
        self.position = _weight(generator, positions, width, scale=0.5)
        self.blocks = nn.ModuleList(_Block(generator, width, heads) for _ in range(layers))
        self.final_scale = nn.Parameter(torch.ones(width, dtype=torch.float64))
        self.readout = _weight(generator, vocabulary, width)
        self.critic = _weight(generator, 1, width)

    def logits_and_value(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One pass over whole rows.

        Raises:
            ValueError: if a row is longer than the positions.
        """
        steps = tokens.shape[1]
        if steps > self.positions:
            raise ValueError(f"rows of {steps} tokens need as many positions, this transformer has {self.positions}")
        stream = self.embedding[tokens] + self.position[:steps]
        for block in self.blocks:
            stream = block(stream)
        stream = layer_norm(stream, stream.shape[-1:]) * self.final_scale
        return stream @ self.readout.T, (stream @ self.critic.T).squeeze(-1)


class _Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, generator: torch.Generator, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_scale = nn.Parameter(torch.ones(width, dtype=torch.float64))
        self.inner_scale = nn.Parameter(torch.ones(width, dtype=torch.float64))
        self.query_key_value = _weight(generator, 3 * width, width)
        self.out = _weight(generator, width, width)
        self.inner = _weight(generator, 2 * width, width)
        self.inner_bias = nn.Parameter(torch.zeros(2 * width, dtype=torch.float64))
        self.outer = _weight(generator, width, 2 * width)

    def forward(self, stream: Tensor) -> Tensor:
        rows, steps, width = stream.shape
        normed = layer_norm(stream, (width,)) * self.attention_scale
        parts = (normed @ self.query_key_value.T).view(rows, steps, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        score = query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5
        later = torch.ones(steps, steps, dtype=torch.bool).triu(1)
        mixed = score.masked_fill(later, -torch.inf).softmax(-1) @ value
        stream = stream + mixed.transpose(1, 2).reshape(rows, steps, width) @ self.out.T
        normed = layer_norm(stream, (width,)) * self.inner_scale
        return stream + gelu(normed @ self.inner.T + self.inner_bias) @ self.outer.T


def _weight(generator: torch.Generator, outputs: int, inputs: int, *, scale: float | None = None) -> nn.Parameter:
    """Normal numbers, by default of a scale that keeps the size of what passes through."""
    spread = inputs**-0.5 if scale is None else scale
    return nn.Parameter(torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) * spread)

"""Named completion problems, each small enough to enumerate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from upslope.errors import UsageError
from upslope.exact.tokens import TokenMDP, Tokens


def token_problem(name: str) -> TokenMDP:
    """One of `TOKEN_PROBLEMS`, made anew.

    Raises:
        UsageError: if there is none, with the names there are.
    """
    if name not in TOKEN_PROBLEMS:
        raise UsageError(f"there is no completion problem {name!r}: choose from {', '.join(sorted(TOKEN_PROBLEMS))}")
    return TOKEN_PROBLEMS[name]()


def _tokens() -> TokenMDP:
    """Three tokens, limit 3, two prompts of different lengths and probabilities, rewards 0, 0.5 and 1."""
    return TokenMDP(vocabulary=3, end=0, limit=3, prompts=((1,), (2, 1)), prompt_probability=(0.4, 0.6), reward=_graded)


def _tokens_binary() -> TokenMDP:
    """Two tokens, limit 2, two prompts of different lengths, right or wrong: all pairs of groups can be listed."""
    return TokenMDP(
        vocabulary=2, end=0, limit=2, prompts=((1, 0), (0,)), prompt_probability=(0.5, 0.5), reward=_right_or_wrong
    )


def _tokens_longer() -> TokenMDP:
    """Four tokens, limit 5, three prompts of different lengths."""
    prompts = ((1,), (2, 3), (3, 1, 2))
    return TokenMDP(
        vocabulary=4, end=0, limit=5, prompts=prompts, prompt_probability=(0.5, 0.3, 0.2), reward=_repetition
    )


def _graded(prompt: Tokens, completion: Tokens) -> float:
    """1 for the prompt's last token and then the end; half for the prompt's first token anywhere else, or at a cut."""
    if completion == (prompt[-1], 0):
        return 1.0
    if completion[-1] != 0:
        return 0.5 if completion[-1] == prompt[0] else 0.0
    return 0.5 if prompt[0] in completion[1:] else 0.0


def _right_or_wrong(prompt: Tokens, completion: Tokens) -> float:
    """After (1, 0) one must say 1 and end, after (0,) go on to the limit."""
    return float(completion == ((1, 0) if prompt == (1, 0) else (1, 1)))


def _repetition(prompt: Tokens, completion: Tokens) -> float:
    """The share of the prompt that the completion says again in order, plus half for ending."""
    said = [token for token in completion if token != 0]
    same = sum(a == b for a, b in zip(prompt, said, strict=False))
    return same / len(prompt) + 0.5 * (completion[-1] == 0)


TOKEN_PROBLEMS: Mapping[str, Callable[[], TokenMDP]] = MappingProxyType(
    {"tokens": _tokens, "tokens-binary": _tokens_binary, "tokens-longer": _tokens_longer}
)
"""How to make each named problem."""

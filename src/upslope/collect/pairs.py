"""Pairs of a better and a worse answer -> trajectories: from data, or drawn from the policy one starts from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from upslope.collect.engines.protocol import Engine
from upslope.collect.example_order import ExampleOrder
from upslope.collect.experience import PairConfig
from upslope.collect.samples import Sample, SampleSource, Scorer, has_spread, reasons
from upslope.collect.tasks.protocol import Example, Examples, Task
from upslope.collect.text_rows import (
    TokenRow,
    Tokens,
    answer_end,
    answer_tokens,
    build_rows,
    check_length,
    prompt_tokens,
)
from upslope.errors import UsageError
from upslope.policies.language.tokenizer import Tokenizer
from upslope.trajectory import Policy, Trajectory, Tree
from upslope.typed_tree import TreeError, read_fields

MOST_PROMPTS_PER_PAIR = 50
"""Drawing pairs gives up once this many prompts per wanted pair were tried: the rewards hardly tell answers apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPair:
    """Two answers to one prompt as the very tokens that were drawn.

    Attributes:
        prompt: tokens.
        chosen: the better answer, with its end token where it ended.
        rejected: the worse one.
        chosen_ended: whether it ended; False: the length limit cut it.
        rejected_ended: the same of the worse one.
        chosen_total: what the better answer is worth.
        rejected_total: what the worse one is worth.
        chosen_own: per token of the better answer, whether the policy chose it; None for all of them.
        rejected_own: the same of the worse one.
    """

    prompt: Tokens
    chosen: Tokens
    rejected: Tokens
    chosen_ended: bool
    rejected_ended: bool
    chosen_total: float
    rejected_total: float
    chosen_own: tuple[bool, ...] | None = None
    rejected_own: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse pieces that do not fit each other."""
        for name, answer, own in (
            ("chosen", self.chosen, self.chosen_own),
            ("rejected", self.rejected, self.rejected_own),
        ):
            if own is not None and (len(own) != len(answer) or not own[-1:] == (True,)):
                raise ValueError(
                    f"{name}_own says of each of the {len(answer)} tokens whether the policy chose it, as it did the "
                    f"last; got {len(own)} entries"
                )


class PairCollector:
    """Brings pairs, the chosen answer's row before the rejected one's; a `Collector`.

    Rewards are +1 and -1, `group` is the number of the pair within the batch, and `behaviour_log_prob` is NaN where the
    mask is True. Whoever learns from pairs keeps two rows together (`Passes.together = 2`).

    Args:
        pairs: examples with a completion (the chosen answer) and a rejected one, or pairs that were drawn.
        tokenizer: of the policy.
        config: how many.
        seed: of the run.
        context: most tokens that the model reads (`LanguagePolicy.context`).
    """

    def __init__(
        self,
        pairs: Examples | Sequence[TokenPair],
        tokenizer: Tokenizer,
        config: PairConfig,
        *,
        seed: int,
        context: int,
    ) -> None:
        self._pairs = pairs
        self._tokenizer = tokenizer
        self._config = config
        self._context = context
        self._order = ExampleOrder(len(pairs), seed=seed)
        self._metrics: dict[str, float] = {}

    def collect(self, policy: Policy, update: int) -> Trajectory:
        """The next pairs.

        Raises:
            UsageError: naming the pair that lacks an answer, has two equal ones, cannot be written as tokens or does
                not fit the context.
        """
        trajectory = self.take(self._order.take(self._config.pairs), version=update)
        lengths = trajectory.mask.sum(dim=1).float().view(-1, 2).mean(dim=0).tolist()
        self._metrics = {
            "rows": float(len(trajectory.mask)),
            "learnt_tokens": float(trajectory.mask.sum()),
            "chosen_length": lengths[0],
            "rejected_length": lengths[1],
        }
        return trajectory

    def take(self, indices: Iterable[int], *, version: int) -> Trajectory:
        """These pairs in this order, whatever comes next in training.

        Args:
            indices: of the pairs.
            version: written into every row.

        Raises:
            UsageError: as `collect`.
        """
        rows = [row for index in indices for row in self._rows(index)]
        group = [place // 2 for place in range(len(rows))]
        return build_rows(rows, end_token=self._tokenizer.end_token, group=group, version=version)

    def _rows(self, index: int) -> tuple[TokenRow, TokenRow]:
        pair, where = self._pairs[index], f"pair {index}"
        if isinstance(pair, Example):
            prompt, chosen, rejected = self._encode(pair, where)
            rows = (
                TokenRow(prompt=prompt, answer=chosen, reward=1.0),
                TokenRow(prompt=prompt, answer=rejected, reward=-1.0),
            )
        else:
            rows = (
                _drawn_row(pair.prompt, pair.chosen, pair.chosen_own, 1.0, pair.chosen_ended),
                _drawn_row(pair.prompt, pair.rejected, pair.rejected_own, -1.0, pair.rejected_ended),
            )
        if rows[0].answer == rows[1].answer:
            raise UsageError(
                f"{where} has the same chosen and rejected answer: there is nothing to prefer; leave it out"
            )
        for row in rows:
            check_length(row, self._context, where)
        return rows

    def _encode(self, example: Example, where: str) -> tuple[Tokens, Tokens, Tokens]:
        for name, answer in (("completion (the chosen answer)", example.completion), ("rejected", example.rejected)):
            if answer is None:
                raise UsageError(f"{where} has no {name}: learning from pairs needs both answers in every example")
        if example.turns is not None:
            raise UsageError(
                f"{where} is a conversation, and of given pairs only single turns can be learnt from: let pairs of "
                "conversations be drawn (experience.drawn), which keeps whose tokens are whose"
            )
        prompt, ending = (
            prompt_tokens(self._tokenizer, example, where),
            answer_end(self._tokenizer, example.prompt, where),
        )
        return (
            prompt,
            answer_tokens(self._tokenizer, example.completion or "", f"{where}, chosen", ending=ending),
            answer_tokens(self._tokenizer, example.rejected or "", f"{where}, rejected", ending=ending),
        )

    def metrics(self) -> dict[str, float]:
        """Rows, learnt tokens and mean lengths of the last update; nothing before the first."""
        return dict(self._metrics)

    def snapshot(self) -> Tree:
        """Which pairs come next."""
        return {"pairs": self._order.snapshot()}

    def restore(self, tree: Tree) -> None:
        """Go on exactly there.

        Raises:
            ValueError: if it was made with another number of pairs.
        """
        self._order.restore(tree["pairs"])

    def close(self) -> None:
        """There is nothing to close."""


def draw_pairs(
    task: Task,
    tokenizer: Tokenizer,
    engine: Engine,
    rewards: Scorer,
    config: PairConfig,
    *,
    seed: int,
    context: int,
    name: str = "training example",
) -> list[TokenPair]:
    """Pairs of the best and the worst of `config.group` completions of a prompt, where their totals differ.

    The engine draws with the weights it has. Prompts come in the task's order, every sample from its own stream, by
    (prompt number, sample). Of equally good completions the first counts. Tokens are kept as they were drawn.

    Args:
        task: prompts, and what their answers are worth.
        tokenizer: of the policy.
        engine: draws with the policy that training starts from.
        rewards: scores.
        config: `drawn` pairs from groups of `group`.
        seed: of the run.
        context: most tokens that the model reads.
        name: what the examples are called in errors.

    Raises:
        ValueError: if `config.drawn` is None.
        UsageError: if a prompt does not fit the context, or after `MOST_PROMPTS_PER_PAIR` prompts per pair there are
            too few pairs.
    """
    if config.drawn is None:
        raise ValueError("how many pairs to draw is not said: set drawn, or take the pairs of the data")
    source = SampleSource(
        task=task,
        tokenizer=tokenizer,
        engine=engine,
        rewards=rewards,
        sampling=config.sampling,
        group=config.group,
        limit=config.limit,
        context=context,
    )
    order = ExampleOrder(len(task.training), seed=seed)
    pairs: list[TokenPair] = []
    unscored: list[Sample] = []
    while len(pairs) < config.drawn:
        if order.cursor >= MOST_PROMPTS_PER_PAIR * config.drawn:
            raise _too_few(len(pairs), order.cursor, config, unscored)
        first = order.cursor
        indices = order.take(min(config.pairs, MOST_PROMPTS_PER_PAIR * config.drawn - first))
        keys = [(first + number,) for number in range(len(indices))]
        drawn = source.draw(task.training, indices, keys, name)
        for group in drawn.groups:
            unscored += [sample for sample in group if sample.total is None]
            pairs += _pair([sample for sample in group if sample.total is not None])
        if all(sample.total is None for group in drawn.groups for sample in group):
            raise _too_few(len(pairs), order.cursor, config, unscored)
    return pairs[: config.drawn]


def _pair(scored: Sequence[Sample]) -> list[TokenPair]:
    """The best and the worst of a group, if they differ."""
    if len(scored) < 2 or not has_spread(scored):
        return []
    best, worst = max(scored, key=_total), min(scored, key=_total)
    return [
        TokenPair(
            prompt=best.prompt,
            chosen=best.completion.tokens,
            rejected=worst.completion.tokens,
            chosen_ended=best.completion.ended,
            rejected_ended=worst.completion.ended,
            chosen_total=_total(best),
            rejected_total=_total(worst),
            chosen_own=best.completion.chosen,
            rejected_own=worst.completion.chosen,
        )
    ]


def _drawn_row(prompt: Tokens, answer: Tokens, own: tuple[bool, ...] | None, reward: float, ended: bool) -> TokenRow:
    return TokenRow(prompt=prompt, answer=answer, chosen=own, reward=reward, ended=ended)


def _total(sample: Sample) -> float:
    assert sample.total is not None
    return sample.total


def _too_few(found: int, prompts: int, config: PairConfig, unscored: Sequence[Sample]) -> UsageError:
    failures = f" {len(unscored)} completions had no total: {reasons(unscored)}." if unscored else ""
    return UsageError(
        f"{prompts} prompts with {config.group} completions each gave {found} pairs of the {config.drawn} wanted: in "
        f"nearly every group no two totals differ.{failures} Raise group or the temperature, start from a policy "
        "that is sometimes right, or take rewards that tell its answers apart"
    )


def pairs_to_lines(pairs: Iterable[TokenPair], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """One JSON-able record per drawn pair: its tokens, which are what is read back, and their text for people.

    Args:
        pairs: as drawn.
        tokenizer: of the policy.
    """
    for pair in pairs:
        text = {name: tokenizer.decode(getattr(pair, name), special=True) for name in ("prompt", "chosen", "rejected")}
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(pair).items()}
        yield {**fields, "text": text}


def pairs_from_lines(lines: Iterable[Mapping[str, Any]], tokenizer: Tokenizer) -> list[TokenPair]:
    """The pairs of records that `pairs_to_lines` wrote.

    Args:
        lines: records.
        tokenizer: of the policy; the same as when they were written.

    Raises:
        UsageError: naming the record that is no such pair, or has tokens that the tokenizer does not.
    """
    pairs: list[TokenPair] = []
    for number, line in enumerate(lines, start=1):
        where = f"pair {number}"
        try:
            pair = read_fields(TokenPair, {name: value for name, value in line.items() if name != "text"}, where)
        except TreeError as error:
            raise UsageError(str(error)) from error
        for name, tokens in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
            if not tokens:
                raise UsageError(f"{where}.{name} is empty: it needs at least one token")
            if min(tokens) < 0 or max(tokens) >= tokenizer.size:
                raise UsageError(
                    f"{where}.{name} has a token outside 0 .. {tokenizer.size - 1}: the pairs were drawn with another "
                    "tokenizer; draw them again"
                )
        pairs.append(pair)
    return pairs

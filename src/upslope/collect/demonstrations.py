"""Data -> trajectories: answers to learn from, and answers that are labelled good or bad. Nobody sampled them here."""

from __future__ import annotations

from dataclasses import replace

from upslope.collect.conversations import demonstration, role_of
from upslope.collect.example_order import ExampleOrder
from upslope.collect.experience import DemonstrationConfig
from upslope.collect.tasks.protocol import Example, Task
from upslope.collect.text_rows import TokenRow, build_rows, check_length
from upslope.errors import UsageError
from upslope.policies.language.tokenizer import Tokenizer
from upslope.trajectory import Policy, Trajectory, Tree


class DemonstrationCollector:
    """Brings the task's examples with their answers, an end token after each; a `Collector`.

    Answers to messages end as the chat template ends the assistant's turns.
    Where an answer is a conversation, the replies to the policy's turns are read and not learnt.

    No example is skipped: one without an answer is an error. An empty answer is just the end token. Nobody sampled
    these answers: `behaviour_log_prob` is NaN where the mask is True.

    Args:
        task: whose training examples.
        tokenizer: of the policy.
        config: how many, and whether prompts are learnt, too.
        seed: of the run.
        context: most tokens that the model reads (`LanguagePolicy.context`).
        labelled: the examples are good and bad answers, each by itself (for KTO): rewards are +1 where the example's
            column `label` is true and -1 where it is false. Otherwise they are 0. Data that comes in pairs gives the
            same two kinds of row through a `PairCollector`.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        config: DemonstrationConfig,
        *,
        seed: int,
        context: int,
        labelled: bool = False,
    ) -> None:
        self._task = task
        self._tokenizer = tokenizer
        self._config = config
        self._context = context
        self._labelled = labelled
        self._order = ExampleOrder(len(task.training), seed=seed)
        self._metrics: dict[str, float] = {}

    def collect(self, policy: Policy, update: int) -> Trajectory:
        """The next examples.

        Raises:
            UsageError: naming the example that has no answer or label, cannot be written as tokens or does not fit the
                context.
        """
        rows = [self._row(index) for index in self._order.take(self._config.rows)]
        trajectory = build_rows(rows, end_token=self._tokenizer.end_token, version=update)
        self._metrics = {"rows": float(len(rows)), "learnt_tokens": float(trajectory.mask.sum())}
        return trajectory

    def _row(self, index: int) -> TokenRow:
        example, where = self._task.training[index], f"training example {index} of task {self._task.name!r}"
        if example.completion is None:
            raise UsageError(
                f"{where} has a prompt and no completion: learning from demonstrations needs one in every example "
                '(an empty one, "", is an answer that ends at once)'
            )
        row = replace(
            demonstration(self._tokenizer, example, where, role=role_of(self._task)),
            reward=_label(example, where) if self._labelled else 0.0,
            prompt_chosen=not self._config.completion_only,
        )
        check_length(row, self._context, where)
        return row

    def metrics(self) -> dict[str, float]:
        """Rows and learnt tokens of the last update; nothing before the first."""
        return dict(self._metrics)

    def snapshot(self) -> Tree:
        """Which examples come next."""
        return {"examples": self._order.snapshot()}

    def restore(self, tree: Tree) -> None:
        """Go on exactly there.

        Raises:
            ValueError: if it was made with another number of examples.
        """
        self._order.restore(tree["examples"])

    def close(self) -> None:
        """There is nothing to close."""


def _label(example: Example, where: str) -> float:
    label = example.columns.get("label")
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise UsageError(
            f"{where} needs a column label that is true (a good answer) or false (a bad one), got {label!r}"
        )
    return 1.0 if label else -1.0

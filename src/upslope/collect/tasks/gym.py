"""Any task of reasoning-gym by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, Final

from upslope.collect.rewards.protocol import Reward
from upslope.collect.tasks.protocol import Example, Message, Task
from upslope.collect.tasks.rows import PLACE
from upslope.errors import UsageError
from upslope.streams import Purpose, derived_seed

LENGTH: Final = 1 << 24
"""How many training examples a task has."""

_ATTEMPTS: Final = 64
_HELD_OUT_SEED: Final = 0
_TRAINING, _HELD_OUT = 2, 3

Setting = bool | int | float | str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasoningGym:
    """A task of reasoning-gym (`pip install 'upslope[rewards]'`): endless problems that it makes and scores itself."""

    name: str = "spell_backward"
    """Which task; `reasoning_gym.factory.DATASETS` holds them all."""
    settings: dict[str, Setting] = field(default_factory=dict[str, Setting])
    """Settings of that task, such as min_word_len; lists are written as JSON text, "[2, 3]"."""
    prompt_pattern: str | None = None
    """Regular expression whose first group is all that is left of a question, for tiny models: `: (\\w+)$`."""
    template: str = PLACE
    """What a question is set into, at {prompt}."""
    chat: bool = False
    """Give the prompt to the tokenizer's chat template as the user's message."""
    answer_mark: str | None = None
    """What is scored follows the last of these marks in a completion; None scores all of it."""
    reward: str = "score"
    """score: what reasoning-gym gives, partial credit included; correct: 1 for full marks, else 0."""
    held_out: int = 256
    """Different problems to judge by, none of which is trained on; the same for every seed."""
    alphabet: str | None = None
    """Every character that texts may hold, for a character tokenizer built here; None where a model has its own."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if self.held_out < 1:
            raise ValueError(f"held_out must be at least 1, got {self.held_out}")
        if PLACE not in self.template:
            raise ValueError(f"template must hold {PLACE}, got {self.template!r}")
        if self.reward not in ("score", "correct"):
            raise ValueError(f"reward must be 'score' or 'correct', got {self.reward!r}")
        if self.answer_mark == "":
            raise ValueError("answer_mark must not be empty; None scores the whole completion")
        if self.prompt_pattern is not None:
            try:
                groups = re.compile(self.prompt_pattern).groups
            except re.error as error:
                raise ValueError(f"prompt_pattern {self.prompt_pattern!r} is no regular expression: {error}") from error
            if not groups:
                raise ValueError(f"prompt_pattern {self.prompt_pattern!r} has no group in parentheses to keep")

    def build(self, seed: int) -> Task:
        """The task.

        Raises:
            UsageError: if reasoning-gym has no such task or it refuses the settings, a question does not match the
                pattern, or there are too few different problems.
            ModuleNotFoundError: without reasoning-gym.
        """
        settings = json.dumps(self.settings, sort_keys=True)
        held_out = _held_out(self, settings)
        grader = GymScore(self.name, settings, self.answer_mark)
        score = Reward(name="score", function=grader, weight=float(self.reward == "score"))
        full = GymScore(self.name, settings, self.answer_mark, full_marks=True)
        correct = Reward(name="correct", function=full, weight=float(self.reward == "correct"))
        return Task(
            name=self.name,
            training=GymExamples(self, settings, seed, frozenset(str(example.prompt) for example in held_out)),
            held_out=held_out,
            rewards=(score, correct),
            correct="correct",
            alphabet=self.alphabet,
        )

    def example(self, settings: str, seed: int, index: int) -> Example:
        """Item `index` of the task with this seed."""
        entry = _entry(self.name, settings, seed, index)
        question, answer = entry["question"], entry["answer"]
        if self.prompt_pattern is not None:
            found = re.search(self.prompt_pattern, question)
            if found is None or found[1] is None:
                raise UsageError(f"prompt_pattern {self.prompt_pattern!r} does not match the question {question!r}")
            question = found[1]
        text = self.template.replace(PLACE, question)
        completion = answer if isinstance(answer, str) and answer else None
        if completion is not None and self.answer_mark is not None:
            completion = f"{self.answer_mark}{completion}"
        columns = {"answer": answer if isinstance(answer, str) else None, "gym_seed": seed, "gym_index": index}
        prompt = (Message(role="user", content=text),) if self.chat else text
        return Example(prompt=prompt, completion=completion, columns=columns)


class GymExamples:
    """Training examples: item i is a pure function of (seed, i), and no held-out prompt.

    Args:
        config: the task.
        settings: its settings as JSON.
        seed: the run's.
        held_out: prompts that are left out; another problem takes their place.
    """

    def __init__(self, config: ReasoningGym, settings: str, seed: int, held_out: frozenset[str]) -> None:
        self._config = config
        self._settings = settings
        self._seed = _gym_seed(seed, _TRAINING)
        self._held_out = held_out

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int, /) -> Example:
        if not 0 <= index < LENGTH:
            raise IndexError(f"examples have indices from 0 to {LENGTH - 1}, got {index}")
        for attempt in range(_ATTEMPTS):
            example = self._config.example(self._settings, self._seed, index + attempt * LENGTH)
            if str(example.prompt) not in self._held_out:
                return example
        raise UsageError(f"{self._config.name} has hardly any problem that is not held out: set held_out lower")


@dataclass(frozen=True, slots=True)
class GymScore:
    """A reward function: what reasoning-gym's own verifier says of an answer.

    Attributes:
        name: of the task.
        settings: its settings as JSON.
        answer_mark: what is scored follows the last of these marks; None scores all.
        full_marks: 1 for the full score and 0 for less, instead of the score.
    """

    name: str
    settings: str
    answer_mark: str | None
    full_marks: bool = False

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        *,
        gym_seed: Sequence[int],
        gym_index: Sequence[int],
        **_: object,
    ) -> list[float | None]:
        """Score completions of the problems with these seeds and indices."""
        scores = [
            self._score(text, seed, index) for text, seed, index in zip(completions, gym_seed, gym_index, strict=True)
        ]
        return [float(score >= 1.0) if self.full_marks else score for score in scores]

    def _score(self, text: str, seed: int, index: int) -> float:
        if self.answer_mark is not None:
            _, mark, text = text.rpartition(self.answer_mark)
            if not mark:
                return 0.0
        entry = _entry(self.name, self.settings, seed, index)
        return float(_dataset(self.name, self.settings, seed).score_answer(text.strip(), entry))


def _held_out(config: ReasoningGym, settings: str) -> tuple[Example, ...]:
    seed = _gym_seed(_HELD_OUT_SEED, _HELD_OUT)
    chosen: dict[str, Example] = {}
    for index in range(config.held_out * _ATTEMPTS):
        example = config.example(settings, seed, index)
        chosen.setdefault(str(example.prompt), example)
        if len(chosen) == config.held_out:
            return tuple(chosen.values())
    raise UsageError(
        f"{config.name} makes hardly more than {len(chosen)} different prompts with these settings: set held_out lower"
    )


def _gym_seed(seed: int, part: int) -> int:
    """31 bits: the item's index is added to it, and generators of 32 bits must still take the sum."""
    return derived_seed(seed, Purpose.TASK, part) >> 32


@lru_cache(maxsize=4096)
def _entry(name: str, settings: str, seed: int, index: int) -> Mapping[str, Any]:
    return _dataset(name, settings, seed)[index]


@cache
def _dataset(name: str, settings: str, seed: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reasoning-gym is not installed: pip install 'upslope[rewards]'") from error
    if name not in DATASETS:
        raise UsageError(f"reasoning-gym has no task {name!r}; it has {', '.join(sorted(DATASETS))}")
    plain = {key: _plain(value) for key, value in json.loads(settings).items()}
    if set(plain) & {"seed", "size"}:
        raise UsageError("seed and size are not settings of a task here: the run's seed decides, and there is no end")
    try:
        return reasoning_gym.create_dataset(name, size=LENGTH * (_ATTEMPTS + 1), seed=seed, **plain)
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"reasoning-gym refuses the settings {plain} of {name}: {error}") from error


def _plain(value: Setting) -> Any:
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value

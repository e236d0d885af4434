"""Stand-ins for the language collectors' tests: an engine that follows a script, and rewards called in place."""

import numpy as np

from upslope.collect.engines.protocol import Completion
from upslope.collect.rewards.protocol import NOT_APPLICABLE, Failed, Reward, Scores
from upslope.collect.tasks.protocol import Example, Task
from upslope.policies.language.tokenizer import character_tokenizer

TOKENIZER = character_tokenizer("0123456789+=ab")


def ids(text):
    return tuple(TOKENIZER.encode(text))


class ScriptedEngine:
    """Answers request number n of a call by `script(key)`: a text (ended), (text, False) (cut), or a Completion."""

    def __init__(self, script):
        self.script, self.version, self.updates, self.calls = script, 0, [], []

    def update(self, version):
        self.version = version
        self.updates.append(version)

    def generate(self, requests, *, sampling, limit, stop=()):
        self.calls.append((list(requests), sampling, limit, stop))
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        answer = self.script(request)
        if isinstance(answer, Completion):
            return answer
        text, ended = answer if isinstance(answer, tuple) else (answer, True)
        tokens = (*ids(text), TOKENIZER.end_token) if ended else ids(text)
        log_prob = tuple(-0.5 - 0.25 * place for place in range(len(tokens)))
        return Completion(tokens=tokens, log_prob=log_prob, ended=ended, version=self.version)


def random_digit(request):
    """A digit that only the sample's key decides."""
    return str(np.random.default_rng([7, *request.key]).integers(10))


class InlineRewards:
    """Every part by a function of (completion, columns)."""

    def __init__(self, **functions):
        self.functions, self.closed, self.prompts = functions, False, []

    def score(self, prompts, completions, columns):
        self.prompts += prompts
        pairs = list(zip(completions, columns, strict=True))
        parts = {name: tuple(function(*pair) for pair in pairs) for name, function in self.functions.items()}
        return Scores(total=tuple(map(_total, zip(*parts.values(), strict=True))), parts=parts)

    def close(self):
        self.closed = True


def _total(outcomes):
    applied = [outcome for outcome in outcomes if outcome is not NOT_APPLICABLE]
    return None if not applied or any(isinstance(outcome, Failed) for outcome in applied) else sum(applied)


def right(completion, columns):
    return float(completion == columns["answer"])


def make_task(examples, *, rewards=("correct",), stop=()):
    return Task(
        name="scripted",
        training=examples,
        held_out=examples,
        rewards=tuple(Reward(name=name, function=right, inline=True) for name in rewards),
        correct="correct",
        stop=stop,
    )


def sums(count):
    """Prompts of different lengths: "1=", "1+1=", ... with the number of ones as the answer."""
    return [Example(prompt="+".join("1" * (n + 1)) + "=", columns={"answer": str(n + 1)}) for n in range(count)]

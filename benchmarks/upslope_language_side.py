"""upslope's side of `language.py`: `python upslope_language_side.py CASE FOLDER`, one step per line that it reads.

The pieces are those of `upslope.train.language.session`, put together as it does. With `--profile N` it takes N steps
on its own and prints where their time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time

import torch

from language_cases import BETA, CASES, EXAMPLES, LEARNING_RATE, MAX_NORM, Case, Parts, answer, asked, digits, examples
from upslope.algorithms import GRPO, SFT, Preference
from upslope.algorithms.protocol import Algorithm, Now
from upslope.collect.completions import CompletionCollector
from upslope.collect.demonstrations import DemonstrationCollector
from upslope.collect.engines.torch import TorchEngine
from upslope.collect.experience import CompletionConfig, DemonstrationConfig, PairConfig
from upslope.collect.pairs import PairCollector
from upslope.collect.rewards.pool import RewardPool
from upslope.collect.rewards.protocol import Reward
from upslope.collect.tasks.protocol import Example, Task
from upslope.policies.language.folder import load_language_policy
from upslope.policies.language.policy import LanguagePolicy
from upslope.policies.language.reference import freeze
from upslope.streams import Purpose, stream
from upslope.train.config import OptimizerConfig
from upslope.train.optimizer import FlatOptimizer
from upslope.train.step import learn

SEED = 0
PRODUCT = 1024
"""Rows and columns of the products that the machine is measured with."""


class Stepper:
    """One whole step per call."""

    def __init__(self, case: Case, folder: str) -> None:
        self.parts = Parts()
        policy = load_language_policy(folder)
        optimizer = OptimizerConfig(kind="adamw", learning_rate=LEARNING_RATE, max_gradient_norm=MAX_NORM)
        self.policy = policy
        self.optimizer = FlatOptimizer(policy, optimizer)
        self.algorithm: Algorithm = _algorithm(case)
        self.reference = freeze(policy, "start") if case.method == "dpo" else None
        self.collector = self._collector(case, policy)
        self.update = 0

    def _collector(
        self, case: Case, policy: LanguagePolicy
    ) -> CompletionCollector | DemonstrationCollector | PairCollector:
        rewards = (Reward(name="digits", function=digits, inline=True),)
        task = Task(
            name=case.method,
            training=[_example(row) for row in examples(case, EXAMPLES)],
            held_out=(),
            rewards=rewards,
            correct="digits",
        )
        tokenizer, context = policy.tokenizer, policy.context
        if case.method == "sft":
            demonstrations = DemonstrationConfig(rows=case.prompts)
            return DemonstrationCollector(task, tokenizer, demonstrations, seed=SEED, context=context)
        if case.method == "dpo":
            pairs = PairConfig(pairs=case.prompts)
            return PairCollector(task.training, tokenizer, pairs, seed=SEED, context=context)
        if not case.ragged:
            tokenizer.end = frozenset()  # the other side is forbidden to draw the end token; here it ends nothing
        completions = CompletionConfig(prompts=case.prompts, group=case.group, limit=case.limit)
        engine = TorchEngine(policy, seed=SEED, slots=completions.slots)
        pool = RewardPool(rewards, workers=1, deadline=10.0)
        self.parts.watch(engine, "update", "generate")
        self.parts.watch(engine, "generate", "generate")
        self.parts.watch(pool, "score", "reward")
        return CompletionCollector(task, tokenizer, engine, pool, completions, seed=SEED, context=context)

    def __call__(self) -> dict[str, float]:
        """CPU seconds, and the tokens that were learnt from."""
        self.parts.clear()
        begun = time.process_time()
        trajectory = self.collector.collect(self.policy, self.update)
        collected = time.process_time()
        learn(
            self.policy,
            self.algorithm,
            self.optimizer,
            trajectory,
            now=Now(),
            learning_rate=LEARNING_RATE,
            generator=stream(SEED, Purpose.SHUFFLE, 0, self.update),
            reference=self.reference,
        )
        learnt = time.process_time()
        self.update += 1
        measured = {"step": learnt - begun, "learn": learnt - collected, "tokens": int(trajectory.mask.sum())}
        return measured | self.parts.seconds


def _algorithm(case: Case) -> Algorithm:
    if case.method == "grpo":
        return GRPO()
    return SFT() if case.method == "sft" else Preference(beta=BETA)


def _example(row: dict[str, str]) -> Example:
    if "chosen" in row:
        return Example(prompt=row["prompt"], completion=row["chosen"], rejected=row["rejected"])
    return Example(**row)  # pyright: ignore[reportArgumentType]


def machine_rate() -> float:
    """Floating-point operations per CPU second of large float32 products."""
    left, right = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)
    begun = time.process_time()
    torch.mm(left, right)
    return 2 * PRODUCT**3 / (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("folder", help="of the model")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS")
    options = parser.parse_args()
    torch.set_num_threads(1)
    step = Stepper(CASES[options.case], options.folder)
    if options.profile:
        step()
        profile = cProfile.Profile(time.process_time)
        for _ in range(options.profile):
            profile.runcall(step)
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
        return
    while asked():
        measured = step()
        answer(**measured, machine=machine_rate())


if __name__ == "__main__":
    main()

"""What a language model's run begins with and never changes: task, starting policy, reference, drawn pairs.

All of it lies in the run directory, so that going on depends on nothing outside it: the starting policy as `start/`, a
reference that is another policy as `reference/`, pairs that were drawn as `pairs.jsonl`. Their hashes stand in
`config.json` and in every checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upslope.collect.experience import CompletionConfig, PairConfig
from upslope.collect.tasks.protocol import Task
from upslope.errors import UsageError
from upslope.policies.language.sampling import Sampling
from upslope.streams import Purpose, derived_seed
from upslope.train.language.config import START, LanguageRun
from upslope.train.run_directory import RunDirectory
from upslope.train.saving import save
from upslope.train.session import ResumeError
from upslope.train.starting_weights import check_hashes as check_hashes
from upslope.train.storage import write_file_atomically
from upslope.trajectory import Trajectory

if TYPE_CHECKING:
    from upslope.collect.engines.torch import TorchEngine
    from upslope.collect.pairs import TokenPair
    from upslope.collect.rewards.pool import RewardPool
    from upslope.policies.language.policy import LanguagePolicy
    from upslope.policies.language.reference import Reference
    from upslope.policies.language.tokenizer import Tokenizer

PAIRS, HELD_OUT_PAIRS = "pairs", "held_out_pairs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """What a run begins with.

    Attributes:
        task: prompts and rewards.
        policy: to be trained, before its first step.
        reference: the frozen policy that the algorithm stays close to, or None.
        rewards: scores completions; None where the task has no rewards.
        pairs: that were drawn to learn from and to judge by, by the name of their file.
        hashes: of the starting policy, the reference and the pairs, by name.
    """

    task: Task
    policy: LanguagePolicy
    reference: Reference | None
    rewards: RewardPool | None
    pairs: dict[str, list[TokenPair]]
    hashes: dict[str, str]


def freeze_new(run: LanguageRun, task: Task, start: Path | None) -> Frozen:
    """What a new run begins with.

    Args:
        run: the configuration.
        task: built.
        start: the folder `run.start_from` stands for, or None.

    Raises:
        UsageError: if model, tokenizer, task or reference do not go together, or there is no such device.
    """
    from upslope.policies.language.tokenizer import character_tokenizer

    source = run.model.source if start is None else str(start)
    tokenizer = None
    if source is None:
        if task.alphabet is None:
            raise UsageError(
                f"the task {task.name!r} has no alphabet to build a tokenizer from: set model.source to a folder with "
                "a model and its tokenizer, or start_from"
            )
        tokenizer = character_tokenizer(task.alphabet)
    policy = _policy(run, source, tokenizer)
    reference = _reference(run, policy, run.reference)
    with ExitStack() as unless_done:
        rewards = reward_pool(run, task)
        if rewards is not None:
            unless_done.callback(rewards.close)
        pairs = _draw(run, task, policy, rewards)
        frozen = _frozen(task, policy, reference, rewards, pairs)
        unless_done.pop_all()
    return frozen


def keep(frozen: Frozen, run: LanguageRun, directory: RunDirectory) -> None:
    """Write all that a resumed run needs of it into the run directory.

    Raises:
        CheckpointError: if it cannot be written.
    """
    save(frozen.policy, directory.start)
    if frozen.reference is not None and run.reference != START:
        save(frozen.reference.policy, directory.reference)
    for name, pairs in frozen.pairs.items():
        write_file_atomically(directory.pairs(name), _lines(pairs, frozen.policy.tokenizer))


def freeze_again(run: LanguageRun, task: Task, directory: RunDirectory, recorded: dict[str, str]) -> Frozen:
    """The same from the run directory.

    Args:
        run: the configuration.
        task: built.
        directory: of the run.
        recorded: hashes of what it began with.

    Raises:
        ResumeError: if something is not what it was.
    """
    policy = _policy(run, str(directory.start), None)
    place = run.reference if run.reference in (None, START) else str(directory.reference)
    reference = _reference(run, policy, place)
    pairs = {name: read_pairs(directory.pairs(name), policy.tokenizer) for name in _drawn(run)}
    frozen = _frozen(task, policy, reference, None, pairs)
    check_hashes(frozen.hashes, recorded)
    return replace(frozen, rewards=reward_pool(run, task))


def reward_pool(run: LanguageRun, task: Task) -> RewardPool | None:
    """What scores the task's completions and answers the policy's turns; None where it has no rewards.

    Raises:
        UsageError: if all rewards have weight 0.
    """
    from upslope.collect.rewards.pool import RewardPool

    if not task.rewards:
        return None
    if all(reward.weight == 0.0 for reward in task.rewards):
        raise UsageError(f"all rewards of task {task.name!r} have weight 0: nothing would be learnt; weigh one of them")
    settings = run.rewards
    return RewardPool(
        task.rewards,
        workers=settings.workers,
        deadline=settings.deadline,
        outage=settings.outage,
        dialogue=task.dialogue,
    )


def sampling_of(run: LanguageRun) -> Sampling:
    """The distribution whose log-probs are learnt from: that of the completions; the model's own for given data."""
    return run.experience.sampling if isinstance(run.experience, CompletionConfig) else Sampling()


def evaluation_seed(run: LanguageRun) -> int:
    """Of everything that is drawn to judge."""
    return derived_seed(run.seed, Purpose.EVALUATION_GENERATION)


def _policy(run: LanguageRun, source: str | None, tokenizer: Tokenizer | None) -> LanguagePolicy:
    from upslope.policies.language.model import build_policy

    if run.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "the device is cuda, and PyTorch finds no CUDA device here: set device to cpu, or install a PyTorch with "
            "CUDA and its driver"
        )
    config = replace(run.model, source=source)
    return build_policy(config, tokenizer=tokenizer, seed=run.seed, sampling=sampling_of(run), device=run.device)


def _reference(run: LanguageRun, policy: LanguagePolicy, place: str | None) -> Reference | None:
    from upslope.policies.language.model import build_policy
    from upslope.policies.language.reference import freeze

    if place is None:
        return None
    if place == START:
        return freeze(policy, START)
    config = replace(run.model, source=place, lora=None, value_head=False)
    other = build_policy(config, tokenizer=None, seed=run.seed, sampling=sampling_of(run), device=run.device)
    if other.tokenizer.backend.get_vocab() != policy.tokenizer.backend.get_vocab():
        raise UsageError(
            f"the reference {run.reference} has another tokenizer than the policy, so that their tokens do not mean "
            "the same: take a reference of the same family"
        )
    return freeze(other, str(run.reference))


def _drawn(run: LanguageRun) -> tuple[str, ...]:
    """Names of the files of pairs that are drawn."""
    experience = run.experience
    if not isinstance(experience, PairConfig) or experience.drawn is None:
        return ()
    return (PAIRS, HELD_OUT_PAIRS) if run.judges_pairs and run.evaluation.times else (PAIRS,)


def _draw(
    run: LanguageRun, task: Task, policy: LanguagePolicy, rewards: RewardPool | None
) -> dict[str, list[TokenPair]]:
    from upslope.collect.pairs import draw_pairs

    names, experience = _drawn(run), run.experience
    if not names:
        return {}
    assert isinstance(experience, PairConfig)
    if rewards is None:
        raise UsageError(
            f"pairs are drawn by rewards, and the task {task.name!r} has none: set experience.drawn to None"
        )
    found: dict[str, list[TokenPair]] = {}
    for name in names:
        training = name == PAIRS
        found[name] = draw_pairs(
            task if training else replace(task, training=task.held_out),
            policy.tokenizer,
            engine_of(policy, run.seed if training else evaluation_seed(run), experience.pairs * experience.group),
            rewards,
            experience if training else replace(experience, drawn=run.evaluation.prompts),
            seed=run.seed,
            context=policy.context,
            name="training example" if training else "held-out example",
        )
    return found


def on_device(device: str, trajectory: Trajectory) -> Trajectory:
    """The trajectory where the model lies."""
    if device == "cpu":
        return trajectory
    moved = {
        entry.name: value.to(device)
        for entry in fields(trajectory)
        if isinstance(value := getattr(trajectory, entry.name), Tensor)
    }
    return replace(trajectory, **moved)


def engine_of(policy: LanguagePolicy, seed: int, slots: int) -> TorchEngine:
    """What draws with the policy's weights."""
    from upslope.collect.engines.torch import TorchEngine

    return TorchEngine(policy, seed=seed, slots=slots)


def _frozen(
    task: Task,
    policy: LanguagePolicy,
    reference: Reference | None,
    rewards: RewardPool | None,
    pairs: dict[str, list[TokenPair]],
) -> Frozen:
    from upslope.policies.language.description import content_hash

    hashes = {START: content_hash(policy)}
    if reference is not None:
        hashes["reference"] = reference.content_hash
    for name, drawn in pairs.items():
        hashes[name] = hashlib.sha256(_lines(drawn, policy.tokenizer)).hexdigest()
    return Frozen(task=task, policy=policy, reference=reference, rewards=rewards, pairs=pairs, hashes=hashes)


def _lines(pairs: Sequence[TokenPair], tokenizer: Tokenizer) -> bytes:
    from upslope.collect.pairs import pairs_to_lines

    return "".join(json.dumps(line) + "\n" for line in pairs_to_lines(pairs, tokenizer)).encode()


def read_pairs(path: Path, tokenizer: Tokenizer) -> list[TokenPair]:
    """Pairs that were drawn and written.

    Raises:
        ResumeError: if they cannot be read.
    """
    from upslope.collect.pairs import pairs_from_lines

    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return pairs_from_lines(lines, tokenizer)
    except (OSError, ValueError) as error:
        raise ResumeError(f"{path} cannot be read ({error}): bring it back from a copy, or start a new run") from error

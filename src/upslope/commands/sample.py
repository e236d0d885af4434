"""`upslope sample`: a policy completes a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text
from tyro.conf import Positional

from upslope.commands.common import DONE, say
from upslope.errors import UsageError, checking_usage
from upslope.options import parse

_LIMIT = 256


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Complete a prompt with a language model's policy."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run directory, or any folder of a causal language model."""
    prompt: str
    """Text to go on from."""
    count: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 1
    """Completions."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Draw among the likeliest tokens, this many."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens with this much probability between them."""
    limit: int | None = None
    """Most tokens; what the context has room for, at most 256, if not given."""
    seed: int = 0
    """Decides what is drawn."""
    chat: bool = False
    """Give the prompt to the chat template as the user's message."""
    best: bool = False
    """Take the policy that was best in evaluation during the run, not the last one."""


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    command = parse(Sample, arguments, program="upslope sample")
    if command.count < 1:
        raise UsageError(f"-n must be at least 1, got {command.count}")
    folder = find_policy(command)
    from upslope.collect.engines.protocol import Request
    from upslope.collect.engines.torch import TorchEngine
    from upslope.policies.language.folder import load_language_policy
    from upslope.policies.language.sampling import Sampling

    with checking_usage():
        sampling = Sampling(temperature=command.temperature, top_k=command.top_k, top_p=command.top_p)
        policy = load_language_policy(folder, sampling=sampling)
        tokenizer = policy.tokenizer
        if command.chat:
            prompt = tuple(tokenizer.render([{"role": "user", "content": command.prompt}]))
        else:
            prompt = tuple(tokenizer.encode(command.prompt))
        room = policy.context - len(prompt)
        limit = max(min(room, _LIMIT), 1) if command.limit is None else command.limit
        engine = TorchEngine(policy, seed=command.seed, slots=command.count)
        requests = [Request(prompt=prompt, key=(number,)) for number in range(command.count)]
        completions = engine.generate(requests, sampling=sampling, limit=limit)
    console = Console()
    for completion in completions:
        kept = completion.tokens[:-1] if completion.tokens[-1:] and completion.tokens[-1] in tokenizer.end else None
        text = tokenizer.decode(completion.tokens if kept is None else kept)
        cut = "" if completion.ended else ", cut off"
        note = f"   {len(completion.tokens)} tokens{cut}, log-prob {sum(completion.log_prob):.3f}"
        say(console, Text.assemble((command.prompt, "dim"), (text, "bold"), (note, "dim")))
    return DONE


def find_policy(command: Sample) -> Path:
    """The policy's folder.

    Args:
        command: as parsed.

    Raises:
        UsageError: there is none, or it is an agent's.
    """
    from upslope.policies.language.library import require_language
    from upslope.train.config_file import recorded_run
    from upslope.train.language import LanguageRun

    place = command.run
    if not place.is_dir():
        raise UsageError(f"there is no directory {place}: give a run directory or the folder of a language model")
    if (place / "metrics.jsonl").is_file() or (place / "checkpoints").is_dir():
        if recorded_run(place).get("class") != LanguageRun.__name__:
            raise UsageError(f"{place} trained an agent, which completes no prompts: give a language model's run")
        folder = place / ("best" if command.best else "policy")
        if not folder.is_dir():
            raise UsageError(f"{place} has no {folder.name}/ yet: let the run come to its first checkpoint")
        place = folder
    elif command.best:
        raise UsageError(f"{place} is no run directory, so there is no best policy in it: leave --best out")
    require_language()
    return place

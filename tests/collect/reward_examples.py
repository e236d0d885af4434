"""Reward functions for the tests, as a user's file holds them."""

import asyncio
import ctypes
import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def correct(prompts, completions, answer, level=None):
    assert len(prompts) == len(completions) == len(answer) == len(level)
    return [None if one is None else float(text == one) for text, one in zip(completions, answer, strict=True)]


def names(completions, **columns):
    assert sorted(columns) == ["answer", "level", "prompts"]
    return [float(sum(value is None for value in values)) for values in zip(*columns.values(), strict=True)]


async def later(completions):
    await asyncio.sleep(0.001)
    return tuple(len(text) for text in completions)


def nothing(completions):
    return [None] * len(completions)


def constant(completions):
    return [1] * len(completions)


def chance(completions):
    return [random.random() for _ in completions]


def process(completions):
    return [float(os.getpid())] * len(completions)


def heavy_modules(completions):
    return [float("torch" in sys.modules or "numpy" in sys.modules)] * len(completions)


def whole_library(completions):
    import upslope

    return [upslope.PPO().gamma] * len(completions)


def talks(completions):
    print("x" * 200_000)
    return [1.0] * len(completions)


def with_child(completions):
    return [float(subprocess.Popen(["sleep", "600"]).pid)] * len(completions)


def positional(completions, /):
    return [1.0] * len(completions)


def _fault(kind):
    match kind:
        case "raise":
            raise ValueError("this one is bad")
        case "hang":
            time.sleep(600)
        case "exit":
            sys.exit(4)
        case "vanish":
            os._exit(5)
        case "crash":
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            ctypes.string_at(0)
        case "memory":
            bytearray(2**62)


def faulty(completions):
    """Does what a completion says."""
    for text in completions:
        _fault(text)
    if "count" in completions:
        return [1.0] * (len(completions) + 1)
    if "one" in completions:
        return [1.0]
    if "single" in completions:
        return 1.0
    if "endless" in completions:
        return itertools.repeat(1.0)
    if "huge" in completions:
        return [0.5] * 10_000_000
    values = {"nan": math.nan, "inf": -math.inf, "text": "1.0", "list": [1.0]}
    return [values.get(text, 1.0) for text in completions]

"""Replies for the tests, as a user's file holds them."""

import time


def shout(turns, answer):
    """The column, twice; nothing after "."."""
    return [None if said[-1].endswith(".") else f"{right}{right};" for said, right in zip(turns, answer, strict=True)]


def picky(turns, answer):
    if "3" in answer:
        raise RuntimeError("no threes")
    return shout(turns, answer)


def hangs(turns, answer):
    if "3" in answer:
        time.sleep(60)
    return shout(turns, answer)


def numbers(turns):
    return [1.5 for _ in turns]

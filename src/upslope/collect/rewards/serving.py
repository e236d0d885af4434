"""A worker's conversation: it loads reward functions once and calls them, one request after the other."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from multiprocessing import spawn
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

from upslope.collect.rewards import processes
from upslope.collect.rewards.calling import Accepted, CallError, call, describe, seed_from
from upslope.collect.rewards.functions import warm_up
from upslope.collect.rewards.http import HttpReward, is_address
from upslope.collect.rewards.protocol import Failed, NotApplicable, Outcome, Reply
from upslope.user_code import function_from_file

_Functions: TypeAlias = dict[str, tuple[Callable[..., Any], Accepted]]


def serve(descriptor: int, main_module: Mapping[str, str]) -> None:
    """Answer requests until the other side closes.

    Args:
        descriptor: of the connection.
        main_module: how `multiprocessing` finds the parent's main module, for functions that stand in it.
    """
    processes.mark_as_worker()
    connection = Connection(descriptor)
    functions: _Functions = {}
    broken = _import_main(main_module)
    with asyncio.Runner() as runner:
        while True:
            try:
                answer = _answer(connection, functions, broken, runner)
                connection.send_bytes(json.dumps(answer).encode())
            except (EOFError, OSError):
                return


def _import_main(main_module: Mapping[str, str]) -> str | None:
    try:
        spawn.prepare(dict(main_module))
    except (Exception, SystemExit) as error:  # noqa: BLE001 (the answer to the first request says so)
        return describe(error)
    return None


def _answer(
    connection: Connection, functions: _Functions, broken: str | None, runner: asyncio.Runner
) -> dict[str, Any]:
    try:
        message = connection.recv()
    except (EOFError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 (whatever the objects in it raise on arrival)
        return {"kind": "refused", "reason": broken or describe(error)}
    if message["kind"] == "load":
        return {"kind": "refused", "reason": broken} if broken else _load(message, functions)
    try:
        function, accepted = functions[message["name"]]
        seed_from(message["completions"])
        columns = message["columns"]
        given = message["prompts"], message["completions"], columns
        outcomes = call(function, accepted, *given, texts=message["texts"], runner=runner)
    except CallError as error:
        return {"kind": "failed", "reason": str(error), "divisible": error.divisible}
    return {"kind": "scored", "outcomes": [_encode(outcome) for outcome in outcomes]}


def _load(message: Mapping[str, Any], functions: _Functions) -> dict[str, Any]:
    try:
        function = _find(message["function"], message["seconds"], message["outage"])
        accepted = Accepted.of(function)
        warm_up(function)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever a user's file raises)
        return {"kind": "refused", "reason": describe(error)}
    functions[message["name"]] = function, accepted
    names = None if accepted.names is None else sorted(accepted.names)
    return {"kind": "loaded", "names": names, "required": sorted(accepted.required)}


def _find(given: Any, seconds: float, outage: float) -> Callable[..., Any]:
    if not isinstance(given, str):
        return given
    if is_address(given):
        return HttpReward(address=given, seconds=seconds, outage=outage)
    folder = str(Path(given.rpartition(":")[0]).parent)
    if folder not in sys.path:
        sys.path.append(folder)  # what stands beside the file can be imported, as if the file were run
    return function_from_file(given, what="reward")


def _encode(outcome: Outcome | Reply) -> Any:
    if isinstance(outcome, Failed):
        return {"reason": outcome.reason}
    return None if isinstance(outcome, NotApplicable) else outcome

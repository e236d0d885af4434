"""What a worker process does: it is run by path, imports little, and answers in JSON.

It must be light, since it is started again whenever a reward function had to be killed: `upslope` itself, which brings
PyTorch, is imported only if a reward function uses it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from types import ModuleType
from typing import Any

_PARENT_DEATH_SIGNAL = 1
_PACKAGES = ("upslope", "upslope.collect", "upslope.collect.rewards")


def _import_later(name: str) -> None:
    """A package whose submodules can be imported at once; its own code runs when a name of it is asked for."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    loader, module = spec.loader, importlib.util.module_from_spec(spec)

    def load(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        del vars(module)["__getattr__"]
        loader.exec_module(module)
        return getattr(module, attribute)

    vars(module)["__getattr__"] = load
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        vars(sys.modules[parent])[last] = module


def _die_with_parent(life: int, parent: int, from_main_thread: bool) -> None:
    """No orphans: a thread waits for the end of a pipe that the parent holds, and the kernel watches besides.

    The kernel means the parent's thread that made this process, so it is asked only if that was the main one.
    """
    import signal

    def watch() -> None:
        os.read(life, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    if sys.platform == "linux" and from_main_thread:
        import ctypes

        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Serve until the parent closes the connection."""
    settings = json.loads(sys.argv[1])
    sys.path[:] = settings["path"]
    sys.argv[:] = [""]
    _die_with_parent(settings["life"], settings["parent"], settings["from_main_thread"])
    for name in _PACKAGES:
        _import_later(name)
    serving: ModuleType = importlib.import_module("upslope.collect.rewards.serving")
    serving.serve(settings["connection"], settings["main"])


if __name__ == "__main__":
    main()

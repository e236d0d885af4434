"""Functions from a user's own file, `path/to/file.py:function`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upslope.errors import UsageError


def function_from_file(place: str, *, what: str) -> Callable[..., Any]:
    """The function `path/to/file.py:function`. The file is the user's own code and is run, as a module of its own.

    Args:
        place: a Python file, a colon, and the name of something in it that can be called.
        what: what it is to be, in words for errors, such as "recipe".

    Raises:
        UsageError: if there is no such file, or no such function in it.
    """
    file, _, name = place.rpartition(":")
    path, advice = Path(file), f"a {what} of your own is given as path/to/file.py:function"
    if not path.is_file():
        raise UsageError(f"there is no file {file!r}; {advice}")
    spec = importlib.util.spec_from_file_location(f"upslope_{what}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file!r} is no Python file; {advice}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found = vars(module).get(name)
    if not callable(found):
        raise UsageError(f"{file!r} has no function {name!r}")
    return found

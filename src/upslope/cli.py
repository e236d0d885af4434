"""The command line: find the command that was asked for, run it, and say plainly what was wrong with the input.

Exit codes: 0 done, 1 an audit that is not as declared or a seed that failed, 75 interrupted and saved, 2 for input that
cannot be used.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from upslope.commands.common import BAD_INPUT, DONE, KILLED, say
from upslope.errors import UsageError

_DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def main(argv: Sequence[str] | None = None) -> int:
    """The `upslope` command.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _overview()
        return DONE
    name, *rest = arguments
    try:
        if name not in _COMMANDS:
            raise UsageError(f"there is no command {name!r}; {_close(name, _COMMANDS)}")
        return _COMMANDS[name].act(rest)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else BAD_INPUT
    except KeyboardInterrupt:
        _complain("interrupted")
        return KILLED
    except Exception as error:
        if not _refused(error):
            raise
        _complain("\n".join([str(error), *getattr(error, "__notes__", [])]))
        return BAD_INPUT


def _refused(error: Exception) -> bool:
    """Whether the library refuses what it was given, as against failing at it.

    It does with errors of its own types, and where a package is missing that it names; the disk may refuse too.
    Everything else keeps its traceback: it is a mistake of ours, or one in the user's own code, which the traceback
    leads to.
    """
    if type(error).__module__.startswith("upslope."):
        return True
    if isinstance(error, ModuleNotFoundError):
        return error.name is None
    if isinstance(error, OSError):
        return error.errno in _DISK_REFUSES
    return False


def _complain(text: str) -> None:
    say(Console(stderr=True), Text.assemble(("upslope: ", "bold red"), text))


def _close(word: str, words: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, words, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"the commands are {', '.join(words)}"


def _overview() -> None:
    """What there is."""
    console = Console(highlight=False)
    console.print("[bold]upslope[/bold]: policy gradients from the theorem to practice\n")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for name, command in _COMMANDS.items():
        table.add_row(Text(f"  {name} {command.takes}", style="cyan"), command.purpose)
    console.print(table)
    console.print("\n`upslope COMMAND --help` says more; `upslope train RECIPE --help` shows every setting.")


@dataclass(frozen=True, kw_only=True)
class _Command:
    takes: str
    purpose: str
    file: str

    def act(self, arguments: list[str]) -> int:
        """Import the command's file and run it."""
        return importlib.import_module(f"upslope.commands.{self.file}").act(arguments)


_COMMANDS = {
    "train": _Command(
        takes="RECIPE... [--setting value ...] [--seeds N]",
        purpose="train a recipe, or several in turn, from one seed or from several at once",
        file="train",
    ),
    "recipes": _Command(takes="", purpose="list the built-in recipes", file="recipes"),
    "tune": _Command(
        takes="RECIPE [--search setting=low..high ...] [--trials N]",
        purpose="search for better settings of a recipe",
        file="tune",
    ),
    "solve": _Command(
        takes="PROBLEM [--plot FILE] [--against RUN ...]",
        purpose="the best policy of a named problem, exactly, and the way there",
        file="solve",
    ),
    "describe": _Command(
        takes="RECIPE|RUN|ALGORITHM [--against B]",
        purpose="show the exact estimator and every setting, or where two estimators differ",
        file="describe",
    ),
    "resume": _Command(takes="RUN [--steps N]", purpose="go on with a run", file="resume"),
    "evaluate": _Command(
        takes="RUN [--episodes N | --prompts N --samples K]", purpose="judge the policy of a run", file="evaluate"
    ),
    "record": _Command(
        takes="RUN --out FILE [--episodes N]", purpose="record episodes of an agent into a file", file="record"
    ),
    "sample": _Command(takes='RUN --prompt "..." [-n N]', purpose="complete a prompt with a policy", file="sample"),
    "compare": _Command(takes="RUN... [--out PICTURE]", purpose="compare runs over seeds", file="compare"),
    "diagnose": _Command(takes="RUN", purpose="say what is wrong with a run, if something is", file="diagnose"),
    "audit": _Command(
        takes="ALGORITHM|FILE.py:FUNCTION [--problem NAME]",
        purpose="hold a gradient against the exact one",
        file="audit",
    ),
    "check-env": _Command(takes="ID", purpose="check an environment", file="check_environment"),
}

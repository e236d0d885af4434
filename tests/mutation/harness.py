"""Breaks upslope on purpose, one slip at a time, and asks the audit and the identities what they see.

`Workshop` starts one server, which imports everything once; each question is answered in a child forked from it, where
the mutated functions get new code in place, so that whoever imported them sees the slip. The server itself stays whole.
"""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import CodeType, FunctionType, ModuleType, TracebackType
from typing import Literal, TypeAlias

import pytest

HERE = Path(__file__).parent
DEADLINE = 240
"""Seconds a child may take; one that hangs is killed, and counts as caught by the deadline."""

Kind: TypeAlias = Literal["audit", "identity"]


@dataclass(frozen=True)
class Mutant:
    """A slip that somebody could make.

    Attributes:
        name: short, unique.
        module: where, such as "upslope.estimators.returns".
        old: source text that occurs there exactly once.
        new: what stands in its place.
        breaks: what that does, in words.
        rows: rows of the audit that should see it: "subject", or "subject: words of the setting".
        identities: tests in tests/identities that should see it: "test", or "test[words of its parameters]".
    """

    name: str
    module: str
    old: str
    new: str
    breaks: str
    rows: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()

    @property
    def killers(self) -> tuple[str, ...]:
        """Rows first."""
        return self.rows + self.identities


@dataclass(frozen=True)
class Finding:
    """What one killer said.

    Attributes:
        killer: the row or test.
        kind: audit or identity.
        failed: the setting or example it failed on; None if it passed.
        crashed: whether it failed with an error rather than with a wrong number.
        detail: the first words of the failure.
    """

    killer: str
    kind: Kind
    failed: str | None = None
    crashed: bool = False
    detail: str = ""


class MutantError(Exception):
    """A mutant that cannot be made, because the source has moved on."""


def mutate(mutant: Mutant) -> None:
    """Give the live functions of the module the code of the mutated source; changes this process for good.

    Raises:
        MutantError: if `old` does not occur exactly once, or what changes is not the body or defaults of a function,
            or a constant of the module.
    """
    module = importlib.import_module(mutant.module)
    source = inspect.getsource(module)
    count = source.count(mutant.old)
    if count != 1:
        raise MutantError(
            f"mutant {mutant.name!r}: its source text occurs {count} times in {mutant.module}, not once; bring "
            f"it up to date with the source:\n{mutant.old}"
        )
    mutated = source.replace(mutant.old, mutant.new)
    before, after = _definitions(ast.parse(source)), _definitions(ast.parse(mutated))
    changed = [name for name in before if name in after and ast.dump(before[name]) != ast.dump(after[name])]
    if before.keys() != after.keys() or not changed:
        raise MutantError(f"mutant {mutant.name!r} does not change the inside of a function of {mutant.module}")
    codes = dict(_codes(compile(mutated, str(module.__file__), "exec")))
    functions = dict(_functions(module))
    for name in changed:
        node = after[name]
        if isinstance(node, ast.Assign):
            setattr(module, name, ast.literal_eval(node.value))
        else:
            _replace(functions[name], codes[name], node)


Definition: TypeAlias = ast.FunctionDef | ast.Assign


def _definitions(tree: ast.Module) -> dict[str, Definition]:
    """Functions and methods by qualified name, and constants of the module."""
    found: dict[str, Definition] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
        elif isinstance(node, ast.ClassDef):
            methods = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
            found.update({f"{node.name}.{method.name}": method for method in methods})
    return found


def _codes(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant.co_qualname, constant
            yield from _codes(constant)


def _functions(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    """The live functions by qualified name: also methods, properties, static and class methods."""
    for member in vars(module).values():
        if inspect.isclass(member) and member.__module__ == module.__name__:
            for each in vars(member).values():
                yield from _bare(each)
        else:
            yield from _bare(member)


def _bare(member: object) -> Iterator[tuple[str, FunctionType]]:
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, staticmethod | classmethod):
        member = member.__func__
    elif isinstance(member, cached_property):
        member = member.func
    elif callable(member):
        member = inspect.unwrap(member)
    if isinstance(member, FunctionType):
        yield member.__qualname__, member


def _replace(function: FunctionType, code: CodeType, node: ast.FunctionDef) -> None:
    function.__code__ = code
    arguments = node.args
    if function.__defaults__:
        function.__defaults__ = tuple(
            _value(default, live) for default, live in zip(arguments.defaults, function.__defaults__, strict=True)
        )
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is not None and function.__kwdefaults__ is not None:
            function.__kwdefaults__[argument.arg] = _value(default, function.__kwdefaults__[argument.arg])


def _value(node: ast.expr, live: object) -> object:
    """The value of a literal default; of any other, such as `torch.float32`, the one in force."""
    return ast.literal_eval(node) if isinstance(node, ast.Constant | ast.UnaryOp) else live


class Killers:
    """Every row of the audit and every identity, by name. Imports all of them."""

    def __init__(self) -> None:
        from hypothesis import Phase, settings

        settings.register_profile("mutation", phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False)
        settings.load_profile("mutation")
        sys.path[:0] = [str(HERE), str(HERE.parent / "identities")]
        import upslope.auditing.table
        from upslope.auditing.cases.case import Case

        files = sorted((HERE.parent / "identities").glob("test_*.py"))
        self._modules = [importlib.import_module(path.stem) for path in files]
        self._cases: list[Case] = [*upslope.auditing.table.all_cases(), *importlib.import_module("sampled").cases()]

    def run(self, killer: str) -> Finding:
        """Ask one killer, named as in `Mutant.rows` or `Mutant.identities`.

        Raises:
            MutantError: if there is none of that name.
        """
        return self._identity(killer) if killer.startswith("test_") else self._rows(killer)

    def _rows(self, killer: str) -> Finding:
        subject, _, words = killer.partition(": ")
        cases = [case for case in self._cases if case.subject == subject and words in case.setting]
        if not cases:
            raise MutantError(f"the audit has no row {killer!r}")
        for case in cases:
            try:
                report = case.run()
            except Exception as error:
                return Finding(killer, "audit", case.setting, True, _words(error))
            if not report.as_declared:
                detail = f"{report.verdict}, declared {report.declared}; bias {report.relative_bias:.2g}"
                return Finding(killer, "audit", case.setting, False, detail)
        return Finding(killer, "audit")

    def _identity(self, killer: str) -> Finding:
        test, _, words = killer.rstrip("]").partition("[")
        found = [getattr(module, test) for module in self._modules if test in vars(module)]
        cases = [each for each in _parametrised(found[0]) if words in _label(each)] if found else []
        if not cases:
            raise MutantError(f"tests/identities has no test {killer!r}")
        for arguments in cases:
            try:
                found[0](**arguments)
            except (Exception, pytest.fail.Exception) as error:
                where = _label(arguments) or "an example"
                crashed = not isinstance(error, AssertionError | pytest.fail.Exception)
                return Finding(killer, "identity", where, crashed, _words(error))
        return Finding(killer, "identity")


def _parametrised(test: Callable[..., None]) -> Iterator[dict[str, object]]:
    """The arguments of each case of a test under `pytest.mark.parametrize`."""
    cases: list[dict[str, object]] = [{}]
    for mark in getattr(test, "pytestmark", ()):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else list(mark.args[0])
        names = [name.strip() for name in names]
        several = len(names) > 1
        values = [dict(zip(names, each if several else (each,), strict=True)) for each in mark.args[1]]
        cases = [{**case, **value} for case in cases for value in values]
    yield from cases


def _label(arguments: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items())


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def answer(killers: Killers, mutant: Mutant | None, names: tuple[str, ...]) -> list[Finding]:
    """Ask killers in turn, of each kind until the first that fails; without a mutant, all of them."""
    if mutant is not None:
        mutate(mutant)
    findings: list[Finding] = []
    for name in names:
        kind = "identity" if name.startswith("test_") else "audit"
        if mutant is not None and any(each.kind == kind and each.failed for each in findings):
            continue
        findings.append(killers.run(name))
    return findings


def serve() -> None:
    """Answer questions from standard input, one JSON line each, in forked children."""
    import torch

    torch.set_num_threads(1)
    killers = Killers()
    _warm_up()
    gc.freeze()
    for line in sys.stdin:
        question = json.loads(line)
        mutant = Mutant(**question["mutant"]) if question["mutant"] else None
        print(_in_a_child(killers, mutant, tuple(question["killers"])), flush=True)


def _warm_up() -> None:
    """What every child would otherwise load for itself: nothing here touches the code under test."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(
        max_examples=5, database=None, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(st.integers(), st.floats(), st.lists(st.booleans()), st.data())
    def draw(number: int, real: float, flags: list[bool], data: st.DataObject) -> None:
        data.draw(st.sampled_from([number, real, len(flags)]))

    draw()


def _in_a_child(killers: Killers, mutant: Mutant | None, names: tuple[str, ...]) -> str:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        signal.alarm(DEADLINE)
        try:
            said = {"findings": [asdict(finding) for finding in answer(killers, mutant, names)]}
        except MutantError as error:
            said = {"error": str(error)}
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if text:
        return text
    ending = (
        f"killed by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else "died without a word"
    )
    return json.dumps({"findings": [asdict(Finding("deadline", "identity", ending, True))]})


class Workshop:
    """A server at work; a context manager."""

    def __enter__(self) -> Workshop:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.__exit__(kind, error, trace)

    def ask(self, killers: tuple[str, ...], mutant: Mutant | None = None) -> list[Finding]:
        """What the killers say, of the source as it is or of a mutant of it.

        Raises:
            MutantError: if the mutant cannot be made, or a killer is not there.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        question = {"mutant": None if mutant is None else asdict(mutant), "killers": killers}
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        if not line:
            raise MutantError("the server of mutants has died; see its standard error")
        said = json.loads(line)
        if "error" in said:
            raise MutantError(said["error"])
        return [Finding(**finding) for finding in said["findings"]]


if __name__ == "__main__":
    serve()

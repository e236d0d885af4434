"""No file that upslope reads can run code: what could is banned from the source, and the ban is tested."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("src/upslope", "examples") for path in (ROOT / folder).rglob("*.py"))

MODULES = {
    *("pickle", "_pickle", "cPickle", "pickletools", "cloudpickle", "dill", "joblib", "marshal", "shelve"),
    *("jsonpickle", "torch.package", "torch.distributed.checkpoint", "numpy.lib.format"),
}
ALLOWED_PARTS = {
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.checkpoint.hf_storage",
}
FUNCTIONS = {
    *("eval", "exec", "builtins.eval", "builtins.exec", "builtins.compile", "compile"),
    *("torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save", "torch.hub.load"),
    *("torch.jit.load", "torch.export.load", "torch.hub.load_state_dict_from_url"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"),
    *("pandas.read_pickle", "numpy.core.multiarray.fromstring"),
}
METHODS = {"read_pickle", "to_pickle", "unsafe_load", "full_load"}


def banned_module(name: str) -> bool:
    if any(name == part or name.startswith(part + ".") for part in ALLOWED_PARTS):
        return False
    return any(name == module or name.startswith(module + ".") for module in MODULES)


def full_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value, names)
        return f"{inner}.{node.attr}" if inner else None
    return None


def violations(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    names = full_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"{node.lineno}: {alias.name}" for alias in node.names if banned_module(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if banned_module(full) or full in FUNCTIONS or (banned_module(node.module) and alias.name == "*"):
                    yield f"{node.lineno}: {full}"
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            full = dotted(node, names)
            method = isinstance(node, ast.Attribute) and node.attr in METHODS
            if method or (full and (full in FUNCTIONS or banned_module(full))):
                yield f"{node.lineno}: {full}"
        elif isinstance(node, ast.Call):
            yield from calls(node, names)


def calls(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    for keyword in node.keywords:
        harmless = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg == "allow_pickle" and not harmless:
            yield f"{node.lineno}: allow_pickle"
    imports = dotted(node.func, names) in ("__import__", "importlib.import_module", "builtins.__import__")
    first = node.args[0] if node.args else None
    if imports and isinstance(first, ast.Constant) and banned_module(str(first.value)):
        yield f"{node.lineno}: import of {first.value}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_source_holds_nothing_that_could_run_code_from_a_file(path: Path) -> None:
    assert list(violations(path.read_text())) == []


def test_the_source_was_found() -> None:
    assert ROOT / "src/upslope/train/checkpoint.py" in SOURCES


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "def f():\n    import dill",
        "from pickle import loads",
        "from cloudpickle import *",
        "import joblib.numpy_pickle",
        "import marshal, json",
        "from shelve import open as o",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.save(1, 'x')",
        "import torch\nread = torch.load",
        "from torch import load",
        "from torch import load as read",
        "from torch import serialization\nserialization.load('x')",
        "import torch.serialization as s\ns.load('x')",
        "eval('1')",
        "exec('1')",
        "run = eval",
        "import builtins\nbuiltins.eval('1')",
        "compile('1', 'x', 'eval')",
        "import yaml\nyaml.load(x)",
        "from yaml import unsafe_load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=trusted)",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
        "from torch.distributed.checkpoint import FileSystemReader",
        "import torch\ntorch.distributed.checkpoint.load({})",
        "import importlib\nimportlib.import_module('pickle')",
        "__import__('dill')",
        "frame.to_pickle('x')",
    ],
)
def test_the_ban_catches(source: str) -> None:
    assert list(violations(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nmodel = torch.nn.Linear(1, 1)\nmodel.eval()",
        "import safetensors.torch\nsafetensors.torch.load(b'')",
        "import json\njson.load(file)",
        "import re\nre.compile('x')",
        "import torch\nstep = torch.compile(step)",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import yaml\nyaml.safe_load(x)",
        "from upslope import load, save",
        "from torch.distributed.checkpoint.state_dict import get_state_dict",
        "'torch.load and pickle may be talked about'",
    ],
)
def test_the_ban_lets_pass(source: str) -> None:
    assert list(violations(source)) == []

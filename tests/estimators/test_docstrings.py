"""Every public function carries an equation that runs: the doctests of each module, and none missing."""

import doctest
import importlib
import inspect

import pytest
import torch

from upslope import estimators

MODULES = [
    "advantages",
    "curvature",
    "divergences",
    "importance",
    "objectives",
    "preference",
    "recurrence",
    "reductions",
    "returns",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"upslope.estimators.{name}")
    globs = {**vars(module), "torch": torch}
    finder = doctest.DocTestFinder(exclude_empty=False)
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
    for test in finder.find(module, name, globs=globs):
        runner.run(test)
    assert runner.failures == 0
    assert runner.tries > 0


@pytest.mark.parametrize("name", estimators.__all__)
def test_every_public_function_has_an_example(name: str) -> None:
    member = getattr(estimators, name)
    documentation = inspect.getdoc(member)
    assert documentation
    if inspect.isfunction(member):
        assert ">>> " in documentation
        assert "Args:" in documentation


def test_every_public_function_is_exported() -> None:
    for name in MODULES:
        module = importlib.import_module(f"upslope.estimators.{name}")
        for function, _ in inspect.getmembers(module, inspect.isfunction):
            if not function.startswith("_") and getattr(module, function).__module__ == module.__name__:
                assert function in estimators.__all__

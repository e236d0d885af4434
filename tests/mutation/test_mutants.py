"""Every slip is seen by the audit or by an identity, as a wrong number; and they pass the source as it is."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FunctionType

import pytest
from harness import Mutant, MutantError, Workshop, mutate
from mutants import MUTANTS

from upslope import estimators
from upslope.auditing.table import exported

KILLERS = tuple(dict.fromkeys(killer for mutant in MUTANTS for killer in mutant.killers))


@pytest.fixture(scope="module")
def workshop() -> Iterator[Workshop]:
    with Workshop() as server:
        yield server


@pytest.mark.parametrize("killer", KILLERS)
def test_the_source_as_it_is_passes(killer: str, workshop: Workshop) -> None:
    (finding,) = workshop.ask((killer,))
    assert finding.failed is None, f"{finding.failed}: {finding.detail}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_caught(mutant: Mutant, workshop: Workshop) -> None:
    caught = [finding for finding in workshop.ask(mutant.killers, mutant) if finding.failed is not None]
    assert caught, f"nobody sees it: {mutant.breaks}. Asked: {mutant.killers}"
    crashes = [f"{finding.killer}: {finding.detail}" for finding in caught if finding.crashed]
    assert not crashes, f"a mutant should give wrong numbers, not errors: {crashes}"


def test_no_two_mutants_have_one_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("name", sorted(exported()))
def test_every_exported_estimator_and_algorithm_is_broken(name: str) -> None:
    """In its own body, or in a private function of its module that it calls; a record where it is made."""
    thing = getattr(estimators, name, None) or getattr(import_module("upslope.algorithms"), name)
    here = [mutant for mutant in MUTANTS if mutant.module == thing.__module__]
    bodies = [inspect.getsource(thing)] if inspect.isclass(thing) else list(_bodies(thing))
    made = rf"\b{name}\("
    assert [mutant for mutant in here if re.search(made, mutant.old) or any(mutant.old in body for body in bodies)]


def _bodies(function: FunctionType) -> Iterator[str]:
    yield inspect.getsource(function)
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        private = name.startswith("_") and inspect.isfunction(called) and called.__module__ == function.__module__
        if private and called is not function:
            yield from _bodies(called)


def test_a_mutant_of_a_source_that_has_moved_on_is_refused() -> None:
    gone = Mutant("gone", "upslope.estimators.returns", "no such text", "anything", "nothing")
    with pytest.raises(MutantError, match="occurs 0 times"):
        mutate(gone)
    twice = Mutant("twice", "upslope.estimators.returns", 'require_bool("cut", cut)', "pass", "nothing")
    with pytest.raises(MutantError, match="times in"):
        mutate(twice)
    outside = Mutant("outside", "upslope.estimators.returns", '"""Returns: what', '"""Returns, what', "nothing")
    with pytest.raises(MutantError, match="does not change the inside of a function"):
        mutate(outside)


def test_a_mutant_that_changes_nothing_survives(workshop: Workshop) -> None:
    """A killer that always fails would show here."""
    idle = Mutant("idle", "upslope.estimators.divergences", "0.5 * k1(", "1.0 * 0.5 * k1(", "nothing")
    killers = ("k2", "test_the_estimates_are_their_definitions")
    assert [finding.failed for finding in workshop.ask(killers, idle)] == [None, None]


def test_the_server_stays_whole(workshop: Workshop) -> None:
    broken = Mutant("broken", "upslope.estimators.divergences", "0.5 * k1(", "0.7 * k1(", "another factor")
    before, during, after = (workshop.ask(("k2",), mutant)[0] for mutant in (None, broken, None))
    assert (before.failed, after.failed) == (None, None)
    assert during.failed is not None
    assert "0.5 * k1(" in Path(inspect.getsourcefile(estimators.k2) or "").read_text()

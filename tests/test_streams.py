import doctest

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from upslope import streams
from upslope.streams import LateStream, Purpose, derived_seed, stream, torch_stream


def test_equations_in_docstrings_run():
    assert doctest.testmod(streams).failed == 0


@given(seed=st.integers(0, 2**64 - 1), update=st.integers(0, 2**40))
def test_the_same_stream_always_gives_the_same_numbers(seed, update):
    first = stream(seed, Purpose.ACTION, 0, update).random(4)
    assert np.array_equal(first, stream(seed, Purpose.ACTION, 0, update).random(4))


def test_streams_differ_in_seed_purpose_and_every_index():
    names = [(1, Purpose.ACTION, 0, 0), (2, Purpose.ACTION, 0, 0), (1, Purpose.SHUFFLE, 0, 0)]
    names += [(1, Purpose.ACTION, 1, 0), (1, Purpose.ACTION, 0, 1), (1, Purpose.ACTION, 0), (1, Purpose.ACTION)]
    draws = {tuple(stream(*name).random(2)) for name in names}
    assert len(draws) == len(names)


def test_numbers_are_pinned_since_checkpoints_depend_on_them():
    assert derived_seed(1, Purpose.ENVIRONMENT, 0) == 608024111298957010
    assert torch_stream(1, Purpose.INITIALISATION).initial_seed() == derived_seed(1, Purpose.INITIALISATION)


def test_torch_streams_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    torch.rand(3, generator=torch_stream(1, Purpose.INITIALISATION))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("arguments", [(-1, Purpose.ACTION), (1, Purpose.ACTION, -2)])
def test_negative_seeds_and_indices_are_refused(arguments):
    with pytest.raises(ValueError, match="non-negative"):
        stream(*arguments)


def test_a_late_stream_is_the_stream_from_its_first_draw_on() -> None:
    late, drawn = LateStream(5, Purpose.SHUFFLE, 0, 7), stream(5, Purpose.SHUFFLE, 0, 7)
    for count in (10, 10, 3):
        assert late.permutation(count).tolist() == drawn.permutation(count).tolist()

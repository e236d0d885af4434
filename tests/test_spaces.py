import json

import pytest

from upslope.spaces import Box, Composite, Discrete, MultiBinary, MultiDiscrete, space_from_tree, space_to_tree

SPACES = [
    Box((3,), -1.0, 1.0),
    Box((2,), (-1.0, float("-inf")), (1.0, float("inf"))),
    Box((84, 84, 4), 0.0, 255.0, "uint8"),
    Discrete(4, start=-1),
    MultiDiscrete((2, 3), (0, 1)),
    MultiBinary(5),
    Composite((("a/b", Discrete(2)), ("c", Box((1,), 0.0, 1.0)))),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_space_survives_a_file(space):
    assert space_from_tree(json.loads(json.dumps(space_to_tree(space)))) == space


def test_an_image_is_three_dimensions_of_bytes():
    assert Box((84, 84, 4), 0.0, 255.0, "uint8").is_image
    assert not Box((84, 84), 0.0, 255.0, "uint8").is_image
    assert not Box((84, 84, 4), 0.0, 1.0).is_image


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "Text"}, "unknown kind of space 'Text'"),
        ({"kind": "Discrete", "n": 2}, "has the fields"),
        ({"kind": "Composite", "entries": [1]}, "mapping called 'entries'"),
        ({"kind": "Composite", "entries": {"a": 3}}, "described by a mapping, got int"),
    ],
)
def test_what_describes_no_space_is_named(tree, message):
    with pytest.raises(ValueError, match=message):
        space_from_tree(tree)

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disha.finetune.data.examples import Example
from disha.finetune.data.packing import first_fit, packed

LENGTHS = st.lists(st.integers(0, 50))


@given(LENGTHS)
def test_every_thing_is_in_one_box_and_no_box_too_full(lengths):
    boxes = first_fit(lengths, 50)
    assert sorted(thing for box in boxes for thing in box) == list(range(len(lengths)))
    assert all(sum(lengths[thing] for thing in box) <= 50 for box in boxes)
    assert all(boxes)


@given(LENGTHS)
def test_no_two_boxes_fit_into_one(lengths):
    filled = sorted(sum(lengths[thing] for thing in box) for box in first_fit(lengths, 50))
    assert sum(filled[:2]) > 50 or len(filled) < 2


def test_the_longest_come_first_and_each_goes_where_there_is_room():
    assert first_fit([3, 6, 4, 7, 2], 10) == [[3, 0], [1, 2], [4]]


def test_what_is_too_long_is_refused():
    with pytest.raises(ValueError, match="a length of 11 does not fit into 10"):
        first_fit([3, 11], 10)


def test_an_example_needs_a_place_less_than_it_has_tokens():
    examples = [Example(tuple(range(length)), ((1, length),)) for length in (6, 5, 4)]
    assert packed(examples, 5) == [(examples[0],), (examples[1],), (examples[2],)]
    assert packed(examples, 7) == [(examples[0],), (examples[1], examples[2])]

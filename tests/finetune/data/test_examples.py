from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disha.finetune.data.examples import Example, StoredExamples

NUMBERS = st.integers(0, 2**31 - 1)
EXAMPLES = st.builds(
    Example,
    st.lists(NUMBERS, max_size=20).map(tuple),
    st.lists(st.tuples(NUMBERS, NUMBERS), max_size=3).map(tuple),
)


@given(st.lists(EXAMPLES, max_size=8), st.slices(8))
def test_stored_examples_are_the_same_in_the_same_order(examples, piece):
    stored = StoredExamples(examples)
    assert list(stored) == examples
    assert [stored[index] for index in range(-len(examples), 0)] == examples
    assert list(stored[piece]) == examples[piece]
    with pytest.raises(IndexError):
        stored[len(examples)]


def test_stored_examples_take_little_memory():
    tracemalloc.start()
    try:
        stored = StoredExamples(
            Example(tuple(range(1000 * row, 1000 * row + 100)), ((60, 100),)) for row in range(1000)
        )
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(stored) == 1000
    assert taken < 1000 * 600  # of which 400 are the tokens; tuples would take 3600


def test_what_is_learned():
    example = Example((5, 6, 7, 8, 9), ((2, 3), (4, 5)))
    assert example.prompt == (5, 6)
    assert example.supervised == 2

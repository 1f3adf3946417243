from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disha.finetune.data.batches import batch_by_length, collate, first_fit, packed
from disha.finetune.data.examples import IGNORED, Example
from disha.finetune.training.objectives import TextObjective

OFF = IGNORED


def examples_of(*lengths):
    return [
        Example(tuple(range(100, 100 + length)), ((length // 2, length),)) for length in lengths
    ]


@st.composite
def examples(draw):
    tokens = draw(st.lists(st.integers(0, 200), min_size=2, max_size=12))
    bounds = sorted(draw(st.sets(st.integers(1, len(tokens)), min_size=2, max_size=4)))
    pairs = zip(bounds[::2], bounds[1::2], strict=False)
    return Example(tuple(tokens), tuple(pairs))


def test_labels_are_the_response_moved_ahead_and_nothing_else():
    batch = collate([[Example((5, 6, 7, 8, 9), ((3, 5),))], [Example((4, 3, 2), ((1, 3),))]])
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [4, 3, 0, 0]]
    assert batch.labels.tolist() == [[OFF, OFF, 8, 9], [3, 2, OFF, OFF]]
    assert (batch.size, batch.weight, batch.positions) == (6, 4, None)


def test_several_spans_are_learned():
    batch = collate([[Example((5, 6, 7, 8, 9), ((1, 2), (3, 4)))]])
    assert batch.labels.tolist() == [[6, OFF, 8, OFF]]
    assert batch.weight == 2


def test_packed_examples_stand_side_by_side_and_count_from_nought_each():
    one, two, three = Example((5, 6, 7), ((2, 3),)), Example((8, 9), ((1, 2),)), *examples_of(5)
    batch = collate([(one, two), (three,)], positions=True)
    assert batch.tokens.tolist() == [[5, 6, 8, 0], [100, 101, 102, 103]]
    assert batch.labels.tolist() == [[OFF, 7, 9, OFF], [OFF, 102, 103, 104]]
    assert batch.positions.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert (batch.size, batch.weight) == (7, 5)


@given(st.lists(st.lists(examples(), min_size=1, max_size=4), min_size=1, max_size=4))
def test_packed_rows_hold_what_their_examples_hold_alone(rows):
    batch = collate(rows, positions=True)
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            alone, end = collate([[example]]), start + len(example.tokens) - 1
            assert torch.equal(batch.tokens[number, start:end], alone.tokens[0])
            assert torch.equal(batch.labels[number, start:end], alone.labels[0])
            assert batch.positions[number, start:end].tolist() == list(range(end - start))
            start = end
        assert (batch.labels[number, start:] == IGNORED).all()
        assert batch.positions[number, start:].tolist() == list(
            range(batch.tokens.shape[1] - start)
        )
    assert batch.size == sum(len(example.tokens) - 1 for row in rows for example in row)
    assert batch.weight == int((batch.labels != IGNORED).sum())


def test_batches_by_length_hold_every_example_once():
    examples = examples_of(4, 9, 6, 7, 3, 12, 5)
    batches = list(batch_by_length(examples, 3))
    assert [batch.tokens.shape[1] for batch in batches] == [11, 5, 2]
    assert sum(batch.weight for batch in batches) == sum(e.supervised for e in examples)


def test_packed_texts_lose_what_they_lose_alone(tiny_model):
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (5, 17, 9, 3, 12, 8):
        tokens = torch.randint(3, 200, (length,), generator=generator).tolist()
        made.append(Example(tuple(tokens), ((2, length),)))
    objective = TextObjective(tiny_model.double())
    batch = collate([made[:3], made[3:]], positions=True)
    together = objective(batch)
    alone = sum(objective(collate([[example]])) for example in made)
    torch.testing.assert_close(together, alone)  # both are float32, whatever the model's dtype


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

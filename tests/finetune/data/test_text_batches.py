from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disha.finetune.data.batches import TextBatches
from disha.finetune.data.examples import Example, StoredExamples

MAX_LENGTH = 40


def examples_of(lengths):
    """Examples that can be told apart by their first token."""
    return [
        Example((1000 + number, *range(length - 1)), ((1, length),))
        for number, length in enumerate(lengths)
    ]


def some_examples(count, longest, seed=0):
    """Most are short, some are long, as in real data."""
    chance = random.Random(seed)
    return examples_of([2 + int((longest - 2) * chance.random() ** 2) for _ in range(count)])


def shuffled(examples, seed=0, size=4):
    return TextBatches(StoredExamples(examples), size, seed)


def packing(examples, seed=0, size=2, max_length=MAX_LENGTH):
    return TextBatches(StoredExamples(examples), size, seed, max_length)


def order(source, epoch=1):
    return [list(batch) for batch in source.batches(epoch)]


@pytest.mark.parametrize("make", [shuffled, packing])
def test_the_order_is_decided_by_seed_and_epoch(make):
    examples = some_examples(300, MAX_LENGTH)
    assert order(make(examples, seed=1)) == order(make(examples, seed=1))
    assert order(make(examples, seed=1)) != order(make(examples, seed=1), epoch=2)
    assert order(make(examples, seed=1)) != order(make(examples, seed=2))


@given(st.lists(st.integers(2, 30), max_size=150), st.integers(1, 5), st.integers(0, 9))
def test_an_epoch_holds_every_example_once(lengths, size, seed):
    examples = examples_of(lengths)
    source = shuffled(examples, seed, size)
    batches = order(source)
    found = sorted(example.tokens for batch in batches for (example,) in batch)
    assert found == [example.tokens for example in examples]
    assert [len(batch) for batch in batches if len(batch) != size][1:] == []
    assert len(batches) == source.batches_per_epoch()


@given(st.lists(st.integers(2, MAX_LENGTH + 1), max_size=150), st.integers(1, 5), st.integers(0, 9))
def test_a_packed_epoch_holds_every_example_once_in_rows_not_too_long(lengths, size, seed):
    examples = examples_of(lengths)
    source = packing(examples, seed, size)
    batches = order(source)
    rows = [row for batch in batches for row in batch]
    assert sorted(e.tokens for row in rows for e in row) == [e.tokens for e in examples]
    assert all(len(batch) == size for batch in batches[:-1])
    assert len(batches) == source.batches_per_epoch()
    for batch in source.batches(1):
        collated = source.collate(batch)
        assert collated.tokens.shape[1] <= MAX_LENGTH
        assert collated.weight == source.weight(batch)
        # A text begins wherever positions do, and padding counts as one.
        padded = sum(sum(len(e.tokens) - 1 for e in r) < collated.tokens.shape[1] for r in batch)
        assert int((collated.positions == 0).sum()) == sum(map(len, batch)) + padded


def padded_size(source):
    return sum(source.collate(batch).tokens.numel() for batch in source.batches(1))


def real_size(source):
    return sum(source.collate(batch).size for batch in source.batches(1))


def test_shuffling_pads_little():
    source = shuffled(some_examples(400, 160))
    assert real_size(source) / padded_size(source) > 0.95


def test_without_grouping_the_batches_are_the_shuffled_rows_as_they_come():
    examples = StoredExamples(some_examples(103, 160))
    source = TextBatches(examples, 4, 7, by_length=False)
    found = [sorted(row[0].tokens for row in batch) for batch in source.batches(2)]
    order = [example.tokens for example in examples.shuffled(9)]
    assert found == [sorted(order[start : start + 4]) for start in range(0, 103, 4)]
    assert real_size(source) / padded_size(source) < 0.7


def test_packing_fills_rows():
    examples = some_examples(3000, 512)
    source = packing(examples, size=1, max_length=512)
    rows = sum(1 for _ in source.batches(1))
    fill = real_size(source) / (rows * 512)
    assert fill > 0.98
    assert abs(source.batches_per_epoch() - sum(1 for _ in source.batches(2))) <= 3


def test_packed_rows_come_in_any_order_and_not_the_longest_first():
    source = packing(some_examples(1000, 512), size=1, max_length=512)
    longest = [len(row[0].tokens) for (row,) in source.batches(1)]
    half = len(longest) // 2
    means = [sum(part) / len(part) for part in (longest[:half], longest[half:])]
    assert abs(means[0] - means[1]) < 60


def test_weight_is_what_collating_finds():
    source = shuffled(some_examples(50, 30))
    for batch in source.batches(1):
        assert source.collate(batch).weight == source.weight(batch)

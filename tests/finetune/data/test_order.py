from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disha.finetune.data.order import drawn, mixed_order, permutation


@given(st.integers(0, 300), st.integers(0, 2**62))
def test_every_number_comes_once(count, seed):
    assert sorted(permutation(count, seed)) == list(range(count))


def test_it_takes_eight_bytes_a_row_and_is_the_same_for_any_number_of_them():
    numbers = permutation(200_000, 3)
    assert numbers.itemsize == 8
    expected = torch.randperm(200_000, generator=torch.Generator().manual_seed(3))
    assert numbers.tolist() == expected.tolist()


def test_the_random_state_of_training_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    permutation(10, 5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ((30, 10), (1, 1), [20, 20]),
        ((30, 10), (3, 1), [30, 10]),
        ((30, 10), (0.5, 1.5), [10, 30]),
        ((30, 10), (1, 0), [30, 0]),
        ((30, 0), (1, 5), [30, 0]),
        ((9, 1), (1e-9, 1), [1, 10]),
        ((5,), (7,), [5]),
        ((0, 0), (1, 1), [0, 0]),
        ((4, 4), (1e307, 1e307), [4, 4]),
    ],
)
def test_a_weight_is_the_part_of_an_epochs_rows(sizes, weights, expected):
    assert drawn(sizes, weights) == expected


def in_order(sizes, weights, seed):
    return list(mixed_order(sizes, weights, seed))


SETS = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from([0, 0.3, 1, 2, 5])), min_size=1, max_size=4
).filter(lambda sets: any(size and weight for size, weight in sets))


@given(SETS, st.integers(0, 99))
def test_every_row_comes_as_often_as_its_data_set_is_repeated(sets, seed):
    sizes, weights = zip(*sets, strict=True)
    order = in_order(sizes, weights, seed)
    starts = accumulate(sizes, initial=0)
    for start, size, count in zip(starts, sizes, drawn(sizes, weights), strict=False):
        own = [index - start for index in order if start <= index < start + size]
        assert len(own) == count
        # Each turn has all rows before any comes again; only the last turn may end early.
        turns = [own[first : first + size] for first in range(0, count, size or 1)]
        assert all(sorted(turn) == list(range(size)) for turn in turns[:-1])
        assert all(len(set(turn)) == len(turn) for turn in turns)
    assert len(order) == sum(drawn(sizes, weights))


def test_the_seed_decides_the_order_and_which_rows_are_drawn():
    def of(seed):
        return in_order((40, 40), (1, 3), seed)

    assert of(1) == of(1)
    assert set(of(1)) != set(of(2))
    # The data sets are mixed, and not one after the other; each has an order of its own.
    order = of(1)
    assert 3 < sum(index >= 40 for index in order[:10]) < 10
    assert [i for i in order if i < 40] != [i - 40 for i in order if i >= 40][:20]


def test_the_parts_of_an_epoch_are_close_to_the_weights_everywhere():
    order = in_order((1000, 1000), (1, 3), 5)
    for first in range(0, 2000, 500):
        part = sum(index >= 1000 for index in order[first : first + 500]) / 500
        assert part == pytest.approx(0.75, abs=0.07)

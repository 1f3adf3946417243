from __future__ import annotations

import pytest

from disha.finetune.data.held_out import split_held_out
from disha.finetune.data.rows import Rows
from disha.finetune.errors import DataError


class Untouchable(Rows):
    """Rows of which none may be read."""

    def row(self, index):
        raise AssertionError("a row was read")

    def __len__(self):
        return 1000


def test_holding_out_keeps_every_row_once_and_order():
    rows = list(range(40))
    dataset = split_held_out(rows, 0.25, seed=3)
    assert len(dataset.held_out) == 10
    assert sorted([*dataset.training, *dataset.held_out]) == rows
    assert list(dataset.training) == sorted(dataset.training)
    assert list(dataset.held_out) == sorted(dataset.held_out)
    assert dataset == split_held_out(rows, 0.25, seed=3)
    assert dataset != split_held_out(rows, 0.25, seed=4)


def test_holding_out_nothing_and_too_much():
    assert split_held_out(["a"], 0.0, seed=0).held_out == ()
    with pytest.raises(DataError, match=r"holding out 0\.5 of 1 rows leaves none"):
        split_held_out(["a"], 0.5, seed=0)


def test_no_row_is_read():
    dataset = split_held_out(Untouchable(), 0.1, seed=0)
    assert (len(dataset.training), len(dataset.held_out)) == (900, 100)

"""Rows set aside to measure on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from disha.finetune.data.order import permutation
from disha.finetune.data.rows import Dataset, Row, SelectedRows
from disha.finetune.errors import DataError

__all__ = ["split_held_out"]


def split_held_out(rows: Sequence[Row], fraction: float, seed: int) -> Dataset:
    """Set a random part of the rows aside, both parts in their original order.

    Both are views: no row is read or copied.

    Args:
        rows: all of them.
        fraction: how much to hold out, from 0 up to but not including 1; rounded to whole rows,
            at least one unless 0.
        seed: decides which.

    Raises:
        DataError: nothing would be left to train on.
    """
    if fraction == 0:
        return Dataset(training=rows, held_out=())
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise DataError(
            f"holding out {fraction:g} of {len(rows)} rows leaves none to train on; "
            "give more rows or a smaller --eval_fraction"
        )
    chosen = bytearray(len(rows))
    for index in permutation(len(rows), seed)[:count]:
        chosen[index] = 1
    return Dataset(
        training=SelectedRows(rows, _places(chosen, 0)),
        held_out=SelectedRows(rows, _places(chosen, 1)),
    )


def _places(marks: bytearray, wanted: int) -> array[int]:
    return array("q", (index for index, mark in enumerate(marks) if mark == wanted))

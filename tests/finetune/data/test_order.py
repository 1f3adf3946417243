from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

from disha.finetune.data import order, parquet
from disha.finetune.data.order import permutation, reading_order
from disha.finetune.data.parquet import ParquetRows
from disha.finetune.data.rows import Row, Rows


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


@pytest.fixture
def tables(tmp_path):
    """Two files of ten groups of ten rows; a group takes about 12 kilobytes."""
    for number in range(2):
        table = pa.table({"n": range(100), "text": [f"{n:03}" * 333 for n in range(100)]})
        pq.write_table(
            table,
            tmp_path / f"{number}.parquet",
            row_group_size=10,
            use_dictionary=False,
            compression="none",
        )
    return Rows([ParquetRows(tmp_path / f"{number}.parquet") for number in range(2)])


def test_rows_that_can_be_read_alone_are_mixed_without_bounds():
    assert reading_order(Rows([[Row({}, "here")] * 30]), 5) == permutation(30, 5)


def test_so_are_few_blocks(tables):
    assert reading_order(tables, 5) == permutation(200, 5)


def test_many_blocks_are_mixed_some_at_a_time(tables, monkeypatch):
    monkeypatch.setattr(order, "MOST_BYTES_MIXED", 40_000)
    numbers = reading_order(tables[20:], 5)
    assert sorted(numbers) == list(range(180))
    assert numbers == reading_order(tables[20:], 5) != reading_order(tables[20:], 6)
    together = [numbers[start : start + 30] for start in range(0, 180, 30)]
    for part in together:
        assert len({number // 10 for number in part}) == 3
        assert len({number // 10 for number in part[:10]}) > 1
    assert [min(part) for part in together] != sorted(min(part) for part in together)


def test_every_block_is_read_once_in_that_order(tables, monkeypatch):
    monkeypatch.setattr(order, "MOST_BYTES_MIXED", 40_000)
    monkeypatch.setattr(parquet, "MOST_BYTES_KEPT", 45_000)
    read = []
    plain_read = pq.ParquetFile.read_row_group

    def noted_read(self, number, **options):
        read.append(number)
        return plain_read(self, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted_read)
    for index in reading_order(tables, 1):
        assert tables[index]["n"] == index % 100
    assert sorted(read) == sorted(2 * list(range(10)))

from __future__ import annotations

import json

import pytest

from disha.finetune.data.dataset import open_rows, read_dataset, split_held_out
from disha.finetune.data.rows import Row, Rows
from disha.finetune.errors import DataError
from disha.finetune.settings import DataSettings


@pytest.fixture
def folder(tmp_path):
    """Twelve rows to train on in two files, three to test with."""
    write(tmp_path / "train-1.jsonl", range(5))
    (tmp_path / "train-2.csv").write_text("n\n" + "".join(f"{n}\n" for n in range(5, 12)))
    write(tmp_path / "test.jsonl", range(100, 103))
    return tmp_path


def write(path, numbers, field="n"):
    path.write_text("".join(json.dumps({field: n}) + "\n" for n in numbers), encoding="utf-8")
    return path


def numbers(rows):
    return [int(row["n"]) for row in rows]


def settings(path, **changes):
    return DataSettings(data_path=(path,), dataset_field=("n",), **changes)


@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        ("train", list(range(12))),
        ("train[3:7]", [3, 4, 5, 6]),
        ("train[-25%:]+test[:1]+train[:1]", [9, 10, 11, 100, 0]),
        ("test", [100, 101, 102]),
        ("testing[:2]", [100, 101]),
    ],
)
def test_splits_of_a_folder(folder, split, wanted):
    assert numbers(open_rows(folder, split)) == wanted


def test_only_the_splits_named_are_read(folder):
    (folder / "validation.json").write_text("no JSON")
    assert len(open_rows(folder, "train")) == 12


def test_an_unknown_split_is_named_with_those_there(folder):
    with pytest.raises(DataError, match=r"has no split 'trian'; it has: 'test', 'train'"):
        open_rows(folder, "trian")


def test_a_split_without_rows_is_named(folder):
    with pytest.raises(DataError, match=r"split 'test\[3:\]' .* leaves no rows: 'test' has 3 rows"):
        open_rows(folder, "test[3:]")


def test_files_without_rows_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [])
    with pytest.raises(DataError, match=r"a\.jsonl holds no rows"):
        open_rows(path, "train")
    write(tmp_path / "b.jsonl", [])
    with pytest.raises(DataError, match=r"a\.jsonl and .*b\.jsonl hold no rows"):
        open_rows(tmp_path, "train")
    write(tmp_path / "c.jsonl", [7])
    assert numbers(open_rows(tmp_path, "train")) == [7]


def test_files_of_different_fields_are_named(folder):
    write(folder / "notes.jsonl", [1], field="note")
    with pytest.raises(
        DataError,
        match=r"but .*notes\.jsonl, line 1 has the fields 'note' and .*train-1.* has 'n'; name one",
    ):
        open_rows(folder, "train")


def test_nothing_is_held_out_unless_asked(folder):
    dataset = read_dataset(settings(folder), seed=0)
    assert numbers(dataset.training) == list(range(12))
    assert len(dataset.held_out) == 0


def test_a_part_is_held_out_of_the_split(folder):
    dataset = read_dataset(
        settings(folder, dataset_split=("train[:8]",), eval_fraction=0.25), seed=0
    )
    assert len(dataset.held_out) == 2
    assert sorted(numbers(dataset.training) + numbers(dataset.held_out)) == list(range(8))
    other = [
        numbers(read_dataset(settings(folder, eval_fraction=0.25), seed=seed).held_out)
        for seed in (0, 0, 1)
    ]
    assert other[0] == other[1] != other[2]


def test_another_split_is_held_out(folder):
    dataset = read_dataset(
        settings(folder, dataset_split=("train[:-2]",), eval_split="train[-2:]"), seed=0
    )
    assert numbers(dataset.training) == list(range(10))
    assert numbers(dataset.held_out) == [10, 11]


def test_another_file_is_held_out(folder, tmp_path):
    held_out = folder / "test.jsonl"
    dataset = read_dataset(settings(folder / "train-1.jsonl", eval_path=held_out), seed=0)
    assert (numbers(dataset.training), numbers(dataset.held_out)) == (
        [0, 1, 2, 3, 4],
        [100, 101, 102],
    )
    sliced = settings(folder, eval_path=held_out, eval_split="test[1:]")
    assert numbers(read_dataset(sliced, seed=0).held_out) == [101, 102]


def test_a_folder_of_several_splits_to_measure_on_needs_one_named(folder):
    with pytest.raises(DataError, match=r"several splits: 'test', 'train'; say .* --eval_split"):
        read_dataset(settings(folder, eval_path=folder), seed=0)


def listed(count):
    return Rows([[Row({"n": n}, f"row {n}") for n in range(count)]])


def test_holding_out_keeps_every_row_once_and_order():
    dataset = split_held_out(listed(40), 0.25, seed=3)
    training, held_out = numbers(dataset.training), numbers(dataset.held_out)
    assert len(held_out) == 10
    assert sorted(training + held_out) == list(range(40))
    assert (training, held_out) == (sorted(training), sorted(held_out))
    again, other = (split_held_out(listed(40), 0.25, seed=seed) for seed in (3, 4))
    assert numbers(again.held_out) == held_out != numbers(other.held_out)


def test_holding_out_nothing_and_too_much():
    nothing = split_held_out(listed(1), 0.0, seed=0)
    assert (len(nothing.training), len(nothing.held_out)) == (1, 0)
    with pytest.raises(DataError, match=r"holding out 0\.5 of 1 rows leaves none"):
        split_held_out(listed(1), 0.5, seed=0)


class Untouchable:
    """Rows of which none may be read."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        raise AssertionError("a row was read")


def test_no_row_is_read():
    dataset = split_held_out(Rows([Untouchable()]), 0.1, seed=0)
    assert (len(dataset.training), len(dataset.held_out)) == (900, 100)

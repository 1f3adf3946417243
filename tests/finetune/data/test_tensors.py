from __future__ import annotations

import json

import pytest
import torch

from disha.finetune.data.dataset import open_rows
from disha.finetune.data.rows import Row
from disha.finetune.data.tensors import TensorRows, read_samples
from disha.finetune.errors import BadRowError, DataError

FIELDS = ("x", "y")


def rows(*values):
    return [Row({"x": x, "y": y}, f"line {n}") for n, (x, y) in enumerate(values, 1)]


def read(*values, **options):
    return read_samples(rows(*values), FIELDS, **options)


def test_whole_numbers_are_classes():
    samples = read(([1, 2.5], 0), ([3, 4], 2))
    assert samples.inputs.tolist() == [[1.0, 2.5], [3.0, 4.0]]
    assert samples.inputs.dtype == torch.float32
    assert samples.targets.tolist() == [0, 2]
    assert samples.targets.dtype == torch.int64


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ((0.5, 2), [0.5, 2.0]),
        (([1, 2], [3, 4]), [[1.0, 2.0], [3.0, 4.0]]),
        ((-1.0, 1), [-1.0, 1.0]),
    ],
)
def test_other_targets_are_numbers_to_predict(targets, wanted):
    samples = read(*((1.0, target) for target in targets))
    assert samples.targets.tolist() == wanted
    assert samples.targets.dtype == torch.float32


def test_inputs_of_any_shape():
    image = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(read((image.tolist(), 1)).inputs[0], image.float())
    assert read((3, 1)).inputs.tolist() == [3.0]


def test_a_table_of_text_holds_numbers_too(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('x,y\n"[1, 2]",1\n"[3, 4.5]",0\n')
    samples = read_samples(open_rows(path, "train"), FIELDS)
    assert (samples.inputs.tolist(), samples.targets.tolist()) == ([[1, 2], [3, 4.5]], [1, 0])
    assert samples.are_classes


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        (([1, 2, 3], 0), r"line 2: field 'x' has the shape \(3,\), but must have \(2,\) as in lin"),
        (([1, 2], [0]), r"line 2: field 'y' has the shape \(1,\), but must have \(\) as in line 1"),
        (([[1, 2], [3]], 0), "line 2: field 'x' must be a number or a list of numbers, nested"),
        (([1, "a"], 0), "line 2: field 'x' must be a number or a list of numbers, nested"),
        (([1, None], 0), "line 2: field 'x' must be a number or a list of numbers, nested"),
        (({"a": 1}, 0), "line 2: field 'x' must be a number or a list of numbers, nested"),
        (([1, 10**400], 0), "line 2: field 'x' must be a number or a list of numbers, nested"),
        (([1, 1e300], 0), "line 2: field 'x' must hold finite numbers"),
        (("NaN", 0), "line 2: field 'x' must hold finite numbers"),
        (([], 0), "line 2: field 'x' must hold finite numbers, at least one"),
        (("[1, 2", 0), "line 2: field 'x' must be a number or a list of numbers, found '"),
    ],
)
def test_a_row_that_is_not_like_the_first_is_named_or_counted(second, complaint):
    values = ([1.0, 2.0], 0), second, ([3.0, 4.0], 1)
    with pytest.raises(BadRowError, match=complaint):
        read(*values)
    samples = read(*values, skip_bad_rows=True)
    assert samples.targets.tolist() == [0, 1]
    assert (samples.tally.used, samples.tally.bad) == (2, 1)


def test_a_whole_number_below_nought_is_no_class():
    with pytest.raises(DataError, match="line 2: field 'y' is -1, but whole numbers are classes"):
        read((1.0, 1), (1.0, -1))


def test_no_usable_row_is_refused():
    with pytest.raises(DataError, match="none of the 1 rows can be used, such as: line 1: field"):
        read(("a", 1), skip_bad_rows=True)


def test_held_out_rows_must_be_like_those_to_train_on():
    training = read(([1.0, 2.0], 1), ([1.0, 2.0], 0))
    with pytest.raises(BadRowError, match=r"shape \(1,\), but must have \(2,\) as in training"):
        read(([1.0], 1), like=training)
    with pytest.raises(BadRowError, match="field 'y' must be a class, a whole number from 0"):
        read(([1.0, 2.0], 0.5), like=training)
    numbers = read(([1.0, 2.0], 0.5))
    assert read(([1.0, 2.0], 1), like=numbers).targets.dtype == torch.float32


def test_batches_hold_every_sample_once_in_an_order_of_seed_and_epoch():
    samples = read(*((float(n), n) for n in range(23)))
    source = TensorRows(samples, 4, seed=1)

    def order(source, epoch):
        return [source.collate(batch).targets.tolist() for batch in source.batches(epoch)]

    batches = order(source, 1)
    assert len(batches) == source.batches_per_epoch() == 6
    assert sorted(target for batch in batches for target in batch) == list(range(23))
    assert batches == order(TensorRows(samples, 4, seed=1), 1)
    assert batches != order(source, 2)
    assert batches != order(TensorRows(samples, 4, seed=2), 1)


@pytest.mark.parametrize(("target", "terms"), [(1, 1), (1.5, 1), ([1.0, 2.0, 3.0], 3)])
def test_a_batch_weighs_as_many_terms_as_its_targets_have(target, terms):
    source = TensorRows(read(([1.0, 2.0], target), ([3.0, 4.0], target)), 2, seed=0)
    (batch,) = source.batches(1)
    collated = source.collate(batch).to(torch.device("cpu"))
    assert collated.inputs.shape == (2, 2)
    assert (collated.size, collated.weight) == (2, 2 * terms)
    assert source.weight(batch) == collated.weight


def test_rows_from_a_file_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"x": x, "y": 1}) for x in ([1], [2, 3])))
    with pytest.raises(BadRowError, match=r"rows\.jsonl, line 2: field 'x' .*rows\.jsonl, line 1"):
        read_samples(open_rows(path, "train"), FIELDS)

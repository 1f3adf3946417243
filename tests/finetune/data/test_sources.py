from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

from disha.finetune.data.dataset import open_rows
from disha.finetune.data.encoding import Encoder, Outcome, Tally, encode_rows
from disha.finetune.data.examples import Example, StoredExamples
from disha.finetune.data.sources import StreamedExamples, TextBatches
from disha.finetune.errors import BadRowError, DataError, TrainingError
from disha.finetune.stopping import SIGNALS, listening, noted_signal
from disha.finetune.text.templates import CHATML

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


# --- streaming -----------------------------------------------------------------------------------

FIELDS = ("query", "response")
ROWS = [
    {"query": f"hello {number}", "response": "world " * (number * 7 % 13 + 1)}
    for number in range(330)
]


@pytest.fixture
def encoder(tiny_tokenizer):
    return Encoder(tiny_tokenizer, FIELDS, 160, CHATML)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def opened(path):
    return open_rows(path, "train", streaming=True)


def plain(path, encoder, **options):
    return TextBatches(StreamedExamples(opened(path), encoder, **options), 4, 7)


def packed(path, encoder, **options):
    return TextBatches(StreamedExamples(opened(path), encoder, **options), 4, 7, 160)


def test_the_batches_are_those_of_examples_in_memory(path, encoder):
    examples, _ = encode_rows(opened(path), encoder)
    assert order(plain(path, encoder)) == order(TextBatches(examples, 4, 7))
    assert order(packed(path, encoder), 2) == order(TextBatches(examples, 4, 7, 160), 2)


@pytest.mark.parametrize("make", [plain, packed])
def test_the_number_of_workers_changes_nothing(path, encoder, make):
    alone = order(make(path, encoder))
    for workers in (1, 2):
        assert order(make(path, encoder, workers=workers)) == alone


def test_nor_where_rows_are_parquet_in_a_folder_and_some_are_held_out(tmp_path, encoder):
    for part in range(2):
        table = pa.Table.from_pylist(ROWS[part::2])
        pq.write_table(table, tmp_path / f"train-{part}.parquet", row_group_size=50)
    rows = open_rows(tmp_path, "train[10%:]", streaming=True)
    assert rows[0]["query"] == "hello 66"  # read here before workers are begun
    alone, helped = (StreamedExamples(rows, encoder, workers) for workers in (0, 2))
    assert order(TextBatches(helped, 4, 7)) == order(TextBatches(alone, 4, 7))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_their_hash_is_that_of_the_files_and_the_numbers_of_the_rows(tmp_path, encoder, suffix):
    def hash_of(name, rows, split="train", **options):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif suffix == "csv":
            lines = ["query,response", *(",".join(row.values()) for row in rows)]
            path.write_text("\n".join(lines))
        else:
            write(path, rows)
        opened = open_rows(path, split, streaming=True)
        return StreamedExamples(opened, dataclasses.replace(encoder, **options), 2).digest()

    expected = hash_of("one", ROWS)
    assert hash_of("two", ROWS) == expected
    assert (
        len(
            {
                expected,
                hash_of("one", [*ROWS[:9], {"query": "a", "response": "b"}, *ROWS[10:]]),
                hash_of("one", ROWS, "train[:329]"),
                hash_of("one", ROWS, "train[1:]+train[:1]"),
                hash_of("one", ROWS, fields=FIELDS[::-1]),
            }
        )
        == 5
    )


def test_every_epoch_has_its_own_order_of_the_same_rows(path, encoder):
    source = plain(path, encoder)
    first, second = order(source, 1), order(source, 2)
    assert first != second
    assert sorted(row[0].tokens for batch in first for row in batch) == sorted(
        row[0].tokens for batch in second for row in batch
    )
    assert source.batches_per_epoch() == len(first) == 83
    assert packed(path, encoder).batches_per_epoch() is None


def test_they_are_collated_as_others_are(path, encoder):
    for source in (plain(path, encoder), packed(path, encoder)):
        for batch in source.batches(1):
            collated = source.collate(batch)
            assert collated.weight == source.weight(batch)
            assert collated.tokens.shape[1] <= 160


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_that_can_not_be_used_are_counted(tmp_path, encoder, workers):
    rows = [*ROWS[:50], {"query": 3}, {"query": "a", "response": "b" * 300}, *ROWS[50:60]]
    path = write(tmp_path / "rows.jsonl", rows)
    skipping = Encoder(encoder.tokenizer, FIELDS, 160, CHATML, skip_bad_rows=True)
    source = plain(path, skipping, workers=workers)
    for epoch in (1, 2):
        assert sum(map(len, order(source, epoch))) == 60
        complaint = f"{path}, line 51: field 'query' must be text, found int 3"
        assert source.examples.tally == Tally(60, cut=0, dropped=1, bad=1, complaints=[complaint])


@pytest.mark.parametrize("workers", [0, 2])
def test_or_raised_in_one_clear_line(tmp_path, encoder, workers):
    path = write(tmp_path / "rows.jsonl", [*ROWS[:50], {"query": 3}])
    with pytest.raises(BadRowError) as caught:
        order(plain(path, encoder, workers=workers))
    assert str(caught.value) == f"{path}, line 51: field 'query' must be text, found int 3"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_changes_meanwhile_stops_it(path, encoder, workers):
    source = plain(path, encoder, workers=workers)
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError) as caught:
        order(source)
    assert str(caught.value).startswith(f"{path} was changed while it was being read")


def test_an_epoch_of_no_usable_rows_stops_it(tmp_path, encoder):
    path = write(tmp_path / "rows.jsonl", [{"query": "a", "response": "b" * 300}])
    with pytest.raises(DataError, match=r"none of the 1 rows can be used: 1 don't fit into"):
        order(plain(path, encoder))


def test_it_can_be_sent_to_other_processes(path, encoder):
    source = plain(path, encoder)
    assert order(pickle.loads(pickle.dumps(source))) == order(source)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_random_state_of_training_is_left_alone(path, encoder, workers):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    order(plain(path, encoder, workers=workers))
    assert torch.equal(torch.rand(3), expected)


READ_A_LARGE_FILE = """
import sys
from pathlib import Path
import pyarrow.parquet
from disha.finetune.data import order, parquet
from disha.finetune.data.dataset import open_rows
from disha.finetune.data.encoding import Encoder
from disha.finetune.text.templates import PLAIN
from disha.finetune.data.sources import StreamedExamples, TextBatches

class Bytes:
    begin, end, special = (), 0, frozenset()
    def encode(self, text, special=True, continues=False):
        return list(text.encode()[:40])
    def encode_with_places(self, text):
        return self.encode(text), [(i, i + 1) for i in range(len(text[:40]))]

def peak():
    line, = (l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

before = peak()
order.MOST_BYTES_MIXED, parquet.MOST_BYTES_KEPT = 5_000_000, 15_000_000
rows = open_rows(Path(sys.argv[1]), "train[:90%]", streaming=True)
encoder = Encoder(Bytes(), ("query", "response"), 99, PLAIN)
source = TextBatches(StreamedExamples(rows, encoder), 8, seed=0)
count = sum(len(batch) for batch in source.batches(1))
print(count, peak() - before)
"""


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_large_file_takes_little_memory(tmp_path, suffix):
    path, count = tmp_path / f"rows.{suffix}", 15_000
    write_large_file(path, suffix, count)
    assert path.stat().st_size > 70e6
    finished = subprocess.run(
        [sys.executable, "-c", READ_A_LARGE_FILE, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    examples, growth = map(int, finished.stdout.split())
    assert examples == 0.9 * count
    assert growth < 40e6


def write_large_file(path, suffix, count):
    text = "some words, " * 400
    if suffix == "parquet":
        rows = [{"query": text, "response": "b"}] * count
        options = {"compression": "none", "use_dictionary": False, "row_group_size": 200}
        pq.write_table(pa.Table.from_pylist(rows), path, **options)
        return
    row = {"jsonl": f'{{"query": "{text}", "response": "b"}}\n', "csv": f'"{text}",b\n'}[suffix]
    with path.open("w") as file:
        file.write("query,response\n" if suffix == "csv" else "")
        file.writelines(row for _ in range(count))


class EndsItself:
    """Encodes nothing: the process that tries is killed, as one that takes too much memory is."""

    max_length = 160

    def outcome(self, row):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_was_killed_is_told_of_in_one_line(path):
    source = TextBatches(StreamedExamples(opened(path), EndsItself(), workers=1), 4, 7)
    with pytest.raises(
        TrainingError, match=r"a worker process that prepares rows has ended .*lower --data"
    ):
        next(source.batches(1))


@dataclasses.dataclass(frozen=True)
class Interrupting(Encoder):
    """Presses Ctrl-C for the process that encodes."""

    def outcome(self, row):
        os.kill(os.getpid(), signal.SIGINT)
        return super().outcome(row)


def test_ctrl_c_is_left_to_training(path, tiny_tokenizer, capfd):
    encoder = Interrupting(tiny_tokenizer, FIELDS, 160, CHATML)
    with listening():
        assert len(order(plain(path, encoder, workers=2))) == 83
        assert noted_signal() is None
    assert capfd.readouterr().err == ""


class Revealing:
    """Complains of how the process that encodes takes signals."""

    max_length = 160

    def outcome(self, row):
        found = tuple(map(signal.getsignal, SIGNALS))
        return Outcome(complaint=str(found))

    def counted(self, outcome, tally):
        raise BadRowError(outcome.complaint)


def test_processes_that_prepare_rows_can_be_told_to_end(path):
    wanted = (signal.SIG_DFL if n == signal.SIGTERM else signal.SIG_IGN for n in SIGNALS)
    usual = str(tuple(wanted))
    source = TextBatches(StreamedExamples(opened(path), Revealing(), workers=1), 4, 7)
    with listening(), pytest.raises(BadRowError, match=re.escape(usual)):
        next(source.batches(1))

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import signal
import subprocess
import sys

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet as pq

from disha.finetune.data.dataset import open_rows
from disha.finetune.data.encoding import Encoder, Outcome, Tally, encode_rows
from disha.finetune.data.sources import PackedExamples, ShuffledExamples
from disha.finetune.data.streaming import StreamedExamples, StreamedPackedExamples
from disha.finetune.errors import BadRowError, DataError, TrainingError
from disha.finetune.interruption import noticing_interruption
from disha.finetune.text.templates import CHATML

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
    return StreamedExamples(opened(path), encoder, 4, 7, **options)


def packed(path, encoder, **options):
    return StreamedPackedExamples(opened(path), encoder, 4, 7, **options)


def batches(source, epoch=1):
    return [list(batch) for batch in source.batches(epoch)]


def test_the_batches_are_those_of_examples_in_memory(path, encoder):
    examples = encode_rows(opened(path), encoder).examples
    assert batches(plain(path, encoder)) == batches(ShuffledExamples(examples, 4, 7))
    assert batches(packed(path, encoder), 2) == batches(PackedExamples(examples, 4, 7, 160), 2)


@pytest.mark.parametrize("make", [plain, packed])
def test_the_number_of_workers_changes_nothing(path, encoder, make):
    alone = batches(make(path, encoder))
    for workers in (1, 2):
        assert batches(make(path, encoder, workers=workers)) == alone


def test_nor_where_rows_are_parquet_in_a_folder_and_some_are_held_out(tmp_path, encoder):
    for part in range(2):
        table = pa.Table.from_pylist(ROWS[part::2])
        pq.write_table(table, tmp_path / f"train-{part}.parquet", row_group_size=50)
    rows = open_rows(tmp_path, "train[10%:]", streaming=True)
    assert rows[0]["query"] == "hello 66"  # read here before workers are begun
    alone = batches(StreamedExamples(rows, encoder, 4, 7))
    assert batches(StreamedExamples(rows, encoder, 4, 7, workers=2)) == alone


def test_every_epoch_has_its_own_order_of_the_same_rows(path, encoder):
    source = plain(path, encoder)
    first, second = batches(source, 1), batches(source, 2)
    assert first != second
    assert sorted(e.tokens for batch in first for e in batch) == sorted(
        e.tokens for batch in second for e in batch
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
        assert sum(map(len, batches(source, epoch))) == 60
        complaint = f"{path}, line 51: field 'query' must be text, found int 3"
        assert source.tally == Tally(60, cut=0, dropped=1, bad=1, complaints=[complaint])


@pytest.mark.parametrize("workers", [0, 2])
def test_or_raised_in_one_clear_line(tmp_path, encoder, workers):
    path = write(tmp_path / "rows.jsonl", [*ROWS[:50], {"query": 3}])
    with pytest.raises(BadRowError) as caught:
        batches(plain(path, encoder, workers=workers))
    assert str(caught.value) == f"{path}, line 51: field 'query' must be text, found int 3"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_changes_meanwhile_stops_it(path, encoder, workers):
    source = plain(path, encoder, workers=workers)
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError) as caught:
        batches(source)
    assert str(caught.value).startswith(f"{path} was changed while it was being read")


def test_an_epoch_of_no_usable_rows_stops_it(tmp_path, encoder):
    path = write(tmp_path / "rows.jsonl", [{"query": "a", "response": "b" * 300}])
    with pytest.raises(DataError, match=r"none of the 1 rows can be used: 1 don't fit into"):
        batches(plain(path, encoder))


def test_it_can_be_sent_to_other_processes(path, encoder):
    source = plain(path, encoder)
    assert batches(pickle.loads(pickle.dumps(source))) == batches(source)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_random_state_of_training_is_left_alone(path, encoder, workers):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches(plain(path, encoder, workers=workers))
    assert torch.equal(torch.rand(3), expected)


READ_A_LARGE_FILE = """
import sys
from pathlib import Path
import pyarrow.parquet
from disha.finetune.data import order, parquet
from disha.finetune.data.dataset import open_rows
from disha.finetune.data.encoding import Encoder
from disha.finetune.text.templates import PLAIN
from disha.finetune.data.streaming import StreamedExamples

class Bytes:
    begin, end, special = None, 0, frozenset()
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
source = StreamedExamples(rows, Encoder(Bytes(), ("query", "response"), 99, PLAIN), 8, seed=0)
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
    source = StreamedExamples(opened(path), EndsItself(), 4, 7, workers=1)
    with pytest.raises(
        TrainingError, match=r"a process that prepares rows has ended .*lower --data"
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
    with noticing_interruption() as interruption:
        assert len(batches(plain(path, encoder, workers=2))) == 83
    assert not interruption.requested
    assert capfd.readouterr().err == ""


class Revealing:
    """Complains of how the process that encodes takes signals."""

    max_length = 160

    def outcome(self, row):
        found = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        return Outcome(complaint=str(found))

    def require_allowed(self, outcome):
        raise BadRowError(outcome.complaint)


def test_processes_that_prepare_rows_can_be_told_to_end(path):
    usual = str((signal.SIG_IGN, signal.SIG_DFL))
    source = StreamedExamples(opened(path), Revealing(), 4, 7, workers=1)
    with noticing_interruption(), pytest.raises(BadRowError, match=re.escape(usual)):
        next(source.batches(1))

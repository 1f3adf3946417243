from __future__ import annotations

import gzip
import multiprocessing
import os
import pickle

import pytest

from disha.finetune.data.storage import InMemory, OnDisk
from disha.finetune.errors import DataError

CONTENT = b"one\r\ntwo\n\n\x0cthree\x1e\xe2\x80\xa8and on"


@pytest.fixture(params=[InMemory.of, OnDisk])
def opened(request):
    return request.param


def written(tmp_path, content):
    path = tmp_path / "rows.txt"
    path.write_bytes(content)
    return path


def test_lines_end_at_line_feeds_only_and_know_their_place(tmp_path, opened):
    storage = opened(written(tmp_path, CONTENT))
    lines = list(storage.lines())
    assert [line for _, line in lines] == [
        b"one\r\n",
        b"two\n",
        b"\n",
        b"\x0cthree\x1e\xe2\x80\xa8and on",
    ]
    assert storage.size == len(CONTENT)
    for start, line in lines:
        assert storage.read(start, start + len(line)) == line


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path, opened):
    storage = opened(written(tmp_path, b"\xef\xbb\xbfone\ntwo"))
    assert list(storage.lines()) == [(3, b"one\n"), (7, b"two")]


def test_utf_16_is_named(tmp_path, opened):
    storage = opened(written(tmp_path, "one".encode("utf-16")))
    with pytest.raises(DataError, match=r"rows\.txt is not UTF-8 text but UTF-16; save it as UTF"):
        list(storage.lines())


def test_a_missing_file_is_named(tmp_path, opened):
    with pytest.raises(DataError, match=r"there is no data file .*absent\.txt"):
        opened(tmp_path / "absent.txt")


def test_a_folder_is_no_file(tmp_path, opened):
    with pytest.raises(DataError, match="can't be read: Is a directory"):
        list(opened(tmp_path).lines())


def test_packed_files_are_unpacked(tmp_path):
    path = tmp_path / "rows.txt.gz"
    path.write_bytes(gzip.compress(CONTENT))
    assert InMemory.of(path).content == CONTENT


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(CONTENT)[:-9]], ids=["not packed", "cut short"]
)
def test_a_damaged_packed_file_is_named(tmp_path, content):
    path = tmp_path / "rows.txt.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.txt\.gz can't be unpacked, it is damaged"):
        InMemory.of(path)


def grown(path):
    path.write_bytes(path.read_bytes() + b"more")


def touched(path):
    os.utime(path, ns=(1, 1))


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(b"something else")
    other.replace(path)


@pytest.mark.parametrize("change", [grown, touched, replaced])
def test_a_file_that_changes_meanwhile_is_refused(tmp_path, change):
    path = written(tmp_path, CONTENT)
    storage = OnDisk(path)
    assert storage.read(0, 3) == b"one"
    change(path)
    with pytest.raises(DataError, match=r"rows\.txt was changed while it was being read"):
        storage.read(0, 3)
    with pytest.raises(DataError, match=r"rows\.txt was changed while it was being read"):
        list(storage.lines())


def test_a_file_that_vanishes_is_named(tmp_path):
    path = written(tmp_path, CONTENT)
    storage = OnDisk(path)
    path.unlink()
    with pytest.raises(DataError, match="there is no data file"):
        storage.read(0, 3)


def test_it_pickles_with_an_open_handle(tmp_path):
    storage = OnDisk(written(tmp_path, CONTENT))
    storage.read(0, 1)
    assert pickle.loads(pickle.dumps(storage)).read(5, 8) == b"two"


def read_often(storage, start, wanted, results):
    results.put(all(storage.read(start, start + 4096) == wanted for _ in range(2000)))


def test_processes_that_fork_do_not_disturb_each_other(tmp_path):
    content = b"".join(bytes([number]) * 4096 for number in range(4))
    storage = OnDisk(written(tmp_path, content))
    storage.read(0, 10)  # the handle is open before the fork
    forking = multiprocessing.get_context("fork")
    results = forking.SimpleQueue()
    readers = [
        forking.Process(
            target=read_often,
            args=(storage, part * 4096, bytes([part]) * 4096, results),
        )
        for part in range(4)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [results.get() for _ in readers] == [True] * 4

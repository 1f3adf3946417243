"""The lock of an output folder, and runs that meet in one."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
from collections import Counter

import pytest

from disha.finetune.errors import OutputError
from disha.finetune.folder_lock import LOCK, FolderLock
from tests.fuzzing import runs
from tests.processes import ended, started

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked here")


def is_taken(folder):
    try:
        with FolderLock(folder).held():
            return False
    except OutputError:
        return True


def test_a_second_run_hears_who_holds_the_folder_and_what_to_do(tmp_path):
    with FolderLock(tmp_path).held():
        with pytest.raises(OutputError) as refused, FolderLock(tmp_path).held():
            pass
        assert str(refused.value).startswith(
            f"--output_dir {tmp_path} is in use by another run: process {os.getpid()} on "
            f"{os.uname().nodename}, since 20"
        )
        assert "started by: " in str(refused.value)
        assert "wait until it has ended, or stop it, or name another folder" in str(refused.value)
        assert is_taken(tmp_path), "a refusal has freed it"
    assert not is_taken(tmp_path)


def test_nothing_is_left_of_a_folder_that_was_made_and_not_used(tmp_path):
    with FolderLock(tmp_path / "new" / "out").held():
        assert (tmp_path / "new" / "out" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path / "out").held():
        (tmp_path / "out" / "file").write_text("")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


@pytest.mark.parametrize("note", ["", "process 1 on another machine", "long" * 5000])
def test_the_file_of_a_killed_run_locks_nothing(tmp_path, note):
    (tmp_path / LOCK).write_text(note)
    with FolderLock(tmp_path).held():
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
        (tmp_path / LOCK).write_text(note)
        with pytest.raises(OutputError) as refused, FolderLock(tmp_path).held():
            pass
        assert len(str(refused.value)) < 1000


HOLD_AND_FORK = """
import os, signal, sys
from pathlib import Path
from disha.finetune.folder_lock import FolderLock

with FolderLock(Path(sys.argv[1])).held():
    if not os.fork():  # it prints once it has closed its copies
        print(os.getppid(), flush=True)
    signal.pause()
"""


def test_a_killed_run_holds_nothing_through_the_processes_that_it_forked(tmp_path):
    """Workers that prepare rows live on for seconds."""
    process = started(["-c", HOLD_AND_FORK, str(tmp_path)])
    try:
        assert process.stdout.readline() == f"{process.pid}\n"
        assert is_taken(tmp_path)
        process.kill()
        process.wait()
        os.killpg(process.pid, 0)  # the forked process is alive
        assert not is_taken(tmp_path)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_of_all_that_try_at_once_one_holds_it(tmp_path):
    """The file and the folder come and go with each."""
    folder, inside, counts = tmp_path / "out", threading.Semaphore(1), Counter()

    def hold_often():
        for _ in range(200):
            try:
                with FolderLock(folder).held():
                    counts["together"] += not inside.acquire(blocking=False)
                    counts["held"] += 1
                    inside.release()
            except OutputError as error:
                counts["refused"] += "in use by another run" in str(error)

    threads = [threading.Thread(target=hold_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts["together"] == 0
    assert counts["held"] + counts["refused"] == 800
    assert counts["held"] > 0
    assert list(folder.glob("*")) == []


# --- what happens to the folder meanwhile ---------------------------------------------------------


def test_a_deleted_folder_is_made_again_and_locked(tmp_path, capsys):
    lock = FolderLock(tmp_path / "out")
    with lock.held():
        lock.keep()
        assert capsys.readouterr().err == ""
        shutil.rmtree(lock.folder)
        lock.keep()
        assert "out was deleted while this run writes to it" in capsys.readouterr().err
        assert is_taken(lock.folder)
        (lock.folder / LOCK).unlink()
        lock.keep()
        assert capsys.readouterr().err == ""
        assert is_taken(lock.folder)


def test_a_folder_that_another_run_has_taken_is_left_to_it(tmp_path):
    lock = FolderLock(tmp_path / "out")
    with lock.held():
        shutil.rmtree(lock.folder)
        with FolderLock(lock.folder).held():
            with pytest.raises(OutputError, match="is in use by another run: process"):
                lock.keep()
            assert is_taken(lock.folder)
            with pytest.raises(OutputError, match="is in use by another run: process"):
                lock.keep()
        lock.keep()
        assert is_taken(lock.folder), "it is free again"


def test_what_is_not_held_is_not_kept(tmp_path):
    FolderLock(tmp_path / "out").keep()
    assert not (tmp_path / "out").exists()


# --- what a file system may answer ----------------------------------------------------------------


def answering(monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, capsys, number):
    answering(monkeypatch, number)
    with FolderLock(tmp_path).held():
        assert f"the file system of {tmp_path} has no locks" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "complaint"),
    [(errno.EACCES, "is in use by another run"), (errno.EIO, "can't be written: Input/output")],
)
def test_other_answers_are_errors(tmp_path, monkeypatch, number, complaint):
    answering(monkeypatch, number)
    with pytest.raises(OutputError, match=complaint), FolderLock(tmp_path / "out").held():
        pass


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "absent" / "folder")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(OutputError, match=f"{name} can't be written"):
            FolderLock(tmp_path / name).held().__enter__()


# --- whole runs -----------------------------------------------------------------------------------


def test_of_two_runs_one_works_and_the_other_says_why_not(tmp_path):
    """One try of every order; `python -m tests.fuzzing` makes many."""
    done = ended(started(["-m", runs.__name__, str(tmp_path), str(len(runs.ORDERS)), "0"]), 300)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == list(runs.ORDERS)

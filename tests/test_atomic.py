"""Saves that are killed, fail, run out of room or meet: what is there is whole, and alone."""

import errno
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

import disha
from disha import AdapterIOError
from disha.files import atomic
from disha.files.atomic import write_whole, write_whole_folder
from tests.fuzzing.children import in_child
from tests.fuzzing.saving import (
    entries,
    files_of,
    kill_saves,
    meet,
    save_under_limits,
    save_without_room,
    version,
)

fcntl = pytest.importorskip("fcntl")


def writing(text):
    return lambda path: Path(path).write_text(text)


def failing(path):
    Path(path).write_text("a part")
    raise OSError(errno.EIO, "broken")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.txt"


def leftover(path, number=1):
    """Make what a killed save of a file leaves."""
    folder = path.parent / f"{atomic._prefix(path)}{number:016x}.tmp"
    folder.mkdir()
    (folder / "file").write_text("a part")
    (folder / ".tmpAbCdEf").write_text("a part of a part")
    return folder


class TestKilled:
    def test_whole_or_absent_and_nothing_piles_up(self, tmp_path):
        left = list(kill_saves(tmp_path / "adapter.safetensors", 20))
        assert len(left) == 20
        assert len(set(left)) > 1  # they were not all killed at the same moment

    def test_the_next_save_clears_what_killed_ones_have_left(self, path):
        for number in range(3):
            leftover(path, number)
        write_whole(path, writing("whole"))
        assert os.listdir(path.parent) == [path.name]

    def test_one_that_is_alive_keeps_its_own(self, path):
        alive = leftover(path)
        descriptor = os.open(alive, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        write_whole(path, writing("whole"))
        assert sorted(os.listdir(alive)) == [".tmpAbCdEf", "file"]
        os.close(descriptor)
        write_whole(path, writing("whole"))
        assert not alive.exists()

    def test_a_save_holds_its_lock_until_its_file_is_in_place(self, path):
        def write(temporary):
            Path(temporary).write_text("first")
            write_whole(path, writing("second"))  # clears what no one holds
            assert Path(temporary).exists()

        write_whole(path, write)
        assert path.read_text() == "first"
        assert entries(path) == []

    def test_one_that_is_cleared_before_it_is_locked_begins_again(self, path, monkeypatch):
        right, cleared = os.open, []

        def open_late(name, *arguments, **options):
            if not cleared and str(name).endswith(".tmp"):
                cleared.append(name)
                atomic._clear(Path(name))
            return right(name, *arguments, **options)

        monkeypatch.setattr(os, "open", open_late)
        write_whole(path, writing("whole"))
        assert cleared
        assert path.read_text() == "whole"
        assert entries(path) == []

    def test_one_that_can_not_be_locked_leaves_nothing(self, path, monkeypatch):
        def fail(*_):
            raise OSError(errno.EMFILE, "too many open files")

        monkeypatch.setattr(os, "open", fail)
        with pytest.raises(AdapterIOError, match="too many open files"):
            write_whole(path, writing("whole"))
        assert os.listdir(path.parent) == []

    def test_others_files_stay(self, path):
        names = (".file.txt.tmp", ".file.txt.0123456789abcde.tmp", ".other.0123456789abcdef.tmp",
                 ".file.txt.mybackup.tmp", "file.txt.0123456789abcdef.tmp")  # fmt: skip
        for name in names:
            (path.parent / name).mkdir()
        plain = path.parent / ".file.txt.0123456789abcdef.tmp"
        plain.write_text("a file, and no save makes one of that name")
        link = path.parent / ".file.txt.fedcba9876543210.tmp"
        link.symlink_to(names[0])
        write_whole(path, writing("whole"))
        assert entries(path) == sorted([*names, plain.name, link.name])

    def test_where_nothing_locks_nothing_is_cleared(self, path, monkeypatch):
        def flock(*_):
            raise OSError(errno.ENOLCK, "no locks")

        left = leftover(path)
        monkeypatch.setattr(fcntl, "flock", flock)
        write_whole(path, writing("whole"))
        assert path.read_text() == "whole"
        assert entries(path) == [left.name]

    def test_without_the_module_for_locks(self, path, monkeypatch):
        left = leftover(path)
        monkeypatch.setattr(atomic, "fcntl", None)
        write_whole(path, writing("whole"))
        assert path.read_text() == "whole"
        with pytest.raises(AdapterIOError):
            write_whole(path, failing)
        assert entries(path) == [left.name]


class TestMeeting:
    def test_two_save_and_one_loads(self, tmp_path):
        loads, seen = meet(tmp_path / "adapter.safetensors", 25)
        assert loads > 1
        assert len(seen) > 1


class TestFailing:
    @pytest.mark.parametrize("there", [True, False])
    @pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
    def test_the_old_file_stays_and_nothing_else(self, path, there, error):
        def write(temporary):
            Path(temporary).write_text("a part")
            raise error("broken")

        if there:
            path.write_text("old")
        with pytest.raises(AdapterIOError if error is OSError else error, match="broken"):
            write_whole(path, write)
        assert (path.read_text() if path.exists() else None) == ("old" if there else None)
        assert entries(path) == []

    def test_several_files_come_together_or_not_at_all(self, tmp_path):
        folder = tmp_path / "folder"
        with pytest.raises(AdapterIOError, match=r"broken; what was there is unchanged$"):
            write_whole_folder(folder, {"a": writing("new"), "b": failing})
        assert not folder.exists()
        write_whole_folder(folder, {"a": writing("old"), "b": writing("old")})
        with pytest.raises(AdapterIOError):
            write_whole_folder(folder, {"a": writing("new"), "b": failing})
        assert {name: (folder / name).read_text() for name in os.listdir(folder)} == {
            "a": "old", "b": "old",
        }  # fmt: skip

    def test_what_is_in_place_already_is_told(self, tmp_path, monkeypatch):
        right = os.replace

        def replace(source, target):
            if Path(target).name == "b":
                raise OSError(errno.EIO, "broken")
            right(source, target)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(AdapterIOError, match=r"unchanged, but for .*a, new already"):
            write_whole_folder(tmp_path, {"a": writing("new"), "b": writing("new")})
        assert os.listdir(tmp_path) == ["a"]

    def test_no_file_may_be_that_long(self, tmp_path):
        path = tmp_path / "adapter.safetensors"
        (old,) = files_of([0])
        path.write_bytes(old)
        messages = in_child(save_under_limits, path, [0, 1, 8, 1000, 300_000, len(old) - 1])
        assert all(re.search("can't save to .* is unchanged", message) for message in messages)
        assert path.read_bytes() == old
        assert entries(path) == []

    def test_the_disk_is_full(self, tmp_path):
        came = in_child(save_without_room, tmp_path)
        if came is None:
            pytest.skip("nobody may mount a disk here")
        old, new = files_of([0, 1])
        assert re.search("No space left.*what was there is unchanged", came["error"])
        assert came == {**came, "kept": old, "litter": ["filler"], "then": new}

    @pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
    def test_a_folder_whose_names_do_not_reach_the_disk(self, path, monkeypatch, code):
        right = os.fsync

        def fsync(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(code, "broken")
            right(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        if code == errno.EIO:
            with pytest.raises(AdapterIOError, match=r"not confirmed the new name.*save again"):
                write_whole(path, writing("whole"))
        else:  # it can't be asked to
            write_whole(path, writing("whole"))
        assert path.read_text() == "whole"

    def test_file_and_names_reach_the_disk_in_this_order(self, path, monkeypatch):
        done, right_sync, right_replace = [], os.fsync, os.replace

        def fsync(descriptor):
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            done.append("names" if is_folder else "file")
            right_sync(descriptor)

        def replace(source, target):
            done.append("rename")
            right_replace(source, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)
        write_whole(path, writing("whole"))
        assert done == ["file", "rename", "names"]


class TestPaths:
    def test_relative(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("file", "./other", Path("third")):
            write_whole(Path(name), writing("whole"))
        assert sorted(os.listdir()) == ["file", "other", "third"]

    @pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "x" * 200, "x" * 201, ".hidden", "a b"])
    def test_names_as_long_as_names_can_be(self, tmp_path, name):
        path = tmp_path / name
        leftover(path)
        write_whole(path, writing("whole"))
        assert os.listdir(tmp_path) == [name]

    def test_links_stay_and_what_they_lead_to_is_replaced(self, tmp_path):
        (tmp_path / "far").mkdir()
        link, target = tmp_path / "link", tmp_path / "far" / "file"
        link.symlink_to("second")
        (tmp_path / "second").symlink_to("far/file")
        for text in ("new", "newer"):  # first to where nothing is yet
            write_whole(link, writing(text))
            assert target.read_text() == text
        assert link.is_symlink()
        assert sorted(os.listdir(tmp_path)) == ["far", "link", "second"]
        assert os.listdir(tmp_path / "far") == ["file"]

    def test_links_in_a_circle(self, tmp_path):
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(AdapterIOError, match="can't be a file here"):
            disha.save_adapter(version(0), tmp_path / "a")

    def test_other_names_of_the_old_file_keep_it(self, path):
        path.write_text("old")
        os.link(path, path.with_name("other"))
        write_whole(path, writing("new"))
        assert path.with_name("other").read_text() == "old"


class TestPermissions:
    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
    def test_a_new_file_gets_what_the_system_gives(self, path, mask):
        before = os.umask(mask)
        try:
            write_whole(path, writing("whole"))
            path.with_name("other").write_text("")
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
        assert path.stat().st_mode == path.with_name("other").stat().st_mode

    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
    def test_a_file_keeps_its_own_and_is_never_more_open(self, path, mode):
        seen = []

        def write(temporary):
            Path(temporary).write_text("new")
            seen.append(stat.S_IMODE(Path(temporary).parent.stat().st_mode))

        path.write_text("old")
        path.chmod(mode)
        write_whole(path, write)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert seen == [0o700]

    @pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
    def test_a_file_keeps_its_owner(self, path):
        path.write_text("old")
        os.chown(path, 12345, 54321)
        write_whole(path, writing("new"))
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)

    def test_what_may_not_be_written_is_not(self):
        with tempfile.TemporaryDirectory() as name:  # its parents are open to everybody
            came = in_child(save_as_nobody, Path(name))
        read_only = "can't save to .*read-only: it is read-only; allow writing, or name another"
        assert re.fullmatch(read_only, came["read-only file"])
        assert re.fullmatch(
            "can't save to .*: Permission denied; what was there is unchanged",
            came["read-only folder"],
        )
        assert came["unlisted folder"] == ""
        assert came["left"] == {"closed": ["file"], "open": ["read-only"], "unlisted": ["file"]}


def save_as_nobody(root):
    """Save where a user may not; return the errors and what is there then."""
    os.umask(0o022)
    for name in ("open", "closed", "unlisted"):
        (root / name).mkdir()
    for name in ("open/read-only", "closed/file"):
        (root / name).write_text("old")
    (root / "open" / "read-only").chmod(0o444)
    if os.geteuid() == 0:  # whom nothing stops
        for folder in (root, *root.rglob("*")):
            os.chown(folder, 65534, 65534)
        os.setgid(65534)
        os.setuid(65534)
    (root / "closed").chmod(0o555)
    (root / "unlisted").chmod(0o333)
    errors = {
        "read-only file": error_of_writing(root / "open" / "read-only"),
        "read-only folder": error_of_writing(root / "closed" / "file"),
        "unlisted folder": error_of_writing(root / "unlisted" / "file"),
    }
    for name in ("closed", "unlisted"):
        (root / name).chmod(0o755)
    left = {folder: sorted(os.listdir(root / folder)) for folder in os.listdir(root)}
    for folder in left:
        shutil.rmtree(root / folder)
    return {**errors, "left": left}


def error_of_writing(path):
    try:
        write_whole(path, writing("new"))
    except AdapterIOError as error:
        return str(error)
    return ""

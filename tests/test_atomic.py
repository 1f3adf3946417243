"""Saves that are killed, fail, run out of room or meet: what is there is whole, and alone."""

import errno
import os
import re
import shutil
import signal
import stat
import tempfile
from pathlib import Path

import pytest

import disha
from disha import AdapterIOError
from disha.files import atomic
from disha.files.atomic import write_whole, write_whole_folder
from disha.files.staging import staged_folder
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

    def test_several_files_are_never_of_two_saves(self, tmp_path):
        """Killed before or after any rename, the file that makes a reader look goes with all."""
        found = []
        for moment in range(6):
            folder = tmp_path / str(moment)
            write_whole_folder(folder, pair("old"))
            with pytest.raises(AssertionError, match="exit code -9"):
                in_child(save_pair_until, moment, folder)
            names = ("weights", "config")
            found.append(tuple(text_of(folder / name) for name in names))
            write_whole_folder(folder, pair("newer"))
            assert sorted(os.listdir(folder)) == ["config", "weights"]
            assert {text_of(folder / name) for name in names} == {"newer"}
        assert found == [("old", "old"), *[("old", None)] * 2, *[("new", None)] * 2, ("new", "new")]

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
        (path.parent / names[0] / "mine").touch()
        pipe = path.parent / ".file.txt.aaaaaaaaaaaaaaaa.tmp"
        os.mkfifo(pipe)  # which nobody waits for
        write_whole(path, writing("whole"))
        assert entries(path) == sorted([*names, plain.name, link.name, pipe.name])
        assert os.listdir(link) == ["mine"]

    def test_a_folder_that_a_killed_merge_took_away_is_no_leftover_of_a_file(self, path):
        left = path.parent / f"{atomic._prefix(path)}{1:016x}.tmp"
        (left / "former").mkdir(parents=True)
        (left / "former" / "model.safetensors").write_text("old")
        write_whole(path, writing("whole"))
        assert (left / "former" / "model.safetensors").read_text() == "old"

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
        with pytest.raises(AdapterIOError, match=r"unchanged, but for .*a, new already$"):
            write_whole_folder(tmp_path, {"a": writing("new"), "b": writing("new")})
        assert os.listdir(tmp_path) == ["a"]

    def test_what_was_taken_away_is_put_back(self, tmp_path, monkeypatch):
        write_whole_folder(tmp_path, pair("old"))
        failing_at(monkeypatch, "weights")
        with pytest.raises(AdapterIOError, match=r"broken; what was there is unchanged$"):
            write_whole_folder(tmp_path, pair("new"))
        assert sorted(os.listdir(tmp_path)) == ["config", "weights"]
        assert text_of(tmp_path / "config") == text_of(tmp_path / "weights") == "old"

    def test_what_was_taken_away_does_not_come_back_to_other_files(self, tmp_path, monkeypatch):
        write_whole_folder(tmp_path, pair("old"))
        failing_at(monkeypatch, "config")
        gone = r"unchanged, but for .*weights, new already, and .*config, gone; save again"
        with pytest.raises(AdapterIOError, match=gone):
            write_whole_folder(tmp_path, pair("new"))
        assert os.listdir(tmp_path) == ["weights"]

    def test_what_can_not_be_put_back_is_told_and_kept(self, tmp_path, monkeypatch):
        write_whole_folder(tmp_path, pair("old"))
        failing_at(monkeypatch, "weights")
        right = os.rename

        def rename(source, target):
            if Path(target).name == "config":
                raise OSError(errno.EIO, "broken too")
            right(source, target)

        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(AdapterIOError, match=r"can't put .*config back: broken too") as caught:
            write_whole_folder(tmp_path, pair("new"))
        assert text_of(Path(str(caught.value).rpartition(" from ")[2])) == "old"

    def test_our_own_errors_are_not_wrapped(self, path):
        def write(temporary):
            raise AdapterIOError("this is what is wrong")

        with pytest.raises(AdapterIOError, match=r"^this is what is wrong$"):
            write_whole(path, write)
        assert os.listdir(path.parent) == []

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

    def test_a_new_folders_own_name_reaches_the_disk(self, tmp_path, monkeypatch):
        synced = synced_folders(monkeypatch)
        write_whole_folder(tmp_path / "folder", pair("new"))
        assert synced[0] == tmp_path.stat().st_ino
        synced.clear()
        write_whole_folder(tmp_path / "folder", pair("newer"))
        assert tmp_path.stat().st_ino not in synced

    def test_a_new_folder_whose_name_does_not_reach_the_disk_goes(self, tmp_path, monkeypatch):
        synced_folders(monkeypatch, errno.EIO)
        with pytest.raises(AdapterIOError, match=r"can't make the folder .*: broken"):
            write_whole_folder(tmp_path / "folder", pair("new"))
        assert os.listdir(tmp_path) == []

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


class TestFolders:
    """`staged_folder`: whole folders."""

    @pytest.fixture
    def target(self, tmp_path):
        return tmp_path / "folder"

    def fill(self, target, text, **options):
        with staged_folder(target, **options) as staged:
            (staged / "sub").mkdir()
            (staged / "sub" / "file").write_text(text)

    def text(self, target):
        return text_of(target / "sub" / "file")

    def test_one_that_may_replace_another_needs_none(self, target):
        self.fill(target, "new", overwrite=True)
        assert os.listdir(target.parent) == [target.name]

    def test_one_that_came_meanwhile_is_not_replaced(self, target):
        def fill_late():
            with staged_folder(target, overwrite=False) as staged:
                (staged / "mine").touch()
                target.mkdir()
                (target / "theirs").touch()

        with pytest.raises(AdapterIOError, match="what was there is unchanged"):
            fill_late()
        assert os.listdir(target) == ["theirs"]
        assert os.listdir(target.parent) == [target.name]

    def test_killed_at_any_rename_it_is_whole_after_the_next(self, tmp_path):
        found = []
        for moment in range(4):
            target = tmp_path / str(moment) / "folder"
            target.parent.mkdir()
            self.fill(target, "old")
            with pytest.raises(AssertionError, match="exit code -9"):
                in_child(replace_folder_until, moment, target)
            found.append(self.text(target))
            # The next one fails, and has put back what was there.
            with pytest.raises(AdapterIOError, match="is not empty"):
                self.fill(target, "newer")
            assert self.text(target) == (found[-1] or "old")
            assert os.listdir(target.parent) == ["folder"]
            self.fill(target, "newer", overwrite=True)
            assert self.text(target) == "newer"
            assert os.listdir(target.parent) == ["folder"]
        assert found == ["old", None, None, "new"]

    @pytest.mark.parametrize("moments", [(None,), (3, None)])
    def test_a_part_of_a_former_one_is_never_put_back(self, target, moments):
        """Killed while it deletes its former folder, or that of one killed before."""
        self.fill(target, "old")
        for moment in moments:
            with pytest.raises(AssertionError, match="exit code -9"):
                in_child(replace_folder_until, moment, target)
        assert len(entries(target)) == 1
        shutil.rmtree(target)
        self.fill(target, "newer")
        assert self.text(target) == "newer"
        assert entries(target) == []

    def test_one_that_is_alive_keeps_its_own(self, target):
        with staged_folder(target) as first:
            (first / "file").write_text("first")
            self.fill(target, "second")
            target.rename(target.with_name("second"))
        assert os.listdir(target) == ["file"]
        assert self.text(target.with_name("second")) == "second"

    @pytest.mark.parametrize("how", ["no locks", "no module"])
    def test_without_locks(self, target, monkeypatch, how):
        def flock(*_):
            raise OSError(errno.ENOLCK, "no locks")

        if how == "no module":
            monkeypatch.setattr(atomic, "fcntl", None)
        else:
            monkeypatch.setattr(fcntl, "flock", flock)
        self.fill(target, "old")
        self.fill(target, "new", overwrite=True)
        assert self.text(target) == "new"
        assert os.listdir(target.parent) == ["folder"]

    def test_one_that_is_cleared_before_it_is_locked_begins_again(self, target, monkeypatch):
        right, cleared = os.open, []

        def open_late(name, *arguments, **options):
            if not cleared and str(name).endswith(".tmp"):
                cleared.append(name)
                atomic._clear(Path(name), target)
            return right(name, *arguments, **options)

        monkeypatch.setattr(os, "open", open_late)
        self.fill(target, "new")
        assert cleared
        assert self.text(target) == "new"

    def test_links_and_pipes_of_such_a_name_are_left_alone(self, target):
        other = target.with_name("other")
        other.mkdir()
        (other / "former").touch()
        target.with_name(f".folder.{1:016x}.tmp").symlink_to(other)
        os.mkfifo(target.with_name(f".folder.{2:016x}.tmp"))
        self.fill(target, "new")
        assert len(os.listdir(target.parent)) == 4
        assert os.listdir(other) == ["former"]

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    def test_the_former_one_is_back_when_the_new_one_can_not_come(self, target, monkeypatch, error):
        self.fill(target, "old")
        failing_at(monkeypatch, "folder", error)
        with pytest.raises(AdapterIOError if error is OSError else error, match="broken"):
            self.fill(target, "new", overwrite=True)
        assert self.text(target) == "old"
        assert os.listdir(target.parent) == ["folder"]

    def test_it_stays_when_it_can_not_be_taken_away(self, target, monkeypatch):
        def rename(source, target):
            raise OSError(errno.EIO, "broken")

        self.fill(target, "old")
        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(AdapterIOError, match="broken; what was there is unchanged"):
            self.fill(target, "new", overwrite=True)
        assert self.text(target) == "old"
        assert os.listdir(target.parent) == ["folder"]

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
    def test_a_disk_that_can_not_be_asked_for_names(self, target, monkeypatch, code):
        self.fill(target, "old")
        synced_folders(monkeypatch, code)
        self.fill(target, "new", overwrite=True)
        assert self.text(target) == "new"
        assert os.listdir(target.parent) == ["folder"]

    @pytest.mark.parametrize("there", [True, False])
    def test_names_that_do_not_reach_the_disk(self, target, monkeypatch, there):
        """Then the former folder is kept, and the error does not say that it is in its place."""
        if there:
            self.fill(target, "old")
        synced_folders(monkeypatch, errno.EIO, target.parent)
        with pytest.raises(AdapterIOError, match="has not confirmed its name") as caught:
            self.fill(target, "new", overwrite=there)
        assert "unchanged" not in str(caught.value)
        assert self.text(target) == "new"
        assert ("what was there is in" in str(caught.value)) == there
        if there:
            assert self.text(Path(str(caught.value).rpartition(" is in ")[2])) == "old"
        else:
            assert os.listdir(target.parent) == ["folder"]

    def test_the_former_one_goes_after_the_name_of_the_new_one_is_on_the_disk(
        self, target, monkeypatch
    ):
        self.fill(target, "old")
        done, right = synced_folders(monkeypatch), os.rename

        def rename(source, target):
            done.append(Path(target).name)
            right(source, target)

        monkeypatch.setattr(os, "rename", rename)
        self.fill(target, "new", overwrite=True)
        new, parent = target.stat().st_ino, target.parent.stat().st_ino
        assert done == [new, (target / "sub").stat().st_ino, "former", parent, "removed"]

    @pytest.mark.parametrize("mask", [0o022, 0o077])
    def test_permissions(self, target, monkeypatch, mask):
        before = os.umask(mask)
        try:
            with monkeypatch.context() as patched:
                patched.delattr(os, "umask")  # other threads make files meanwhile
                self.fill(target, "old")
        finally:
            os.umask(before)
        assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~mask
        target.chmod(0o750)
        self.fill(target, "new", overwrite=True)
        assert stat.S_IMODE(target.stat().st_mode) == 0o750

    def test_one_that_may_not_be_written_is_not(self):
        with tempfile.TemporaryDirectory() as name:  # its parents are open to everybody
            error, left = in_child(replace_folder_as_nobody, Path(name))
        assert "folder: it is read-only; allow writing, or name another" in error
        assert left == ["folder"]


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


def pair(text):
    return {"weights": writing(text), "config": writing(text)}


def text_of(path):
    return path.read_text() if path.exists() else None


def failing_at(monkeypatch, name, error=OSError):
    """Let nothing take the place of this name."""
    right = os.replace

    def replace(source, target):
        if Path(target).name == name:
            raise error(errno.EIO, "broken") if error is OSError else error("broken")
        right(source, target)

    monkeypatch.setattr(os, "replace", replace)


def synced_folders(monkeypatch, code=None, only=None):
    """Return a list of the inodes of the folders that are synced from now on; or let that fail."""
    synced, right = [], os.fsync

    def fsync(descriptor):
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            synced.append(found.st_ino)
            if code is not None and (only is None or os.path.samestat(found, only.stat())):
                raise OSError(code, "broken")
        right(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return synced


def killed_at(moment):
    """Kill this process before (even) or after (odd) one of its renames."""
    moments = iter(range(100))

    def killing(rename):
        def one(source, target):
            for action in (lambda: None, lambda: rename(source, target)):
                action()
                if next(moments) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        return one

    os.rename, os.replace = killing(os.rename), killing(os.replace)


def save_pair_until(moment, folder):
    killed_at(moment)
    write_whole_folder(folder, pair("new"))


def replace_folder_until(moment, target):
    """Be killed at a rename, or else when a folder is deleted."""
    killed_at(moment)
    shutil.rmtree = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    TestFolders().fill(target, "new", overwrite=True)


def replace_folder_as_nobody(root):
    """Replace a read-only folder; return the error and what is there then."""
    target = root / "folder"
    target.mkdir()
    become_nobody(root)
    target.chmod(0o555)
    try:
        TestFolders().fill(target, "new", overwrite=True)
    except AdapterIOError as error:
        return str(error), os.listdir(root)
    return "", os.listdir(root)


def become_nobody(root):
    """Give a folder to a user whom something stops, and become that one."""
    if os.geteuid() == 0:
        for folder in (root, *root.rglob("*")):
            os.chown(folder, 65534, 65534)
        os.setgid(65534)
        os.setuid(65534)


def save_as_nobody(root):
    """Save where a user may not; return the errors and what is there then."""
    os.umask(0o022)
    for name in ("open", "closed", "unlisted"):
        (root / name).mkdir()
    for name in ("open/read-only", "closed/file"):
        (root / name).write_text("old")
    (root / "open" / "read-only").chmod(0o444)
    become_nobody(root)
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

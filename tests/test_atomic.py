"""Saves that are killed, fail, run out of room or meet: each target is complete, and alone."""

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
from disha.files import atomic, write_files, write_folder
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


def save(path, text):
    write_files({path: writing(text)})


def save_pair(folder, text):
    write_files({folder / name: writing(text) for name in ("weights", "config")})


def texts(folder):
    return {name: (folder / name).read_text() for name in sorted(os.listdir(folder))}


def fill(target, text, **options):
    with write_folder(target, **options) as new:
        (new / "sub").mkdir()
        (new / "sub" / "file").write_text(text)


def text_in(target):
    file = target / "sub" / "file"
    return file.read_text() if file.exists() else None


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.txt"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "folder"


def leftover(path, number=1):
    """Make what a killed save of a file leaves."""
    folder = path.parent / f"{atomic._prefix(path)}{number:016x}.tmp"
    folder.mkdir()
    (folder / "new").write_text("a part")
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
        save(path, "whole")
        assert os.listdir(path.parent) == [path.name]

    def test_several_files_are_never_of_two_saves(self, tmp_path):
        """Killed before or after any rename; the next save fails, and the one after it does not."""
        found, after = [], []
        for moment in range(6):
            folder = tmp_path / str(moment)
            folder.mkdir()
            save_pair(folder, "old")
            with pytest.raises(AssertionError, match="exit code -9"):
                in_child(save_pair_until, moment, folder)
            found.append(visible(folder))
            with pytest.raises(AdapterIOError, match="unchanged"):
                write_files({folder / "weights": failing, folder / "config": failing})
            after.append(texts(folder))
            save_pair(folder, "newer")
            assert texts(folder) == {"config": "newer", "weights": "newer"}
        old, new = ({"config": text, "weights": text} for text in ("old", "new"))
        weights = {"weights": "old"}, {"weights": "new"}
        assert found == [old, *[weights[0]] * 2, *[weights[1]] * 2, new]
        assert after == [old, *[new] * 5]

    def test_a_part_of_a_killed_pair_is_not_completed_with_files_of_another_save(self, tmp_path):
        save_pair(tmp_path, "old")
        with pytest.raises(AssertionError, match="exit code -9"):
            in_child(save_pair_until, 2, tmp_path)
        save(tmp_path / "weights", "newer")
        with pytest.raises(AdapterIOError, match="unchanged"):
            write_files({tmp_path / "weights": failing, tmp_path / "config": failing})
        assert texts(tmp_path) == {"weights": "newer"}

    def test_a_folder_is_whole_after_the_next_and_the_new_one_is_not_lost(self, tmp_path):
        """Killed before or after any rename; the next save fails, and the one after it does not."""
        found, after = [], []
        for moment in range(4):
            target = tmp_path / str(moment) / "folder"
            target.parent.mkdir()
            fill(target, "old")
            with pytest.raises(AssertionError, match="exit code -9"):
                in_child(replace_folder_until, moment, target)
            found.append(text_in(target))
            with pytest.raises(AdapterIOError, match="is not empty"):
                fill(target, "newer")
            after.append(text_in(target))
            assert os.listdir(target.parent) == ["folder"]
            fill(target, "newer", overwrite=True)
            assert text_in(target) == "newer"
            assert os.listdir(target.parent) == ["folder"]
        assert found == ["old", None, None, "new"]
        assert after == ["old", "new", "new", "new"]

    @pytest.mark.parametrize("moments", [(None,), (3, None)])
    def test_a_folder_that_is_half_deleted_is_never_put_back(self, target, moments):
        """Killed while it deletes the old folder, or that of one killed before."""
        fill(target, "old")
        for moment in moments:
            with pytest.raises(AssertionError, match="exit code -9"):
                in_child(replace_folder_until, moment, target)
        assert len(entries(target)) == 1
        shutil.rmtree(target)
        fill(target, "newer")
        assert text_in(target) == "newer"
        assert entries(target) == []

    @pytest.mark.parametrize("write", [save, fill])
    def test_one_that_is_alive_keeps_its_own(self, target, write):
        alive = leftover(target)
        descriptor = os.open(alive, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        write(target, "first")
        assert sorted(os.listdir(alive)) == [".tmpAbCdEf", "new"]
        os.close(descriptor)
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        write(target, "second")
        assert not alive.exists()

    def test_two_that_write_at_once(self, path, target):
        def write(temporary):
            Path(temporary).write_text("first")
            save(path, "second")  # clears what no one holds
            assert Path(temporary).exists()

        write_files({path: write})
        assert path.read_text() == "first"
        with write_folder(target) as first:
            (first / "file").write_text("first")
            fill(target, "second")
            target.rename(target.with_name("second"))
        assert os.listdir(target) == ["file"]
        assert text_in(target.with_name("second")) == "second"
        assert sorted(os.listdir(path.parent)) == ["file.txt", "folder", "second"]

    @pytest.mark.parametrize("write", [save, fill])
    def test_one_that_is_cleared_before_it_is_locked_begins_again(self, target, write, monkeypatch):
        right, cleared = os.open, []

        def open_late(name, *arguments, **options):
            if not cleared and str(name).endswith(".tmp"):
                cleared.append(name)
                shutil.rmtree(name)
            return right(name, *arguments, **options)

        monkeypatch.setattr(os, "open", open_late)
        write(target, "new")
        assert cleared
        assert os.listdir(target.parent) == ["folder"]

    def test_one_that_can_not_be_locked_leaves_nothing(self, path, monkeypatch):
        def fail(*_):
            raise OSError(errno.EMFILE, "too many open files")

        monkeypatch.setattr(os, "open", fail)
        with pytest.raises(AdapterIOError, match="too many open files"):
            save(path, "whole")
        assert os.listdir(path.parent) == []

    @pytest.mark.parametrize("write", [save, fill])
    def test_others_files_stay(self, target, write):
        names = (".folder.tmp", ".folder.0123456789abcde.tmp", ".other.0123456789abcdef.tmp",
                 ".folder.mybackup.tmp", "folder.0123456789abcdef.tmp")  # fmt: skip
        for name in names:
            target.with_name(name).mkdir()
        target.with_name(names[0]).joinpath("mine").touch()
        plain = target.with_name(".folder.0123456789abcdef.tmp")
        plain.write_text("a file, and no save makes one of that name")
        link = target.with_name(".folder.fedcba9876543210.tmp")
        link.symlink_to(names[0])
        pipe = target.with_name(".folder.aaaaaaaaaaaaaaaa.tmp")
        os.mkfifo(pipe)  # which nobody waits for
        write(target, "new")
        assert entries(target) == sorted([*names, plain.name, link.name, pipe.name])
        assert os.listdir(link) == ["mine"]

    @pytest.mark.parametrize("how", ["no locks", "no module"])
    def test_without_locks_nothing_is_cleared(self, path, target, monkeypatch, how):
        def flock(*_):
            raise OSError(errno.ENOLCK, "no locks")

        left = leftover(path)
        if how == "no module":
            monkeypatch.setattr(atomic, "fcntl", None)
        else:
            monkeypatch.setattr(fcntl, "flock", flock)
        save(path, "whole")
        fill(target, "old")
        fill(target, "new", overwrite=True)
        with pytest.raises(AdapterIOError):
            write_files({path: failing})
        assert path.read_text() == "whole"
        assert text_in(target) == "new"
        assert sorted(os.listdir(path.parent)) == [left.name, "file.txt", "folder"]


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
            write_files({path: write})
        assert (path.read_text() if path.exists() else None) == ("old" if there else None)
        assert entries(path) == []

    def test_several_files_come_together_or_not_at_all(self, tmp_path):
        files = {tmp_path / "a": writing("new"), tmp_path / "b": failing}
        with pytest.raises(AdapterIOError, match=r"broken; what was there is unchanged$"):
            write_files(files)
        assert texts(tmp_path) == {}
        write_files(dict.fromkeys(files, writing("old")))
        with pytest.raises(AdapterIOError):
            write_files(files)
        assert texts(tmp_path) == {"a": "old", "b": "old"}

    def test_what_is_in_place_already_is_told(self, tmp_path, monkeypatch):
        failing_at(monkeypatch, "config")
        with pytest.raises(
            AdapterIOError, match=r"broken; .*weights already replaced; save again$"
        ):
            save_pair(tmp_path, "new")
        assert texts(tmp_path) == {"weights": "new"}

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    def test_what_was_moved_away_is_put_back(self, tmp_path, monkeypatch, error):
        save_pair(tmp_path, "old")
        failing_at(monkeypatch, "weights", error)
        with pytest.raises(AdapterIOError if error is OSError else error, match="broken"):
            save_pair(tmp_path, "new")
        assert texts(tmp_path) == {"config": "old", "weights": "old"}

    def test_what_was_moved_away_does_not_come_back_to_other_files(self, tmp_path, monkeypatch):
        save_pair(tmp_path, "old")
        with monkeypatch.context() as patched:
            failing_at(patched, "config")
            gone = r"weights already replaced, .*config missing; save again$"
            with pytest.raises(AdapterIOError, match=gone):
                save_pair(tmp_path, "new")
        assert visible(tmp_path) == {"weights": "new"}
        with pytest.raises(AdapterIOError):  # and the next one puts in place what was complete
            write_files({tmp_path / "weights": failing, tmp_path / "config": failing})
        assert texts(tmp_path) == {"config": "new", "weights": "new"}

    def test_our_own_errors_are_not_wrapped(self, path):
        def write(temporary):
            raise AdapterIOError("this is what is wrong")

        with pytest.raises(AdapterIOError, match=r"^this is what is wrong$"):
            write_files({path: write})
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


class TestDisk:
    @pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL, errno.ENOTSUP])
    def test_names_that_do_not_reach_the_disk(self, path, target, monkeypatch, code):
        fill(target, "old")
        synced_folders(monkeypatch, code)
        if code == errno.EIO:
            with pytest.raises(
                AdapterIOError, match=r"broken; .*file.txt already replaced; save again"
            ):
                save(path, "whole")
        else:  # the system can't sync folders
            save(path, "whole")
            fill(target, "new", overwrite=True)
            assert text_in(target) == "new"
        assert path.read_text() == "whole"
        assert sorted(os.listdir(path.parent)) == ["file.txt", "folder"]

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
        save(path, "whole")
        assert done == ["file", "rename", "names"]
        done.clear()
        fill(path.parent / "folder", "new")
        assert done == ["names", "file", "names", "rename", "names"]

    def test_the_old_folder_goes_after_the_name_of_the_new_one_is_on_the_disk(
        self, target, monkeypatch
    ):
        fill(target, "old")
        synced, right, deleted = synced_folders(monkeypatch), shutil.rmtree, []

        def rmtree(*arguments, **options):
            deleted.append(synced[-1])
            right(*arguments, **options)

        monkeypatch.setattr(shutil, "rmtree", rmtree)
        fill(target, "new", overwrite=True)
        assert deleted == [target.parent.stat().st_ino]


class TestFolders:
    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    @pytest.mark.parametrize("moment", ["filling", "placing"])
    def test_the_old_one_stays_when_the_new_one_can_not_come(
        self, target, monkeypatch, error, moment
    ):
        fill(target, "old")
        if moment == "placing":
            failing_at(monkeypatch, "folder", error)
        with pytest.raises(AdapterIOError if error is OSError else error, match="broken") as caught:
            self.fill_and_fail(target, error if moment == "filling" else None)
        if error is OSError:
            assert str(caught.value).endswith("what was there is unchanged")
        assert text_in(target) == "old"
        assert os.listdir(target.parent) == ["folder"]

    def fill_and_fail(self, target, error):
        with write_folder(target, overwrite=True) as new:
            (new / "file").touch()
            if error is not None:
                raise error("broken")

    def test_one_that_may_replace_another_needs_none(self, target):
        fill(target, "new", overwrite=True)
        assert os.listdir(target.parent) == [target.name]

    def test_an_empty_one_is_replaced(self, target):
        target.mkdir()
        fill(target, "new")
        assert text_in(target) == "new"

    def test_one_that_came_meanwhile_is_not_replaced(self, target):
        def fill_late():
            with write_folder(target) as new:
                (new / "mine").touch()
                target.mkdir()
                (target / "theirs").touch()

        with pytest.raises(AdapterIOError, match="what was there is unchanged"):
            fill_late()
        assert os.listdir(target) == ["theirs"]
        assert os.listdir(target.parent) == [target.name]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_what_is_in_the_way(self, target, overwrite):
        target.touch()
        with pytest.raises(AdapterIOError, match="folder: it is a file; name a folder"):
            fill(target, "new", overwrite=overwrite)
        with pytest.raises(AdapterIOError, match="does not exist; create it first"):
            fill(target.parent / "a" / "b", "new", overwrite=overwrite)

    @pytest.mark.parametrize("mask", [0o022, 0o077])
    def test_permissions(self, target, monkeypatch, mask):
        before = os.umask(mask)
        try:
            with monkeypatch.context() as patched:
                patched.delattr(os, "umask")  # other threads make files meanwhile
                fill(target, "old")
        finally:
            os.umask(before)
        assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~mask
        target.chmod(0o750)
        fill(target, "new", overwrite=True)
        assert stat.S_IMODE(target.stat().st_mode) == 0o750


class TestPaths:
    def test_relative(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("file", "./other", Path("third")):
            save(name, "whole")
        fill("folder", "new")
        assert sorted(os.listdir()) == ["file", "folder", "other", "third"]

    @pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "x" * 200, "x" * 201, ".hidden", "a b"])
    def test_names_as_long_as_names_can_be(self, tmp_path, name):
        path = tmp_path / name
        leftover(path)
        save(path, "whole")
        assert os.listdir(tmp_path) == [name]

    def test_links_stay_and_what_they_lead_to_is_replaced(self, tmp_path):
        (tmp_path / "far").mkdir()
        link, target = tmp_path / "link", tmp_path / "far" / "file"
        link.symlink_to("second")
        (tmp_path / "second").symlink_to("far/file")
        for text in ("new", "newer"):  # first to where nothing is yet
            save(link, text)
            assert target.read_text() == text
        assert link.is_symlink()
        assert sorted(os.listdir(tmp_path)) == ["far", "link", "second"]
        assert os.listdir(tmp_path / "far") == ["file"]

    def test_links_in_a_circle(self, tmp_path):
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(AdapterIOError, match="can't be a file here"):
            disha.save_adapter(version(0), tmp_path / "a")

    def test_what_is_in_the_way(self, path):
        path.mkdir()
        with pytest.raises(AdapterIOError, match="it is a folder; name a file in it"):
            save(path, "new")
        os.mkfifo(path.with_name("pipe"))
        with pytest.raises(AdapterIOError, match="it is not a regular file; name another"):
            save(path.with_name("pipe"), "new")
        with pytest.raises(AdapterIOError, match="does not exist; create it first"):
            save(path.parent / "a" / "b", "new")

    def test_other_names_of_the_old_file_keep_it(self, path):
        path.write_text("old")
        os.link(path, path.with_name("other"))
        save(path, "new")
        assert path.with_name("other").read_text() == "old"


class TestPermissions:
    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
    def test_a_new_file_gets_what_the_system_gives(self, path, mask):
        before = os.umask(mask)
        try:
            save(path, "whole")
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
        write_files({path: write})
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert seen == [0o700]

    @pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
    def test_a_file_keeps_its_owner(self, path):
        path.write_text("old")
        os.chown(path, 12345, 54321)
        save(path, "new")
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)

    def test_what_may_not_be_written_is_not(self):
        with tempfile.TemporaryDirectory() as name:  # its parents are open to everybody
            errors, left = in_child(save_as_nobody, Path(name))
        read_only = "can't save to .*: it is read-only; allow writing, or name another"
        denied = "can't save to .*: Permission denied; what was there is unchanged"
        assert re.fullmatch(read_only, errors["open/read-only"])
        assert re.fullmatch(read_only, errors["open/folder"])
        assert re.fullmatch(denied, errors["closed/file"])
        assert errors["unlisted/file"] == ""
        assert left == {"closed": ["file"], "open": ["folder", "read-only"], "unlisted": ["file"]}


def visible(folder):
    """Return the text of each file that is no leftover."""
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.is_file()}


def failing_at(monkeypatch, name, error=OSError):
    """Let nothing take the place of this name."""
    right = os.replace

    def replace(source, target):
        if Path(target).name == name:
            raise error(errno.EIO, "broken") if error is OSError else error("broken")
        right(source, target)

    monkeypatch.setattr(os, "replace", replace)


def synced_folders(monkeypatch, code=None):
    """Return a list of the inodes of the folders that are synced from now on; or let that fail."""
    synced, right = [], os.fsync

    def fsync(descriptor):
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            synced.append(found.st_ino)
            if code is not None:
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
    save_pair(folder, "new")


def replace_folder_until(moment, target):
    """Be killed at a rename, or else when a folder is deleted."""
    killed_at(moment)
    shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    fill(target, "new", overwrite=True)


def save_as_nobody(root):
    """Save where a user may not; return the errors and what is there then."""
    os.umask(0o022)
    for name in ("open/folder", "closed", "unlisted"):
        (root / name).mkdir(parents=True)
    for name in ("open/read-only", "closed/file"):
        (root / name).write_text("old")
    if os.geteuid() == 0:
        for folder in (root, *root.rglob("*")):
            os.chown(folder, 65534, 65534)
        os.setgid(65534)
        os.setuid(65534)
    modes = {"open/read-only": 0o444, "open/folder": 0o555, "closed": 0o555, "unlisted": 0o333}
    for name, mode in modes.items():
        (root / name).chmod(mode)
    errors = {
        name: error_of_writing(root / name)
        for name in ("open/read-only", "open/folder", "closed/file", "unlisted/file")
    }
    for name in ("closed", "unlisted"):
        (root / name).chmod(0o755)
    left = {folder: sorted(os.listdir(root / folder)) for folder in os.listdir(root)}
    for folder in left:
        shutil.rmtree(root / folder)
    return errors, left


def error_of_writing(path):
    try:
        fill(path, "new", overwrite=True) if path.is_dir() else save(path, "new")
    except AdapterIOError as error:
        return str(error)
    return ""

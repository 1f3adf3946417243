"""A save that fails or is killed leaves the old file."""

import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

import disha
from disha import AdapterIOError, ArgumentError, ArgumentTypeError
from disha.files import disk
from disha.files.disk import require_free, save, save_tensors, save_together
from tests.adapter_files import trained

NEW = {"x": torch.ones(40_000)}


@pytest.fixture
def old(tmp_path):
    """Return the path of a file that exists."""
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.zeros(3)}, {})
    return path


def folder_with(text):
    """Return what writes a folder with a file in another one."""

    def write(new):
        (new / "inner").mkdir(parents=True)
        (new / "inner" / "x").write_text(text)

    return write


def in_two_moves(new, target):
    """Exchange nothing, as a system that can't do it in one step."""
    return False


def assert_old(path):
    assert torch.equal(safetensors.torch.load_file(path)["x"], torch.zeros(3))
    assert [one.name for one in path.parent.iterdir()] == [path.name]


class TestFailed:
    def test_a_full_disk(self, old):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(AdapterIOError, match=r"can't save to .*too large"):
                save_tensors(old, NEW, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert_old(old)

    @pytest.mark.parametrize(
        ("error", "raised"),
        [(OSError("full"), AdapterIOError), (KeyboardInterrupt("full"), KeyboardInterrupt)],
    )
    def test_a_writer_that_raises(self, old, error, raised):
        def write(new):
            new.write_text("a part")
            raise error

        with pytest.raises(raised, match="full"):
            save(old, write)
        assert_old(old)

    @pytest.mark.parametrize(("name", "says"), [("a\0b", "null byte"), ("a\udcff", "can't encode")])
    def test_a_name_that_no_reader_can_open(self, tmp_path, name, says):
        with pytest.raises(AdapterIOError, match=f"can't save to .*{says}"):
            disha.save_adapter(trained(), tmp_path / name)
        assert not list(tmp_path.iterdir())
        if "\0" not in name:
            disha.save_adapter(trained(), tmp_path / "a")
            (tmp_path / "a").rename(tmp_path / name)
        with pytest.raises(AdapterIOError, match=f"can't read .*{says}"):
            disha.inspect_adapter(tmp_path / name)

    def test_a_folder_is_no_file(self, tmp_path):
        with pytest.raises(AdapterIOError, match="Is a directory"):
            save_tensors(tmp_path, NEW, {})
        assert not list(tmp_path.iterdir())

    def test_a_pipe_or_a_device_stays_what_it_is(self, tmp_path):
        path = tmp_path / "a.safetensors"
        os.mkfifo(path)
        with pytest.raises(AdapterIOError, match="it is a device or a pipe; nothing was changed"):
            disha.save_adapter(trained(), path)
        assert path.is_fifo()
        assert [one.name for one in tmp_path.iterdir()] == [path.name]

    def test_a_folder_that_can_not_take_the_place_of_another(self, tmp_path, monkeypatch):
        path = tmp_path / "folder"
        for text in ("old", "new"):
            save(path, folder_with(text))
            assert (path / "inner" / "x").read_text() == text

        def fail(*_):
            raise OSError("full")

        monkeypatch.setattr(disk, "_exchange", in_two_moves)
        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(AdapterIOError, match="full"):
            save(path, folder_with("newer"))
        assert (path / "inner" / "x").read_text() == "new"
        assert list(tmp_path.iterdir()) == [path]

    def test_an_open_file_that_windows_does_not_replace(self, old, monkeypatch):
        """Simulated: Windows refuses to replace or move what a program has open."""

        def refuse(self, target):
            raise PermissionError(13, "Access is denied", str(self), 5, str(target))

        monkeypatch.setattr(disk, "_exchange", in_two_moves)
        monkeypatch.setattr(Path, "replace", refuse)
        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(AdapterIOError, match="Access is denied; nothing was changed"):
            save_tensors(old, NEW, {})
        assert_old(old)
        folder = old.parent / "folder"
        folder_with("old")(folder)
        with pytest.raises(AdapterIOError, match="Access is denied; nothing was changed"):
            save(folder, folder_with("new"))
        assert (folder / "inner" / "x").read_text() == "old"
        assert {one.name for one in old.parent.iterdir()} == {old.name, folder.name}

    def test_what_is_there_stays_unless_that_is_asked_for(self, old):
        (old.parent / "empty").mkdir()
        for name, overwrite in (("none", False), ("empty", False), (old.name, True)):
            require_free(old.parent / name, overwrite)
        for path in (old, old.parent):
            with pytest.raises(ArgumentError, match="exists; choose another name"):
                require_free(path, False)

    def test_what_belongs_together_is_replaced_together(self, old):
        folder = old.with_name("folder")
        folder.mkdir()
        with pytest.raises(AdapterIOError, match="Is a directory; nothing was changed"):
            save_together({old: Path.touch, folder: Path.touch})
        folder.rmdir()
        assert_old(old)

    def test_the_error_says_if_one_of_two_is_replaced_already(self, old, monkeypatch):
        replace = Path.replace

        def refuse_second(self, target):
            if target.name == "second":
                raise PermissionError(13, "Access is denied")
            return replace(self, target)

        second = old.with_name("second")
        second.write_text("old")
        monkeypatch.setattr(Path, "replace", refuse_second)
        says = rf"can't save to {second}: Access is denied.* {old} is replaced already"
        with pytest.raises(AdapterIOError, match=says) as caught:
            save_together({old: Path.touch, second: Path.touch})
        assert "nothing was changed" not in str(caught.value)
        assert (old.read_bytes(), second.read_text()) == (b"", "old")
        assert {one.name for one in old.parent.iterdir()} == {old.name, second.name}

    @pytest.mark.parametrize("ends", ["", "/below"])
    def test_a_file_where_the_folder_should_be(self, old, ends):
        with pytest.raises(AdapterIOError, match="can't save to"):
            disha.save_adapter(trained(), f"{old}{ends}/")
        assert_old(old)

    def test_no_folder(self, tmp_path):
        with pytest.raises(AdapterIOError, match="No such file"):
            disha.save_adapter(trained(), tmp_path / "none" / "a.safetensors")

    def test_a_name_that_is_too_long(self, tmp_path):
        says = "File name too long; nothing was changed; choose a shorter name"
        with pytest.raises(AdapterIOError, match=says):
            disha.save_adapter(trained(), tmp_path / ("a" * 250))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", ["a" * 300, "a/" * 2500])
    @pytest.mark.parametrize("ends", ["", "/"])
    @pytest.mark.parametrize(
        "use",
        [
            lambda path: disha.save_adapter(trained(), path),
            disha.inspect_adapter,
            lambda path: disha.load_adapter(trained(), path),
            lambda path: disha.interop.peft.export(trained(), path),
            lambda path: disha.interop.checkpoints.merge_into_checkpoint(path, path, path),
            disha.interop.peft.find_folder,
        ],
    )
    def test_a_path_that_no_file_can_have(self, tmp_path, name, ends, use):
        with pytest.raises(AdapterIOError, match=r"no file can be at .*too long") as caught:
            use(f"{tmp_path}/{name}{ends}")
        assert len(str(caught.value)) < 300
        assert not list(tmp_path.iterdir())

    def test_an_empty_path_is_not_the_current_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        disha.save_adapter(trained(), "./")
        for use in (disha.inspect_adapter, lambda path: disha.save_adapter(trained(), path)):
            with pytest.raises(AdapterIOError, match="the path is empty; name a file or a folder"):
                use("")

    @pytest.mark.parametrize(
        ("number", "remedy"),
        [
            (errno.ENOSPC, "free some space"),
            (errno.EACCES, "choose a folder that you may write to"),
            (errno.ENOENT, "make its folder first"),
            (errno.EIO, "choose another name"),
        ],
    )
    def test_an_error_says_what_to_do(self, old, number, remedy):
        def write(new):
            raise OSError(number, os.strerror(number))

        with pytest.raises(AdapterIOError, match=f"nothing was changed; {remedy}"):
            save(old, write)
        assert_old(old)

    def test_what_is_no_path(self):
        with pytest.raises(ArgumentTypeError, match="path must be"):
            save_tensors(5, NEW, {})


class TestSaved:
    def test_several_at_once(self, old):
        def save_often(number):
            for _ in range(40):
                save_tensors(old, {"x": torch.full((20_000,), number)}, {})

        fork = multiprocessing.get_context("fork")
        savers = [fork.Process(target=save_often, args=(float(number),)) for number in (1, 2)]
        for saver in savers:
            saver.start()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(save_often, (3.0, 4.0, 5.0, 6.0)))
        for saver in savers:
            saver.join()
        assert [saver.exitcode for saver in savers] == [0, 0]
        [value] = safetensors.torch.load_file(old)["x"].unique().tolist()
        assert value in range(1, 7)
        save_tensors(old, {"x": torch.zeros(3)}, {})
        assert_old(old)

    def test_two_savers_of_what_belongs_together_do_not_mix(self, tmp_path, monkeypatch):
        paths = [tmp_path / "first", tmp_path / "second"]
        swap = disk._swap

        def save_both(text):
            save_together({path: lambda new: new.write_text(text) for path in paths})

        def start_other(new, target):
            swap(new, target)
            monkeypatch.setattr(disk, "_swap", swap)
            other.start()
            other.join(0.2)
            assert [path.read_text() for path in paths if path.exists()] == ["one"]

        other = threading.Thread(target=save_both, args=["two"])
        monkeypatch.setattr(disk, "_swap", start_other)
        save_both("one")
        other.join()
        assert [path.read_text() for path in paths] == ["two", "two"]

    def test_a_file_that_is_replaced_while_it_is_read(self, old):
        tensors, _ = disk.read_tensors(old)
        save_tensors(old, NEW, {})
        assert torch.equal(tensors["x"], torch.zeros(3))
        assert torch.equal(disk.read_tensors(old)[0]["x"], NEW["x"])

    def test_permissions(self, tmp_path):
        path, mask = tmp_path / "a.safetensors", os.umask(0o022)
        try:
            save_tensors(path, NEW, {})
            assert stat.S_IMODE(path.stat().st_mode) == 0o644
            save(path.with_name("folder"), lambda new: (new.mkdir(), save_file(NEW, new / "x")))
            assert stat.S_IMODE(path.with_name("folder").joinpath("x").stat().st_mode) == 0o644
            path.chmod(0o604)
            save_tensors(path, NEW, {})
            assert stat.S_IMODE(path.stat().st_mode) == 0o604
        finally:
            os.umask(mask)

    def test_a_read_only_file_can_be_saved_again(self, old, monkeypatch):
        # Only root may open a read-only file to flush it, so the draft is not read-only yet.
        def flush(descriptor):
            flushed.append(os.fstat(descriptor).st_mode & stat.S_IWUSR)

        flushed = []
        monkeypatch.setattr(os, "fsync", flush)
        old.chmod(0o444)
        save_tensors(old, NEW, {})
        assert flushed == [stat.S_IWUSR]
        assert stat.S_IMODE(old.stat().st_mode) == 0o444

    def test_a_link_stays(self, old):
        link = old.with_name("link")
        link.symlink_to(old)
        save_tensors(link, NEW, {})
        assert link.is_symlink()
        assert torch.equal(safetensors.torch.load_file(old)["x"], NEW["x"])


class TestDraftsOfKilledSavers:
    @pytest.fixture
    def draft(self, old):
        """Return the draft of a saver of `old` that was killed while it wrote."""

        def die(new):
            new.write_text("a part")
            os.kill(os.getpid(), signal.SIGKILL)

        saver = multiprocessing.get_context("fork").Process(target=save, args=(old, die))
        saver.start()
        saver.join()
        assert saver.exitcode == -signal.SIGKILL
        [draft] = set(old.parent.iterdir()) - {old}
        return draft

    def test_the_next_save_sweeps_them(self, old, draft):
        save_tensors(old, {"x": torch.zeros(3)}, {})
        assert_old(old)

    def test_those_of_other_files_stay(self, old, draft):
        for other in ("a.safetensors.b", "[a].safetensors", ".a.safetensors.12345678.tmp"):
            save(old.with_name(other), Path.touch)
            assert draft.exists()

    def test_that_of_a_living_saver_stays(self, old):
        def write(new):
            save_tensors(old, {"x": torch.ones(3)}, {})
            assert new.parent.exists()
            save_file({"x": torch.zeros(3)}, new)

        save(old, write)
        assert_old(old)

    def test_a_file_system_without_locks(self, old, draft, monkeypatch):
        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        save_tensors(old, NEW, {})
        assert set(old.parent.iterdir()) == {old, draft}

    def test_a_folder_that_was_moved_away_comes_back(self, tmp_path, monkeypatch):
        """Killed between two moves, where a system can't exchange two folders in one."""
        folder = tmp_path / "folder"
        save(folder, folder_with("old"))

        def die(self, target):
            os._exit(1)

        def save_and_die():
            monkeypatch.setattr(disk, "_exchange", in_two_moves)
            monkeypatch.setattr(Path, "replace", die)
            save(folder, folder_with("new"))

        saver = multiprocessing.get_context("fork").Process(target=save_and_die)
        saver.start()
        saver.join()
        assert not folder.exists()

        def fail(new):
            raise OSError("full")

        with pytest.raises(AdapterIOError, match="full"):
            save(folder, fail)
        assert (folder / "inner" / "x").read_text() == "old"
        assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what is mapped")
def test_a_loaded_file_is_not_kept_open(tmp_path):
    # Windows replaces no file that a process has open or mapped.
    path = tmp_path / "adapter.safetensors"
    model = disha.inject_adapters(torch.nn.Linear(16, 16), "", r=4)
    disha.save_adapter(model, path)
    disha.load_adapter(model, path, replace=True)
    file = disha.inspect_adapter(path)
    assert file.path == path
    assert str(path) not in Path("/proc/self/maps").read_text()
    descriptors = [os.readlink(one.path) for one in os.scandir("/proc/self/fd") if one.is_symlink()]
    assert str(path) not in descriptors

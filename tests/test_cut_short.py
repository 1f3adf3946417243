"""Files that someone cuts short, or replaces, while they are read.

Whatever reads a file runs again and again, and the file changes before its first operation on it,
then before its second, and so on: it raises `DishaError`, or what it read is the file as it was.
"""

import contextlib
import itertools

import pytest
import torch
from disha.finetune.errors import CheckpointError
from disha.finetune.models.folder import FolderCheckpoint
from safetensors.torch import save_file

import disha
from disha import interop
from disha.files import tensors as tensors_module
from disha.files.combining import Summand, combine_contents
from disha.files.contents import read_contents
from disha.files.differences import tensor_differences
from disha.files.statistics import statistics_of
from disha.interop.checkpoints import merge_into_checkpoint, open_checkpoint, verify_against
from tests.adapter_files import base, trained
from tests.finetune import tiny_checkpoints


class Watched:
    """An open file; `before` runs before each operation that reads it."""

    def __init__(self, file, before):
        self._file, self._before = file, before

    def __getattr__(self, name):
        if name in ("read", "readinto"):
            self._before()
        return getattr(self._file, name)


def attempts(monkeypatch, change, attempt):
    """Change files before the n-th read of `attempt`, for every n; return what came of each."""
    original = tensors_module.opened_file
    found, number = [], 0
    while True:
        number += 1
        left = itertools.count(number, -1)

        def before(left=left):
            if next(left) == 1:
                change()

        @contextlib.contextmanager
        def opened_file(path, before=before):
            with original(path) as file:
                yield Watched(file, before)

        with monkeypatch.context() as patch:
            patch.setattr(tensors_module, "opened_file", opened_file)
            try:
                found.append(attempt())
            except (disha.DishaError, CheckpointError) as error:
                found.append(error)
        if next(left) > 0:
            return found


def values(tensors):
    return {key: tensor.tolist() for key, tensor in tensors.items()}


def loaded(path):
    model = base()
    disha.load_adapter(model, path)
    return values(model.state_dict())


def replaced(path):
    model = trained()
    disha.load_adapter(model, path, replace=True)
    return values(model.state_dict())


def combined(path):
    header, tensors = read_contents(path, also_train=False)
    return values(combine_contents([Summand(path, (header, tensors), 0.5)])[1])


def statistics(path):
    return list(statistics_of(disha.inspect_adapter(path)))


def compared(path):
    described = disha.inspect_adapter(path)
    return list(tensor_differences(described, described))


def of_peft(path):
    model = base()
    interop.peft.load(model, path.parent / "peft")
    return values(model.state_dict())


ADAPTERS = [loaded, replaced, combined, statistics, compared, of_peft]


@pytest.mark.parametrize("size", [0, 1_000, -1])
@pytest.mark.parametrize("attempt", ADAPTERS, ids=lambda one: one.__name__)
def test_an_adapter(tmp_path, monkeypatch, attempt, size):
    path = tmp_path / "adapter.safetensors"
    model = trained(also_train=None)
    disha.save_adapter(model, path)
    interop.peft.export(model, tmp_path / "peft")
    files = [path, *(tmp_path / "peft").glob("*.safetensors")]
    contents = [file.read_bytes() for file in files]
    expected = attempt(path)

    def again():
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        return attempt(path)

    def cut():
        for file, content in zip(files, contents, strict=True):
            with open(file, "r+b") as open_file:
                open_file.truncate(size if size >= 0 else len(content) - 1)

    found = attempts(monkeypatch, cut, again)
    assert found[-1] == expected
    assert all(isinstance(one, disha.DishaError) or one == expected for one in found)
    assert sum(isinstance(one, disha.DishaError) for one in found) >= 3


@pytest.fixture
def checkpoint(tmp_path):
    model = trained(also_train=None)
    disha.save_adapter(model, tmp_path / "adapter")
    save_file(base().state_dict(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def merged(path):
    out = path.with_name("merged.safetensors")
    out.unlink(missing_ok=True)
    merge_into_checkpoint(path, path.with_name("adapter"), out)
    return out.read_bytes()


def verified(path):
    return verify_against(path, path.with_name("adapter"))


def read(path):
    found = open_checkpoint(path)
    return {name: found.tensor(name).tolist() for name in found.tensors}


@pytest.mark.parametrize("replace", [False, True], ids=["cut short", "replaced"])
@pytest.mark.parametrize("attempt", [merged, verified, read], ids=lambda one: one.__name__)
def test_a_base_checkpoint(checkpoint, monkeypatch, attempt, replace):
    content = checkpoint.read_bytes()
    expected = attempt(checkpoint)
    other = checkpoint.with_name("other")
    state = {name: torch.zeros_like(value) for name, value in base().state_dict().items()}

    def again():
        checkpoint.write_bytes(content)
        return attempt(checkpoint)

    def change():
        if replace:
            save_file(state, other)
            other.replace(checkpoint)
        else:
            with open(checkpoint, "r+b") as file:
                file.truncate(len(content) - 1)

    found = attempts(monkeypatch, change, again)
    assert found[-1] == expected
    right = [expected]
    if replace:  # before it was opened
        change()
        with contextlib.suppress(disha.DishaError):
            right.append(attempt(checkpoint))
    assert all(isinstance(one, disha.DishaError) or one in right for one in found)
    assert sum(isinstance(one, disha.DishaError) for one in found) >= 3


def test_a_base_model_of_the_commands(tmp_path, monkeypatch):
    path = tiny_checkpoints.write_folder(tmp_path / "model", "llama2")
    file = path / "model.safetensors"
    content = file.read_bytes()

    def attempt():
        file.write_bytes(content)
        FolderCheckpoint(path).load_model(torch.float32)
        return "loaded"

    def cut():
        with open(file, "r+b") as opened:
            opened.truncate(1_000)

    found = attempts(monkeypatch, cut, attempt)
    assert found[-1] == "loaded"
    assert sum(isinstance(one, CheckpointError) for one in found) >= len(found) - 2

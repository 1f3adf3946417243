"""The checksum of an adapter file: no bit of a file flips unnoticed."""

import json
import struct

import pytest
import safetensors.torch
import torch

import disha
from disha.files.contents import read_contents
from disha.files.differences import tensor_differences
from disha.files.statistics import statistics_of
from disha.interop.checkpoints import verify_against
from tests.adapter_files import base, every_kind, rewritten, save, trained
from tests.conftest import assert_unchanged, snapshot
from tests.fuzzing.carrier import Draft, container
from tests.reference_reader import Refused
from tests.reference_reader import read as reference_read

KEY = "disha_checksum"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def contents(path):
    """Return all that a file means, to the bit."""
    header, tensors = read_contents(path)
    values = {key: (one.dtype, one.flatten().view(torch.uint8).tolist())
              for key, one in tensors.items()}  # fmt: skip
    return header.config, header.layers, header.also_train, header.metadata, values


def test_any_flipped_bit_is_found(path):
    """The file is refused, or means the same: some white space, and the checksum's own name."""
    model = disha.inject_adapters(every_kind().bfloat16(), "linear|padded", r=2, scale=1.5)
    disha.save_adapter(model, path, metadata={"task": "dialogue"})
    data, expected, refused = path.read_bytes(), contents(path), 0
    flips = range(0, 8 * len(data), 23)
    for place in flips:
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            assert contents(path) == expected, f"bit {place}"
        except disha.DishaError:
            refused += 1
    assert refused > 0.95 * len(flips)


def flip(path, part=0.99):
    """Change the lowest bit of one value."""
    data = bytearray(path.read_bytes())
    data[int(part * len(data)) // 4 * 4] ^= 1
    path.write_bytes(data)
    return path


def checkpoint(path):
    safetensors.torch.save_file(base().state_dict(), path.with_name("base"))
    return path.with_name("base")


READERS = {
    "load": lambda path: disha.load_adapter(base(), path),
    "a part": lambda path: disha.load_adapter(base(), path, layers="head"),
    "replace": lambda path: disha.load_adapter(trained(also_train=None), path, replace=True),
    "read": read_contents,
    "statistics": lambda path: list(statistics_of(disha.inspect_adapter(path))),
    "differences": lambda path: list(tensor_differences(*[disha.inspect_adapter(path)] * 2)),
    "verify": lambda path: verify_against(checkpoint(path), path),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_whatever_reads_values_checks_it(path, read):
    disha.save_adapter(trained(also_train=None), path)
    read(path)
    flip(path)
    with pytest.raises(disha.AdapterFileError, match="is damaged: its checksum"):
        read(path)
    assert disha.inspect_adapter(path).layers  # which reads no values


def test_a_damaged_file_changes_no_model(path):
    disha.save_adapter(trained(), path)
    flip(path)
    for model, replace in ((base(), False), (trained(), True)):
        before = snapshot(model)
        with pytest.raises(disha.AdapterFileError, match="is damaged"):
            disha.load_adapter(model, path, replace=replace)
        assert_unchanged(model, before)


def test_it_does_not_depend_on_the_places_of_the_tensors(path):
    save(path, also_train="linear.bias")
    expected, data = contents(path), path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    draft = Draft.of(data)
    draft.tensors = dict(reversed(draft.tensors.items()))
    index, values = draft.index()
    index[0] = ("__metadata__", metadata)
    path.write_bytes(container(json.dumps(dict(index)).encode(), values))
    assert path.read_bytes() != data
    assert contents(path) == expected


def test_a_file_without_it_loads(path):
    model = trained()
    disha.save_adapter(model, path)
    expected = contents(path)
    rewritten(path)
    assert KEY.encode() not in path.read_bytes()
    assert contents(path) == expected


@pytest.mark.parametrize("said", ["", "0" * 64, "none", "A" * 10_000])
def test_a_wrong_one_is_refused(path, said):
    disha.save_adapter(trained(), path)
    draft = Draft.of(path.read_bytes())
    draft.beside = {KEY: said}
    path.write_bytes(draft.file())
    with pytest.raises(disha.AdapterFileError, match=f"its checksum says '{said[:10]}"):
        disha.load_adapter(base(), path)
    with pytest.raises(Refused, match="checksum"):
        reference_read(path.read_bytes())

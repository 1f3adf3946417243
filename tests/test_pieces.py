"""Files that are written without the library are those that the library would write."""

import struct

import pytest
import safetensors.torch
import torch

import disha
from disha.files import tensors as reading
from disha.files.pieces import Piece, tensor_writer, write_pieces
from disha.files.tensors import NAMES, opened


def every_dtype():
    """Two tensors of each dtype that this release of the library knows."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in safetensors.torch._TYPES.items():
        if dtype is None:
            continue
        assert NAMES[dtype] == name
        for key in (f"{name}.b", f"a.{name}"):
            tensors[key] = (4 * torch.rand(3, 2, generator=generator)).to(dtype)
    return tensors


def parts(content):
    """Return the text and the values; early releases of the library pad the text otherwise."""
    end = 8 + int.from_bytes(content[:8], "little")
    assert end % 8 == 0
    return content[8:end].rstrip(b" "), content[end:]


def written(tensors, metadata, path):
    tensor_writer(tensors, metadata)(str(path))
    return path.read_bytes()


def test_every_dtype_is_read_back_by_the_library(tmp_path):
    tensors = every_dtype()
    ours = written(tensors, {"note": "ünd"}, tmp_path / "file")
    with opened(tmp_path / "file") as file:
        mine = {key: file.read(key) for key in file.tensors}
        stored = file.tensors
    for key, tensor in safetensors.torch.load(ours).items():
        for one in (tensor, mine.pop(key)):
            assert one.dtype == tensors[key].dtype
            assert torch.equal(one.view(torch.uint8), tensors[key].view(torch.uint8))
    assert not mine
    assert all(one.start % tensors[key].element_size() == 0 for key, one in stored.items())


@pytest.mark.parametrize("dtypes", [["F64", "F32", "BF16", "F16"], ["F32"]])
def test_dtypes_of_adapters_are_written_as_the_library_writes_them(tmp_path, dtypes):
    tensors = {key: one for key, one in every_dtype().items() if NAMES[one.dtype] in dtypes}
    ours = written(tensors, {"note": "ünd"}, tmp_path / "file")
    assert parts(ours) == parts(safetensors.torch.save(tensors, {"note": "ünd"}))


@pytest.mark.parametrize(
    "tensors",
    [
        {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "one": torch.ones(1)},
        {'quote " slash \\ bell \a line \n tab \t del \x7f ü 𝄞': torch.ones(2)},
    ],
    ids=["few values", "a name to escape"],
)
@pytest.mark.parametrize("metadata", [{}, {"k": 'a "note"\n\u2028'}], ids=["plain", "noted"])
def test_files_are_those_of_the_library(tensors, metadata, tmp_path):
    ours = written(tensors, metadata, tmp_path / "file")
    assert parts(ours) == parts(safetensors.torch.save(tensors, metadata or None))


def test_a_file_without_tensors_is_one(tmp_path):
    ours = written({}, {"k": "v"}, tmp_path / "file")  # early releases of the library can't
    assert safetensors.torch.load(ours) == {}
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"k": "v"}


def test_views_are_written_as_they_look(tmp_path):
    view = torch.arange(12.0).view(3, 4).T
    ours = written({"view": view}, {}, tmp_path / "file")
    assert torch.equal(safetensors.torch.load(ours)["view"], view)


def test_conjugates_are_written_as_they_look(tmp_path):
    tensors = {
        "conjugate": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj(),
        "negative": torch._neg_view(torch.tensor([5.0])),
    }
    # The bytes themselves: early releases of the library can't read complex numbers.
    _, values = parts(written(tensors, {}, tmp_path / "file"))
    assert struct.unpack("<5f", values) == (1, -2, 3, 4, -5)


def test_metadata_of_several_keys_comes_out_in_one_order(tmp_path):
    one = written({}, {"a": "1", "b": "2"}, tmp_path / "one")
    assert one == written({}, {"b": "2", "a": "1"}, tmp_path / "other")


def test_what_files_can_not_hold_is_refused():
    with pytest.raises(disha.ArgumentError, match=r"'x' has dtype torch\.complex128"):
        tensor_writer({"x": torch.zeros(1, dtype=torch.complex128)}, {})


def test_pieces_of_unknown_dtypes_come_last(tmp_path):
    def piece(dtype):
        return Piece(dtype, (2,), 4, lambda file: file.write(b"\0" * 4))

    write_pieces(str(tmp_path / "file"), {"a": piece("X16"), "b": piece("F16")}, {})
    content = (tmp_path / "file").read_bytes()
    assert content.index(b'"b"') < content.index(b'"a"')


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_tensors_are_found_and_read_byte_by_byte(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    tensors = {"wide": torch.arange(6.0).view(2, 3), "narrow": torch.ones(5, dtype=torch.int8)}
    whole = written(tensors, {"k": "v"}, tmp_path / "file")
    with opened(tmp_path / "file") as file:
        assert file.metadata == {"k": "v"}
        assert {name: (one.dtype, one.shape) for name, one in file.tensors.items()} == {
            "wide": ("F32", (2, 3)),
            "narrow": ("I8", (5,)),
        }
        for name, one in file.tensors.items():
            expected = bytes(tensors[name].flatten().view(torch.uint8).tolist())
            assert whole[one.start : one.start + one.nbytes] == expected
            assert b"".join(map(bytes, file.chunks(name))) == expected


def test_rows_and_single_values_are_those_of_the_tensor(tmp_path):
    tensors = {"a": torch.rand(5, 2, 3), "b": torch.rand(4).bfloat16(), "c": torch.tensor(2.0)}
    written({**tensors, "none": torch.zeros(0, 3)}, {}, tmp_path / "file")
    with opened(tmp_path / "file") as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name), tensor)
            at = torch.tensor([tensor.numel() - 1, 0])
            assert torch.equal(file.values_at(name, at), tensor.take(at))
        for first, last in ((0, 5), (1, 3), (4, 9), (7, 9), (3, 3)):
            assert torch.equal(file.read("a", first, last), tensors["a"][first:last])
        assert file.read("none").shape == file.read("none", 0, 2).shape == (0, 3)

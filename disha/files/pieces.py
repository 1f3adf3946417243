"""Safetensors files as bytes: find where each tensor is stored, and write one tensor at a time.

A file starts with the length of its index (8 bytes, little-endian). The index is JSON with the
dtype, shape and position of each tensor. The bytes of the tensors follow without gaps. So this
module can copy tensors of any dtype as bytes, and write files that are larger than memory. The
`safetensors` library writes only tensors that are in memory, and needs NumPy for that.

Source: the format's description in the documentation of `safetensors`.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from disha.errors import AdapterFileError, AdapterIOError, ArgumentError
from disha.files.atomic import Write
from disha.files.tensors import LARGEST_INDEX, LENGTH_BYTES, explained, opened

__all__ = [
    "NAMES",
    "Piece",
    "StoredTensor",
    "copy_tensor",
    "stored_tensors",
    "tensor_writer",
    "write_pieces",
    "write_tensor",
]

CHUNK = 1 << 20

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
"""Dtype of torch -> its name in a file, for all dtypes that the safetensors library reads."""

ITEM_SIZES = {name: dtype.itemsize for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, unread.

    Attributes:
        path: the file.
        dtype: the name of its dtype in the file, such as `"BF16"`.
        shape: its shape.
        start: the position of its first byte in the file.
        nbytes: the number of its bytes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """A tensor to be written.

    Attributes:
        dtype: the name of its dtype in the file.
        shape: its shape.
        nbytes: the number of its bytes.
        write: writes exactly `nbytes` bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    write: Callable[[BinaryIO], None]


def stored_tensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a file by name, and its `__metadata__`, without reading a tensor.

    Raises:
        AdapterIOError: it can't be read.
        AdapterFileError: it is not a complete safetensors file.
    """
    with opened(path) as file:  # checks that every byte belongs to one tensor
        metadata = file.metadata
    with explained(path), open(path, "rb") as raw:
        length = int.from_bytes(raw.read(LENGTH_BYTES), "little")
        text = raw.read(length)
    try:  # the library accepts more than the format's description allows
        index = json.loads(text)
        index.pop("__metadata__", None)
        first = LENGTH_BYTES + length
        return {name: _stored(path, fields, first) for name, fields in index.items()}, metadata
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise AdapterFileError(
            f"{path} has a header that breaks the safetensors format ({error}); get it again, or "
            "write it again with the safetensors library"
        ) from error


def _stored(path: Path, fields: Mapping[str, Any], first: int) -> StoredTensor:
    start, stop = fields["data_offsets"]
    return StoredTensor(path, fields["dtype"], tuple(fields["shape"]), first + start, stop - start)


def write_pieces(path: str, pieces: Mapping[str, Piece], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file piece by piece, with one piece in memory at a time.

    Args:
        path: the file.
        pieces: name -> the tensor to write.
        metadata: the file's `__metadata__`.

    Raises:
        ArgumentError: names and metadata are too large for a safetensors file.
        OSError: it can't be written.
    """
    ordered = sorted(pieces.items(), key=_rank)
    index = _index(ordered, metadata)
    if len(index) > LARGEST_INDEX:
        raise ArgumentError(
            f"names and metadata take {len(index):,} bytes; the header of a safetensors file may "
            f"have at most {LARGEST_INDEX:,}; give less metadata"
        )
    with open(path, "wb") as file:
        file.write(len(index).to_bytes(LENGTH_BYTES, "little") + index)
        for name, piece in ordered:
            before = file.tell()
            piece.write(file)
            assert file.tell() - before == piece.nbytes, name


def _rank(item: tuple[str, Piece]) -> tuple[int, str, str]:
    """Sort the widest dtypes first, so that each tensor begins at a multiple of its item size."""
    name, piece = item
    return -ITEM_SIZES.get(piece.dtype, 0), piece.dtype, name


def _index(pieces: list[tuple[str, Piece]], metadata: Mapping[str, str]) -> bytes:
    """Return the JSON that describes the pieces, padded with spaces to a multiple of 8 bytes."""
    index: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, piece in pieces:
        offsets = [offset, offset + piece.nbytes]
        index[name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": offsets}
        offset += piece.nbytes
    text = json.dumps(index, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def tensor_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Write:
    """Return a function that writes a safetensors file, for `write_files`.

    Args:
        tensors: key -> tensor on the CPU.
        metadata: the file's `__metadata__`.

    Raises:
        ArgumentError: a tensor has a dtype that safetensors files can't hold.
    """
    pieces = {}
    for key, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ArgumentError(
                f"tensor {key!r} has dtype {tensor.dtype}, which safetensors files can't hold; "
                f"allowed are {', '.join(NAMES.values())}"
            )
        write = partial(write_tensor, tensor)
        pieces[key] = Piece(NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, write)
    return partial(write_pieces, pieces=pieces, metadata=metadata)


def write_tensor(tensor: Tensor, file: BinaryIO) -> None:
    """Write the bytes of a tensor on the CPU, without copying a contiguous one."""
    # A lazy conjugate shares the bytes of the original tensor.
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.nbytes:
        file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def copy_tensor(stored: StoredTensor, file: BinaryIO) -> None:
    """Copy the bytes of a tensor from its file into another.

    Raises:
        AdapterIOError: they can't be read, or some are missing.
    """
    with explained(stored.path), open(stored.path, "rb", buffering=0) as source:
        source.seek(stored.start)
        left = stored.nbytes
        while left:
            chunk = source.read(min(left, CHUNK))
            if not chunk:
                raise AdapterIOError(
                    f"{stored.path} was cut off while it was being read; get it again"
                )
            file.write(chunk)
            left -= len(chunk)

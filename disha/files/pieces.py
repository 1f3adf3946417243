"""Safetensors files piece by piece: where each tensor's bytes are, and writing one after another.

A file starts with the length of its header, 8 bytes, little end first; the header, JSON, says of
each tensor what it is and where its bytes are; the bytes follow without a gap. So tensors of any
dtype can be copied unread, and a file can be written that is larger than memory. The `safetensors`
library can write too, from what is all in memory, and only where NumPy is.

Source: the format's description in the documentation of `safetensors`.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from disha.errors import AdapterFileError, AdapterIOError, ArgumentError
from disha.files.atomic import Write
from disha.files.tensors import LARGEST_INDEX, explained, opened

__all__ = [
    "Piece",
    "StoredTensor",
    "copy_tensor",
    "stored_tensors",
    "tensor_writer",
    "write_pieces",
    "write_tensor",
]

LENGTH_BYTES = 8
ALIGNMENT = 8
CHUNK = 1 << 20

WRITTEN = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Dtypes as files name them -> as torch does, in the order in which the library writes tensors.

All that the library reads with torch.
"""

NAMES = {getattr(torch, name): key for key, name in WRITTEN.items() if hasattr(torch, name)}
BITS = {key: 8 * dtype.itemsize for dtype, key in NAMES.items()}
RANKS = {key: rank for rank, key in enumerate(WRITTEN)}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, unread.

    Attributes:
        path: the file.
        dtype: its dtype as the file names it: `"BF16"`, say.
        shape: its shape.
        start: where its bytes begin in the file.
        nbytes: how many there are.
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
        dtype: its dtype as the file is to name it.
        shape: its shape.
        nbytes: the number of its bytes.
        write: writes exactly so many bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    write: Callable[[BinaryIO], None]

    @property
    def bits(self) -> int:
        """Size of one value."""
        known = BITS.get(self.dtype)  # an empty tensor does not show it
        return 8 * self.nbytes // max(math.prod(self.shape), 1) if known is None else known


def stored_tensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a file by name, and its `__metadata__`; no tensor is read.

    Raises:
        AdapterIOError: it can't be read.
        AdapterFileError: it is no whole safetensors file.
    """
    with opened(path) as file:  # checks that every byte belongs to one tensor
        metadata = file.metadata
    with explained(path), open(path, "rb") as raw:
        length = int.from_bytes(raw.read(LENGTH_BYTES), "little")
        text = raw.read(length)
    try:  # what the library reads is more than what the format's description allows
        header = json.loads(text)
        header.pop("__metadata__", None)
        first = LENGTH_BYTES + length
        return {name: _stored(path, fields, first) for name, fields in header.items()}, metadata
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise AdapterFileError(
            f"{path} has a header that is not as safetensors describes it ({error}); get it again, "
            "or write it anew with the safetensors library"
        ) from error


def _stored(path: Path, fields: Mapping[str, Any], first: int) -> StoredTensor:
    start, stop = fields["data_offsets"]
    return StoredTensor(path, fields["dtype"], tuple(fields["shape"]), first + start, stop - start)


def write_pieces(path: str, pieces: Mapping[str, Piece], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file piece by piece: no more than one is in memory.

    Args:
        path: the file.
        pieces: name -> what is to be written.
        metadata: the file's `__metadata__`.

    Raises:
        OSError: it can't be written.
    """
    _write(path, _ordered(pieces), _index(_ordered(pieces), metadata))


def tensor_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Write:
    """Return what writes a safetensors file, for `write_files`.

    Args:
        tensors: key -> tensor on the CPU.
        metadata: the file's `__metadata__`.

    Raises:
        ArgumentError: the names and the metadata are more than a safetensors file can hold, or a
            tensor has a dtype that it can't.
    """
    pieces = _ordered({key: _piece(key, tensor) for key, tensor in tensors.items()})
    index = _index(pieces, metadata)
    if len(index) > LARGEST_INDEX:
        raise ArgumentError(
            f"the header does not fit into a safetensors file: it has {len(index):,} bytes, "
            f"allowed are {LARGEST_INDEX:,}; give less metadata"
        )
    return partial(_write, pieces=pieces, index=index)


def _piece(key: str, tensor: Tensor) -> Piece:
    if tensor.dtype not in NAMES:
        raise ArgumentError(
            f"tensor {key!r} has dtype {tensor.dtype}, which safetensors files can't hold; allowed "
            f"are {', '.join(WRITTEN.values())}"
        )
    shape = tuple(tensor.shape)
    return Piece(NAMES[tensor.dtype], shape, tensor.nbytes, partial(write_tensor, tensor))


def _ordered(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """Return the pieces as the library orders them, so that each begins at a multiple of its size.

    Wide values come first.
    """

    def rank(name: str) -> tuple[int, int, str]:
        piece = pieces[name]
        return -piece.bits, RANKS.get(piece.dtype, len(RANKS)), name

    return {name: pieces[name] for name in sorted(pieces, key=rank)}


def _index(pieces: Mapping[str, Piece], metadata: Mapping[str, str]) -> bytes:
    """Return the JSON that describes the pieces, padded with spaces."""
    index: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, piece in pieces.items():
        offsets = [offset, offset + piece.nbytes]
        index[name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": offsets}
        offset += piece.nbytes
    text = json.dumps(index, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % ALIGNMENT)


def _write(path: str, pieces: Mapping[str, Piece], index: bytes) -> None:
    with open(path, "wb") as file:
        file.write(len(index).to_bytes(LENGTH_BYTES, "little") + index)
        for name, piece in pieces.items():
            before = file.tell()
            piece.write(file)
            assert file.tell() - before == piece.nbytes, name


def write_tensor(tensor: Tensor, file: BinaryIO) -> None:
    """Write the bytes of a tensor on the CPU, without copying a contiguous one."""
    # A conjugate that is not worked out yet shares the bytes of what it is the conjugate of.
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.nbytes:
        file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def copy_tensor(stored: StoredTensor, file: BinaryIO) -> None:
    """Copy the bytes of a tensor from its file into another.

    Raises:
        AdapterIOError: they can't be read, or not all of them are there any more.
    """
    with explained(stored.path), open(stored.path, "rb", buffering=0) as source:
        source.seek(stored.start)
        left = stored.nbytes
        while left:
            chunk = source.read(min(left, CHUNK))
            if not chunk:
                raise AdapterIOError(f"{stored.path} was cut off while it was being read")
            file.write(chunk)
            left -= len(chunk)

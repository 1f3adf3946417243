"""Safetensors files piece by piece: where each tensor's bytes are, and writing one after another.

A file starts with the length of its header, 8 bytes, little end first; the header, JSON, says of
each tensor what it is and where its bytes are; the bytes follow without a gap. So tensors of any
dtype can be copied unread, and a file can be written that is larger than memory.

Source: the format's description in the documentation of `safetensors`.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from disha.errors import AdapterFileError, AdapterIOError
from disha.files.tensors import explained, opened

__all__ = ["Piece", "StoredTensor", "copy_tensor", "stored_tensors", "write_pieces", "write_tensor"]

LENGTH_BYTES = 8
ALIGNMENT = 8
CHUNK = 1 << 20


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
        return 8 * self.nbytes // max(math.prod(self.shape), 1)


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
    # Wide values first, as the library orders them: each then starts at a multiple of its size.
    order = sorted(pieces, key=lambda name: (-pieces[name].bits, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        piece = pieces[name]
        offsets = [offset, offset + piece.nbytes]
        header[name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": offsets}
        offset += piece.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for name in order:
            before = file.tell()
            pieces[name].write(file)
            assert file.tell() - before == pieces[name].nbytes, name


def write_tensor(tensor: Tensor, file: BinaryIO) -> None:
    """Write the bytes of a tensor on the CPU, without copying a contiguous one."""
    tensor = tensor.detach().contiguous()
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

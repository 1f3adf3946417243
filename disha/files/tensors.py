"""Read safetensors files of any content.

A file starts with the length of its index (8 bytes, little-endian). The index is JSON with the
dtype, shape and position of each tensor. The bytes of the tensors follow without gaps.

The tensors are read, and never mapped into memory. If a mapped file is cut short, the process that
uses it is killed. The `safetensors` library can only map a file or read all of it.

Source: the format's description in the documentation of `safetensors`.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from disha.errors import AdapterFileError, AdapterIOError
from disha.files.json_files import parsed_json
from disha.files.reading import explained, opened_file
from disha.records import TensorRecord
from disha.text import brief

__all__ = [
    "DTYPES",
    "HELD",
    "LARGEST_INDEX",
    "LENGTH_BYTES",
    "NAMES",
    "Index",
    "StoredTensor",
    "TensorFile",
    "memory_of",
    "opened",
]

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

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Name of a dtype in a file -> the dtype, for all that adapters and base weights may have."""

HELD = {**DTYPES, "I64": torch.int64}
"""The same for all that an adapter file may have: running statistics count batches."""

KNOWN = {name: dtype for dtype, name in NAMES.items()}

LENGTH_BYTES = 8

LARGEST_INDEX = 32 * 2**20
"""Largest index in bytes. Parsed JSON takes up to 40 times its size in memory."""

MOST_DIMENSIONS = 64
"""The most dimensions that operations of torch take."""

CHUNK = 1 << 20
"""Number of bytes that are read at once."""


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
class Index:
    """What a safetensors file says about itself.

    Attributes:
        metadata: the file's `__metadata__`.
        tensors: name -> where the tensor is.
        stamp: identifies the content of the file: device, number, size, and time of change.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    stamp: tuple[int, ...]

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.stamp[2]


class TensorFile:
    """An open safetensors file. Each tensor is read on request.

    Args:
        path: the name of the file in errors.
        file: the open file.
        index: its index.
    """

    def __init__(self, path: Path, file: BinaryIO, index: Index) -> None:
        self.path = path
        self.index = index
        self.metadata, self.tensors = index.metadata, index.tensors
        self._file = file

    def record(self, key: str) -> TensorRecord:
        """Return a tensor's shape and dtype without reading it; its dtype is one of `HELD`."""
        stored = self.tensors[key]
        if stored.dtype not in HELD:
            raise AdapterFileError(
                f"{self.path}: tensor {brief(key)} has dtype {brief(stored.dtype)}; allowed are "
                f"{', '.join(HELD)}"
            )
        return TensorRecord(stored.shape, HELD[stored.dtype])

    def read(self, key: str, first: int = 0, last: int | None = None) -> Tensor:
        """Return a tensor, on the CPU.

        Args:
            key: its name.
            first: the first row to read.
            last: the row after the last one to read; all rows by default.

        Raises:
            AdapterFileError: its dtype is unknown.
            AdapterIOError: the file can't be read any more, or was cut short, or there is no memory
                for the tensor.
        """
        stored = self.tensors[key]
        if stored.dtype not in KNOWN:
            raise AdapterFileError(
                f"{self.path}: tensor {brief(key)} has the unknown dtype {brief(stored.dtype)}; "
                f"known are {', '.join(KNOWN)}"
            )
        shape, offset = stored.shape, 0
        if shape and (first, last) != (0, None):
            first, last, _ = slice(first, last).indices(shape[0])
            offset = first * (stored.nbytes // max(shape[0], 1))
            shape = (max(last - first, 0), *shape[1:])
        tensor = self._empty(key, shape, KNOWN[stored.dtype])
        self._fill(stored.start + offset, memory_of(tensor))
        return tensor

    def values_at(self, key: str, positions: Tensor) -> Tensor:
        """Return the values at flat positions, as `torch.take`, without reading the others.

        Args:
            key: the tensor's name.
            positions: integer tensor (n,).
        """
        stored = self.tensors[key]
        values = torch.empty(len(positions), dtype=KNOWN[stored.dtype], device="cpu")
        size = values.element_size()
        for value, position in zip(values, positions.tolist(), strict=True):
            self._fill(stored.start + position * size, memory_of(value))
        return values

    def chunks(self, key: str) -> Iterator[memoryview]:
        """Iterate over the bytes of a tensor in parts of bounded size.

        A part is valid until the next one is read.
        """
        stored, chunk = self.tensors[key], bytearray(CHUNK)
        for done in range(0, stored.nbytes, CHUNK):
            part = memoryview(chunk)[: min(CHUNK, stored.nbytes - done)]
            self._fill(stored.start + done, part)
            yield part

    def _empty(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(shape, dtype=dtype, device="cpu")
        except (RuntimeError, MemoryError) as error:
            raise AdapterIOError(
                f"can't read {self.path}: there is no memory for tensor {brief(key)}, which takes "
                f"{math.prod(shape) * dtype.itemsize:,} bytes; get another version of the file, or "
                "read it on a larger machine"
            ) from error

    def _fill(self, start: int, memory: Any) -> None:
        """Read bytes from a position on, until the memory is full."""
        view = memoryview(memory)
        with explained(self.path):
            self._file.seek(start)
            done = 0
            while done < len(view):
                count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
                if not count:
                    raise AdapterIOError(
                        f"{self.path} was cut off while it was being read; get it again"
                    )
                done += count


def memory_of(tensor: Tensor) -> Any:
    """Return the memory of a contiguous tensor on the CPU, as an object with a buffer."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr() or 1)


@contextmanager
def opened(path: Path, index: Index | None = None) -> Iterator[TensorFile]:
    """Open a safetensors file for reading.

    Args:
        path: the file.
        index: its index, if it has been read before.

    Raises:
        AdapterIOError: it can't be read, or has changed since its index was read.
        AdapterFileError: it is not a complete safetensors file.
    """
    with opened_file(path) as file:
        if index is not None and index.stamp != _stamp(file):
            raise AdapterIOError(f"{path} has changed while it was being read; start again")
        yield TensorFile(path, file, _index(path, file) if index is None else index)


# --- the index -----------------------------------------------------------------------------------


def _stamp(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _index(path: Path, file: BinaryIO) -> Index:
    stamp = _stamp(file)
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    first = LENGTH_BYTES + length
    if first > size:
        raise _incomplete(path, f"its index ends at byte {first:,}, but the file at {size:,}")
    if length > LARGEST_INDEX:
        raise AdapterFileError(
            f"{path} has a header of {length:,} bytes; at most {LARGEST_INDEX:,} are allowed. "
            "It is damaged, or made to do harm; get it again"
        )
    try:
        entries = parsed_json(f"{path}: the index", file.read(length).decode(), strict=True)
    except (UnicodeDecodeError, AdapterFileError) as error:
        raise _incomplete(path, str(error)) from error
    metadata = entries.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(one) is str for one in metadata.values()):
        raise _incomplete(path, "its metadata is not an object of text")
    tensors = {name: _stored(path, name, entry, first) for name, entry in entries.items()}
    _check_positions(path, tensors.values(), first, size)
    return Index(metadata, tensors, stamp)


def _stored(path: Path, name: str, entry: Any, first: int) -> StoredTensor:
    fields = entry if type(entry) is dict else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    ends: Any = fields.get("data_offsets")
    if type(dtype) is not str or not _are_sizes(shape) or not _are_sizes(ends) or len(ends) != 2:
        raise _incomplete(path, f"the entry of {brief(name)} is {brief(entry)}")
    # If one dimension is 0, the others may be of any size, as there is no data.
    if len(shape) > MOST_DIMENSIONS or math.prod(size or 1 for size in shape) >= 2**63:
        raise AdapterFileError(
            f"{path}: tensor {brief(name)} has shape {brief(tuple(shape))}; allowed are up to "
            f"{MOST_DIMENSIONS} dimensions and less than 2**63 in all"
        )
    begin, end = ends
    if dtype in KNOWN and end - begin != math.prod(shape) * KNOWN[dtype].itemsize:
        raise _incomplete(path, f"shape and size of {brief(name)} disagree")
    return StoredTensor(path, dtype, tuple(shape), first + begin, end - begin)


def _are_sizes(value: Any) -> bool:
    return type(value) is list and all(type(one) is int and 0 <= one < 2**64 for one in value)


def _check_positions(path: Path, tensors: Iterable[StoredTensor], first: int, size: int) -> None:
    """Raise unless each byte behind the index belongs to one tensor."""
    position = first
    for one in sorted(tensors, key=lambda one: (one.start, one.nbytes)):
        if one.start != position or one.nbytes < 0:
            raise _incomplete(path, f"bytes {position:,} to {one.start:,} are in no tensor, or two")
        position += one.nbytes
    if position != size:
        raise _incomplete(path, f"its tensors end at byte {position:,}, but the file at {size:,}")


def _incomplete(path: Path, problem: str) -> AdapterFileError:
    return AdapterFileError(
        f"{path} is not a complete safetensors file ({problem}); it is damaged, was cut off, or "
        "is another kind of file. Get it again"
    )

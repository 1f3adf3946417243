"""Reads the header of a GGUF file: its metadata, and where its tensors are.

    "GGUF", version, number of tensors, number of values
    per value:   its key, its type, itself; an array is a type, a number of items, and the items
    per tensor:  its name, number of dimensions, dimensions, type, position behind the header
    padding to a multiple of general.alignment, then the tensors

All numbers are little-endian. A text is its length and its bytes. The reader of the package gguf
trusts every number, and keeps two arrays for each item of an array. The reader here checks each
number against the bytes that are there, and keeps one list for an array.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disha.files import opened_file
from disha.finetune.errors import CheckpointError, raised_as

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

__all__ = ["Header", "StoredTensor", "damaged", "read_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32

LARGEST_HEADER = 32 * 2**20
"""In bytes. A vocabulary of 262,000 tokens with merges takes 15 MB in a file. In Python, it takes 9
times as much."""

MOST_VALUES, MOST_TENSORS, MOST_DIMENSIONS = 10_000, 100_000, 4

NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Type of a number -> NumPy's character for it."""

LENGTH = struct.Struct("<Q")

TEXT, ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file, unread.

    Args:
        kind: how its numbers are stored.
        shape: its shape, in PyTorch's order.
        start: the position of its first byte in the file.
        nbytes: the number of its bytes.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself.

    Args:
        values: its metadata.
        tensors: where each tensor is.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        CheckpointError: the file can't be read, is not GGUF, or is damaged.
    """
    with raised_as(CheckpointError), opened_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(LARGEST_HEADER)
    if content[: len(MAGIC)] != MAGIC:
        raise CheckpointError(
            f"{path} is not a GGUF file: it begins with {content[:4]!r} instead of {MAGIC!r}"
        )
    try:
        return _parsed(_Parts(content, size))
    except ValueError as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a damaged file."""
    return CheckpointError(f"{path} is damaged or cut short: {error}; download or convert it again")


def _parsed(parts: _Parts) -> Header:
    version, tensors, values = parts.number("I"), parts.number("Q"), parts.number("Q")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}; supported are 2 and 3, little-endian")
    if values > MOST_VALUES or tensors > MOST_TENSORS:
        raise ValueError(
            f"it claims {values:,} values and {tensors:,} tensors; at most {MOST_VALUES:,} and "
            f"{MOST_TENSORS:,} are allowed"
        )
    held = _each_once((parts.text(), parts.value()) for _ in range(values))
    found = _each_once((parts.text(), parts.tensor()) for _ in range(tensors))
    alignment = held.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= parts.size or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r:.60}, and must be a power of two")
    first = math.ceil(parts.place / alignment) * alignment
    placed = {name: _placed(name, first, parts.size, *one) for name, one in found.items()}
    return Header(held, placed)


def _each_once(pairs: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.60} comes twice")
        found[name] = value
    return found


def _placed(
    name: str, first: int, size: int, kind: int, shape: tuple[int, ...], offset: int
) -> StoredTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known = GGMLQuantizationType(kind)  # a ValueError for another number
    block, block_bytes = GGML_QUANT_SIZES[known]
    if shape and shape[-1] % block:
        raise ValueError(f"{name!r:.60} has rows of {shape[-1]}, not a multiple of {block}")
    nbytes = math.prod(shape) // block * block_bytes
    if first + offset + nbytes > size:
        raise ValueError(f"{name!r:.60} ends after the end of the file")
    return StoredTensor(known, shape, first + offset, nbytes)


class _Parts:
    """The parts of a header, one after another.

    Args:
        content: the beginning of the file.
        size: the size of the file.
    """

    def __init__(self, content: bytes, size: int) -> None:
        self.content, self.size = content, size
        self.place = len(MAGIC)

    def number(self, form: str) -> Any:
        return self._numbers(1, form)[0]

    def text(self) -> str:
        self._require(LENGTH.size)
        first = self.place + LENGTH.size
        last = first + LENGTH.unpack_from(self.content, self.place)[0]
        self._require(last - self.place)
        self.place = last
        return str(self.content[first:last], "utf-8")

    def value(self) -> Any:
        kind = self.number("I")
        return self._array() if kind == ARRAY else self._items(kind, 1)[0]

    def tensor(self) -> tuple[int, tuple[int, ...], int]:
        """Return the type of a tensor, its shape in PyTorch's order, and its position."""
        dimensions = self.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions:,} dimensions, more than {MOST_DIMENSIONS}")
        shape = self._numbers(dimensions, "Q")
        return self.number("I"), tuple(shape[::-1]), self.number("Q")

    def _array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind == ARRAY:
            raise ValueError("it has arrays in an array, which no key of a model has")
        return self._items(kind, count)

    def _items(self, kind: int, count: int) -> list[Any]:
        if kind in NUMBERS:
            return self._numbers(count, NUMBERS[kind])
        if kind != TEXT:
            raise ValueError(f"it has a value of the unknown type {kind}")
        self._require(count)  # each text has a length, at least
        return [self.text() for _ in range(count)]

    def _numbers(self, count: int, form: str) -> list[Any]:
        import numpy as np

        kind = np.dtype(f"<{form}")
        self._require(count * kind.itemsize)
        start, self.place = self.place, self.place + count * kind.itemsize
        numbers: list[Any] = np.frombuffer(self.content[start : self.place], kind).tolist()
        return numbers

    def _require(self, count: int) -> None:
        if count > len(self.content) - self.place:
            if len(self.content) < self.size:
                raise ValueError(f"its header has more than {LARGEST_HEADER:,} bytes")
            raise ValueError(f"after byte {self.place:,}, {count:,} bytes or texts are missing")

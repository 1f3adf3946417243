"""Safetensors files, whatever they hold; the only importer of safetensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from disha.errors import AdapterFileError, AdapterIOError, DishaError
from disha.text import brief

__all__ = [
    "DTYPES",
    "LARGEST_INDEX",
    "TensorFile",
    "TensorRecord",
    "explained",
    "opened",
    "refuse_floods",
]

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes that adapters and base weights have, by their names in a file."""


LARGEST_INDEX = 100_000_000
"""Bytes that safetensors takes at most for what describes the tensors."""

CHARACTERS_FOR_BRACKET = 16
FREE_BRACKETS = 64

MOST_DIMENSIONS = 64
"""As many as operations of torch can work on."""


@dataclass(frozen=True)
class TensorRecord:
    """A tensor in a file: its shape, its dtype and its size in bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorFile:
    """An open safetensors file; tensors are read one by one, when they are asked for.

    Args:
        path: what errors name.
        file: the open file.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self._file = file

    @property
    def metadata(self) -> dict[str, str]:
        """The file's `__metadata__`."""
        metadata: dict[str, str] | None = self._file.metadata()
        return metadata or {}

    @property
    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self._file.keys())

    def record(self, key: str) -> TensorRecord:
        """Return a tensor's shape and dtype without reading it; its dtype is one of `DTYPES`."""
        dtype = self._file.get_slice(key).get_dtype()
        if dtype not in DTYPES:
            raise AdapterFileError(
                f"{self.path}: tensor {brief(key)} has dtype {dtype}; allowed are "
                f"{', '.join(DTYPES)}"
            )
        return TensorRecord(self.shape(key), DTYPES[dtype])

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it; it is one that torch can work on."""
        shape = tuple(self._file.get_slice(key).get_shape())
        # A tensor that is empty in one dimension needs no data, however large the others are.
        if len(shape) > MOST_DIMENSIONS or math.prod(size or 1 for size in shape) >= 2**63:
            raise AdapterFileError(
                f"{self.path}: tensor {brief(key)} has shape {brief(shape)}; allowed are up to "
                f"{MOST_DIMENSIONS} dimensions and less than 2**63 in all"
            )
        return shape

    def read(self, key: str) -> Tensor:
        """Return a tensor, on the CPU."""
        with explained(self.path):
            tensor: Tensor = self._file.get_tensor(key)
            return tensor


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file for reading.

    Raises:
        AdapterIOError: it can't be read.
        AdapterFileError: it is no whole safetensors file.
    """
    if path.is_dir():
        raise AdapterIOError(f"can't read {path}: it is a folder; name the .safetensors file")
    if path.exists() and not path.is_file():  # opening a pipe waits for somebody to write into it
        raise AdapterIOError(f"can't read {path}: it is no regular file; copy it into one")
    with explained(path):
        refuse_floods(path, _index(path))
        with safetensors.safe_open(path, framework="pt") as file:
            yield TensorFile(path, file)


def _index(path: Path) -> str:
    """Return the JSON at the start of a file, character by byte."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, LARGEST_INDEX)).decode("latin-1")


def refuse_floods(path: Path, text: str) -> None:
    """Raise if JSON is little else than brackets.

    As objects, empty lists take 30 times the room that they take as text; names and numbers less
    than half of that. What describes tensors has more of these than of brackets.

    Args:
        path: what errors name.
        text: the JSON, valid or not.
    """
    brackets = _brackets(text)
    if brackets > FREE_BRACKETS + len(text) // CHARACTERS_FOR_BRACKET:
        raise AdapterFileError(
            f"{path} has a header that is not valid JSON for tensors: {brackets:,} brackets in "
            f"{len(text):,} characters. It is damaged, or made to do harm; get it again"
        )


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what reading raises into our own errors, which name the file."""
    try:
        yield
    except safetensors.SafetensorError as error:
        raise AdapterFileError(
            f"{path} is not a whole safetensors file ({error}); it is damaged, was cut off, or is "
            "another kind of file. Get it again"
        ) from error
    except OSError as error:
        if isinstance(error, DishaError):
            raise
        raise AdapterIOError(
            f"can't read {path}: {error.strerror or error}; check the path"
        ) from error


PART = 1 << 16


def _brackets(text: str) -> int:
    """Return how many opening brackets JSON has outside of strings."""
    plain = text.replace("\\\\", "").replace('\\"', "")
    count, inside = 0, False
    for start in range(0, len(plain), PART):  # split as a whole, it would take a lot of room
        pieces = plain[start : start + PART].split('"')
        outside = "".join(pieces[1::2] if inside else pieces[::2])
        count += outside.count("[") + outside.count("{")
        inside ^= len(pieces) % 2 == 0
    return count

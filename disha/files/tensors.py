"""Read safetensors files of any content; no other module imports safetensors."""

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
    "LENGTH_BYTES",
    "TensorFile",
    "TensorRecord",
    "explained",
    "opened",
]

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Name of a dtype in a file -> the dtype, for all that adapters and base weights may have."""

LENGTH_BYTES = 8
"""A safetensors file begins with the length of its index, little end first."""

LARGEST_INDEX = 32 * 2**20
"""Largest index in bytes. Parsed JSON takes up to 40 times its size in memory."""

MOST_DIMENSIONS = 64
"""The most dimensions that operations of torch take."""


@dataclass(frozen=True)
class TensorRecord:
    """A tensor in a file: its shape and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """The dtype's name in torch, such as `"float32"`."""
        return str(self.dtype).removeprefix("torch.")


class TensorFile:
    """An open safetensors file. Each tensor is read on request.

    Args:
        path: the name of the file in errors.
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
        """Return a tensor's shape without reading it; raise if torch can't work with it."""
        shape = tuple(self._file.get_slice(key).get_shape())
        # If one dimension is 0, the others may be of any size, as there is no data.
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
        AdapterFileError: it is not a complete safetensors file.
    """
    if path.is_dir():
        raise AdapterIOError(f"can't read {path}: it is a folder; name the .safetensors file")
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        raise AdapterIOError(f"can't read {path}: it is not a regular file; copy it into one")
    with explained(path):
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(LENGTH_BYTES), "little")
        if LARGEST_INDEX < length <= path.stat().st_size:
            raise AdapterFileError(
                f"{path} has a header of {length:,} bytes; at most {LARGEST_INDEX:,} are allowed. "
                "It is damaged, or made to do harm; get it again"
            )
        with safetensors.safe_open(path, framework="pt") as file:
            yield TensorFile(path, file)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Convert reading errors to errors of this library that name the file."""
    try:
        yield
    except safetensors.SafetensorError as error:
        raise AdapterFileError(
            f"{path} is not a complete safetensors file ({error}); it is damaged, was cut off, or "
            "is another kind of file. Get it again"
        ) from error
    except OSError as error:
        if isinstance(error, DishaError):
            raise
        raise AdapterIOError(
            f"can't read {path}: {error.strerror or error}; check the path"
        ) from error

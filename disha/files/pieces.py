"""Write safetensors files one tensor at a time, and copy tensors of any dtype as bytes.

So files may be larger than memory. The `safetensors` library writes only tensors that are in
memory, and needs NumPy for that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from torch import Tensor

from disha.errors import ArgumentError
from disha.files.atomic import Write
from disha.files.tensors import LARGEST_INDEX, LENGTH_BYTES, NAMES, memory_of

__all__ = ["Piece", "tensor_writer", "write_pieces", "write_tensor"]

ITEM_SIZES = {name: dtype.itemsize for dtype, name in NAMES.items()}


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
        file.write(memory_of(tensor))

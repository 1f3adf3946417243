"""The checksum of an adapter file, which shows whether a bit has flipped since it was written.

It is the SHA-256 of the header and of all tensors, in an order that does not depend on where the
file has them; docs/format.md describes it. Every language has SHA-256, and of the hashes in the
standard library it is the fastest on processors with instructions for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from disha.errors import AdapterFileError
from disha.files.tensors import NAMES, TensorFile, memory_of
from disha.text import brief

__all__ = ["CHECKSUM_KEY", "HEADER_KEY", "check_values", "checksum"]

HEADER_KEY = "disha"
"""The metadata key of the header."""

CHECKSUM_KEY = "disha_checksum"
"""The metadata key of the checksum."""

_Described = tuple[str, tuple[int, ...], Iterable[Any]]
"""The dtype of a tensor in a file, its shape, and its bytes in parts."""


def checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of an adapter, 64 hexadecimal digits.

    Args:
        header: the text of its header.
        tensors: key -> tensor on the CPU.
    """
    return _digest(header, {key: _described(tensor) for key, tensor in tensors.items()})


def check_values(file: TensorFile, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Raise unless a file has the header and the values that its checksum belongs to.

    A file without a checksum is not checked.

    Args:
        file: the open file.
        tensors: tensors that have been read already. The others are read in parts.

    Raises:
        AdapterFileError: a bit has flipped.
        AdapterIOError: the file can't be read any more.
    """
    expected = file.metadata.get(CHECKSUM_KEY)
    if expected is None:
        return
    known = {} if tensors is None else tensors
    found = _digest(
        file.metadata.get(HEADER_KEY, ""),
        {
            key: _described(known[key])
            if key in known
            else (stored.dtype, stored.shape, file.chunks(key))
            for key, stored in file.tensors.items()
        },
    )
    if found != expected:
        raise AdapterFileError(
            f"{file.path} is damaged: its checksum says {brief(expected)}, and its header and "
            f"tensors give {found!r}; get the file again"
        )


def _described(tensor: Tensor) -> _Described:
    return NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), _bytes_of(tensor)


def _bytes_of(tensor: Tensor) -> Iterable[Any]:
    tensor = tensor.detach().contiguous()
    yield memory_of(tensor)


def _digest(header: str, tensors: Mapping[str, _Described]) -> str:
    digest = hashlib.sha256()
    _add_text(digest, header)
    for key, (dtype, shape, parts) in sorted(tensors.items()):
        _add_text(digest, f"{dtype} {shape} {key}")
        for part in parts:
            digest.update(part)
    return digest.hexdigest()


def _add_text(digest: Any, text: str) -> None:
    encoded = text.encode()
    digest.update(len(encoded).to_bytes(8, "little") + encoded)

"""Hashes of files, numbers and models, which show whether they are the same as before."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

__all__ = ["add_state", "add_tensor", "file_hash"]

PIECE = 1 << 20
"""How many bytes of a file are read at a time."""


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        OSError: it can't be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def add_tensor(digest: Hash, tensor: Tensor) -> None:
    """Add the bytes of a dense tensor to a hash."""
    values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)


def add_state(digest: Hash, state: Mapping[str, object]) -> None:
    """Add the tensors of a state dict to a hash, with their names, dtypes and shapes.

    Args:
        digest: the hash.
        state: the state dict of any model. A tensor may be sharded, or consist of other tensors, as
            quantised weights do. What is not a tensor is left out.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        if hasattr(value, "__tensor_flatten__"):
            inner, _ = value.__tensor_flatten__()
            add_state(digest, {f"{name}.{part}": getattr(value, part) for part in inner})
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        add_tensor(digest, value.to_dense() if value.layout != torch.strided else value)

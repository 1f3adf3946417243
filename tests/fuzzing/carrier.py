"""Safetensors files written by hand, so that they can lie."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Draft", "Pairs", "Raw", "Tensor", "container", "to_text"]


@dataclass(frozen=True)
class Raw:
    """JSON text that stands as it is, valid or not."""

    text: str


@dataclass
class Pairs:
    """A JSON object as (key, value) pairs, in which a key may come twice."""

    items: list[tuple[str, Any]]


def to_text(value: Any) -> str:
    """Return JSON text, with `Raw` and `Pairs` wherever they stand in the value."""
    if isinstance(value, Raw):
        return value.text
    try:
        return json.dumps(value)
    except TypeError:  # something of ours is in it
        pass
    if isinstance(value, (dict, Pairs)):
        pairs = value.items() if isinstance(value, dict) else value.items
        return "{" + ",".join(f"{json.dumps(key)}:{to_text(item)}" for key, item in pairs) + "}"
    return "[" + ",".join(map(to_text, value)) + "]"


def container(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file, whose header may be said to have another length."""
    said = len(header) if length is None else length
    return struct.pack("<Q", said % 2**64) + header + data


@dataclass
class Tensor:
    """A tensor in a draft."""

    dtype: str
    shape: list[Any]
    data: bytes


@dataclass
class Draft:
    """An adapter file taken apart, to be changed and put together again."""

    tensors: dict[str, Tensor]
    header: Any
    beside: dict[str, Any] = field(default_factory=dict)
    """Entries of `__metadata__` besides ours."""
    large: int = 0
    """How many of something makes the file large."""

    @classmethod
    def of(cls, file: bytes) -> Draft:
        """Return a valid file as a draft."""
        (length,) = struct.unpack("<Q", file[:8])
        index, data = json.loads(file[8 : 8 + length]), file[8 + length :]
        header = json.loads(index.pop("__metadata__")["disha"])
        tensors = {
            key: Tensor(one["dtype"], one["shape"], data[slice(*one["data_offsets"])])
            for key, one in index.items()
        }
        return cls(tensors, header)

    def index(self) -> tuple[list[tuple[str, Any]], bytes]:
        """Return the items of the safetensors header, metadata first, and the data."""
        ours = to_text(self.header)
        items: list[tuple[str, Any]] = [
            ("__metadata__", Pairs([("disha", ours), *self.beside.items()]))
        ]
        pieces: list[bytes] = []
        offset = 0
        for key, tensor in self.tensors.items():
            end = offset + len(tensor.data)
            entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
            items.append((key, entry))
            pieces.append(tensor.data)
            offset = end
        return items, b"".join(pieces)

    def file(self) -> bytes:
        """Return the file."""
        items, data = self.index()
        return container(to_text(Pairs(items)).encode(), data)

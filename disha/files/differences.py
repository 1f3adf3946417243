"""What differs between two adapter files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from disha.files.header import AdapterFile
from disha.files.statistics import chunks
from disha.files.tensors import TensorFile, opened

__all__ = ["FieldDifference", "TensorDifference", "header_differences", "tensor_differences"]


@dataclass(frozen=True)
class FieldDifference:
    """A field that has another value in the other file.

    Attributes:
        field: its name.
        first: its value in the first file; None where it has none.
        second: its value in the second.
    """

    field: str
    first: Any
    second: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.first} | {self.second}"


@dataclass(frozen=True)
class TensorDifference:
    """How a layer, or a parameter saved beside the blocks, differs.

    Attributes:
        name: the layer's or the parameter's name.
        layer: whether it is a layer.
        held: `"both"`, `"first"` or `"second"`: who has it.
        fields: what is said of it, and differs: sizes, scale, dtype and the like.
        largest: largest absolute difference of two values, 0 where all are equal; None where they
            can't be compared: one is missing, shapes differ, or values are not finite.
        relative: the norm of the difference by the larger of both norms; None likewise.
    """

    name: str
    layer: bool
    held: str
    fields: tuple[FieldDifference, ...]
    largest: float | None
    relative: float | None

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return self.held == "both" and not self.fields and self.largest == 0


def header_differences(first: AdapterFile, second: AdapterFile) -> tuple[FieldDifference, ...]:
    """Return what differs in the configurations and the users' notes.

    Args:
        first: what one file says of itself.
        second: what the other does.
    """
    one, other = first.config.to_json(), second.config.to_json()
    changed = [FieldDifference(f, one[f], other[f]) for f in one if one[f] != other[f]]
    notes = sorted({*first.metadata, *second.metadata})
    pairs = [(note, first.metadata.get(note), second.metadata.get(note)) for note in notes]
    return (
        *changed,
        *(FieldDifference(f"metadata.{note}", a, b) for note, a, b in pairs if a != b),
    )


def tensor_differences(first: AdapterFile, second: AdapterFile) -> Iterator[TensorDifference]:
    """Iterate over the layers, and then the further parameters, of two files: what differs.

    Tensors are read one pair at a time. Those of the first come in its order, and what only the
    second has comes last.

    Args:
        first: what one file says of itself.
        second: what the other does.

    Raises:
        AdapterIOError: a file can't be read any more.

    Examples:
        >>> import tempfile, pathlib
        >>> from torch import nn
        >>> import disha
        >>> from disha.files.differences import tensor_differences
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "adapter.safetensors")
        ...     disha.save_adapter(model, path)
        ...     described = disha.inspect_adapter(path)
        ...     [difference.same for difference in tensor_differences(described, described)]
        [True]
    """
    one, other = _entries(first), _entries(second)
    with opened(first.path) as a, opened(second.path) as b:
        for place, mine in one.items():
            if place in other:
                yield _difference(*place, (a, mine), (b, other[place]))
            else:
                yield TensorDifference(*place, "first", (), None, None)
    yield from (
        TensorDifference(*place, "second", (), None, None) for place in other if place not in one
    )


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file, and what is said of it."""

    key: str
    said: dict[str, Any]


def _entries(described: AdapterFile) -> dict[tuple[str, bool], _Entry]:
    """Return the tensors of a file by name, and by whether it is a layer's."""
    found = {}
    for layer in described.layers:
        found[layer.name, True] = _entry(described, layer.key, layer.to_json())
    for key in described.also_train:
        found[key, False] = _entry(described, key, {})
    return found


def _entry(described: AdapterFile, key: str, said: dict[str, Any]) -> _Entry:
    record = described.tensors[key]
    dtype = str(record.dtype).removeprefix("torch.")
    return _Entry(key, {**said, "shape": record.shape, "dtype": dtype})


def _difference(
    name: str, layer: bool, first: tuple[TensorFile, _Entry], second: tuple[TensorFile, _Entry]
) -> TensorDifference:
    (a, one), (b, other) = first, second
    changed = tuple(
        FieldDifference(field, value, other.said[field])
        for field, value in one.said.items()
        if value != other.said[field]
    )
    largest, relative = None, None
    if one.said["shape"] == other.said["shape"]:
        largest, relative = _compared(a.read(one.key), b.read(other.key))
    return TensorDifference(name, layer, "both", changed, largest, relative)


def _compared(a: Tensor, b: Tensor) -> tuple[float | None, float | None]:
    """Return the largest and the relative difference of two tensors of one shape."""
    largest, difference, norms = 0.0, 0.0, [0.0, 0.0]
    for one, other in zip(chunks(a), chunks(b), strict=True):
        pair = one.double(), other.double()
        apart = pair[0] - pair[1]
        largest = max(largest, float(apart.abs().max()))
        difference += float(apart.square().sum())
        norms = [norm + float(x.square().sum()) for norm, x in zip(norms, pair, strict=True)]
        if not math.isfinite(difference):
            return None, None
    norm = max(norms)  # 0 where squares vanish
    return largest, math.sqrt(difference / norm) if norm else 0.0

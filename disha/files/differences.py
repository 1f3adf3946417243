"""The differences between two adapter files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from disha.files.checksum import check_values
from disha.files.header import AdapterFile
from disha.files.statistics import chunks
from disha.files.tensors import opened
from disha.text import printable

__all__ = ["FieldDifference", "TensorDifference", "header_differences", "tensor_differences"]


@dataclass(frozen=True)
class FieldDifference:
    """A field that has different values in the two files.

    Attributes:
        field: its name.
        first: its value in the first file, or None.
        second: its value in the second file, or None.
    """

    field: str
    first: Any
    second: Any

    def __str__(self) -> str:
        return printable(f"{self.field}: {self.first} | {self.second}")


@dataclass(frozen=True)
class TensorDifference:
    """How a block, or a parameter saved with the blocks, differs.

    Attributes:
        name: the name of the layer or the parameter.
        layer: whether it is a layer.
        held: which file has it: `"both"`, `"first"` or `"second"`.
        fields: the fields of its entry that differ: sizes, scale, dtype and others.
        largest: largest absolute difference of two values, 0 if all are equal. It is None if one
            tensor is missing, the shapes differ, or values are not finite.
        relative: the norm of the difference divided by the larger of both norms; None as above.
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
    """Return the differences between the configurations and the users' notes.

    Args:
        first: the header of one file.
        second: the header of the other file.
    """
    notes = [
        {f"metadata.{name}": note for name, note in sorted(one.metadata.items())}
        for one in (first, second)
    ]
    return (*_changed(first.config.to_json(), second.config.to_json()), *_changed(*notes))


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[FieldDifference, ...]:
    return tuple(
        FieldDifference(field, one.get(field), other.get(field))
        for field in dict.fromkeys((*one, *other))
        if one.get(field) != other.get(field)
    )


def tensor_differences(first: AdapterFile, second: AdapterFile) -> Iterator[TensorDifference]:
    """Iterate over the tensors of two files, and compare those of the same key.

    Tensors are read one pair at a time, in the order of the first file. Those that only the second
    file has come last.

    Args:
        first: the header of one file.
        second: the header of the other file.

    Raises:
        AdapterFileError: a file is damaged.
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
    one, other = first.entries(), second.entries()
    both = {**other, **one}
    blocks = {layer.key for layer in (*first.layers, *second.layers)}
    with opened(first.path) as a, opened(second.path) as b:
        check_values(a)
        check_values(b)
        for key in dict.fromkeys((*one, *other)):
            name = both[key]["name"]
            if key not in one or key not in other:
                held = "first" if key in one else "second"
                yield TensorDifference(name, key in blocks, held, (), None, None)
                continue
            largest, relative = None, None
            if one[key]["shape"] == other[key]["shape"]:
                largest, relative = _distance(a.read(key), b.read(key))
            fields = _changed(one[key], other[key])
            yield TensorDifference(name, key in blocks, "both", fields, largest, relative)


def _distance(a: Tensor, b: Tensor) -> tuple[float | None, float | None]:
    """Return the largest and the relative difference of two tensors of one shape."""
    largest, difference, norms = 0.0, 0.0, [0.0, 0.0]
    for pair in zip(chunks(a), chunks(b), strict=True):
        one, other = (chunk.double() for chunk in pair)
        largest = max(largest, float((one - other).abs().max()))
        difference += float((one - other).square().sum())
        norms[0] += float(one.square().sum())
        norms[1] += float(other.square().sum())
    if not math.isfinite(difference):
        return None, None
    norm = max(norms)  # 0 if the squares are too small for a double
    return largest, math.sqrt(difference / norm) if norm else 0.0

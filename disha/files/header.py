"""The header of an adapter file, format 1: what the file says of itself.

It is JSON under one key of the safetensors metadata; docs/format.md describes its fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from disha import functional
from disha.config import AdapterConfig, check_scale, checked_rows
from disha.errors import AdapterFileError, ArgumentError, DishaError
from disha.files.json_files import each_once
from disha.files.tensors import TensorFile, TensorRecord, refuse_floods
from disha.functional import METHODS, PATTERNS, Geometry, Layout, Rows
from disha.layers import block_name
from disha.model import join
from disha.tables import table
from disha.text import brief, printable

__all__ = [
    "FORMAT",
    "HEADER_KEY",
    "AdapterFile",
    "AdapterHeader",
    "LayerRecord",
    "TensorRecord",
    "contradictions",
    "described_by",
    "encoded",
]

FORMAT = 1
"""The newest file format that this library writes and reads."""

HEADER_KEY = "disha"
"""The one metadata key: several would come out in changing order, and the bytes with them."""

T = TypeVar("T")


@dataclass(frozen=True)
class LayerRecord:
    """An adapted weight in a file: what block it has, on what it fits, its base's fingerprint.

    Attributes:
        name: the layer's name in its model; where the weight is not its layer's `weight`, with
            its own name behind (`experts.gate_up_proj`).
        method: the block's method.
        r: shard size.
        r_out: size of the output shard of a tile, or None.
        in_features: size of the layer's input.
        out_features: size of its output.
        scale: factor on the update.
        base: fingerprint of the base weight, or None where it has none.
        layout: where the base weight keeps its outputs and inputs.
        rows: the outputs that are adapted, where not all of the weight's are.
    """

    name: str
    method: str
    r: int
    r_out: int | None
    in_features: int
    out_features: int
    scale: float
    base: str | None
    layout: Layout
    rows: Rows = ()

    @property
    def sizes(self) -> tuple[str, int, int | None, int, int]:
        """Kind, r, r_out, in and out."""
        return (self.method, self.r, self.r_out, self.in_features, self.out_features)

    def to_json(self) -> dict[str, Any]:
        """Return all that is said of the layer as JSON values, its layout's fields included."""
        return {
            **vars(self),
            "layout": self.layout.pattern,
            "groups": self.layout.groups,
            "padding_idx": self.layout.padding_idx,
            "rows": [list(one) for one in self.rows],
        }

    def geometry(self, block: tuple[int, ...]) -> Geometry:
        """Return the sizes of the adapted weight; those of its stack come from the block."""
        stack = functional.stack_of(self.method, self.layout, block)
        return Geometry(self.in_features, self.out_features, stack)

    def weight_shape(self, block: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the adapted rows of the weight, by the block's shape."""
        return self.layout.shape(self.geometry(block))

    def block_misfit(self, block: tuple[int, ...]) -> str | None:
        """Return why a block of that shape is none of such a layer, or None if it can be."""
        layout, r, r_out = self.layout, self.r, self.r_out
        least = 2 if layout.has_kernel else METHODS[self.method].block_axes
        weight = self.weight_shape(block) if len(block) >= least else ()
        if layout.misfit(weight) is not None:
            return f"a block of shape {block} does not go with the layout {layout.pattern!r}"
        misfit = functional.misfit(self.method, self.layout, self.geometry(block), r, r_out)
        if misfit is not None:
            return misfit
        count = sum(stop - first for first, stop in self.rows)
        if self.rows and count != self.out_features:
            return f"it has {count} rows, and out_features={self.out_features}"
        expected = functional.block_shape(self.method, layout, weight, r, r_out)
        return None if block == expected else f"expected a block of shape {expected}, found {block}"

    def weight_misfit(self, block: tuple[int, ...], weight: tuple[int, ...]) -> str | None:
        """Return why a weight of that shape can't be the layer's, or None if it can.

        Args:
            block: the shape of the layer's block, which fits the layer.
            weight: the shape of the whole weight.
        """
        expected, of_rows = self.weight_shape(block), ""
        if self.rows:
            of_rows = " in rows " + ", ".join(f"{first}:{stop}" for first, stop in self.rows)
        if self.layout.misfit(weight) is None:
            geometry = self.layout.geometry(weight, self.rows)
            outputs = self.layout.geometry(weight).out_features
            if geometry == self.geometry(block) and all(stop <= outputs for _, stop in self.rows):
                return None
        return f"the weight there is {weight}, and the adapter is for {expected}{of_rows}"

    def adapted_part(self, weight: Tensor) -> Tensor:
        """Return the rows of a weight that are adapted; all of it where all are."""
        return self.layout.part(weight, self.rows)

    @property
    def key(self) -> str:
        """The block's key in the file."""
        return join(self.name, block_name(self.method))


@dataclass(frozen=True)
class AdapterHeader:
    """What describes an adapter away from its model.

    Attributes:
        config: the adapter's configuration.
        layers: the adapted layers.
        also_train: names of the parameters saved beside the blocks.
        tensors: key -> shape and dtype, of all tensors.
        metadata: what the user gave to `save_adapter`.
    """

    config: AdapterConfig
    layers: tuple[LayerRecord, ...]
    also_train: tuple[str, ...]
    tensors: Mapping[str, TensorRecord]
    metadata: Mapping[str, str]

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors.values())


@dataclass(frozen=True)
class AdapterFile(AdapterHeader):
    """What an adapter file says of itself; printable.

    Attributes:
        config: the adapter's configuration.
        layers: the adapted layers.
        also_train: names of the parameters saved beside the blocks.
        tensors: key -> shape and dtype, of all tensors.
        metadata: what the user gave to `save_adapter`.
        path: the file.
        format: its format version.
        nbytes: size of the file.

    Examples:
        >>> import pathlib, tempfile
        >>> import disha
        >>> layer = disha.BoneLinear(8, 16, r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "adapter.safetensors")
        ...     disha.save_adapter(layer, path, metadata={"task": "dialogue"})
        ...     found = disha.inspect_adapter(path)
        >>> found.layers[0].in_features, found.layers[0].out_features, found.parameters
        (8, 16, 64)
        >>> found.config.method, found.metadata["task"]
        ('bone', 'dialogue')
    """

    path: Path
    format: int
    nbytes: int

    def __str__(self) -> str:
        rows = [
            (
                layer.name or "(the model)",
                layer.method,
                layer.r,
                f"{layer.in_features} -> {layer.out_features}",
                "x".join(map(str, self.tensors[layer.key].shape)),
                str(self.tensors[layer.key].dtype).removeprefix("torch."),
            )
            for layer in self.layers
        ]
        lines = [table(("layer", "method", "r", "in -> out", "block", "dtype"), rows)]
        if self.also_train:
            lines.append(f"also trained: {printable(', '.join(self.also_train))}")
        lines += [printable(f"{key}: {value}") for key, value in self.metadata.items()]
        lines.append(
            f"{self.path}: format {self.format}, {len(self.layers)} layers, "
            f"{self.parameters:,} parameters, {self.nbytes:,} bytes"
        )
        return "\n".join(lines)


# --- writing -------------------------------------------------------------------------------------


def encoded(header: AdapterHeader) -> str:
    """Return a header as JSON, the same text for the same header.

    Raises:
        ArgumentError: a name or a note is no Unicode text (it has half of a surrogate pair).
    """
    fields = {
        "format": FORMAT,
        "config": header.config.to_json(),
        "layers": _grouped(header.layers),
        "also_train": list(header.also_train),
        "metadata": dict(sorted(header.metadata.items())),
    }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
    broken = _not_unicode(text)
    if broken:
        raise ArgumentError(
            f"names and metadata must be Unicode text, and {broken} can't be written; replace it"
        )
    return text


def _not_unicode(text: str) -> str | None:
    """Return what of a text UTF-8 can't express, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ascii(text[error.start : error.end])
    return None


def _grouped(records: tuple[LayerRecord, ...]) -> list[dict[str, Any]]:
    """Return the layers grouped by their sizes: most of a model's layers share a few.

    What a group does not have, such as a tile or several groups of channels, it does not mention.
    """
    groups: dict[tuple[Any, ...], dict[str, str | None]] = {}
    for one in records:
        layout = one.layout
        shared = (
            *one.sizes,
            layout.pattern,
            None if layout.groups == 1 else layout.groups,
            layout.padding_idx,
            one.rows or None,
            one.scale,
        )
        groups.setdefault(shared, {})[one.name] = one.base
    names = ("kind", "r", "r_out", "in", "out", "layout", "groups", "padding_idx", "rows", "scale")
    return [
        {name: value for name, value in zip(names, shared, strict=True) if value is not None}
        | {"base": base}
        for shared, base in groups.items()
    ]


# --- checking ------------------------------------------------------------------------------------


def contradictions(header: AdapterHeader) -> list[str]:
    """Return, for each layer that contradicts the configuration or its block, how it does."""
    found = [
        (layer.name or "(the model)", _contradiction(layer, header)) for layer in header.layers
    ]
    return [f"{name}: {problem}" for name, problem in found if problem is not None]


def _contradiction(layer: LayerRecord, header: AdapterHeader) -> str | None:
    config = header.config
    if (layer.method, layer.r_out) != (config.method, config.r_out):
        return (
            f"has kind {layer.method!r} and r_out {layer.r_out}, but the configuration says "
            f"{config.method!r} and {config.r_out}"
        )
    return layer.block_misfit(header.tensors[layer.key].shape)


# --- reading -------------------------------------------------------------------------------------


def described_by(file: TensorFile) -> AdapterFile:
    """Return what an open file says of itself.

    Raises:
        AdapterFileError: it is no valid adapter file.
    """
    path = file.path
    header = _Header(path, _parsed(path, file.metadata))
    tensors = {key: file.record(key) for key in file.keys}
    layers, also_train = header.layers(), header.also_train()
    _check_keys(path, [layer.key for layer in layers] + list(also_train), tensors)
    described = AdapterFile(
        config=header.config(),
        layers=layers,
        also_train=also_train,
        tensors=tensors,
        metadata=header.metadata(),
        path=path,
        format=FORMAT,
        nbytes=path.stat().st_size,
    )
    problems = contradictions(described)
    if problems:
        raise AdapterFileError(f"{path} contradicts itself:\n" + "\n".join(problems[:20]))
    return described


def _parsed(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(HEADER_KEY)
    if text is None:
        raise AdapterFileError(
            f"{path} is a safetensors file without a {HEADER_KEY!r} entry in its metadata: it "
            "was not written by disha.save_adapter"
        )
    refuse_floods(path, text)
    try:
        header = json.loads(text, object_pairs_hook=each_once, parse_constant=_no_number)
        if "\\u" in text:  # half of a surrogate pair can be written as an escape only
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise AdapterFileError(
            f"{path}: the header must be a JSON object, is {type(header).__name__}"
        )
    version = header.get("format")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise AdapterFileError(f"{path}: the header's format must be a number, is {brief(version)}")
    if version > FORMAT:
        raise AdapterFileError(
            f"{path} has format {brief(version)}, and this version of disha reads up to {FORMAT}; "
            "upgrade disha-torch"
        )
    return header


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


class _Header:
    """The fields of a header, each checked as it is read."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def config(self) -> AdapterConfig:
        try:
            return AdapterConfig.from_json(self._field(self.fields, "config", dict))
        except DishaError as error:
            raise AdapterFileError(f"{self.path}: {error}") from error

    def layers(self) -> tuple[LayerRecord, ...]:
        records = [
            record
            for group in self._field(self.fields, "layers", list)
            for record in self._group(group)
        ]
        if not records:
            raise AdapterFileError(f"{self.path}: the header lists no layer")
        twice = _repeated(record.name for record in records)
        if twice is not None:
            raise AdapterFileError(f"{self.path}: the header lists layer {brief(twice)} twice")
        return tuple(records)

    def _group(self, group: object) -> Iterator[LayerRecord]:
        if not isinstance(group, dict):
            raise AdapterFileError(f"{self.path}: an entry of the header's layers is no object")
        kind = self._field(group, "kind", str)
        if kind not in METHODS:
            raise AdapterFileError(
                f"{self.path}: unknown kind {brief(kind)}; known are {', '.join(METHODS)}"
            )
        r_out = None if group.get("r_out") is None else self._size(group, "r_out")
        r, inputs, outputs = (self._size(group, field) for field in ("r", "in", "out"))
        layout, rows, scale = self._layout(group), self._rows(group), self._scale(group)
        for name, base in self._field(group, "base", dict).items():
            if base is not None and not isinstance(base, str):
                raise AdapterFileError(f"{self.path}: the fingerprint of {brief(name)} is no text")
            yield LayerRecord(
                name=name,
                method=kind,
                r=r,
                r_out=r_out,
                in_features=inputs,
                out_features=outputs,
                scale=scale,
                base=base,
                layout=layout,
                rows=rows,
            )

    def also_train(self) -> tuple[str, ...]:
        names = self._field(self.fields, "also_train", list)
        if not all(isinstance(name, str) for name in names):
            raise AdapterFileError(f"{self.path}: the header's also_train must list names")
        return tuple(names)

    def metadata(self) -> dict[str, str]:
        metadata = self._field(self.fields, "metadata", dict)
        if not all(isinstance(value, str) for value in metadata.values()):
            raise AdapterFileError(f"{self.path}: the header's metadata must be text")
        return metadata

    def _field(self, fields: dict[str, Any], name: str, kind: type[T]) -> T:
        value = fields.get(name)
        if not isinstance(value, kind):
            raise AdapterFileError(
                f"{self.path}: the header's field {name!r} must be a JSON {kind.__name__}, "
                f"is {type(value).__name__}"
            )
        return value

    def _layout(self, fields: dict[str, Any]) -> Layout:
        pattern = self._field(fields, "layout", str)
        if pattern not in PATTERNS:
            known = ", ".join(map(repr, PATTERNS))
            raise AdapterFileError(
                f"{self.path}: unknown layout {brief(pattern)}; known are {known}"
            )
        for field, only in (("groups", "in out *kernel"), ("padding_idx", "index out")):
            if field in fields and pattern != only:
                raise AdapterFileError(
                    f"{self.path}: the header's field {field!r} goes with the layout {only!r}, and "
                    f"this one is {pattern!r}"
                )
        groups = self._size(fields, "groups") if "groups" in fields else 1
        return Layout(pattern, groups, self._padding_idx(fields))

    def _padding_idx(self, fields: dict[str, Any]) -> int | None:
        if "padding_idx" not in fields:
            return None
        index = self._field(fields, "padding_idx", int)
        if isinstance(index, bool) or not 0 <= index < self._size(fields, "in"):
            raise AdapterFileError(
                f"{self.path}: the header's field 'padding_idx' must be an index below 'in', is "
                f"{brief(index)}"
            )
        return index

    def _rows(self, fields: dict[str, Any]) -> Rows:
        if "rows" not in fields:
            return ()
        try:
            rows = checked_rows("the header", fields["rows"])
        except DishaError as error:
            raise AdapterFileError(f"{self.path}: {error}") from error
        if rows[-1][1] >= 2**31 or [list(one) for one in rows] != fields["rows"]:
            raise AdapterFileError(
                f"{self.path}: the header's field 'rows' must list ranges in their order, below "
                f"2**31, is {brief(fields['rows'])}"
            )
        return rows

    def _scale(self, fields: dict[str, Any]) -> float:
        try:
            check_scale(fields.get("scale"))
        except DishaError as error:
            raise AdapterFileError(f"{self.path}: {error}") from error
        return float(fields["scale"])

    def _size(self, fields: dict[str, Any], name: str) -> int:
        value = self._field(fields, name, int)
        if isinstance(value, bool) or not 1 <= value < 2**31:
            raise AdapterFileError(
                f"{self.path}: the header's field {name!r} must be a size, is {brief(value)}"
            )
        return value


def _repeated(names: Iterable[str]) -> str | None:
    """Return a name that comes again, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _check_keys(path: Path, described: list[str], tensors: Mapping[str, object]) -> None:
    twice = _repeated(described)
    if twice is not None:
        raise AdapterFileError(f"{path}: the header lists {brief(twice)} twice")
    missing = [key for key in described if key not in tensors]
    extra = sorted(set(tensors) - set(described))
    if missing or extra:
        parts = [f"missing {brief(key)}" for key in missing[:10]] + [
            f"not described {brief(key)}" for key in extra[:10]
        ]
        raise AdapterFileError(
            f"{path}: tensors and header disagree ({len(missing)} missing, {len(extra)} not "
            f"described): {', '.join(parts)}"
        )

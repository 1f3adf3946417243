"""The header of an adapter file, format 1, which describes the adapter.

It is JSON under one key of the safetensors metadata; docs/format.md describes its fields. From top
to bottom: what a header holds, how it is written, and how it is read and checked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from disha.config import LARGEST_SCALE, AdapterConfig
from disha.errors import AdapterFileError, ArgumentError, DishaError
from disha.files.checksum import HEADER_KEY
from disha.files.json_files import is_size, parsed_json
from disha.files.tensors import TensorFile
from disha.functional import PATTERNS, Layout
from disha.records import LayerRecord, TensorRecord
from disha.text import brief, counted, first_few, printable, table

__all__ = [
    "FORMAT",
    "AdapterFile",
    "AdapterHeader",
    "LayerRecord",
    "TensorRecord",
    "block_misfits",
    "described_by",
    "encoded",
]

FORMAT = 1
"""The newest file format that this library writes and reads."""

MOST_LAYERS = 100_000
"""The largest number of layers that a header may list."""


# --- what a header holds -------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterHeader:
    """The description of an adapter outside its model.

    Attributes:
        config: the adapter's configuration.
        layers: the adapted layers, in the order of the model.
        also_train: names of the parameters and running statistics saved with the blocks.
        tensors: key -> shape and dtype, of all tensors.
        metadata: notes that the user gave to `save_adapter`.
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

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return key -> all JSON fields of each tensor, blocks first."""
        named = {layer.key: layer.to_json() for layer in self.layers}
        named |= {key: {"name": key} for key in self.also_train}
        return {
            key: {
                **fields,
                "key": key,
                "shape": self.tensors[key].shape,
                "dtype": self.tensors[key].dtype_name,
            }
            for key, fields in named.items()
        }


@dataclass(frozen=True)
class AdapterFile(AdapterHeader):
    """The header of an adapter file, with its path and size; printable.

    Attributes:
        config: the adapter's configuration.
        layers: the adapted layers, in the order of the model.
        also_train: names of the parameters and running statistics saved with the blocks.
        tensors: key -> shape and dtype, of all tensors.
        metadata: notes that the user gave to `save_adapter`.
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
        is_scaled = any(layer.scale != 1 for layer in self.layers)
        rows = [
            (
                layer.name or "(the model)",
                layer.method,
                layer.r,
                f"{layer.in_features} -> {layer.out_features}",
                "x".join(map(str, self.tensors[layer.key].shape)),
                self.tensors[layer.key].dtype_name,
                *([f"{layer.scale:g}"] if is_scaled else []),
            )
            for layer in self.layers
        ]
        scale = ["scale"] if is_scaled else []  # usually 1 everywhere
        lines = [table(("layer", "method", "r", "in -> out", "block", "dtype", *scale), rows)]
        if self.also_train:
            lines.append(f"also trained: {printable(', '.join(self.also_train))}")
        lines += [printable(f"{key}: {value}") for key, value in self.metadata.items()]
        lines.append(
            f"{printable(str(self.path))}: format {self.format}, "
            f"{counted(len(self.layers), 'layer')}, {counted(self.parameters, 'parameter')}, "
            f"{counted(self.nbytes, 'byte')}"
        )
        return "\n".join(lines)


def block_misfits(header: AdapterHeader) -> list[str]:
    """Return the name and the problem of each layer whose block has a wrong shape."""
    found = [(one.name, one.block_misfit(header.tensors[one.key].shape)) for one in header.layers]
    return [f"{name or '(the model)'}: {misfit}" for name, misfit in found if misfit is not None]


# --- writing -------------------------------------------------------------------------------------


def encoded(header: AdapterHeader) -> str:
    """Return a header as JSON. The same header always gives the same text.

    Raises:
        ArgumentError: a name or a note is not Unicode text (it has half of a surrogate pair).
    """
    fields = {
        "format": FORMAT,
        "config": header.config.to_json(),
        "layers": [layer.entry() for layer in header.layers],
        "also_train": list(header.also_train),
        "metadata": dict(sorted(header.metadata.items())),
    }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            "names and metadata must be Unicode text, and "
            f"{text[error.start : error.end]!a} can't be written; replace it"
        ) from error
    return text


# --- what a field must be ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    """The allowed values of a field in a JSON object.

    Attributes:
        allowed: a description, for errors.
        fits: takes the value and the object, and returns whether the value is allowed. Types are
            exact: `true` is not an integer.
        required: whether the field must be present.
    """

    allowed: str
    fits: Callable[[Any, Mapping[str, Any]], bool]
    required: bool = True


def _is_text(value: Any, _: object = None) -> bool:
    return type(value) is str


def _are_rows(value: Any, _: object = None) -> bool:
    if type(value) is not list or not all(type(one) is list and len(one) == 2 for one in value):
        return False
    ends = [end for one in value for end in one]
    in_order = all(type(end) is int for end in ends) and ends == sorted(ends)
    if not ends or not in_order or ends[0] < 0 or ends[-1] >= 2**31:
        return False
    return all(first < stop for first, stop in value)


_SIZE = _Field("an integer from 1 to 2^31 - 1", lambda value, _: is_size(value))

_HEADER = {
    "config": _Field("an object", lambda value, _: type(value) is dict),
    "layers": _Field(
        f"a list of 1 to {MOST_LAYERS:,} layers",
        lambda value, _: type(value) is list and 1 <= len(value) <= MOST_LAYERS,
    ),
    "also_train": _Field(
        "a list of names", lambda value, _: type(value) is list and all(map(_is_text, value))
    ),
    "metadata": _Field(
        "an object of text",
        lambda value, _: type(value) is dict and all(map(_is_text, value.values())),
    ),
}

_LAYER = {
    "name": _Field("text", _is_text),
    "layout": _Field(
        f"one of {', '.join(map(repr, PATTERNS))}",
        lambda value, _: type(value) is str and value in PATTERNS,
    ),
    "r": _SIZE,
    "in": _SIZE,
    "out": _SIZE,
    "scale": _Field(
        "a number that is finite in float32",
        lambda value, _: type(value) in (int, float) and abs(value) <= LARGEST_SCALE,
    ),
    "groups": _Field(
        f"{_SIZE.allowed}, with the layout 'in out *kernel' only",
        lambda value, layer: is_size(value) and layer["layout"] == "in out *kernel",
        required=False,
    ),
    "padding_idx": _Field(
        "an index below 'in', with the layout 'index out' only",
        lambda value, layer: (
            type(value) is int and 0 <= value < layer["in"] and layer["layout"] == "index out"
        ),
        required=False,
    ),
    "rows": _Field(
        "ranges [first, stop] below 2^31, in ascending order and without overlap",
        _are_rows,
        required=False,
    ),
    "base": _Field("text", _is_text, required=False),
}


def _checked(where: str, found: Any, fields: Mapping[str, _Field]) -> dict[str, Any]:
    """Return the known fields of a JSON object. Unknown fields are ignored."""
    if type(found) is not dict:
        raise _unfit(f"{where} must be an object; it is {brief(found)}")
    for name, field in fields.items():
        if name not in found and field.required:
            raise _unfit(f"{where} lacks the field {name!r}")
        if name in found and not field.fits(found[name], found):
            raise _unfit(f"{where}: {name!r} must be {field.allowed}; it is {brief(found[name])}")
    return {name: found[name] for name in fields if name in found}


def _unfit(problem: str) -> AdapterFileError:
    return AdapterFileError(f"{problem}; get the file again")


# --- reading -------------------------------------------------------------------------------------


def described_by(file: TensorFile) -> AdapterFile:
    """Return the checked header of an open file.

    Raises:
        AdapterFileError: it is not a valid adapter file.
    """
    path = file.path
    fields = _checked(f"{path}: the header", _parsed(path, file.metadata), _HEADER)
    try:
        config = AdapterConfig.from_json(fields["config"])
    except DishaError as error:
        raise AdapterFileError(f"{path}: {error}") from error
    described = AdapterFile(
        config=config,
        layers=tuple(_layer(path, config, entry) for entry in fields["layers"]),
        also_train=tuple(fields["also_train"]),
        tensors={key: file.record(key) for key in file.tensors},
        metadata=fields["metadata"],
        path=path,
        format=FORMAT,
        nbytes=file.index.size,
    )
    _check_keys(described)
    problems = block_misfits(described)
    if problems:
        raise AdapterFileError(
            f"{path} contradicts itself; get the file again:\n{first_few(problems, 20)}"
        )
    return described


def _parsed(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(HEADER_KEY)
    if text is None:
        raise AdapterFileError(
            f"{path} is a safetensors file without a {HEADER_KEY!r} entry in its metadata: it "
            "was not written by disha.save_adapter; name an adapter file"
        )
    header = parsed_json(f"{path}: the header", text, strict=True)
    version = header.get("format")
    if type(version) is not int or version < 1:
        found = brief(version)
        raise _unfit(f"{path}: the header's format must be an integer from 1; it is {found}")
    if version > FORMAT:  # it may have other fields
        raise AdapterFileError(
            f"{path} has format {brief(version)}, and this version of disha reads up to {FORMAT}; "
            "upgrade disha-torch"
        )
    return header


def _layer(path: Path, config: AdapterConfig, entry: Any) -> LayerRecord:
    name = entry.get("name") if type(entry) is dict else None
    fields = _checked(f"{path}: layer {brief(name)} of the header", entry, _LAYER)
    return LayerRecord(
        name=fields["name"],
        method=config.method,
        r=fields["r"],
        r_out=config.r_out,
        in_features=fields["in"],
        out_features=fields["out"],
        scale=float(fields["scale"]),
        base=fields.get("base"),
        layout=Layout(fields["layout"], fields.get("groups", 1), fields.get("padding_idx")),
        rows=tuple((first, stop) for first, stop in fields.get("rows", ())),
    )


def _check_keys(described: AdapterFile) -> None:
    """Raise unless the header lists each tensor once, and there are no other tensors."""
    listed = Counter([*(layer.key for layer in described.layers), *described.also_train])
    [(key, times)] = listed.most_common(1)
    if times > 1:
        raise _unfit(f"{described.path}: the header lists {brief(key)} {times} times")
    problems = [f"missing {brief(key)}" for key in listed if key not in described.tensors]
    problems += [
        f"{brief(layer.key)} is not floating-point"
        for layer in described.layers
        if layer.key in described.tensors
        and not described.tensors[layer.key].dtype.is_floating_point
    ]
    problems += [
        f"not described {brief(key)}" for key in sorted(described.tensors) if key not in listed
    ]
    if problems:
        raise _unfit(
            f"{described.path}: tensors and header disagree: {first_few(problems, 10, ', ')}"
        )

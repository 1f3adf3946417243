"""Adapters outside a model: read them from files, write them, and take parts of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from disha.checks import compile_regex
from disha.errors import (
    ArgumentError,
)
from disha.files.disk import PathLike, file_at, opened, save_tensors
from disha.files.header import (
    HEADER_KEY,
    AdapterContents,
    AdapterFile,
    header_to_json,
    parse_header,
)
from disha.model.records import LayerRecord
from disha.text import first_few

AnyContents = TypeVar("AnyContents", bound=AdapterContents)


def inspect_adapter(path: PathLike) -> AdapterFile:
    """Return the header of an adapter file, without reading any tensor.

    Args:
        path: the file, or a folder with a file `adapter.safetensors`.

    Raises:
        AdapterIOError: the file can't be read.
        AdapterFileError: it is not a valid adapter file.

    Examples:
        >>> import tempfile, pathlib
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "adapter.safetensors")
        ...     disha.save_adapter(model, path, metadata={"task": "dialogue"})
        ...     found = disha.inspect_adapter(path)
        >>> [(layer.name, layer.r, layer.in_features) for layer in found.layers]
        [('0', 4, 8)]
        >>> found.parameters, dict(found.metadata)
        (64, {'task': 'dialogue'})
    """
    found = read_contents(file_at(path))
    without_values = {key: tensor.to("meta") for key, tensor in found.tensors.items()}
    return replace(found, tensors=without_values)


def write_contents(path: Path, contents: AdapterContents) -> None:
    """Write an adapter to a file, completely or not at all."""
    save_tensors(path, contents.tensors, {HEADER_KEY: header_to_json(contents)})


def read_contents(path: Path, *, also_train: bool = True, layers: str | None = None) -> AdapterFile:
    """Return an adapter of a file, or those of its layers whose names match; tensors are mapped."""
    with torch.device("cpu"), opened(path) as file:  # old releases take the default device
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        contents = parse_header(path, (file.metadata() or {}).get(HEADER_KEY), tensors)
    kept = contents.layers
    if layers is not None:
        pattern = compile_regex("layers", layers)
        kept = tuple(record for record in kept if pattern.search(record.name))
    if not kept:
        names = first_few(contents.names, 10, ", ")
        raise ArgumentError(
            f"layers={layers!r} matches none of the layers in {path}, which are {names}"
        )
    return narrowed(contents, kept, contents.also_train if also_train else ())


def narrowed(
    contents: AnyContents,
    layers: Sequence[LayerRecord],
    also_train: Sequence[str] = (),
) -> AnyContents:
    """Return an adapter with only these layers and these parameters."""
    keys = [*(record.key for record in layers), *also_train]
    return replace(
        contents,
        config=contents.config if also_train else contents.config.changed(also_train=[]),
        layers=tuple(layers),
        also_train=tuple(also_train),
        tensors={key: contents.tensors[key] for key in keys},
    )


def blocks_only(contents: AdapterContents) -> AdapterContents:
    """Return an adapter without the parameters besides its blocks."""
    return narrowed(contents, contents.layers)

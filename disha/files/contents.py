"""Read an adapter from a file or write it to one, without its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from disha.checks import compile_regex
from disha.errors import ArgumentError
from disha.files.disk import PathLike, file_at, open_tensors, save_tensors
from disha.files.header import (
    HEADER_KEY,
    AdapterContents,
    AdapterFile,
    header_to_json,
    parse_header,
)
from disha.files.hub import find_adapter
from disha.model.records import LayerRecord
from disha.text import first_few

AnyContents = TypeVar("AnyContents", bound=AdapterContents)


def inspect_adapter(path: PathLike) -> AdapterFile:
    """Return the header of an adapter file, without reading any tensor.

    Args:
        path: the file, or what else `load_adapter` takes.

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
        ...     file = disha.inspect_adapter(path)
        >>> [(layer.name, layer.r, layer.in_features) for layer in file.layers]
        [('0', 4, 8)]
        >>> file.parameters, dict(file.metadata)
        (64, {'task': 'dialogue'})
    """
    file = read_contents(file_at(find_adapter(path)))
    without_values = {key: tensor.to("meta") for key, tensor in file.tensors.items()}
    return replace(file, tensors=without_values)


def write_contents(path: Path, contents: AdapterContents) -> None:
    """Write an adapter to a file, completely or not at all."""
    save_tensors(path, contents.tensors, {HEADER_KEY: header_to_json(contents)})


def read_contents(path: Path, *, also_train: bool = True, layers: str | None = None) -> AdapterFile:
    """Return the adapter in a file, or only those of its layers whose names match `layers`.

    The tensors are mapped: their values are read when they are used.
    """
    with torch.device("cpu"), open_tensors(path) as file:  # torch 2.8 maps to the default device
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    contents = parse_header(path, metadata.get(HEADER_KEY), tensors)
    kept = contents.layers
    if layers is not None:
        pattern = compile_regex("layers", layers)
        kept = tuple(record for record in kept if pattern.search(record.name))
        if not kept:
            names = first_few(contents.names, 10, ", ")
            raise ArgumentError(
                f"layers={layers!r} matches none of the layers in {path}, which are {names}"
            )
    parameters: Sequence[str] = ()
    if also_train:
        parameters = contents.also_train
    return keep_only(contents, kept, parameters)


def keep_only(
    contents: AnyContents,
    layers: Sequence[LayerRecord],
    also_train: Sequence[str] = (),
) -> AnyContents:
    """Return an adapter with only these layers and these parameters."""
    config = contents.config
    if not also_train:
        config = config.changed(also_train=[])
    keys = [*(record.key for record in layers), *also_train]
    return replace(
        contents,
        config=config,
        layers=tuple(layers),
        also_train=tuple(also_train),
        tensors={key: contents.tensors[key] for key in keys},
    )


def keep_blocks(contents: AdapterContents) -> AdapterContents:
    """Return an adapter with its blocks only, without the parameters of `also_train`."""
    return keep_only(contents, contents.layers)

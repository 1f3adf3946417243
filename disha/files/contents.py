"""Read an adapter from a file or write it to one, without its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from torch import Tensor

from disha.checks import compile_regex
from disha.config import AdapterConfig
from disha.errors import ArgumentError
from disha.files.disk import read_tensors, save_tensors
from disha.files.header import (
    HEADER_KEY,
    AdapterContents,
    AdapterFile,
    header_to_json,
    parse_header,
)
from disha.layers.spec import BlockSpec
from disha.model.state import Tensors
from disha.text import first_few

Source = Path | str  # where an adapter came from, for errors

LayerBlock = tuple[BlockSpec, Tensor]
"""A layer and its block."""

AnyContents = TypeVar("AnyContents", bound=AdapterContents)


def contents_of_blocks(
    config: AdapterConfig,
    blocks: Sequence[LayerBlock],
    parameters: Tensors = MappingProxyType({}),
) -> AdapterContents:
    """Return an adapter without notes that has these layers and parameters."""
    layers = tuple(layer for layer, _ in blocks)
    tensors = {layer.key: block for layer, block in blocks} | dict(parameters)
    return AdapterContents(config, layers, tuple(parameters), tensors, {})


def write_contents(path: Path, contents: AdapterContents) -> None:
    """Write an adapter to a file, completely or not at all."""
    save_tensors(path, contents.tensors, {HEADER_KEY: header_to_json(contents)})


def read_contents(path: Path) -> AdapterFile:
    """Return the adapter in a file.

    The tensors are mapped: their values are read when they are used.
    """
    tensors, metadata = read_tensors(path)
    contents = parse_header(path, metadata.get(HEADER_KEY), tensors)
    # In the order of the header, blocks first, where the file sorts tensors by dtype and name.
    return keep_only(contents, contents.layers, contents.also_train)


def keep_matching(contents: AnyContents, layers: str | None, source: Source) -> AnyContents:
    """Return an adapter with those of its layers whose names match a regex; all without one."""
    if layers is None:
        return contents
    pattern = compile_regex("layers", layers)
    kept = [spec for spec in contents.layers if pattern.search(spec.name)]
    if not kept:
        names = first_few(contents.names, 10, ", ")
        raise ArgumentError(
            f"layers={layers!r} matches none of the layers in {source}, which are {names}"
        )
    return keep_only(contents, kept, contents.also_train)


def keep_only(
    contents: AnyContents,
    layers: Sequence[BlockSpec],
    also_train: Sequence[str] = (),
) -> AnyContents:
    """Return an adapter with only these layers and these parameters."""
    config = contents.config
    if not also_train:
        config = config.changed(also_train=[])
    keys = [*(spec.key for spec in layers), *also_train]
    return replace(
        contents,
        config=config,
        layers=tuple(layers),
        also_train=tuple(also_train),
        tensors={key: contents.tensors[key] for key in keys},
    )


def keep_blocks(contents: AnyContents) -> AnyContents:
    """Return an adapter with its blocks only, without the parameters of `also_train`."""
    return keep_only(contents, contents.layers)

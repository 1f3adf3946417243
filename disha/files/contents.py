"""An adapter outside a model: a header and the tensors that it names.

This module takes an adapter from a model or a file, and puts it into either. `interop` converts it
to and from the files of other libraries.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from disha import running_statistics
from disha.config import check_dtype, compile_regex
from disha.errors import (
    AdapterFileError,
    AdapterFileWarning,
    AdapterStateError,
    ArgumentError,
    ArgumentTypeError,
)
from disha.files.header import HEADER_KEY, AdapterFile, AdapterHeader, described, encoded
from disha.files.opening import opened
from disha.files.saving import save_tensors
from disha.fingerprint import fingerprint, same_base
from disha.functional import METHODS
from disha.inject import apply_plan
from disha.layers.adapters import check_adapter_name
from disha.layers.opaque import quantisation_of
from disha.layers.weights import base_of, geometry_of, stored_weight
from disha.model import ModelBlock, ModelView, all_or_nothing, join
from disha.plan import Plan, plan_weights
from disha.records import LayerRecord, records_of
from disha.sharding import gathered, write
from disha.state import LoadReport, adapter_tensors, check_fit, finite_as
from disha.text import counted, first_few, printable

__all__ = [
    "Contents",
    "Source",
    "adapter_contents",
    "blocks_only",
    "load_contents",
    "narrowed",
    "read_contents",
    "write_contents",
]


Source = Path | str
"""Where an adapter came from, for errors."""

Contents = tuple[AdapterHeader, dict[str, Tensor]]
"""An adapter outside a model: its header, and its tensors by key."""

Header = TypeVar("Header", bound=AdapterHeader)


# --- out of a model ------------------------------------------------------------------------------


def adapter_contents(
    view: ModelView,
    adapter: str = "default",
    metadata: Mapping[str, str] | None = None,
    *,
    base: bool = True,
) -> Contents:
    """Return the header of an adapter of a model, and its tensors on the CPU.

    If the model is sharded, all ranks must call this, and each gets the complete adapter. Without
    `base`, the fingerprints of the base weights are left out.
    """
    ranks, action = view.ranks(), f"take adapter {adapter!r} out of the model"
    with ranks.agreeing(action):
        notes = dict(metadata or {})
        if not all(isinstance(text, str) for note in notes.items() for text in note):
            raise ArgumentTypeError(f"metadata must be a dict of str -> str, got {metadata!r}")
        held = adapter_tensors(view, adapter)
        meta = next((key for key, tensor in held.items() if tensor.is_meta), None)
        if meta is not None:
            raise AdapterStateError(
                f"adapter {adapter!r} is on the meta device ({meta}); give the model values first"
            )
    tensors = {key: gathered(tensor.detach()).cpu().contiguous() for key, tensor in held.items()}
    blocks = view.require(adapter)
    layers = tuple(_record(one, base=base) for one in blocks)
    with ranks.agreeing(action):
        _check_can_be_loaded(adapter, layers, tensors)
    keys = {layer.key for layer in layers}
    header = AdapterHeader(
        config=blocks[0].block.config,
        layers=layers,
        also_train=tuple(sorted(tensors.keys() - keys)),
        tensors=records_of(tensors),
        metadata=notes,
    )
    return header, tensors


def _record(one: ModelBlock, *, base: bool) -> LayerRecord:
    block, geometry = one.block, geometry_of(one.layer, one.block.slot)
    return LayerRecord(
        name=one.name,
        method=block.method.name,
        r=block.r,
        r_out=block.r_out,
        in_features=geometry.in_features,
        out_features=geometry.out_features,
        scale=block.scale,
        base=_base_fingerprint(one) if base else None,
        layout=block.slot.layout,
        rows=block.slot.rows,
    )


def _base_fingerprint(one: ModelBlock) -> str | None:
    """Return the fingerprint of an adapted weight's original, or None if it is quantised.

    The values of a quantised weight depend on the way of quantising and on some kernels, but an
    adapter that was trained on one of them fits the others.
    """
    slot = one.block.slot
    if quantisation_of(one.layer, stored_weight(one.layer, slot.parameter)) is not None:
        return None
    return fingerprint(slot.layout.part(base_of(one.layer, slot), slot.rows))


def _check_can_be_loaded(
    adapter: str, layers: Sequence[LayerRecord], tensors: Mapping[str, Tensor]
) -> None:
    methods = {(layer.method, layer.r_out) for layer in layers}
    if len(methods) > 1:
        raise AdapterStateError(
            f"adapter {adapter!r} has blocks of different methods or r_out, and a file holds one; "
            "give each method its own adapter"
        )
    broken = [key for key, tensor in tensors.items() if not finite_as(tensor, tensor.dtype)]
    if broken:
        raise AdapterStateError(
            f"adapter {adapter!r} holds values that are not finite (NaN or infinity) in "
            f"{first_few(broken, 5, ', ')}; go back to an earlier checkpoint"
        )


# --- to and from a file --------------------------------------------------------------------------


def write_contents(path: Path, header: AdapterHeader, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter to a file, completely or not at all."""
    save_tensors(path, tensors, {HEADER_KEY: encoded(header)})


def read_contents(
    path: Path, *, also_train: bool = True, layers: str | None = None
) -> tuple[AdapterFile, dict[str, Tensor]]:
    """Return the header and the tensors of a file, which are mapped and read when used.

    Without `also_train`, only the blocks are returned; with `layers`, those of the layers in whose
    names that regex is found.
    """
    with opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = described(path, (file.metadata() or {}).get(HEADER_KEY), tensors)
    kept = header.layers if layers is None else _chosen(header, layers)
    header = narrowed(header, kept, header.also_train if also_train else ())
    return header, {key: tensors[key] for key in header.tensors}


def _chosen(header: AdapterFile, layers: str) -> Sequence[LayerRecord]:
    pattern = compile_regex("layers", layers)
    kept = [layer for layer in header.layers if pattern.search(layer.name)]
    if not kept:
        names = first_few([layer.name for layer in header.layers], 10, ", ")
        raise ArgumentError(
            f"layers={layers!r} matches none of the layers in {header.path}, which are {names}"
        )
    return kept


def narrowed(header: Header, layers: Sequence[LayerRecord], also_train: Sequence[str]) -> Header:
    """Return a header of a part of an adapter."""
    keys = (*(layer.key for layer in layers), *also_train)
    forgets = header.config.also_train and not also_train
    return changed(
        header,
        config=header.config.changed(also_train=[]) if forgets else header.config,
        layers=tuple(layers),
        also_train=tuple(also_train),
        tensors={key: header.tensors[key] for key in keys},
    )


def blocks_only(header: AdapterHeader, tensors: Mapping[str, Tensor]) -> Contents:
    """Return an adapter without the parameters besides its blocks."""
    without = narrowed(header, header.layers, ())
    return without, {key: tensors[key] for key in without.tensors}


# --- into a model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Incoming:
    """An adapter on its way into a model, under a name.

    `keys` maps each of its keys to that of the same tensor in the model, where a module or a
    parameter can have several names.
    """

    view: ModelView
    adapter: str
    source: Source
    header: AdapterHeader
    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str]

    @property
    def values(self) -> dict[str, Tensor]:
        """The tensors under the keys of the model."""
        return {self.keys[key]: tensor for key, tensor in self.tensors.items()}

    def layers(self) -> Iterator[tuple[ModelBlock, LayerRecord]]:
        """Iterate over the model's blocks for which the adapter has one."""
        records = {self.keys[layer.key]: layer for layer in self.header.layers}
        for one in self.view.require(self.adapter):
            key = join(one.name, one.block.parameter_name)
            if key in records:
                yield one, records[key]


def load_contents(
    view: ModelView,
    source: Source,
    header: AdapterHeader,
    tensors: Mapping[str, Tensor],
    adapter: str = "default",
    *,
    replace: bool = False,
    partial: bool = False,
    dtype: torch.dtype | None = None,
    freeze: bool = True,
    activate: bool = True,
) -> LoadReport:
    """Put an adapter into a model; `load_adapter` documents the arguments and the errors.

    With `partial`, a layer that the header does not name stays as it is.
    """
    with all_or_nothing(view) as undo:
        with view.ranks().agreeing(f"load a file as adapter {adapter!r}"):
            check_adapter_name(adapter)
            check_dtype(dtype)
            view.refuse_inside("load an adapter")
            taken = adapter in view.adapters
            if taken and not replace:
                raise ArgumentError(
                    f"the model has an adapter {adapter!r} already; load under another name "
                    "(adapter=), or pass replace=True"
                )
            if taken and dtype is not None:
                raise ArgumentError(
                    "replace=True keeps the blocks with their dtype; leave dtype out"
                )
            keys = _model_keys(view, source, header)
            incoming = _Incoming(view, adapter, source, header, tensors, keys)
            if taken:
                adapter_tensors(view, adapter)  # raises if the blocks have no values here
                incoming = _as_wide_as_the_model(incoming)
            else:
                apply_plan(view, _planned(incoming, dtype, freeze), undo, activate=activate)
            targets = running_statistics.statistics(view) | adapter_tensors(view, adapter)
            _check_fits(incoming, targets)
        new_blocks = set() if taken else {keys[layer.key] for layer in header.layers}
        for key, value in incoming.values.items():
            # There are no values to put back into a new block.
            write(targets[key], value, None if key in new_blocks else undo)
        if taken and not partial:
            _forget_the_rest(incoming, undo)
        for (*_, block), layer in incoming.layers():
            mine = {"r": block.config.r, "rank_pattern": block.config.rank_pattern}
            undo.callback(block.set_scale, block.scale)
            undo.callback(block.reconfigure, block.config)
            block.reconfigure(header.config.changed(**mine) if taken else header.config)
            block.set_scale(layer.scale)
        _warn_of_other_base(incoming)
    return LoadReport(matched=tuple(incoming.values))  # if a key did not fit, this has raised


def _model_keys(view: ModelView, source: Source, header: AdapterHeader) -> dict[str, str]:
    first = {name: aliases[0] for aliases in view.names.values() for name in aliases}
    parameters = view.parameters_by_name
    keys = {}
    for key in header.also_train:
        module, _, attribute = key.rpartition(".")
        own = join(first.get(module, module), attribute)
        keys[key] = parameters[key].name if key in parameters else own
    for layer in header.layers:
        module, _, below = layer.name.rpartition(".")
        own = first.get(layer.name) or join(first.get(module, module), below)
        keys[layer.key] = own + layer.key[len(layer.name) :]
    given: dict[str, str] = {}
    for key, own in keys.items():
        if given.setdefault(own, key) != key:
            raise AdapterFileError(
                f"{source}: {given[own]} and {key} are one parameter in the model; nothing was "
                "loaded. Leave out one of them"
            )
    return keys


def _planned(incoming: _Incoming, dtype: torch.dtype | None, freeze: bool) -> Plan:
    view, header = incoming.view, incoming.header
    statistics = running_statistics.statistics(view)
    beside = [key for key in header.also_train if incoming.keys[key] not in statistics]
    contents = (header.config, header.layers, header.tensors, beside)
    try:
        return plan_weights(view, incoming.adapter, *contents, dtype=dtype, freeze=freeze)
    except ArgumentError as error:
        raise AdapterFileError(f"{incoming.source}: {error}") from error


def _as_wide_as_the_model(incoming: _Incoming) -> _Incoming:
    """Return an adapter with the shard sizes of the model's adapter, where that is exact."""
    layers = {layer.key: layer for layer in incoming.header.layers}
    tensors = dict(incoming.tensors)
    for (*_, block), layer in incoming.layers():
        method = METHODS[layer.method]
        wider = method.wider_block(layer.layout, tensors[layer.key], layer.r, block.r)
        if wider is not None:
            layers[layer.key], tensors[layer.key] = changed(layer, r=block.r), wider
    header = changed(incoming.header, layers=tuple(layers.values()))
    return changed(incoming, header=header, tensors=tensors)


def _check_fits(incoming: _Incoming, targets: Mapping[str, Tensor]) -> None:
    """Raise unless the model has all keys, with these sizes, and can hold the values."""
    values = incoming.values
    report = check_fit({key: target for key, target in targets.items() if key in values}, values)
    problems = [] if report.complete else [str(report)]
    for one, theirs in incoming.layers():
        mine = _record(one, base=False)
        problems += [
            f"{one.name}: {field} is {getattr(theirs, field)} in the file and "
            f"{getattr(mine, field)} in the model"
            for field in ("method", "r", "r_out", "in_features", "out_features", "layout", "rows")
            if getattr(theirs, field) != getattr(mine, field)
        ]
    if problems:
        raise AdapterFileError(
            f"{incoming.source} does not fit the model's adapter {incoming.adapter!r}; nothing was "
            f"loaded:\n{first_few(problems, 20)}"
        )


def _forget_the_rest(incoming: _Incoming, undo: ExitStack) -> None:
    """Give the base's values to the statistics and layers that the adapter lacks."""
    running_statistics.put_back(incoming.view, undo, incoming.values)
    loaded = {one.block for one, _ in incoming.layers()}
    for *_, block in incoming.view.require(incoming.adapter):
        if block not in loaded:
            write(block.block, torch.zeros_like(block.block), undo)


def _warn_of_other_base(incoming: _Incoming) -> None:
    found = [
        (one.name, layer.base, _base_fingerprint(one))
        for one, layer in incoming.layers()
        if layer.base is not None
    ]
    known = [(name, theirs, ours) for name, theirs, ours in found if ours is not None]
    other = [name for name, theirs, ours in known if not same_base(theirs, ours)]
    if other:
        layers = printable(first_few(other, 3, ", "))
        warnings.warn(
            f"{printable(str(incoming.source))} was saved from other base weights than the model's "
            f"in {len(other)} of {counted(len(known), 'layer')} ({layers}): load the base that it "
            "was trained on, without the adapter merged into it",
            AdapterFileWarning,
            stacklevel=4,
        )

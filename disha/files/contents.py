"""An adapter outside a model: a header and the tensors that it names.

This module takes an adapter from a model or a file, and puts it into either. `interop` converts it
to and from the files of other libraries.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from disha import functional, running_statistics
from disha.config import check_dtype, compile_regex
from disha.errors import (
    AdapterFileError,
    AdapterFileWarning,
    AdapterStateError,
    ArgumentError,
    ArgumentTypeError,
)
from disha.files.atomic import write_files
from disha.files.checksum import CHECKSUM_KEY, HEADER_KEY, check_values, checksum
from disha.files.header import (
    AdapterFile,
    AdapterHeader,
    block_misfits,
    described_by,
    encoded,
)
from disha.files.pieces import tensor_writer
from disha.files.tensors import TensorFile, opened
from disha.fingerprint import fingerprint, same_base
from disha.inject import apply_plan
from disha.layers import (
    base_of,
    check_adapter_name,
    geometry_of,
    quantisation_of,
    stored_weight,
)
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
    "records_of",
    "unread_contents",
    "write_contents",
]


Source = Path | str
"""Where an adapter came from, for errors."""

Contents = tuple[AdapterHeader, dict[str, Tensor]]
"""An adapter outside a model: its header, and its tensors by key."""

Header = TypeVar("Header", bound=AdapterHeader)


# --- out of a model ------------------------------------------------------------------------------


def adapter_contents(
    view: ModelView, adapter: str = "default", metadata: Mapping[str, str] | None = None
) -> Contents:
    """Return the header of an adapter of a model, and copies of its tensors on the CPU.

    If the model is sharded, all ranks must call this, and each gets the complete adapter.

    Args:
        view: a model with adapters.
        adapter: the adapter's name.
        metadata: notes of the user, str -> str.

    Raises:
        AdapterStateError: the adapter holds values that are not finite, or has no values (on the
            meta device), or its blocks differ in method or r_out.
        ArgumentError: there is no such adapter.
        ArgumentTypeError: the metadata is not str -> str.
    """
    ranks, action = view.ranks(), f"take adapter {adapter!r} out of the model"
    with ranks.agreeing(action):
        notes = _checked_metadata(metadata)
        parameters = adapter_tensors(view, adapter)
        _check_has_values(adapter, parameters)
    tensors = {
        key: gathered(parameter.detach()).to("cpu", copy=True).contiguous()
        for key, parameter in parameters.items()
    }
    blocks = view.require(adapter)
    layers = tuple(_record(one) for one in blocks)
    with ranks.agreeing(action):
        _check_one_method(adapter, layers)
        _check_still_finite(adapter, tensors)
    keys = {layer.key for layer in layers}
    header = AdapterHeader(
        config=blocks[0].block.config.changed(scale=layers[0].scale),
        layers=layers,
        also_train=tuple(sorted(key for key in tensors if key not in keys)),
        tensors=records_of(tensors),
        metadata=notes,
    )
    return header, tensors


def _record(one: ModelBlock, *, with_base: bool = True) -> LayerRecord:
    block, geometry = one.block, geometry_of(one.layer, one.block.slot)
    return LayerRecord(
        name=one.name,
        method=block.method.name,
        r=block.r,
        r_out=block.r_out,
        in_features=geometry.in_features,
        out_features=geometry.out_features,
        scale=block.scale,
        base=_base_fingerprint(one) if with_base else None,
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


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in metadata.items()
    ):
        raise ArgumentTypeError(f"metadata must be a dict of str -> str, got {metadata!r}")
    return dict(metadata)


def _check_has_values(adapter: str, parameters: Mapping[str, Tensor]) -> None:
    meta = [key for key, parameter in parameters.items() if parameter.is_meta]
    if meta:
        raise AdapterStateError(
            f"adapter {adapter!r} is on the meta device ({meta[0]}) and has no values; give the "
            "model values first (to_empty, load_state_dict)"
        )


def _check_one_method(adapter: str, layers: Iterable[LayerRecord]) -> None:
    methods = {(layer.method, layer.r_out) for layer in layers}
    if len(methods) > 1:
        raise AdapterStateError(
            f"adapter {adapter!r} has blocks of different methods, {sorted(methods, key=str)} as "
            "(method, r_out), and a file holds one method; give each method its own adapter"
        )


def _check_still_finite(adapter: str, tensors: Mapping[str, Tensor]) -> None:
    broken = [key for key, tensor in tensors.items() if not finite_as(tensor, tensor.dtype)]
    if broken:
        raise AdapterStateError(
            f"adapter {adapter!r} holds values that are not finite (NaN or infinity) in "
            f"{first_few(broken, 5, ', ')}, so it could not be loaded again; nothing was written. "
            "Go back to an earlier checkpoint of the training"
        )


# --- to and from a file --------------------------------------------------------------------------


def write_contents(path: Path, header: AdapterHeader, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter to a file, completely or not at all.

    Raises:
        AdapterIOError: it can't be written; an existing file is unchanged.
        ArgumentError: a name or a note is not Unicode text, or names and notes are too large for a
            safetensors file.
    """
    text = encoded(header)
    metadata = {HEADER_KEY: text, CHECKSUM_KEY: checksum(text, tensors)}
    write_files({path: tensor_writer(tensors, metadata)})


def read_contents(
    path: Path, *, also_train: bool = True, layers: str | None = None
) -> tuple[AdapterFile, dict[str, Tensor]]:
    """Return the header and the tensors of a file.

    Args:
        path: the file.
        also_train: also return the parameters that the file holds besides the blocks.
        layers: a regex, searched in the names of the layers; only matching layers are returned.

    Raises:
        AdapterIOError: the file can't be read.
        AdapterFileError: it is not a valid adapter file.
        ArgumentError: `layers` is not a valid regex, or is found in no layer's name.
    """
    with opened(path) as file:
        described, tensors = unread_contents(file, also_train=also_train, layers=layers)
        return described, dict(tensors)


def unread_contents(
    file: TensorFile, *, also_train: bool = True, layers: str | None = None
) -> tuple[AdapterFile, Mapping[str, Tensor]]:
    """Return the header of an open file, and its tensors, as `read_contents` does.

    The tensors are read when the first of them is used, so a file that does not fit a model is
    refused before any memory is taken for it. Until then the file must stay open.

    Args:
        file: the open file.
        also_train: also return the parameters that the file holds besides the blocks.
        layers: a regex, searched in the names of the layers; only matching layers are returned.
    """
    described = described_by(file)
    kept = described.layers if layers is None else _chosen(described, layers)
    described = narrowed(described, kept, described.also_train if also_train else ())
    return described, _Unread(file, tuple(described.tensors))


class _Unread(Mapping[str, Tensor]):
    """Tensors of an open file. All are read when the first is used."""

    def __init__(self, file: TensorFile, keys: tuple[str, ...]) -> None:
        self._file, self._keys = file, keys

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        tensors = {key: self._file.read(key) for key in self._keys}
        check_values(self._file, tensors)
        return tensors


def _chosen(described: AdapterFile, layers: str) -> Sequence[LayerRecord]:
    pattern = compile_regex("layers", layers)
    kept = [layer for layer in described.layers if pattern.search(layer.name)]
    if not kept:
        names = first_few([layer.name for layer in described.layers], 10, ", ")
        raise ArgumentError(
            f"layers={layers!r} matches none of the layers in {described.path}, which are {names}"
        )
    return kept


def narrowed(header: Header, layers: Sequence[LayerRecord], also_train: Sequence[str]) -> Header:
    """Return a header of a part of an adapter.

    Args:
        header: the adapter's header.
        layers: the layers of the part.
        also_train: the parameters besides its blocks.
    """
    keys = (*(layer.key for layer in layers), *also_train)
    return dataclasses.replace(
        header,
        config=header.config if also_train else header.config.changed(also_train=[]),
        layers=tuple(layers),
        also_train=tuple(also_train),
        tensors={key: header.tensors[key] for key in keys},
    )


def blocks_only(header: AdapterHeader, tensors: Mapping[str, Tensor]) -> Contents:
    """Return an adapter without the parameters besides its blocks.

    Args:
        header: the adapter's header.
        tensors: its tensors.
    """
    without = narrowed(header, header.layers, ())
    return without, {key: tensors[key] for key in without.tensors}


# --- into a model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Incoming:
    """An adapter to be loaded into a model.

    `keys` maps each of its keys to the key of the same parameter in the model. The two differ if a
    module or a parameter has several names, and adapter and model use different ones.
    """

    source: Source
    header: AdapterHeader
    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str]

    def loaded_into(
        self, view: ModelView, adapter: str
    ) -> Iterator[tuple[ModelBlock, LayerRecord]]:
        """Iterate over the model's blocks for which the adapter has one."""
        layers = {self.keys[layer.key]: layer for layer in self.header.layers}
        for one in view.require(adapter):
            layer = layers.get(join(one.name, one.block.parameter_name))
            if layer is not None:
                yield one, layer


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

    Args:
        view: the model.
        source: where the adapter came from, for errors.
        header: the adapter's header.
        tensors: all tensors that the header names.
        adapter: the name that it gets in this model.
        replace: copy into the adapter of that name, if there is one.
        partial: with `replace`, leave layers unchanged that the header does not name.
        dtype: dtype of the blocks; that of the tensors by default.
        freeze: freeze all parameters that belong to no adapter.
        activate: make the new adapter the only active one.
    """
    with all_or_nothing(view) as undo:
        with view.ranks().agreeing(f"load a file as adapter {adapter!r}"):
            check_adapter_name(adapter)
            check_dtype(dtype)
            view.refuse_inside("load an adapter")
            incoming = _Incoming(source, header, tensors, _model_keys(view, header))
            _check_consistent(incoming)
            taken = adapter in view.adapters
            _check_taken(adapter, taken, replace, dtype)
            if taken:
                adapter_tensors(view, adapter)  # raises if the blocks have no values here
                incoming = _as_wide_as(view, incoming, adapter)
                values = _fitting(view, incoming, adapter)
            else:
                plan, values = _planned(view, incoming, adapter, dtype, freeze)
                apply_plan(view, plan, undo, activate=activate)
            targets = running_statistics.statistics(view) | adapter_tensors(view, adapter)
        blocks = {incoming.keys[layer.key] for layer in header.layers}
        for key, value in values.items():
            is_new = not taken and key in blocks
            write(targets[key], value, None if is_new else undo)
        if taken and not partial:
            running_statistics.put_back(view, undo, values)
            for one in view.require(adapter):
                if join(one.name, one.block.parameter_name) not in values:
                    write(one.block.block, torch.zeros_like(one.block.block), undo)
        for (*_, block), layer in incoming.loaded_into(view, adapter):
            undo.callback(block.set_scale, block.scale)
            undo.callback(block.reconfigure, block.config)
            block.reconfigure(incoming.header.config)
            block.set_scale(layer.scale)
        _warn_of_other_base(view, incoming, adapter)
    return LoadReport(matched=tuple(values))  # if a key did not fit, this has raised


def _check_consistent(incoming: _Incoming) -> None:
    """Raise if a block has a wrong shape, or two tensors belong to one parameter of the model."""
    problems = block_misfits(incoming.header)
    first: dict[str, str] = {}
    for key, own in incoming.keys.items():
        if first.setdefault(own, key) != key:
            problems.append(f"{first[own]} and {key} are one parameter in the model")
    if problems:
        raise AdapterFileError(f"{incoming.source}: nothing was loaded:\n{first_few(problems, 20)}")


def _check_taken(adapter: str, taken: bool, replace: bool, dtype: torch.dtype | None) -> None:
    if taken and not replace:
        raise ArgumentError(
            f"the model has an adapter {adapter!r} already; load under another name (adapter=), or "
            "pass replace=True to copy the file's values into it"
        )
    if taken and dtype is not None:
        raise ArgumentError(
            f"dtype={dtype} was given with replace=True, which keeps the blocks that are there; "
            "leave dtype out, or remove the adapter first"
        )


def _model_keys(view: ModelView, header: AdapterHeader) -> dict[str, str]:
    first = {name: aliases[0] for aliases in view.names.values() for name in aliases}
    parameters = view.parameters_by_name
    keys = {key: parameters[key].name if key in parameters else key for key in header.also_train}
    for key in header.also_train:
        if key not in parameters:  # a running statistic
            module, _, own = key.rpartition(".")
            keys[key] = join(first.get(module, module), own)
    for layer in header.layers:
        module, _, below = layer.name.rpartition(".")
        own = first.get(layer.name) or join(first.get(module, module), below)
        keys[layer.key] = own + layer.key[len(layer.name) :]
    return keys


def _planned(
    view: ModelView, incoming: _Incoming, adapter: str, dtype: torch.dtype | None, freeze: bool
) -> tuple[Plan, dict[str, Tensor]]:
    """Return the plan to inject the adapter, and its values by the model's keys."""
    header = incoming.header
    statistics = running_statistics.statistics(view)
    beside = [key for key in header.also_train if incoming.keys[key] not in statistics]
    try:
        plan = plan_weights(
            view,
            adapter,
            header.config,
            header.layers,
            header.tensors,
            beside,
            dtype=dtype,
            freeze=freeze,
        )
    except ArgumentError as error:
        raise AdapterFileError(f"{incoming.source}: {error}") from error
    values = {incoming.keys[key]: tensor for key, tensor in incoming.tensors.items()}
    given = {key: value for key, value in values.items() if key in statistics}
    report = check_fit({key: statistics[key] for key in given}, given)
    if not report.complete:
        raise AdapterFileError(f"{incoming.source} does not fit the model:\n{report}")
    _check_finite(view, incoming, values, dtype)
    return plan, values


def _as_wide_as(view: ModelView, incoming: _Incoming, adapter: str) -> _Incoming:
    """Return an adapter with the shard sizes of the model's adapter, where that is exact.

    A layer with another r that fits otherwise is widened, if the model's r is a multiple of its r.
    """
    header, held = incoming.header, None
    records, layers = dict(header.tensors), {layer.key: layer for layer in header.layers}
    blocks: dict[str, Tensor] = {}
    for one, layer in incoming.loaded_into(view, adapter):
        mine = _record(one, with_base=False)
        wider = dataclasses.replace(layer, r=mine.r)
        if layer.r == mine.r or _differences(one.name, wider, mine):
            continue
        narrow = incoming.tensors[layer.key]
        method = functional.method_of(layer.method)
        widened = method.wider_block(layer.layout, narrow, layer.r, mine.r)
        if widened is not None:
            layers[layer.key], blocks[layer.key], held = wider, widened, one.block.config
            records[layer.key] = dataclasses.replace(records[layer.key], shape=tuple(widened.shape))
    if held is None:
        return incoming
    config = header.config.changed(r=held.r, rank_pattern=held.rank_pattern)
    header = dataclasses.replace(
        header, config=config, layers=tuple(layers.values()), tensors=records
    )
    # The other tensors may be unread, and stay so until all shapes are known to fit.
    tensors = ChainMap(blocks, incoming.tensors)  # type: ignore[arg-type]
    return dataclasses.replace(incoming, header=header, tensors=tensors)


def _fitting(view: ModelView, incoming: _Incoming, adapter: str) -> dict[str, Tensor]:
    """Return the values that fit the model's adapter of that name, by the model's keys."""
    mine = running_statistics.statistics(view) | adapter_tensors(view, adapter)
    found = {incoming.keys[key]: key for key in incoming.tensors}
    targets = {key: parameter for key, parameter in mine.items() if key in found}
    kept = {key: own for key, own in found.items() if key in targets}
    records = incoming.header.tensors
    if all(records[own].shape == targets[key].shape for key, own in kept.items()):
        values = {key: incoming.tensors[own] for key, own in kept.items()}
    else:  # the report says which shapes differ; the values are not read
        zero = torch.zeros((), device="cpu")
        values = {key: zero.expand(records[own].shape) for key, own in kept.items()}
    report = check_fit(targets, {**dict.fromkeys(found), **values})
    problems = [] if report.complete else [str(report)]
    for one, layer in incoming.loaded_into(view, adapter):
        problems += _differences(one.name, layer, _record(one, with_base=False))
    if problems:
        raise AdapterFileError(
            f"{incoming.source} can't replace the model's adapter {adapter!r}, which it does not "
            f"fit; nothing was loaded:\n{first_few(problems, 20)}"
        )
    return values


def _differences(name: str, theirs: LayerRecord, mine: LayerRecord) -> list[str]:
    return [
        f"{name}: {field} is {getattr(theirs, field)} in the file and {getattr(mine, field)} in "
        "the model"
        for field in ("method", "r", "r_out", "in_features", "out_features", "layout", "rows")
        if getattr(theirs, field) != getattr(mine, field)
    ]


def _check_finite(
    view: ModelView, incoming: _Incoming, values: Mapping[str, Tensor], dtype: torch.dtype | None
) -> None:
    """Raise if a value is not finite in the dtype of the parameter that gets it."""
    broken = []
    for key, own in incoming.keys.items():
        target = dtype or values[own].dtype
        if own in view.parameters_by_name:
            target = view.parameters_by_name[own].value.dtype
        if not finite_as(values[own], target):
            broken.append(f"{key} (as {target})")
    if broken:
        raise AdapterFileError(
            f"{incoming.source} holds values that are not finite (NaN or infinity) in "
            f"{first_few(broken, 10, ', ')}; nothing was loaded. Get another version of the file, "
            "or load it in a wider dtype"
        )


def _warn_of_other_base(view: ModelView, incoming: _Incoming, adapter: str) -> None:
    other, known = [], 0
    for one, layer in incoming.loaded_into(view, adapter):
        now = None if layer.base is None else _base_fingerprint(one)
        if now is not None and layer.base is not None:
            known += 1
            if not same_base(now, layer.base):
                other.append(one.name)
    if other:
        layers = printable(first_few(other, 3, ", "))
        warnings.warn(
            f"{printable(str(incoming.source))} was saved from other base weights than the model's "
            f"in {len(other)} of {counted(known, 'layer')} ({layers}): load the base that it was "
            "trained on, or check that the adapter is not merged into this one already",
            AdapterFileWarning,
            stacklevel=4,
        )

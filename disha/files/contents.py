"""An adapter away from its model: a header and the tensors that it names.

It comes out of a model or a file, and goes into either; `interop` makes it of other libraries'
files, and those of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disha.config import check_adapter_name, check_dtype, compile_regex
from disha.errors import (
    AdapterFileError,
    AdapterStateError,
    ArgumentError,
    ArgumentTypeError,
)
from disha.files.atomic import write_files
from disha.files.header import (
    HEADER_KEY,
    AdapterFile,
    AdapterHeader,
    LayerRecord,
    contradictions,
    described_by,
    encoded,
)
from disha.files.pieces import tensor_writer
from disha.files.tensors import TensorFile, TensorRecord, opened
from disha.fingerprint import fingerprint, same_base
from disha.inject import apply_plan
from disha.layers import AdaptedWeight
from disha.model import ModelView, join
from disha.plan import WeightRequest, plan_weights
from disha.sharding import whole
from disha.state import LoadReport, adapter_tensors, check_fit, copy_values, finite_as
from disha.text import printable

__all__ = [
    "AdapterFileWarning",
    "Contents",
    "Source",
    "adapter_contents",
    "blocks_only",
    "load_contents",
    "opened_contents",
    "read_contents",
    "write_contents",
]


Source = Path | str
"""Where an adapter came from, as errors name it."""

Contents = tuple[AdapterHeader, dict[str, Tensor]]
"""An adapter away from its model: what describes it, and its tensors by key."""


class AdapterFileWarning(UserWarning):
    """An adapter was loaded, but onto another base than it was saved from.

    Examples:
        >>> import pathlib, tempfile, warnings
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 4)), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as w:
        ...     warnings.simplefilter("always")
        ...     disha.save_adapter(model, pathlib.Path(folder, "adapter.safetensors"))
        ...     base = nn.Sequential(nn.Linear(8, 4))  # other random weights
        ...     _ = disha.load_adapter(base, pathlib.Path(folder, "adapter.safetensors"))
        >>> [warning.category.__name__ for warning in w]
        ['AdapterFileWarning']
    """


# --- out of a model ------------------------------------------------------------------------------


def adapter_contents(
    view: ModelView, adapter: str = "default", metadata: Mapping[str, str] | None = None
) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Return what describes an adapter of a model, and copies of its tensors on the CPU.

    Collective if the model is sharded: all ranks take part, and get the whole adapter.

    Args:
        view: a model with adapters.
        adapter: the adapter's name.
        metadata: notes of the user's, str -> str.

    Raises:
        AdapterStateError: the adapter holds values that are not finite, or none (on the meta
            device), or its layers have blocks of different kinds.
        ArgumentError: there is no such adapter.
        ArgumentTypeError: the metadata is not str -> str.
    """
    ranks, action = view.ranks(), f"take adapter {adapter!r} out of the model"
    with ranks.agreeing(action):
        notes = _checked_metadata(metadata)
        parameters = adapter_tensors(view, adapter)
        _check_has_values(adapter, parameters)
    tensors = {
        key: whole(parameter.detach()).to("cpu", copy=True).contiguous()
        for key, parameter in parameters.items()
    }
    records = tuple(
        _record(name, adapter, weight, _base_fingerprint(weight))
        for name, weight in view.require(adapter)
    )
    with ranks.agreeing(action):
        _check_one_kind(adapter, records)
        _check_still_finite(adapter, tensors)
    _, weight = view.require(adapter)[0]
    keys = {record.key for record in records}
    header = AdapterHeader(
        config=weight.blocks[adapter].config.changed(scale=records[0].scale),
        layers=records,
        also_train=tuple(sorted(key for key in tensors if key not in keys)),
        tensors={key: TensorRecord(tuple(t.shape), t.dtype) for key, t in tensors.items()},
        metadata=notes,
    )
    return header, tensors


def _record(name: str, adapter: str, weight: AdaptedWeight, base: str | None) -> LayerRecord:
    block = weight.blocks[adapter]
    geometry = weight.geometry
    return LayerRecord(
        name=name,
        method=block.method,
        r=block.r,
        r_out=block.r_out,
        in_features=geometry.in_features,
        out_features=geometry.out_features,
        scale=block.strength,
        base=base,
        layout=block.slot.layout,
        rows=block.slot.rows,
    )


def _base_fingerprint(weight: AdaptedWeight) -> str | None:
    """Return the fingerprint of an adapted weight's original; a quantised one has none.

    Quantising changes the values, and so do a second way of quantising and some kernels, while an
    adapter that was trained on one fits the others.
    """
    return fingerprint(weight.base_rows) if weight.quantisation is None else None


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in metadata.items()
    ):
        raise ArgumentTypeError(f"metadata must be a dict of str -> str, got {metadata!r}")
    return dict(metadata)


def _check_has_values(adapter: str, parameters: Mapping[str, nn.Parameter]) -> None:
    meta = [key for key, parameter in parameters.items() if parameter.is_meta]
    if meta:
        raise AdapterStateError(
            f"adapter {adapter!r} is on the meta device ({meta[0]}), where it has no values to save"
        )


def _check_one_kind(adapter: str, records: Iterable[LayerRecord]) -> None:
    kinds = {(record.method, record.r_out) for record in records}
    if len(kinds) > 1:
        raise AdapterStateError(
            f"adapter {adapter!r} has blocks of different kinds, {sorted(kinds, key=str)} as "
            "(method, r_out), and a file holds one kind; give each an adapter name of its own"
        )


def _check_still_finite(adapter: str, tensors: Mapping[str, Tensor]) -> None:
    broken = [key for key, tensor in tensors.items() if not finite_as(tensor, tensor.dtype)]
    if broken:
        raise AdapterStateError(
            f"adapter {adapter!r} holds values that are not finite (NaN or infinity) in "
            f"{', '.join(broken[:5])}{', ...' if len(broken) > 5 else ''}, and could not be loaded "
            "again; nothing was written. Go back to an earlier state of the training"
        )


# --- into a file and out of it -------------------------------------------------------------------


def write_contents(path: Path, header: AdapterHeader, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter to a file, whole or not at all.

    Raises:
        AdapterIOError: it can't be written; what was there is still there.
        ArgumentError: a name or a note is no Unicode text, or the header is larger than a
            safetensors file can hold.
    """
    write_files({path: tensor_writer(tensors, {HEADER_KEY: encoded(header)})})


def read_contents(
    path: Path, *, also_train: bool = True, layers: str | None = None
) -> tuple[AdapterFile, dict[str, Tensor]]:
    """Return what a file says of itself, and its tensors.

    Args:
        path: the file.
        also_train: also read the parameters that the file holds beside the blocks.
        layers: a regex; only the layers in whose names it is found are returned and read.

    Raises:
        AdapterIOError: the file can't be read.
        AdapterFileError: it is no valid adapter file.
        ArgumentError: `layers` is no valid regex, or is found in no layer's name.
    """
    with opened_contents(path, also_train=also_train, layers=layers) as (described, tensors):
        return described, dict(tensors)


@contextmanager
def opened_contents(
    path: Path, *, also_train: bool = True, layers: str | None = None
) -> Iterator[tuple[AdapterFile, Mapping[str, Tensor]]]:
    """Do as `read_contents`, but read each tensor only when it is asked for, as long as it is open.

    Args:
        path: the file.
        also_train: also offer the parameters that the file holds beside the blocks.
        layers: a regex; only the layers in whose names it is found are offered.
    """
    with opened(path) as file:
        described = described_by(file)
        if layers is not None:
            described = _narrowed(described, layers)
        if not also_train:
            described = _without(described, described.also_train, also_train=())
        yield described, _Unread(file, described.tensors)


class _Unread(Mapping[str, Tensor]):
    """Tensors of an open file."""

    def __init__(self, file: TensorFile, keys: Collection[str]) -> None:
        self._file, self._keys = file, keys

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._file.read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _narrowed(described: AdapterFile, layers: str) -> AdapterFile:
    pattern = compile_regex("layers", layers)
    kept = tuple(layer for layer in described.layers if pattern.search(layer.name))
    if not kept:
        names = ", ".join(layer.name for layer in described.layers[:10])
        raise ArgumentError(
            f"layers={layers!r} is found in the name of no layer in {described.path}; "
            f"it has {names}{', ...' if len(described.layers) > 10 else ''}"
        )
    left_out = {layer.key for layer in described.layers} - {layer.key for layer in kept}
    return _without(described, left_out, layers=kept)


def _without(described: AdapterFile, keys: Iterable[str], **changes: Any) -> AdapterFile:
    gone = frozenset(keys)
    tensors = {key: record for key, record in described.tensors.items() if key not in gone}
    return replace(described, tensors=tensors, **changes)


def blocks_only(header: AdapterHeader, tensors: Mapping[str, Tensor]) -> Contents:
    """Return an adapter without the parameters beside its blocks.

    Args:
        header: what describes the adapter.
        tensors: its tensors.
    """
    keys = [layer.key for layer in header.layers]
    without = replace(
        header,
        config=header.config.changed(also_train=[]),
        also_train=(),
        tensors={key: header.tensors[key] for key in keys},
    )
    return without, {key: tensors[key] for key in keys}


# --- into a model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Incoming:
    """An adapter on its way into a model.

    `keys` maps each key of it to the key of the same parameter in the model: they differ where a
    module or a parameter has several names and the adapter knows another one.
    """

    source: Source
    header: AdapterHeader
    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str]

    @property
    def records(self) -> dict[str, LayerRecord]:
        """The layers under the model's keys of their blocks."""
        return {self.keys[layer.key]: layer for layer in self.header.layers}


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
) -> LoadReport:
    """Put an adapter into a model; `load_adapter` says what the arguments mean and what it raises.

    Args:
        view: the model.
        source: what errors name.
        header: the adapter's header.
        tensors: all tensors that the header names.
        adapter: the name that it gets in this model.
        replace: copy into the adapter of that name, where there is one.
        partial: when replacing, leave layers alone that the header does not name.
        dtype: dtype of the blocks; the tensors' by default.
        freeze: freeze all parameters that belong to no adapter.
    """
    with view.ranks().agreeing(f"load a file as adapter {adapter!r}"):
        check_adapter_name(adapter)
        check_dtype(dtype)
        view.refuse_inside("load an adapter")
        incoming = _Incoming(source, header, tensors, _model_keys(view, header))
        _check_consistent(incoming)
        taken = adapter in view.adapters
        _check_taken(adapter, taken, replace, dtype)
        if taken:
            targets, values, report = _fitting(view, incoming, adapter, partial)
        else:
            report = _inject(view, incoming, adapter, dtype, freeze)
    if taken:
        copy_values(targets, values)
        _reconfigure(view, incoming, adapter)
    _warn_of_other_base(view, incoming, adapter)
    return report


def _check_consistent(incoming: _Incoming) -> None:
    """Raise if the header contradicts itself, or has two tensors for what the model has once."""
    problems = contradictions(incoming.header)
    first: dict[str, str] = {}
    for key, own in incoming.keys.items():
        if first.setdefault(own, key) != key:
            problems.append(f"{first[own]} and {key} are one parameter in the model")
    if problems:
        listing = "\n".join(problems[:20])
        raise AdapterFileError(f"{incoming.source}: nothing was loaded:\n{listing}")


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
    for layer in header.layers:
        module, _, below = layer.name.rpartition(".")
        own = first.get(layer.name) or join(first.get(module, module), below)
        keys[layer.key] = own + layer.key[len(layer.name) :]
    return keys


def _inject(
    view: ModelView,
    incoming: _Incoming,
    adapter: str,
    dtype: torch.dtype | None,
    freeze: bool,
) -> LoadReport:
    header = incoming.header
    requests = [
        WeightRequest(
            name=layer.name,
            r=layer.r,
            in_features=layer.in_features,
            out_features=layer.out_features,
            block_shape=header.tensors[layer.key].shape,
            layout=layer.layout,
            rows=layer.rows,
            dtype=dtype or header.tensors[layer.key].dtype,
        )
        for layer in header.layers
    ]
    beside = {key: header.tensors[key].shape for key in header.also_train}
    with _named(incoming.source):
        plan = plan_weights(view, adapter, header.config, requests, beside, freeze)
    dtypes = {
        layer.key: request.dtype for layer, request in zip(header.layers, requests, strict=True)
    }
    # Only now, since of what does not fit a model there may be any amount.
    values = {incoming.keys[key]: tensor for key, tensor in incoming.tensors.items()}
    _check_finite(view, incoming, values, dtypes)
    apply_plan(view, plan)
    targets = adapter_tensors(view, adapter)
    copy_values(targets, values)
    _set_strengths(view, incoming, adapter)
    return check_fit(targets, values)


def _fitting(
    view: ModelView, incoming: _Incoming, adapter: str, partial: bool
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor], LoadReport]:
    """Return parameters and the values that are to replace theirs; raise if these don't fit."""
    mine = adapter_tensors(view, adapter)
    found = {incoming.keys[key]: key for key in incoming.tensors}
    blocks = {
        join(name, weight.blocks[adapter].parameter_name) for name, weight in view.require(adapter)
    }
    required = set() if partial else blocks | set(incoming.header.also_train)
    targets = {key: parameter for key, parameter in mine.items() if key in found or key in required}
    values = {key: incoming.tensors[own] for key, own in found.items() if key in targets}
    # What nothing is there for needs no reading: there may be any amount of it.
    report = check_fit(targets, {**dict.fromkeys(found), **values})
    problems = [] if report.complete else [str(report)]
    problems += _other_sizes(view, incoming, adapter)
    if problems:
        listing = "\n".join(problems[:20])
        raise AdapterFileError(
            f"{incoming.source} does not fit the adapter {adapter!r} that it was to replace; "
            f"nothing was loaded:\n{listing}"
        )
    return targets, values, report


def _reconfigure(view: ModelView, incoming: _Incoming, adapter: str) -> None:
    records = incoming.records
    for name, weight in view.require(adapter):
        block = weight.blocks[adapter]
        if join(name, block.parameter_name) in records:
            block.reconfigure(incoming.header.config)
    _set_strengths(view, incoming, adapter)


def _set_strengths(view: ModelView, incoming: _Incoming, adapter: str) -> None:
    records = incoming.records
    for name, weight in view.require(adapter):
        block = weight.blocks[adapter]
        record = records.get(join(name, block.parameter_name))
        if record is not None:
            block.set_strength(record.scale)


def _other_sizes(view: ModelView, incoming: _Incoming, adapter: str) -> list[str]:
    """Return what the adapter says of layers and the model's adapter contradicts."""
    asked = incoming.records
    problems = []
    for name, weight in view.require(adapter):
        found = _record(name, adapter, weight, base=None)
        wanted = asked.get(found.key)
        if wanted is not None and found.sizes != wanted.sizes:
            problems.append(f"{name}: the file has {wanted.sizes}, the model {found.sizes}")
        elif wanted is not None and (found.layout, found.rows) != (wanted.layout, wanted.rows):
            problems.append(
                f"{name}: the file has {wanted.layout} and rows {wanted.rows}, the model "
                f"{found.layout} and {found.rows}"
            )
    return problems


def _check_finite(
    view: ModelView,
    incoming: _Incoming,
    values: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype | None],
) -> None:
    """Raise if a value is not finite, or would not be in the dtype that it is loaded into."""
    broken = []
    for key in incoming.tensors:
        tensor, dtype = values[incoming.keys[key]], dtypes.get(key)
        if dtype is None:
            dtype = view.parameters_by_name[incoming.keys[key]].value.dtype
        if not finite_as(tensor, dtype):
            broken.append(f"{key} (as {dtype})")
    if broken:
        raise AdapterFileError(
            f"{incoming.source} holds values that are not finite (NaN or infinity) in "
            f"{', '.join(broken[:10])}; nothing was loaded. Get another version of the file, or "
            "load it in a wider dtype"
        )


@contextmanager
def _named(source: Source) -> Iterator[None]:
    """Let errors about the contents name where they came from."""
    try:
        yield
    except (ArgumentError, AdapterFileError) as error:
        raise AdapterFileError(f"{source}: {error}") from error


def _warn_of_other_base(view: ModelView, incoming: _Incoming, adapter: str) -> None:
    records = incoming.records
    other, known = [], 0
    for name, weight in view.require(adapter):
        record = records.get(join(name, weight.blocks[adapter].parameter_name))
        now = None if record is None else _base_fingerprint(weight)
        if record is None or now is None or record.base is None:
            continue
        known += 1
        if not same_base(now, record.base):
            other.append(name)
    if other:
        shown = printable(", ".join(other[:3])) + (", ..." if len(other) > 3 else "")
        source = printable(str(incoming.source))
        warnings.warn(
            f"{source} was saved from other base weights than the model's in "
            f"{len(other)} of {known} layers ({shown}): load the base that it was trained on, or "
            "check that the adapter is not merged into this one already",
            AdapterFileWarning,
            stacklevel=4,
        )

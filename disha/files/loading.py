"""Put an adapter into a model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from disha.checks import check_dtype
from disha.config import AdapterConfig
from disha.errors import AdapterFileError, AdapterFileWarning, ArgumentError
from disha.files.contents import Source
from disha.files.header import AdapterContents
from disha.files.saving import base_fingerprint, describe_block
from disha.layers.adapters import check_adapter_name
from disha.layers.fingerprints import same_base
from disha.layers.spec import BlockSpec
from disha.layers.weights import rows_of_base
from disha.model import buffers
from disha.model.file_plans import plan_weights
from disha.model.found import ModelBlock
from disha.model.inject import apply_plan
from disha.model.state import LoadReport, check_fit, collect_tensors
from disha.model.view import ModelView, all_or_nothing
from disha.sharding.tensors import write
from disha.sharding.zero import whole_shape
from disha.text import counted, first_few, join, printable


@dataclass(frozen=True)
class _Incoming:
    """An adapter that is being loaded, with the names that everything has in the model."""

    view: ModelView
    adapter: str
    source: Source
    config: AdapterConfig
    layers: Mapping[str, BlockSpec]  # by the keys of their blocks
    tensors: Mapping[str, Tensor]

    def blocks(self) -> Iterator[tuple[ModelBlock, BlockSpec]]:
        """Yield each block of the model that gets new values, with the spec of its layer."""
        for model_block in self.view.blocks(self.adapter):
            spec = self.layers.get(join(model_block.name, model_block.block.parameter_name))
            if spec is not None:
                yield model_block, spec


def load_contents(
    view: ModelView,
    source: Source,
    contents: AdapterContents,
    adapter: str,
    *,
    replace: bool = False,
    partial: bool = False,
    dtype: torch.dtype | None = None,
    freeze: bool,
    activate: bool = True,
    around: ExitStack | None = None,
) -> LoadReport:
    """Put an adapter into a model, as `load_adapter` does.

    If it replaces another one, what it lacks of that one then acts as in the base, unless it is
    `partial`. If a larger operation fails later, its stack `around` takes this back too.
    """
    with all_or_nothing(view, around) as undo:
        swaps_values = replace and adapter in view.adapters
        with view.ranks.fail_together(f"load a file as adapter {adapter!r}"):
            check_adapter_name(adapter)
            view.refuse_inside("load an adapter")
            incoming = _rename_as_in_model(view, adapter, source, contents)
            if swaps_values:
                if dtype is not None:
                    raise ArgumentError(
                        "replace=True keeps the blocks with their dtype; leave dtype out"
                    )
                incoming = _widen(incoming)
                targets = _find_targets(incoming, _list_differences(incoming))
            else:
                targets = _add_adapter(incoming, dtype, freeze, activate)
        for key, target in targets.items():
            write(target, incoming.tensors[key], undo)
        if swaps_values and not partial:
            _reset_missing(incoming, undo)
        _take_settings(incoming, undo)
        _warn_of_other_base(incoming)
    return LoadReport(matched=tuple(incoming.tensors))  # a key that does not fit has raised above


def _add_adapter(
    incoming: _Incoming, dtype: torch.dtype | None, freeze: bool, activate: bool
) -> dict[str, Tensor]:
    """Add an adapter with its blocks, and return the model's other tensors that it changes."""
    view = incoming.view
    adapter = incoming.adapter
    layers = incoming.layers
    if adapter in view.adapters:
        raise ArgumentError(
            f"the model has an adapter {adapter!r} already; load under another name (adapter=), or "
            "pass replace=True"
        )
    check_dtype(dtype)
    also_train = sorted(incoming.tensors.keys() - layers.keys())
    tensors = incoming.tensors
    try:
        plan = plan_weights(
            view, adapter, incoming.config, layers.values(), tensors, also_train, freeze=freeze
        )
    except ArgumentError as error:
        raise AdapterFileError(f"{incoming.source}: {error}") from error
    values = {key: _cast(tensors[key], spec, dtype) for key, spec in layers.items()}
    apply_plan(view, plan, values, activate=activate)
    # Only now that the plan is carried out: it has made the keys of `also_train` those of this
    # adapter, so its own buffers are no conflicts.
    targets = _find_targets(incoming, _list_conflicts(incoming))
    # New blocks have their values already; only other tensors are left to write.
    return {key: target for key, target in targets.items() if key not in layers}


def _cast(values: Tensor, spec: BlockSpec, dtype: torch.dtype | None) -> Tensor:
    """Return the values of a block in the dtype that the user has chosen, if there is one."""
    if dtype is None or values.is_complex() or spec.is_new_rows:
        return values
    return values.to(dtype)


def _rename_as_in_model(
    view: ModelView, adapter: str, source: Source, contents: AdapterContents
) -> _Incoming:
    """Return an adapter under the model's names; a shared module or parameter has its first one."""
    first_names = {name: aliases[0] for aliases in view.names.values() for name in aliases}

    def first_name(name: str) -> str:
        """Return the name of a module, or of a weight or a buffer in one."""
        if name in first_names:
            return first_names[name]
        module, _, below = name.rpartition(".")
        return join(first_names.get(module, module), below)

    parameters = view.parameters_by_name
    keys = {}  # key in the file -> key in the model
    for key in contents.also_train:
        if key in parameters:
            keys[key] = parameters[key].name
        else:
            keys[key] = first_name(key)
    layers = {}
    for spec in contents.layers:
        name = first_name(spec.name)
        tied = sorted(set(map(first_name, spec.tied)))
        renamed = spec.but(name=name, tied=tuple(tied))
        keys[spec.key] = renamed.key
        layers[renamed.key] = renamed
    _refuse_two_of_one(source, keys)
    values = {keys[key]: tensor for key, tensor in contents.tensors.items()}
    return _Incoming(view, adapter, source, contents.config, layers, values)


def _refuse_two_of_one(source: Source, keys: Mapping[str, str]) -> None:
    """Raise if two keys of a file belong to one key of the model."""
    file_keys: dict[str, str] = {}
    for file_key, model_key in keys.items():
        if model_key in file_keys:
            raise AdapterFileError(
                f"{source}: {file_keys[model_key]} and {file_key} are one parameter in the model; "
                "nothing was loaded. Leave out one of them"
            )
        file_keys[model_key] = file_key


def _widen(incoming: _Incoming) -> _Incoming:
    """Return an adapter with the model's r, where a wider block has the same update."""
    layers = dict(incoming.layers)
    tensors = dict(incoming.tensors)
    for model_block, spec in incoming.blocks():
        block = model_block.block
        key = spec.key
        wider = block.method.wider_block(spec.layout, tensors[key], spec.geometry, spec.r, block.r)
        if wider is not None:
            layers[key] = spec.but(r=block.r)
            tensors[key] = wider
    return dataclasses.replace(incoming, layers=layers, tensors=tensors)


FIELDS_OF_BLOCK = (
    "method",
    "r",
    "r_out",
    "in_features",
    "out_features",
    "layout",
    "outputs",
    "kernel",
    "tied",
)
"""What must agree between a block and the file whose values it takes.

The file's scale is taken over, and another base only warns.
"""


def _list_differences(incoming: _Incoming) -> list[str]:
    """Return a line for each field in which the blocks of the file and of the model differ."""
    borrowers = incoming.view.find_borrowers()
    differences = []
    for model_block, in_file in incoming.blocks():
        tied = sorted(borrowers[model_block.block])
        in_model = describe_block(model_block, tied, with_fingerprint=False)
        for field in FIELDS_OF_BLOCK:
            file_value = getattr(in_file, field)
            value = getattr(in_model, field)
            if file_value != value:
                differences.append(
                    f"{in_model.name}: {field} is {file_value} in the file and {value} in the model"
                )
    return differences


def _list_conflicts(incoming: _Incoming) -> list[str]:
    """Return a line for each buffer to which another adapter has given other values."""
    return [
        f"{name}: another adapter has changed it, and it can belong to only one; to load the "
        "layers alone, pass also_train=False"
        for name, now in buffers.list_changed(incoming.view).items()
        if name in incoming.tensors and not torch.equal(incoming.tensors[name].to(now), now)
    ]


def _find_targets(incoming: _Incoming, reasons: Sequence[str]) -> dict[str, Tensor]:
    """Return key -> the model's tensor that gets the values of the incoming one.

    Raise if the model lacks one, if one can't hold the values, or if there are `reasons` against
    the adapter already.
    """
    view = incoming.view
    adapter = incoming.adapter
    tensors = buffers.list_saved(view, adapter) | collect_tensors(view, adapter)
    report = check_fit(tensors, incoming.tensors)
    report = dataclasses.replace(report, missing=())  # what the adapter lacks keeps its values
    if not report.complete:
        reasons = [str(report), *reasons]
    if reasons:
        raise AdapterFileError(
            f"{incoming.source} does not fit the model's adapter {adapter!r}; nothing was loaded:\n"
            f"{first_few(reasons, 20)}"
        )
    return {key: tensors[key] for key in incoming.tensors}


def _take_settings(incoming: _Incoming, undo: ExitStack) -> None:
    """Give the model's blocks the adapter's configuration and scales; each keeps its r."""
    config = incoming.config

    @cache  # the blocks of an adapter share few configurations
    def with_sizes_of(former: AdapterConfig) -> AdapterConfig:
        return config.changed(r=former.r, rank_pattern=former.rank_pattern)

    for model_block, spec in incoming.blocks():
        block = model_block.block
        former = block.config
        if former is not config:  # that of new blocks
            undo.callback(block.reconfigure, former)
            block.reconfigure(with_sizes_of(former))
        if block.scale != spec.scale:
            undo.callback(setattr, block, "scale", block.scale)
            block.scale = spec.scale


def _reset_missing(incoming: _Incoming, undo: ExitStack) -> None:
    """Let the layers and buffers that the adapter lacks act as in the base."""
    buffers.put_back_buffers(incoming.view, undo, incoming.adapter, excepted=incoming.tensors)
    for model_block in incoming.view.blocks(incoming.adapter):
        block = model_block.block
        if join(model_block.name, block.parameter_name) in incoming.layers:
            continue
        if block.is_new_rows:
            start = rows_of_base(model_block.layer, block.spec)
        else:
            start = block.block.new_zeros(whole_shape(block.block))
        write(block.block, start, undo)


def _warn_of_other_base(incoming: _Incoming) -> None:
    """Warn if the model's weights are not those that the adapter was saved from."""
    compared = 0
    differing = []
    for model_block, spec in incoming.blocks():
        if spec.base is None:
            continue
        base = base_fingerprint(model_block)
        if base is None:
            continue
        compared += 1
        if not same_base(spec.base, base):
            differing.append(model_block.name)
    if differing:
        layers = printable(first_few(differing, 3, ", "))
        warnings.warn(
            f"{printable(str(incoming.source))} was saved from other base weights than the model's "
            f"in {len(differing)} of {counted(compared, 'layer')} ({layers}): load the base that "
            "it was trained on, without the adapter merged into it",
            AdapterFileWarning,
            stacklevel=4,  # the caller of load_adapter
        )

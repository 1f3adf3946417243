"""Plan an injection: which weights get which blocks, and what else is trained. Changes nothing.

A plan starts from a `PlannedLayer` for every weight of a model. A target or a file selects some of
them. Each of these gets the sizes of its block, or the reason why it can't have one. Functions
whose names start with `_reason` return such a reason, or None if there is none.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.sparse import SparseSemiStructuredTensor

from disha.config import (
    ALL_LINEAR,
    BLOCK_DTYPES,
    AdapterConfig,
    Init,
    MethodName,
    Patterns,
    as_tuple,
    matching,
    with_hints,
)
from disha.errors import ArgumentError, ArgumentTypeError, TargetError
from disha.functional import Geometry, Update, layout_of, method_names, method_of
from disha.functional.products import update_of_part
from disha.layers.adapted import AdaptedLayer
from disha.layers.blocks import Slot, check_adapter_name
from disha.layers.kinds import declared_slots, slot_of
from disha.layers.quantized import quantization_of
from disha.layers.weights import (
    count_values,
    matrix_weights,
    read_weight,
    stored_weight,
    weight_shape,
)
from disha.model.records import LayerRecord
from disha.model.view import ModelParameter, ModelView
from disha.sharding.imported import imported_class
from disha.sharding.tensor_parallel import split_of
from disha.sharding.zero import whole_shape
from disha.text import WIDEST, brief, counted, first_few, grouped, join, printable, table

Target = str | Sequence[str] | Callable[[str, nn.Module], bool]

Place = tuple[Any, str]
"""A module, and its attribute that holds a parameter."""


# --- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedLayer:
    """A weight, or a module without one, and its planned block or the reason for none."""

    module: nn.Module = field(repr=False)
    module_names: tuple[str, ...]  # its names in the model; a shared module has several
    config: AdapterConfig
    attribute: str = ""  # the weight's name in the module; empty if it has none
    slot: Slot | None = None  # None if the layout is unknown
    r: int = 0
    # Of its block; None for those of `init`.
    values: Tensor | None = field(default=None, repr=False, compare=False)
    reason: str = ""  # why it is not adapted; empty if it is
    # Where else its parameter is, and reads the update.
    tied: Mapping[str, Place] = field(default_factory=dict, compare=False)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Its names in targets and files; a `weight` has the names of its module."""
        below = self.attribute if self.slot is None else self.slot.name
        return tuple(join(name, below) for name in self.module_names)

    @property
    def name(self) -> str:
        """Its main name; empty if the module is the model itself."""
        return self.names[0]

    @property
    def place(self) -> Place:
        """The module and the attribute that hold its parameter."""
        return self.module, self.attribute

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Its names in `layouts` and `rows`, where a module's name means its `weight`."""
        modules = self.module_names if self.attribute == "weight" else ()
        parameters = (join(name, self.attribute) for name in self.module_names)
        return (*self.names, *modules, *parameters)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, with all of its rows."""
        if self.slot is None:
            return tuple(whole_shape(read_weight(self.module, self.attribute)))
        return weight_shape(self.module, self.slot)

    @cached_property
    def geometry(self) -> Geometry:
        """The sizes of the adapted rows."""
        assert self.slot is not None
        return self.slot.layout.geometry(self.shape, self.slot.rows)

    @property
    def in_features(self) -> int:
        """Size of its input."""
        return self.geometry.in_features

    @property
    def out_features(self) -> int:
        """Size of its output, or the number of its adapted rows."""
        return self.geometry.out_features

    @property
    def block_shape(self) -> tuple[int, ...]:
        """The shape of its block."""
        slot = self.slot
        config = self.config
        assert slot is not None
        method = method_of(config.method)
        return method.block_shape(slot.layout, self.shape, self.r, config.r_out, slot.rows)

    @property
    def parameters(self) -> int:
        """Number of values in its block."""
        return math.prod(self.block_shape)

    @property
    def remedy(self) -> str:
        """An argument that declares an unknown layout. Which layout it is, only the user knows."""
        axes = {2: "out in", 3: "expert out in"}.get(len(self.shape), "out in *kernel")
        return f"layouts={{{re.escape(self.name) + '$'!r}: {axes!r}}}"


EXCLUDED = "excluded"
"""The reason of what `exclude` leaves out."""


@dataclass(frozen=True)
class Plan:
    """What an injection would do; `print(plan)` shows it as a table.

    Attributes:
        adapter: the adapter's name.
        config: its configuration.
        freeze: whether all other parameters are frozen.
        layers: the weights that would be adapted.
        also_train: clean names of the parameters to be trained and saved with the adapter.
        skipped: what the target selects but would not be adapted, each with its `reason`.
        unknown: the matrix parameters of the model whose layouts are unknown.
        convolutions: names of the convolutions that `"all-linear"` leaves out.
        trainable: number of parameters in the model that would require gradients afterwards.
        total: number of parameters of the model afterwards, blocks included. A quantised weight
            counts as a dense one.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4), nn.LayerNorm(4))
        >>> plan = disha.plan_adapters(model, "0|2", r=4)
        >>> [(layer.name, layer.in_features, layer.parameters) for layer in plan.layers]
        [('0', 8, 64)]
        >>> [(module.name, module.reason) for module in plan.skipped]
        [('2', 'no layer kind adapts LayerNorm')]
        >>> plan.added, plan.trainable, plan.total
        (64, 64, 284)
    """

    adapter: str
    config: AdapterConfig
    freeze: bool
    layers: tuple[PlannedLayer, ...]
    also_train: tuple[str, ...]
    skipped: tuple[PlannedLayer, ...] = ()
    unknown: tuple[PlannedLayer, ...] = ()
    convolutions: tuple[str, ...] = ()
    trainable: int = 0
    total: int = 0

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """The names of each adapted parameter that several modules share and read with its block.

        Those that `exclude` leaves out do not read it.
        """
        return tuple(
            (layer.parameter_names[-1], *layer.tied) for layer in self.layers if layer.tied
        )

    @property
    def added(self) -> int:
        """Number of parameters in the new blocks."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of all."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        rows = [
            (p.name or "(the model)", p.config.method, p.r,
             f"{p.in_features} -> {p.out_features}", f"{p.parameters:,}")
            for p in self.layers
        ]  # fmt: skip
        lines = [table(("layer", "method", "r", "in -> out", "parameters"), rows)]
        lines += [f"skipped {layer.name}: {layer.reason}" for layer in self.skipped]
        lines += [
            f"not adapted {layer.name} {layer.shape}: declare its layout, such as {layer.remedy}"
            for layer in self.unknown
        ]
        if self.convolutions:
            lines.append(
                f"not adapted {first_few(self.convolutions, 3, ', ')}: {ALL_LINEAR!r} leaves "
                "convolutions out; to adapt them, pass a predicate such as "
                'lambda name, module: "Conv" in type(module).__name__'
            )
        lines += [f"one shared parameter: {', '.join(names)}" for names in self.tied]
        if self.also_train:
            lines.append(f"also trained: {', '.join(self.also_train)}")
        lines.append(
            f"adapter {self.adapter!r}: {counted(len(self.layers), 'layer')}, "
            f"{counted(self.added, 'parameter')}; "
            f"trainable {self.trainable:,} of {self.total:,} ({self.percent:.3f}%)"
        )
        return "\n".join(lines)


# --- planning by a target ------------------------------------------------------------------------


@with_hints
def plan_adapters(
    model: nn.Module,
    target_regex: Target,
    r: int,
    *,
    adapter: str = "default",
    method: MethodName = "bone",
    r_out: int | None = None,
    exclude: Patterns = None,
    rank_pattern: Mapping[str, int] | None = None,
    layouts: Mapping[str, str] | None = None,
    rows: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    dropout: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    init: Init = "zeros",
    also_train: Patterns = None,
    also_train_rows: Mapping[str, Sequence[int]] | None = None,
    freeze: bool = True,
) -> Plan:
    """Return what `inject_adapters` would do with the same arguments; change nothing.

    The plan lists weights that r or r_out does not fit as skipped. It also lists every matrix
    parameter of unknown layout, with the argument that would adapt it.

    Args:
        model: any model.
        target_regex: the weights to adapt. All arguments are as for `inject_adapters`.
        r: shard size.
        adapter: the new adapter's name.
        method: its method.
        r_out: size of the output shard of a tile.
        exclude: names to leave out.
        rank_pattern: regex of names -> r.
        layouts: regex of names -> layout.
        rows: regex of names -> ranges of outputs.
        dropout: probability of zeroing each input of the adapter.
        scale: factor on the update.
        dtype: dtype of the blocks.
        init: initial values of the blocks.
        also_train: names of parameters to train and save with the adapter.
        also_train_rows: regex of names -> rows of matrices to train and save with it.
        freeze: whether all other parameters are frozen.

    Raises:
        DishaError: as for `inject_adapters`, but not if r or r_out does not fit a weight.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> plan = disha.plan_adapters(nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)), ".", r=2)
        >>> print(plan)
        layer  method  r  in -> out  parameters
        0      bone    2  8 -> 4              8
        skipped 1: no layer kind adapts LayerNorm
        adapter 'default': 1 layer, 8 parameters; trainable 8 of 52 (15.385%)
    """
    view = ModelView(model)
    config = AdapterConfig(
        r,
        target_regex,  # type: ignore[arg-type]
        method,
        r_out,
        exclude,  # type: ignore[arg-type]
        rank_pattern,  # type: ignore[arg-type]
        layouts,  # type: ignore[arg-type]
        rows,  # type: ignore[arg-type]
        dropout,
        scale,
        dtype,
        init,
        also_train,  # type: ignore[arg-type]
    )
    plan = plan_injection(
        view, target_regex, config, adapter, freeze, also_train_rows, strict=False
    )
    return _with_counts(view, plan)


def plan_injection(
    view: ModelView,
    target: Target,
    config: AdapterConfig,
    adapter: str,
    freeze: bool,
    also_train_rows: Mapping[str, Sequence[int]] | None = None,
    plain: Iterable[str] = (),
    argument: str = "target_regex",
    *,
    strict: bool,
) -> Plan:
    """Plan an injection. If r or r_out does not fit a weight, raise if `strict`, else list it.

    What `plain` matches does not read the update of a tied parameter; `exclude` by default. Errors
    name the `argument` that gave the target.
    """
    parts = () if callable(target) else as_tuple("target_regex", target)
    if not parts and not callable(target):
        raise ArgumentTypeError(
            f"target_regex must be a regex, a list of them, {ALL_LINEAR!r} or a predicate "
            f"(name, module) -> bool, got {target!r}"
        )
    check_addable(view, adapter)
    known = _layers_of(view, config)
    if config.layouts or config.rows:
        # Several slots may become one weight.
        known = list(dict.fromkeys(_as_declared(layer, config) for layer in known))
    of_rows = Plan(adapter, config, freeze, layers=(), also_train=())
    if also_train_rows:
        of_rows = plan_injection(
            view,
            [*also_train_rows],
            _for_rows(config, also_train_rows),
            adapter,
            freeze,
            plain=config.exclude,
            argument="also_train_rows",
            strict=strict,
        )
    taken = {place for layer in of_rows.layers for place in (layer.place, *layer.tied.values())}
    selected = _selected(view, known, target, parts, config.exclude)
    layers, skipped, unfit = _divided(view, selected, plain or config.exclude, taken)
    unknown = tuple(layer for layer in known if layer.slot is None and layer.attribute)
    convolutions = tuple(
        layer.name
        for layer in known
        if target == ALL_LINEAR
        and layer.slot is not None
        and layer.slot.layout.has_kernel
        and not _reason_against(layer)
    )
    if not layers and not unfit:
        raise TargetError(_nothing_selected(argument, target, known, skipped, unknown))
    names = [name for layer in known for name in (*layer.module_names, *layer.parameter_names)]
    _refuse_unused(argument, [part for part in parts if part != ALL_LINEAR], names)
    for setting in ("exclude", "rank_pattern", "layouts", "rows"):
        _refuse_unused(setting, vars(config)[setting], names)
    if unfit and strict:
        raise ArgumentError(
            f"{_shown(unfit)}. Choose a smaller `r`, or an `r_out` that divides the outputs, give "
            "these layers their own r (`rank_pattern`), or leave them out (`exclude`)"
        )
    return Plan(
        adapter,
        config,
        freeze,
        layers=(*of_rows.layers, *layers),
        also_train=_also_trained(view, config) if config.also_train else (),
        skipped=(*of_rows.skipped, *skipped, *unfit),
        unknown=unknown,
        convolutions=convolutions,
    )


def _divided(
    view: ModelView, layers: Iterable[PlannedLayer], plain: Iterable[str], taken: set[Place]
) -> tuple[list[PlannedLayer], list[PlannedLayer], list[PlannedLayer]]:
    """Return what gets a block, what can't have one, and what can't have one of these sizes.

    A place that is taken reads the block of another layer, and is left out.
    """
    adapted = []
    skipped = []
    unfit = []
    for layer in layers:
        if layer.slot is not None and not layer.reason:
            if layer.place in taken:
                continue
            tied = _tied(view, layer, plain)
            taken.update(tied.values())
            r = layer.config.rank_of(*layer.names, *layer.module_names, *tied)
            layer = replace(layer, tied=tied, r=r)
        reason = layer.reason or _reason_against(layer)
        misfit = None if reason else _reason_against_block(layer)
        if reason:
            skipped.append(replace(layer, reason=reason))
        elif misfit:
            unfit.append(replace(layer, reason=misfit))
        else:
            adapted.append(layer)
    return adapted, skipped, unfit


def _for_rows(config: AdapterConfig, rows: Mapping[str, Any]) -> AdapterConfig:
    """Return the configuration of new rows, which are trained beside an adapter."""
    layouts = dict.fromkeys(rows, "out in")
    return AdapterConfig(1, None, "rows", layouts=layouts, rows=rows, dtype=config.dtype)


def _layers_of(view: ModelView, config: AdapterConfig) -> list[PlannedLayer]:
    """Return all weights, matrices of unknown layout, and modules without either."""
    found = []
    for module, names in view.names.items():
        compiled = isinstance(module, torch.jit.ScriptModule)  # it stays as it is
        slots = [] if compiled else declared_slots(module)
        weights = [PlannedLayer(module, names, config, slot.parameter, slot) for slot in slots]
        if not compiled and not (slots and slots[0].quantized):
            known = [slot.parameter for slot in slots]
            matrices = [name for name in matrix_weights(module) if name not in known]
            weights += [PlannedLayer(module, names, config, name) for name in matrices]
        found += weights or [PlannedLayer(module, names, config)]
    return found


def _as_declared(layer: PlannedLayer, config: AdapterConfig) -> PlannedLayer:
    """Return a weight with the layout and the rows that the user declares."""
    pattern = next(iter(matching(config.layouts, layer.parameter_names)), None)
    quantized = layer.slot is not None and layer.slot.quantized
    if pattern is not None and not quantized and layer.attribute in matrix_weights(layer.module):
        layout = layout_of(config.layouts[pattern])
        reason = layout.reason_against_shape(layer.shape)
        if reason is not None:
            raise ArgumentError(f"layouts {pattern!r} does not fit {layer.name}: {reason}")
        layer = replace(layer, slot=slot_of(layer.attribute, layout))
    pattern = next(iter(matching(config.rows, layer.parameter_names)), None)
    if pattern is not None and layer.slot is not None:
        if layer.slot.rows:
            raise ArgumentError(
                f"{layer.name} has rows of its own; choose it by its name, not by rows"
            )
        layer = replace(layer, slot=replace(layer.slot, rows=config.rows[pattern]))
    return layer


# --- planning by a file --------------------------------------------------------------------------


def plan_weights(
    view: ModelView,
    adapter: str,
    config: AdapterConfig,
    layers: Collection[LayerRecord],
    tensors: Mapping[str, Tensor],
    also_train: Collection[str],
    *,
    dtype: torch.dtype | None,
    freeze: bool,
) -> Plan:
    """Plan an adapter for the weights that a file names; one error lists all reasons."""
    check_addable(view, adapter)
    known: dict[str, PlannedLayer] = {}
    for layer in _layers_of(view, config):
        # A parameter of unknown layout can be asked for too, because the file has its layout.
        known |= dict.fromkeys(layer.parameter_names if layer.slot is None else layer.names, layer)
    reasons = []
    planned = []
    for record in layers:
        tensor = tensors[record.key]
        found = known.get(record.name)
        reason: str | None = "the model has no such layer"
        if found is not None:
            found = _as_recorded(view, found, record, config, tensor.to(dtype or tensor.dtype))
            reason = _reason_against_record(found, record, tensor.shape)
        if found is None or reason is not None:
            reasons.append(f"{printable(record.name, WIDEST) or '(the model)'}: {reason}")
        else:
            planned.append(found)
    for key in also_train:
        reason = _reason_against_parameter(view.parameters_by_name.get(key), tensors[key].shape)
        if reason is not None:
            reasons.append(f"parameter {printable(key, WIDEST)}: {reason}")
    if reasons:
        message = f"the adapter does not fit the model; nothing changed:\n{first_few(reasons, 20)}"
        absent = [record.name for record in layers if record.name not in known]
        nearest = _nearest(absent[0], known) if absent else ""
        if nearest:
            message += f"\nthe names nearest to {brief(absent[0])} are {nearest}"
        raise ArgumentError(message)
    return Plan(adapter, config, freeze, tuple(planned), tuple(also_train))


def _as_recorded(
    view: ModelView,
    layer: PlannedLayer,
    record: LayerRecord,
    config: AdapterConfig,
    values: Tensor,
) -> PlannedLayer:
    """Return a weight with the block and the rows of the file, and its layout if none is known."""
    slot = layer.slot
    config = config if record.method == config.method else _for_rows(config, {})
    if layer.attribute and (slot is None or method_of(record.method).replaces):
        slot = replace(slot or slot_of(layer.attribute, record.layout), layout=record.layout)
    if slot is not None and record.rows:
        slot = replace(slot, rows=record.rows)
    places = _tied(view, layer)  # those that the adapter left out stay plain
    tied = {name: places[name] for name in record.tied if name in places}
    return replace(layer, slot=slot, config=config, r=record.r, values=values, tied=tied)


def _reason_against_record(
    layer: PlannedLayer, record: LayerRecord, block: tuple[int, ...]
) -> str | None:
    """Return why a weight can't be adapted as a file describes it."""
    reason = record.reason_against_block(block)
    if reason is not None:
        return reason
    reason = _reason_against(layer)
    if reason is not None or layer.slot is None:
        return f"can't be adapted: {reason}"
    if {*layer.tied} != {*record.tied}:
        return f"in the adapter, its weight is also {', '.join(record.tied)}; tie them"
    if record.layout != layer.slot.layout:
        return f"expected the layout {record.layout}, found {layer.slot.layout} in the model"
    geometry = record.geometry(block)
    if geometry != layer.geometry:
        return (
            f"expected {_sizes(geometry)}, found {_sizes(layer.geometry)} in the model, where the "
            f"weight is {layer.shape}, read as {record.layout}"
        )
    return _reason_against_block(layer)


def _sizes(geometry: Geometry) -> str:
    stack = "".join(f"{size} x " for size in geometry.stack)
    return f"{stack}{geometry.in_features} -> {geometry.out_features}"


def _reason_against_parameter(
    parameter: ModelParameter | None, shape: tuple[int, ...]
) -> str | None:
    """Return why a parameter can't be trained with the adapter as a file describes it."""
    if parameter is None:
        return "the model has no such parameter"
    found = None if is_lazy(parameter.value) else tuple(whole_shape(parameter.value))
    if found != shape:
        return f"expected shape {tuple(shape)}, found {found} in the model"
    return _reason_against_training(parameter)


# --- reasons against an adapter ------------------------------------------------------------------


def _reason_against(layer: PlannedLayer) -> str | None:
    """Return why its method can't adapt a weight, whatever the size of the block."""
    module = layer.module
    slot = layer.slot
    if slot is None:
        if layer.attribute:
            return (
                f"the layout of this weight {layer.shape} is unknown; declare it, such as "
                f"{layer.remedy}, as your code uses it: see Layouts in docs/mechanism.md"
            )
        return f"no layer kind adapts {type(module).__qualname__}"
    # Properties are looked for and not asked: some read W.
    held = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    taken = {name for name in _ADDED if name in held or hasattr(type(module), name)}
    taken.discard(layer.attribute)
    if taken and not isinstance(module, AdaptedLayer):
        return f"it has its own attribute {min(taken)!r}, which adapters would replace"
    for place, parameter in (layer.place, *layer.tied.values()):
        if not isinstance(place, AdaptedLayer):
            continue
        for block in place.disha.blocks_of(place.disha, parameter):
            other_layout = block.slot.layout
            if other_layout != slot.layout:
                return f"another adapter has it with the layout {other_layout}, not {slot.layout}"
    reason = (
        _reason_against_quantized(module, slot, layer.config.method)
        if slot.quantized
        else _reason_against_dense(read_weight(module, layer.attribute), slot)
    )
    if reason is None and slot.rows:
        outputs = slot.layout.geometry(layer.shape).out_features
        last = slot.rows[-1]
        if last[1] > outputs:
            return f"rows {last} are out of range: it has {outputs} rows"
    return reason


_ADDED = ("disha", "base_weight", "delta_weight")
"""The public names that adapting adds to a module."""


def _reason_against_quantized(module: nn.Module, slot: Slot, method: str) -> str | None:
    """Return why a method can't adapt a quantised weight."""
    quantization = quantization_of(module, stored_weight(module, slot.parameter))
    chosen = method_of(method)
    if quantization is None or not chosen.reads_weight:
        return None
    if quantization.read is None:
        return (
            f"its weight is quantised ({quantization.name}) and can't be read as numbers, as "
            f"method {method!r} requires; "
            f"use {method_names(lambda known: not known.reads_weight)}"
        )
    if chosen.replaces:
        return f"its weight is quantised ({quantization.name}); only dense ones get new rows"
    return None


def _reason_against_dense(weight: Any, slot: Slot) -> str | None:
    """Return why no method can adapt a weight that is not quantised."""
    if is_lazy(weight):
        return "its weight is not initialised yet; run the model once before injecting"
    # Any floating-point dtype will do: a user's hook may cast the weight before each forward.
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return "its weight is not a floating-point tensor"
    if weight.layout is not torch.strided or isinstance(weight, SparseSemiStructuredTensor):
        return "its weight is sparse; store it as a dense tensor (Tensor.to_dense)"
    shape = whole_shape(weight)
    if not shape.numel():
        return "its weight is empty"
    split = split_of(weight)
    if split is not None and split.reason is not None:
        return split.reason
    return slot.layout.reason_against_shape(shape)


def _reason_against_block(layer: PlannedLayer) -> str | None:
    """Return why a weight can't have a block of the planned sizes."""
    slot = layer.slot
    config = layer.config
    assert slot is not None
    reason = slot.layout.reason_against(layer.geometry, layer.r, config.r_out)
    split = None if slot.quantized else split_of(read_weight(layer.module, layer.attribute))
    if reason is not None or split is None:
        return reason
    placed = f"its weight is a DTensor placed as {split.placements}"
    if config.dropout:
        return f"{placed}, and each rank would drop different inputs of it; use dropout=0"
    block = torch.empty(layer.block_shape, device="meta")
    update = Update(method_of(config.method), block, rows=slot.rows, r=layer.r)
    for part in split.parts:
        if update_of_part(update, slot.layout, layer.shape, part) is None:
            ends = " and ".join(f"{first}:{stop}" for first, stop in part)
            return (
                f"{placed}, and a {config.method!r} block of r={layer.r} can't be cut at the edges "
                f"of a rank's part ({ends}); choose an r that divides these, or another method"
            )
    return None


# --- selecting weights ---------------------------------------------------------------------------


def check_addable(
    view: ModelView,
    adapter: str,
    action: str = "add an adapter",
    before_wrapping: str = "inject first, then wrap. To load into an existing adapter, pass "
    "replace=True to load_adapter",
) -> None:
    """Raise unless an adapter of this name can be added to the model."""
    check_adapter_name(adapter)
    view.refuse_inside(action)
    view.refuse_wrapped(action, before_wrapping)
    if adapter in view.adapters:
        raise ArgumentError(f"the model has an adapter {adapter!r} already; choose another name")


def _selected(
    view: ModelView,
    known: list[PlannedLayer],
    target: Target,
    parts: tuple[str, ...],
    exclude: tuple[str, ...],
) -> list[PlannedLayer]:
    """Return what a target selects, a predicate or these parts, with a reason if it is excluded."""
    linear = _all_linear(view, known) if ALL_LINEAR in parts else ()
    # nn.MultiheadAttention itself reads the weight of its child `out_proj`.
    readers = {m.out_proj: m for m in view.names if isinstance(m, nn.MultiheadAttention)}
    found = []
    for layer in known:
        reader = readers.get(layer.module, layer.module)  # type: ignore[call-overload]
        asked = dict.fromkeys((*layer.names, *layer.module_names), layer.module)
        asked |= dict.fromkeys(view.names[reader], reader)
        if callable(target):
            matched = any(starmap(target, asked.items()))
        else:
            matched = bool(matching(parts, [*asked]))
        # A module without parameters is no miss.
        if (matched or layer.place in linear) and (
            layer.attribute or any(p is not None for p in layer.module._parameters.values())
        ):
            found.append(replace(layer, reason=EXCLUDED) if matching(exclude, [*asked]) else layer)
    return found


def _tied(view: ModelView, layer: PlannedLayer, exclude: Iterable[str] = ()) -> dict[str, Place]:
    """Return where else the parameter of a layer is, and reads its update."""
    parameter = view.parameters_by_name.get(join(layer.module_names[0], layer.attribute))
    quantized = layer.slot is not None and layer.slot.quantized
    if quantized or parameter is None or len(parameter.names) == 1:
        return {}
    found: dict[str, Place] = {}
    for name in parameter.names:
        owner, _, attribute = name.rpartition(".")
        place = view.modules[owner], attribute
        if place in [layer.place, *found.values()]:
            continue
        if not matching(exclude, (name, name.removesuffix(".weight"))):
            found[name] = place
    return found


def _all_linear(view: ModelView, known: list[PlannedLayer]) -> set[Place]:
    """Return where linear weights are, without output heads that are tied to an embedding."""
    added = _modules_added_by_peft(view)
    tables = set()
    linear = {}
    for layer in known:
        parameter = dict(layer.module._parameters).get(layer.attribute)
        if isinstance(layer.module, (nn.Embedding, nn.EmbeddingBag)):
            tables.add(id(parameter))
        elif layer.slot is not None and layer.module not in added:
            layout = layer.slot.layout
            if not layout.has_kernel and layout.pattern != "index out":
                linear[layer.place] = id(parameter)
    tables.discard(id(None))  # of a weight that is computed from others
    return {place for place, parameter in linear.items() if parameter not in tables}


def _modules_added_by_peft(view: ModelView) -> set[nn.Module]:
    """Return the modules that PEFT has added beside the layers that it adapts."""
    tuner = imported_class("peft.tuners.tuners_utils", "BaseTunerLayer")
    return {
        added
        for module in view.names
        if isinstance(module, tuner)
        for added, name in view.inside(module).items()
        if name.split(".")[0] not in ("", "base_layer")
    }


def _refuse_unused(argument: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raise if a pattern matches none of the names."""
    used = matching(patterns, names)
    unused = ", ".join(repr(pattern) for pattern in patterns if pattern not in used)
    if unused:
        raise ArgumentError(
            f"{argument} {unused} matches nothing in the model; correct or remove it"
        )


def _nothing_selected(
    argument: str,
    target: Target,
    known: list[PlannedLayer],
    skipped: list[PlannedLayer],
    unknown: Sequence[PlannedLayer],
) -> str:
    """Return the message of the error for a target that selects nothing that can be adapted."""
    asked = "the predicate" if callable(target) else f"{argument}={target!r}"
    if skipped:
        return f"{asked} selects only modules that can't be adapted: {_shown(skipped)}"
    if target == ALL_LINEAR and unknown:
        first = unknown[0]
        return f"{asked} selects no layer; {first.name}: {_reason_against(first)}"
    nearest = _nearest(str(target), (layer.name for layer in known if layer.slot is not None))
    near = f"; the nearest names are {nearest}" if nearest else ""
    return f"{asked} selects no layer that can be adapted{near}"


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """Return the names most similar to a pattern, as text; empty if there is no name."""
    # Only the end of the pattern is compared: the time grows with the product of both lengths.
    plain = re.sub(r"[^\w.]", "", pattern[-200:])
    return ", ".join(map(repr, difflib.get_close_matches(plain, filter(None, names), 5, 0.0)))


def _shown(layers: list[PlannedLayer]) -> str:
    """Return the names of weights and why they are not adapted."""
    reasons = grouped((layer.name or "(the model)", layer.reason) for layer in layers)
    return first_few(reasons, 5, "; ")


# --- other parameters, and counts ----------------------------------------------------------------


def _also_trained(view: ModelView, config: AdapterConfig) -> tuple[str, ...]:
    """Return the clean names of the parameters that `also_train` matches by any of their names."""
    matched = [
        parameter for parameter in view.parameters if matching(config.also_train, parameter.names)
    ]
    for parameter in matched:
        reason = _reason_against_training(parameter)
        if reason is not None:
            raise ArgumentError(
                f"also_train matches {parameter.name}: {reason}; give a regex that leaves it out"
            )
    names = [name for parameter in matched for name in parameter.names]
    _refuse_unused("also_train", config.also_train, names)
    return tuple(parameter.name for parameter in matched)


def _reason_against_training(parameter: ModelParameter) -> str | None:
    """Return why a parameter can't be trained with a new adapter."""
    if quantization_of(None, parameter.value) is not None:
        return "it is quantised and can't be trained with an adapter"
    if parameter.value.dtype not in BLOCK_DTYPES.values():
        return f"it has dtype {parameter.value.dtype} and can't be trained with an adapter"
    if parameter.is_claimed():
        return "it is already trained with another adapter, and can belong to only one"
    return None


def _with_counts(view: ModelView, plan: Plan) -> Plan:
    """Return a plan with what only its reader needs: the numbers of parameters."""
    blocks = [model_block.block.block for model_block in view.blocks()]
    total = plan.added + sum(map(count_values, blocks))
    trainable = plan.added + sum(count_values(block) for block in blocks if block.requires_grad)
    for parameter in view.parameters:
        if is_lazy(parameter.value):
            continue
        total += parameter.size
        stays = not plan.freeze or parameter.is_claimed()
        if parameter.name in plan.also_train or (stays and parameter.value.requires_grad):
            trainable += parameter.size
    return replace(plan, trainable=trainable, total=total)

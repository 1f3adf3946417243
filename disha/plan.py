"""Plan an injection: which weights, of what sizes, with what else trained. Changes nothing."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from disha import freezing, functional
from disha.config import (
    ALL_LINEAR,
    BLOCK_DTYPES,
    AdapterConfig,
    as_patterns,
    check_adapter_name,
)
from disha.errors import ArgumentError, ArgumentTypeError, TargetError
from disha.functional import Layout, Rows
from disha.layers import (
    CHILD_NAME,
    AdaptedLayer,
    Slot,
    declared_slots,
    device_of_weight,
    is_quantised,
    matrix_parameters,
    offloading_hooks,
    parameter_count,
    quantisation_of,
    read_weight,
    slot_of,
    stored_weight,
    weight_shape,
)
from disha.model import ModelParameter, ModelView, join
from disha.sharding import imported_class, is_sharded
from disha.tables import WIDEST, table
from disha.text import brief, printable

__all__ = [
    "Plan",
    "PlannedLayer",
    "SkippedModule",
    "Target",
    "UnknownLayout",
    "WeightRequest",
    "can_train",
    "claimed_names",
    "plan_adapters",
    "plan_injection",
    "plan_weights",
]

Target = str | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class PlannedLayer:
    """A weight that will be adapted, and the block it will get.

    Attributes:
        name: its name in the model, that of its module for `weight`; empty for the model itself.
        type_name: the name of its module's class.
        method: `"bone"` or `"bat"`.
        r: shard size.
        r_out: size of the output shard of a tile, or None.
        in_features: size of its input.
        out_features: size of its output.
        parameters: values in the block.
        layout: how the weight is laid out.
        module: the module.
        slot: where the weight is in it.
        dtype: dtype of the block, or None for the configuration's.
    """

    name: str
    type_name: str
    method: str
    r: int
    r_out: int | None
    in_features: int
    out_features: int
    parameters: int
    layout: str
    module: nn.Module = field(repr=False, compare=False)
    slot: Slot = field(repr=False, compare=False)
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class WeightRequest:
    """A weight to adapt by name, as a file describes it."""

    name: str
    r: int
    in_features: int
    out_features: int
    block_shape: tuple[int, ...]
    layout: Layout | None = None
    rows: Rows = ()
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class SkippedModule:
    """A module or a weight that was asked for and will not be adapted, and why.

    Attributes:
        name: its name in the model.
        type_name: the name of its class.
        reason: why it is not.
        is_weight: whether it is a weight that adapters are for, or a parameter that could be one;
            not what was excluded, nor a module that has neither.
    """

    name: str
    type_name: str
    reason: str
    is_weight: bool = False


@dataclass(frozen=True)
class UnknownLayout:
    """A matrix parameter that no target reaches, since nothing declares its layout.

    Attributes:
        name: its name in the model.
        shape: its shape.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def reason(self) -> str:
        """Why it is not adapted, and what to do."""
        return (
            f"the layout of this parameter of shape {self.shape} is unknown; declare it, such as "
            f"{self.remedy}"
        )

    @property
    def remedy(self) -> str:
        """What to pass to adapt it."""
        axes = {2: "out in", 3: "expert out in"}.get(len(self.shape), "out in *kernel")
        return f"layouts={{{re.escape(self.name) + '$'!r}: {axes!r}}}"


@dataclass(frozen=True)
class Plan:
    """What an injection would do; `print(plan)` shows it as a table.

    Attributes:
        adapter: the adapter's name.
        config: its configuration.
        freeze: whether all other parameters are frozen.
        layers: the weights that would be adapted.
        skipped: what was asked for and would not be adapted, with reasons.
        also_train: clean names of the parameters to be trained and saved with the adapter.
        added: parameters in the new blocks.
        trainable: parameters that would require gradients afterwards, in the whole model.
        total: parameters of the model afterwards, blocks included; a quantised weight counts as
            many as the dense one has.
        unknown: the matrix parameters of the model whose layouts nothing declares.
        tied: for each adapted parameter that several modules share, its names. Each of these
            modules gets a block of its own, which acts only where the model uses that module.

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
    skipped: tuple[SkippedModule, ...]
    also_train: tuple[str, ...]
    added: int
    trainable: int
    total: int
    unknown: tuple[UnknownLayout, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of all."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        rows = [
            (p.name or "(the model)", p.method, p.r, f"{p.in_features} -> {p.out_features}",
             f"{p.parameters:,}")
            for p in self.layers
        ]  # fmt: skip
        lines = [table(("layer", "method", "r", "in -> out", "parameters"), rows)]
        for skipped in self.skipped:
            lines.append(f"skipped {skipped.name} ({skipped.type_name}): {skipped.reason}")
        for one in self.unknown:
            lines.append(f"not adapted {one.name} {one.shape}: to adapt it, pass {one.remedy}")
        lines += [f"one parameter: {', '.join(names)}" for names in self.tied]
        if self.also_train:
            lines.append(f"also trained: {', '.join(self.also_train)}")
        lines.append(
            f"adapter {self.adapter!r}: {len(self.layers)} layers, {self.added:,} parameters; "
            f"trainable {self.trainable:,} of {self.total:,} ({self.percent:.3f}%)"
        )
        return "\n".join(lines)


def plan_adapters(
    model: nn.Module,
    target_regex: Target,
    r: int,
    *,
    method: str = "bone",
    layouts: Mapping[str, str] | None = None,
    rows: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    r_out: int | None = None,
    adapter: str = "default",
    exclude: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    dropout: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    init: str = "zeros",
    freeze: bool = True,
    also_train: str | Sequence[str] | None = None,
) -> Plan:
    """Return what `inject_adapters` would do with the same arguments; change nothing.

    Weights that r or r_out does not fit are listed as skipped. So is every matrix parameter whose
    layout nothing declares, with the argument that adapts it.

    Args:
        model: any model.
        target_regex: which layers, as for `inject_adapters`; so are all that follow.
        r: shard size.
        method: `"bone"` or `"bat"`.
        layouts: regex -> layout.
        rows: regex -> ranges of rows.
        r_out: size of the output shard.
        adapter: the adapter's name.
        exclude: regexes of names to leave out.
        rank_pattern: regex -> r.
        dropout: the blocks' dropout.
        scale: runtime scale.
        dtype: dtype of the blocks.
        init: how blocks start.
        freeze: whether everything else would be frozen.
        also_train: regexes of parameters to train too.

    Raises:
        DishaError: everything that `inject_adapters` would raise, except where r or r_out does not
            fit.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> plan = disha.plan_adapters(nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)), ".", r=2)
        >>> print(plan)
        layer  method  r  in -> out  parameters
        0      bone    2  8 -> 4              8
        skipped 1 (LayerNorm): no layer kind adapts LayerNorm
        adapter 'default': 1 layers, 8 parameters; trainable 8 of 52 (15.385%)
    """
    config = AdapterConfig(
        r=r,
        target=target_regex if isinstance(target_regex, str) else None,
        method=method,
        layouts=layouts or {},
        rows=rows or {},  # type: ignore[arg-type]
        r_out=r_out,
        exclude=as_patterns("exclude", exclude),
        rank_pattern=rank_pattern or {},
        dropout=dropout,
        scale=scale,
        dtype=dtype,
        init=init,
        also_train=as_patterns("also_train", also_train),
    )
    return plan_injection(ModelView(model), target_regex, config, adapter, freeze, strict=False)


def plan_injection(
    view: ModelView,
    target_regex: Target,
    config: AdapterConfig,
    adapter: str,
    freeze: bool,
    *,
    strict: bool,
) -> Plan:
    """Return the plan of an injection.

    Args:
        view: any model.
        target_regex: which weights.
        config: the adapter's configuration.
        adapter: the adapter's name.
        freeze: whether everything else is frozen.
        strict: raise where r or r_out does not fit a weight, instead of listing it as skipped.
    """
    _check_changeable(view, adapter)
    weights = _Weights(view, config)
    selected = weights.selected(target_regex)
    candidates, skipped = _divide(weights, selected, config, target_regex)
    _check_used(config, weights, candidates)
    layers, misfits = [], []
    for one in candidates:
        r = config.rank_of(*one.names)
        problem = functional.misfit(config.method, one.slot.layout, one.geometry, r, config.r_out)
        if problem is None:
            layers.append(_planned(one, config, r))
        else:
            misfits.append(SkippedModule(one.name, one.type_name, problem, True))
    if misfits and strict:
        raise ArgumentError(_misfit_message(misfits, config))
    also_trained = _match_parameters(config.also_train, view)
    plan = _counted_plan(
        view, adapter, config, freeze, tuple(layers), (*skipped, *misfits), also_trained
    )
    return replace(plan, unknown=weights.unknown, tied=_tied(view, layers))


def plan_weights(
    view: ModelView,
    adapter: str,
    config: AdapterConfig,
    requests: Sequence[WeightRequest],
    also_train: Mapping[str, tuple[int, ...]],
    freeze: bool,
) -> Plan:
    """Plan an adapter for weights that are known by name and size, as a file describes them.

    Args:
        view: any model.
        adapter: the adapter's name.
        config: its configuration; what it says of targets is not looked at.
        requests: the weights, each once.
        also_train: clean names of parameters to train too -> their shapes.
        freeze: whether everything else is frozen.

    Raises:
        ArgumentError: the name is taken, or weights or parameters are not there or of other sizes;
            one message lists all of them.
    """
    _check_changeable(view, adapter)
    by_name = _requested(view, requests)
    problems, layers = [], []
    for request in requests:
        one = by_name.get(request.name)
        problem = _unmet(request, one, config, view.modules)
        if problem is None and one is not None:
            layers.append(_planned(one, config, request.r, request.dtype))
        else:
            problems.append(f"{printable(request.name, WIDEST) or '(the model)'}: {problem}")
    for full, shape in also_train.items():
        problem = _unmet_parameter(view.parameters_by_name.get(full), shape)
        if problem is not None:
            problems.append(f"parameter {printable(full, WIDEST)}: {problem}")
    if problems:
        shown = "\n".join(problems[:20])
        more = f"\nand {len(problems) - 20} more" if len(problems) > 20 else ""
        known = list(dict.fromkeys((*view.modules, *by_name)))
        absent = next((r.name for r in requests if r.name not in known), None)
        if absent is not None:
            more += f"\nthe names nearest to {brief(absent)} are {_nearest(absent, known)}"
        raise ArgumentError(f"the adapter does not fit the model; nothing changed:\n{shown}{more}")
    trained = tuple(view.parameters_by_name[full].name for full in also_train)
    return _counted_plan(view, adapter, config, freeze, tuple(layers), (), trained)


def _requested(view: ModelView, requests: Sequence[WeightRequest]) -> dict[str, _Weight]:
    """Return the weights of a model by each of their names, those that a file lays out included."""
    found: dict[str, _Weight] = {}
    for module, module_aliases in view.names.items():
        for slot in declared_slots(module):
            one = _Weight(module, slot, module_aliases)
            found |= dict.fromkeys(one.names, one)
    wanted = {request.name: request for request in requests if request.layout is not None}
    for module, module_aliases in view.names.items():
        for parameter in matrix_parameters(module) if wanted else ():
            below = "" if parameter == "weight" else parameter
            for alias in module_aliases:
                request = wanted.get(join(alias, below))
                if request is not None and request.name not in found and request.layout is not None:
                    one = _Weight(module, slot_of(parameter, request.layout), module_aliases)
                    found |= dict.fromkeys(one.names, one)
    for request in requests:
        if request.rows and request.name in found:
            one = found[request.name]
            found |= dict.fromkeys(one.names, one.in_rows(request.rows))
    return found


def _unmet(
    request: WeightRequest,
    one: _Weight | None,
    config: AdapterConfig,
    modules: Mapping[str, nn.Module],
) -> str | None:
    """Return why a requested weight can't be adapted as described, or None."""
    if one is None:
        module = modules.get(request.name)
        if module is None:
            return "the model has no such layer"
        return f"can't be adapted: no layer kind adapts {type(module).__qualname__}"
    obstacle = one.obstacle(config.method)
    if obstacle is not None:
        return f"can't be adapted: {obstacle}"
    look = stored_weight if one.slot.opaque else read_weight
    weight = look(one.module, one.slot.parameter)
    if isinstance(weight, Tensor) and device_of_weight(one.module, weight).type == "meta":
        return "its weight is on the meta device; give the model its weights first"
    if request.layout is not None and request.layout != one.slot.layout:
        return f"expected the layout {request.layout}, the model has {one.slot.layout}"
    geometry = one.geometry
    if (geometry.in_features, geometry.out_features) != (request.in_features, request.out_features):
        return (
            f"expected {request.in_features} -> {request.out_features}, "
            f"the model has {geometry.in_features} -> {geometry.out_features}"
        )
    layout = one.slot.layout
    misfit = functional.misfit(config.method, layout, geometry, request.r, config.r_out)
    if misfit is not None:
        return misfit
    shape = one.block_shape(config.method, request.r, config.r_out)
    if shape != request.block_shape:
        return f"expected a block of shape {shape}, found {request.block_shape}"
    return None


def _unmet_parameter(one: ModelParameter | None, shape: tuple[int, ...]) -> str | None:
    """Return why a parameter can't be trained with the adapter as described, or None."""
    if one is None:
        return "the model has no such parameter"
    found = None if is_lazy(one.value) else tuple(one.value.shape)
    if found != shape:
        return f"expected shape {shape}, the model has {found}"
    if one.value.is_meta:
        return "it is on the meta device; give the model its weights first"
    return _untrainable(one)


# --- the weights of a model ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    """A weight that can be asked for: a slot of a module, with the module's names."""

    module: nn.Module
    slot: Slot
    module_names: tuple[str, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(join(name, self.slot.name) for name in self.module_names)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def searched(self) -> tuple[str, ...]:
        """The names that `layouts` and `rows` may match: those of the parameter as well."""
        return (*self.names, *(join(name, self.slot.parameter) for name in self.module_names))

    @property
    def type_name(self) -> str:
        return type(self.module).__qualname__

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return weight_shape(self.module, self.slot)

    @cached_property
    def geometry(self) -> functional.Geometry:
        return self.slot.layout.geometry(self.shape, self.slot.rows)

    @property
    def parameter(self) -> nn.Parameter | None:
        return self.module._parameters.get(self.slot.parameter)

    def block_shape(self, method: str, r: int, r_out: int | None) -> tuple[int, ...]:
        layout, rows = self.slot.layout, self.slot.rows
        return functional.block_shape(method, layout, self.shape, r, r_out, rows)

    def in_rows(self, rows: Rows) -> _Weight:
        return replace(self, slot=replace(self.slot, rows=rows))

    def obstacle(self, method: str) -> str | None:
        """Return why `method` can't adapt the weight, or None if it can."""
        module, slot = self.module, self.slot
        if hasattr(module, CHILD_NAME) and not isinstance(module, AdaptedLayer):
            return f"it has an attribute {CHILD_NAME!r} of its own, where the adapters would be"
        if slot.opaque:  # never read
            quantisation = quantisation_of(module, stored_weight(module, slot.parameter))
            unreadable = quantisation is not None and quantisation.read is None
            if unreadable and functional.method_of(method).reads_weight:
                assert quantisation is not None
                return (
                    f"its weight is quantised ({quantisation.name}) and can't be read as numbers; "
                    f"{method!r} needs to, 'bone' does not"
                )
            return _impossible_rows(self)
        weight = read_weight(module, slot.parameter)
        if isinstance(weight, UninitializedParameter):
            return "its weight is not initialised yet; run the model once before injecting"
        # Of any floating-point dtype: hooks of the user's may cast it before each forward.
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            return "its weight is not a floating-point tensor"
        if weight.layout is not torch.strided:
            return "its weight is sparse; store it as a dense tensor (Tensor.to_dense)"
        if is_sharded(weight):
            return (
                "its weight is a DTensor of a tensor-parallel plan, of which every rank has a "
                "part; adapters are not supported there"
            )
        return slot.layout.misfit(weight.shape) or _impossible_rows(self)


def _impossible_rows(one: _Weight) -> str | None:
    out_features = one.slot.layout.geometry(weight_shape(one.module, one.slot)).out_features
    beyond = [rows for rows in one.slot.rows if rows[1] > out_features]
    return f"rows {beyond[0]} are out of range, it has {out_features}" if beyond else None


PRELOADED = (
    "accelerate brings its weight together with all others of a module around it "
    "(preload_module_classes), and would look for the block there; inject first, then offload"
)


class _Weights:
    """The weights of a model that can be asked for, and the matrix parameters that can't.

    Attributes:
        view: the model.
        found: the weights whose layouts are known.
        unknown_of: the matrix parameters whose layouts are not, by module.
        owner_names: the `out_proj` of each nn.MultiheadAttention -> the names of the attention,
            which reads that weight itself.
        preloaded: the modules whose weights accelerate brings together with those around them.
    """

    def __init__(self, view: ModelView, config: AdapterConfig) -> None:
        self.view = view
        self.found: list[_Weight] = []
        self.unknown_of: dict[nn.Module, list[UnknownLayout]] = {}
        self._config = config
        self.preloaded: set[nn.Module] = set()
        for module, aliases in view.names.items():
            if any(hook.place_submodules for hook in offloading_hooks(module)):
                self.preloaded |= set(view.inside(module))
            self._add(module, aliases)
        self.owner_names: dict[nn.Module, tuple[str, ...]] = {
            module.out_proj: aliases
            for module, aliases in view.names.items()
            if isinstance(module, nn.MultiheadAttention)
        }

    @property
    def unknown(self) -> tuple[UnknownLayout, ...]:
        """The matrix parameters whose layouts nothing declares."""
        return tuple(one for some in self.unknown_of.values() for one in some)

    def _add(self, module: nn.Module, aliases: tuple[str, ...]) -> None:
        slots = {slot.name: slot for slot in declared_slots(module)}
        parameters = {slot.parameter for slot in slots.values()}
        opaque = any(slot.opaque for slot in slots.values())
        for name in () if opaque else matrix_parameters(module):
            below = "" if name == "weight" else name
            full = tuple(join(alias, below) for alias in aliases)
            searched = dict.fromkeys((*full, *(join(alias, name) for alias in aliases)))
            hits = [
                pattern
                for pattern in self._config.layouts
                if any(re.search(pattern, alias) for alias in searched)
            ]
            if hits:
                layout = functional.layout_of(self._config.layouts[hits[0]])
                shape = tuple(module._parameters[name].shape)  # type: ignore[union-attr]
                misfit = layout.misfit(shape)
                if misfit is not None:
                    raise ArgumentError(
                        f"layouts={{{hits[0]!r}: {layout.pattern!r}}} does not fit {full[0]}: "
                        f"{misfit}; give it a layout with as many axes"
                    )
                slots = {k: slot for k, slot in slots.items() if slot.parameter != name}
                slots[below] = slot_of(name, layout)
            elif name not in parameters:
                self.unknown_of.setdefault(module, []).append(
                    UnknownLayout(join(aliases[0], name), tuple(module._parameters[name].shape))  # type: ignore[union-attr]
                )
        self.found += [self._in_rows(_Weight(module, slot, aliases)) for slot in slots.values()]

    def _in_rows(self, one: _Weight) -> _Weight:
        for pattern, rows in self._config.rows.items():
            if any(re.search(pattern, name) for name in one.searched):
                return one.in_rows(rows)
        return one

    def selected(self, target: Target) -> list[_Weight]:
        """Return the weights that a target selects."""
        if target == ALL_LINEAR:
            beside = _parts_of_other_adapters(self.view)
            tables = (m for m in self.view.names if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
            tied = {id(m._parameters.get("weight")) for m in tables} - {id(None)}
            return [
                one
                for one in self.found
                if one.slot.linear and id(one.parameter) not in tied and one.module not in beside
            ]
        matches = _predicate(target)
        asked = {m for m, aliases in self.view.names.items() if matches(aliases, m)}
        # torch's attention keeps its last projection in a child, and reads that child's weight.
        asked |= {m.out_proj for m in asked if isinstance(m, nn.MultiheadAttention)}
        return [o for o in self.found if o.module in asked or matches(o.names, o.module)]


def _predicate(target: object) -> Callable[[tuple[str, ...], nn.Module], bool]:
    if isinstance(target, str):
        search = re.compile(target).search
        return lambda names, module: any(search(name) for name in names)
    if callable(target):
        return lambda names, module: bool(target(names[0], module))
    raise ArgumentTypeError(
        f"target_regex must be a regex, {ALL_LINEAR!r} or a predicate (name, module) -> bool, "
        f"got {target!r} of type {type(target).__name__}"
    )


def _parts_of_other_adapters(view: ModelView) -> set[nn.Module]:
    """Return the modules that PEFT has added beside the layers that it adapts."""
    tuner = imported_class("peft.tuners.tuners_utils", "BaseTunerLayer")
    return {
        inner
        for module in view.names
        if tuner is not None and isinstance(module, tuner)
        for inner, name in view.inside(module).items()
        if name and name.split(".")[0] != "base_layer"
    }


# --- what is asked for ---------------------------------------------------------------------------


def _check_changeable(view: ModelView, adapter: str) -> None:
    """Raise unless an adapter of this name can be added to the model."""
    check_adapter_name(adapter)
    view.refuse_inside("add an adapter")
    view.refuse_wrapped(
        "add an adapter",
        "inject first, then wrap. Into an adapter that is there, load_adapter can load with "
        "replace=True",
    )
    if adapter in view.adapters:
        raise ArgumentError(
            f"the model has an adapter {adapter!r} already; choose another name, or remove it "
            f"with remove_adapters(model, {adapter!r})"
        )


def _divide(
    weights: _Weights, selected: list[_Weight], config: AdapterConfig, target: Target
) -> tuple[list[_Weight], tuple[SkippedModule, ...]]:
    """Divide what is selected into weights to adapt and those to skip, with reasons."""
    used: set[str] = set()
    candidates, skipped = [], []
    for one in selected:
        aliases = (*one.names, *one.module_names, *weights.owner_names.get(one.module, ()))
        hits = _hits(config.exclude, aliases)
        used |= hits
        reason = "excluded" if hits else one.obstacle(config.method)
        if reason is None and one.module in weights.preloaded:
            reason = PRELOADED
        if reason is None:
            candidates.append(one)
        else:
            skipped.append(SkippedModule(one.name, one.type_name, reason, not hits))
    if target != ALL_LINEAR:
        beside, hits = _without_layout(weights, target, config.exclude)
        skipped += beside
        used |= hits
    _check_all_used("exclude", config.exclude, used, "no module that the target selects")
    if not candidates:
        raise TargetError(_nothing_matched(target, weights, skipped, config.method))
    return candidates, tuple(skipped)


def _without_layout(
    weights: _Weights, target: Target, exclude: tuple[str, ...]
) -> tuple[list[SkippedModule], set[str]]:
    """Return what else a target matches and nothing declares, and the patterns that exclude it."""
    matches = _predicate(target)
    known = {one.module for one in weights.found}
    skipped: list[SkippedModule] = []
    used: set[str] = set()
    for module, aliases in weights.view.names.items():
        type_name, whole = type(module).__qualname__, matches(aliases, module)
        unknown = weights.unknown_of.get(module, [])
        if whole:
            used |= _hits(exclude, aliases)
        if whole and module not in known and not unknown and _has_parameters(module):
            reason = f"no layer kind adapts {type_name}"
            skipped.append(SkippedModule(aliases[0], type_name, reason))
        for one in unknown:
            if not whole and not matches((one.name,), module):
                continue
            hits = _hits(exclude, (*aliases, one.name))
            used |= hits
            reason = "excluded" if hits else one.reason
            skipped.append(SkippedModule(one.name, type_name, reason, is_weight=not hits))
    return skipped, used


def _has_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _hits(patterns: Iterable[str], names: Sequence[str]) -> set[str]:
    """Return the patterns that are found in any of the names."""
    return {p for p in patterns if any(re.search(p, name) for name in names)}


def _nothing_matched(
    target: Target, weights: _Weights, skipped: list[SkippedModule], method: str
) -> str:
    asked = repr(target) if isinstance(target, str) else "the predicate"
    if skipped:
        shown = "; ".join(f"{s.name} ({s.type_name}): {s.reason}" for s in skipped[:5])
        more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        return f"{asked} selects only modules that can't be adapted: {shown}{more}"
    adaptable = [one.name for one in weights.found if not one.obstacle(method)]
    if not adaptable:
        return f"{asked} selects nothing: the model has no layer that can be adapted"
    nearest = _nearest(target if isinstance(target, str) else "", adaptable)
    return f"{asked} selects no layer that can be adapted; the nearest names are {nearest}"


def _nearest(pattern: str, names: list[str]) -> str:
    # Only the pattern's end: the time to compare grows with the product of both lengths.
    plain = re.sub(r"[^\w.]", "", pattern[-200:].replace("\\.", "."))
    last = plain.rsplit(".", 1)[-1]

    def likeness(name: str) -> float:
        parts = ((plain, name), (last, name.rsplit(".", 1)[-1]))
        return max(difflib.SequenceMatcher(None, a, b).ratio() for a, b in parts)

    best = sorted(names, key=likeness, reverse=True)[:5]
    return ", ".join(repr(name) for name in best)


# --- what follows from it ------------------------------------------------------------------------


def _planned(
    one: _Weight, config: AdapterConfig, r: int, dtype: torch.dtype | None = None
) -> PlannedLayer:
    geometry = one.geometry
    return PlannedLayer(
        name=one.name,
        type_name=one.type_name,
        method=config.method,
        r=r,
        r_out=config.r_out,
        in_features=geometry.in_features,
        out_features=geometry.out_features,
        parameters=math.prod(one.block_shape(config.method, r, config.r_out)),
        layout=one.slot.layout.pattern,
        module=one.module,
        slot=one.slot,
        dtype=dtype,
    )


def _check_all_used(argument: str, patterns: Iterable[str], used: set[str], nothing: str) -> None:
    idle = [pattern for pattern in patterns if pattern not in used]
    if idle:
        raise ArgumentError(
            f"{argument} {', '.join(map(repr, idle))} matches {nothing}; correct or remove it"
        )


def _check_used(config: AdapterConfig, weights: _Weights, targets: list[_Weight]) -> None:
    """Raise if a regex that sets something for some targets matches none of them."""
    names = [name for one in targets for name in one.names]
    searched = [name for one in targets for name in one.searched]
    for argument, patterns, found in (
        ("rank_pattern", config.rank_pattern, names),
        ("layouts", config.layouts, searched),
        ("rows", config.rows, searched),
    ):
        _check_all_used(argument, patterns, _hits(patterns, found), "none of the targets")


def _misfit_message(misfits: list[SkippedModule], config: AdapterConfig) -> str:
    shown = "; ".join(f"{one.name or '(the model)'}: {one.reason}" for one in misfits[:10])
    more = f"; and {len(misfits) - 10} more" if len(misfits) > 10 else ""
    sizes_that_fit = "Choose a smaller r"
    if config.r_out is not None:
        sizes_that_fit += ", or an r_out that divides the outputs of all"
    return (
        f"{shown}{more}. {sizes_that_fit}, give these layers their own r with rank_pattern=, "
        "or leave them out with exclude="
    )


def _tied(view: ModelView, layers: Sequence[PlannedLayer]) -> tuple[tuple[str, ...], ...]:
    """Return the names of planned weights that are one parameter in several modules."""
    planned = {id(layer.module._parameters.get(layer.slot.parameter)) for layer in layers}
    return tuple(
        tuple(dict.fromkeys(one.names))
        for one in view.parameters
        if len(set(one.names)) > 1 and id(one.value) in planned
    )


def can_train(parameter: nn.Parameter) -> bool:
    """Whether a parameter is of a dtype that can be trained and saved."""
    return parameter.dtype in BLOCK_DTYPES.values()


def _match_parameters(patterns: tuple[str, ...], view: ModelView) -> tuple[str, ...]:
    """Return the clean names of the parameters that any pattern matches by any of their names."""
    matched: list[str] = []
    used: set[str] = set()
    for one in view.parameters if patterns else ():
        hits = _hits(patterns, one.names)
        used |= hits
        if not hits:
            continue
        problem = _untrainable(one)
        if problem is not None:
            raise ArgumentError(f"also_train matches {one.name}, which {problem}")
        matched.append(one.name)
    _check_all_used("also_train", patterns, used, "no parameter")
    return tuple(matched)


def _untrainable(one: ModelParameter) -> str | None:
    """Return why a parameter can't be trained with a new adapter, or None."""
    if is_quantised(one.value):
        return "is quantised and can't be trained with an adapter"
    if not can_train(one.value):
        return f"has dtype {one.value.dtype} and can't be trained with an adapter"
    if one.attribute in freezing.claimed(one.module):
        return "is trained with another adapter already, and can't have values for two"
    return None


def _counted_plan(
    view: ModelView,
    adapter: str,
    config: AdapterConfig,
    freeze: bool,
    layers: tuple[PlannedLayer, ...],
    skipped: tuple[SkippedModule, ...],
    also_train: tuple[str, ...],
) -> Plan:
    counted = [
        (one.name, one.value, parameter_count(one.value))
        for one in view.parameters
        if not is_lazy(one.value)
    ]
    kept = claimed_names(view)
    blocks = [block.block for _, layer in view.layers for block in layer.disha.blocks().values()]
    added = sum(layer.parameters for layer in layers)
    trainable = sum(
        numel
        for full, p, numel in counted
        if full in also_train or (p.requires_grad and (not freeze or full in kept))
    )
    return Plan(
        adapter=adapter,
        config=config,
        freeze=freeze,
        layers=layers,
        skipped=skipped,
        also_train=also_train,
        added=added,
        trainable=added + trainable + sum(b.numel() for b in blocks if b.requires_grad),
        total=added + sum(n for _, _, n in counted) + sum(b.numel() for b in blocks),
    )


def claimed_names(view: ModelView) -> set[str]:
    """Return the clean names of parameters that adapters train already."""
    return {one.name for one in view.parameters if one.attribute in freezing.claimed(one.module)}

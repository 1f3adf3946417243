"""Plan an injection: which weights get which blocks, and what else is trained. Changes nothing.

A plan starts from the `Candidate`s of a model. A target or a file selects some of them. Each of
these becomes a `PlannedLayer`, or the plan says why it can't. Functions whose names end with
`problem` return this reason, or None if there is no problem.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from disha import freezing, functional
from disha.candidates import Candidate, UnknownLayout, as_declared, candidates_of
from disha.config import (
    ALL_LINEAR,
    BLOCK_DTYPES,
    AdapterConfig,
    AdapterOptions,
    check_names,
)
from disha.errors import ArgumentError, ArgumentTypeError, TargetError
from disha.functional import Geometry, Layout, Rows
from disha.layers import Slot, check_adapter_name, is_quantised, parameter_count
from disha.model import ModelParameter, ModelView
from disha.sharding import imported_class
from disha.tables import WIDEST, table
from disha.text import brief, counted, first_few, grouped, printable

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Plan",
    "PlannedLayer",
    "SkippedModule",
    "Target",
    "WeightRequest",
    "check_addable",
    "plan_adapters",
    "plan_injection",
    "plan_weights",
]

Target = str | Sequence[str] | Callable[[str, nn.Module], bool]


# --- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedLayer:
    """A weight that will be adapted, and the block that it will get.

    Attributes:
        name: its name in the model; a `weight` has the name of its module. Empty if the module is
            the model itself.
        type_name: the name of its module's class.
        method: the method's name, such as `"bone"`.
        r: shard size.
        r_out: size of the output shard of a tile, or None.
        in_features: size of its input.
        out_features: size of its output.
        parameters: number of values in the block.
        layout: the weight's layout.
        module: the module.
        slot: the place of the weight in the module.
        dtype: dtype of the block, or None for that of the configuration.
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
class SkippedModule:
    """A module or a weight that the target selects but that can't be adapted, and why.

    Attributes:
        name: its name in the model.
        type_name: the name of its class.
        reason: why it is not adapted.
        is_weight: whether it is a weight or another matrix parameter. False if `exclude` leaves it
            out, and for a module without such parameters.
    """

    name: str
    type_name: str
    reason: str
    is_weight: bool = False


@dataclass(frozen=True)
class Plan:
    """What an injection would do; `print(plan)` shows it as a table.

    Attributes:
        adapter: the adapter's name.
        config: its configuration.
        freeze: whether all other parameters are frozen.
        layers: the weights that would be adapted.
        skipped: what the target selects but would not be adapted, with reasons.
        also_train: clean names of the parameters to be trained and saved with the adapter.
        added: number of parameters in the new blocks.
        trainable: number of parameters in the model that would require gradients afterwards.
        total: number of parameters of the model afterwards, blocks included. A quantised weight
            counts as a dense one.
        unknown: the matrix parameters of the model whose layouts are unknown.
        tied: the names of each adapted parameter that several modules share. Each of these modules
            gets its own block, which acts only when the model uses that module.
        convolutions: the convolutions that could be adapted, but that `"all-linear"` leaves out.

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
    convolutions: tuple[str, ...] = ()

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
        if self.convolutions:
            lines.append(
                f"not adapted: {counted(len(self.convolutions), 'convolution')} "
                f"({first_few(self.convolutions, 3, ', ')}), which {ALL_LINEAR!r} leaves out: to "
                'adapt them, pass a predicate such as lambda name, module: "Conv" in '
                "type(module).__name__"
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


def plan_adapters(
    model: nn.Module,
    target_regex: Target | None = None,
    r: int | None = None,
    **options: Unpack[AdapterOptions],
) -> Plan:
    """Return what `inject_adapters` would do with the same arguments; change nothing.

    The plan lists weights that r or r_out does not fit as skipped. It also lists every matrix
    parameter of unknown layout, with the argument that would adapt it.

    Args:
        model: any model.
        target_regex: the weights to adapt. All arguments are as for `inject_adapters`.
        r: shard size.
        options: the other arguments of `inject_adapters`.

    Raises:
        DishaError: as for `inject_adapters`, but not if r or r_out does not fit a weight.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> plan = disha.plan_adapters(nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)), ".", r=2)
        >>> print(plan)
        layer  method  r  in -> out  parameters
        0      bone    2  8 -> 4              8
        skipped 1 (LayerNorm): no layer kind adapts LayerNorm
        adapter 'default': 1 layer, 8 parameters; trainable 8 of 52 (15.385%)
    """
    return plan_injection(ModelView(model), target_regex, r, options, strict=False)


def plan_injection(
    view: ModelView,
    target_regex: Target | None,
    r: int | None,
    options: AdapterOptions,
    *,
    strict: bool,
) -> Plan:
    """Plan an injection. If r or r_out does not fit a weight, raise if `strict`, else list it."""
    check_names(options)
    target_regex = _checked_target(target_regex)
    settings: Any = dict(options)
    adapter, freeze = settings.pop("adapter", "default"), settings.pop("freeze", True)
    target = None if callable(target_regex) else target_regex
    config = AdapterConfig(r, target, **settings)  # type: ignore[arg-type]  # it checks r
    check_addable(view, adapter)
    candidates = as_declared(candidates_of(view), config.layouts, config.rows)
    selected = _selected(view, candidates, target_regex)
    wanted, skipped = _wanted_and_skipped(view, selected, config)
    if not wanted:
        raise TargetError(
            _nothing_selected_message(target_regex, candidates, skipped, config.method)
        )
    _refuse_unused_settings(config, candidates, wanted)
    layers, misfits = [], []
    for one in wanted:
        r = config.rank_of(*one.names)
        problem = one.misfit(config, r)
        if problem is None:
            layers.append(_planned(one, config, r))
        else:
            misfits.append(SkippedModule(one.name, one.type_name, problem, True))
    if misfits and strict:
        raise ArgumentError(_misfit_message(misfits, config))
    trained = _also_trained(view, config)
    plan = _counted_plan(view, adapter, config, freeze, layers, trained, with_others=not strict)
    return replace(
        plan,
        skipped=(*skipped, *misfits),
        unknown=tuple(one.unknown for one in candidates if one.unknown is not None),
        tied=_tied(view, layers),
        convolutions=tuple(
            one.name
            for one in (candidates if target_regex == ALL_LINEAR else ())
            if one.slot is not None
            and one.layout.has_kernel
            and one.obstacle(config.method) is None
        ),
    )


# --- planning by a file --------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightRequest:
    """A weight to adapt by name, as a file describes it.

    Attributes:
        name: its name in the model.
        r: shard size.
        geometry: the sizes of its adapted part.
        layout: its layout.
        rows: the adapted outputs; empty for all.
        dtype: dtype of the block.
    """

    name: str
    r: int
    geometry: Geometry
    layout: Layout
    rows: Rows
    dtype: torch.dtype


def plan_weights(
    view: ModelView,
    adapter: str,
    config: AdapterConfig,
    requests: Sequence[WeightRequest],
    also_train: Mapping[str, tuple[int, ...]],
    freeze: bool,
) -> Plan:
    """Plan an adapter for weights that a file describes by name and size.

    Args:
        view: any model.
        adapter: the adapter's name.
        config: its configuration. Its targets are ignored.
        requests: the weights, each once.
        also_train: clean names of parameters to train too -> their shapes.
        freeze: whether everything else is frozen.

    Raises:
        ArgumentError: the name is taken, or weights or parameters are missing or have other sizes.
            The message lists all of them.
    """
    check_addable(view, adapter)
    by_name = {name: one for one in candidates_of(view) for name in _names_in_files(one)}
    problems, layers = [], []
    for request in requests:
        found = by_name.get(request.name)
        one = None if found is None else _as_requested(found, request)
        problem = _request_problem(request, one, config)
        if one is None or problem is not None:
            problems.append(f"{printable(request.name, WIDEST) or '(the model)'}: {problem}")
        else:
            layers.append(_planned(one, config, request.r, request.dtype))
    for full, shape in also_train.items():
        problem = _parameter_problem(view.parameters_by_name.get(full), shape)
        if problem is not None:
            problems.append(f"parameter {printable(full, WIDEST)}: {problem}")
    if problems:
        message = f"the adapter does not fit the model; nothing changed:\n{first_few(problems, 20)}"
        absent = next((one.name for one in requests if one.name not in by_name), None)
        nearest = "" if absent is None else _nearest(absent, by_name)
        if nearest:
            message += f"\nthe names nearest to {brief(absent)} are {nearest}"
        raise ArgumentError(message)
    trained = tuple(view.parameters_by_name[full].name for full in also_train)
    return _counted_plan(view, adapter, config, freeze, layers, trained, with_others=False)


def _names_in_files(one: Candidate) -> tuple[str, ...]:
    """Return the names by which a file may ask for a candidate.

    A parameter of unknown layout can be asked for too, because the file has its layout.
    """
    return one.parameter_names if one.slot is None else one.names


def _as_requested(one: Candidate, request: WeightRequest) -> Candidate:
    """Return the weight with the rows of the file, and with its layout if none is known."""
    if one.unknown is not None:
        one = one.laid_out(request.layout)
    return one.in_rows(request.rows) if request.rows and one.slot is not None else one


def _request_problem(
    request: WeightRequest, one: Candidate | None, config: AdapterConfig
) -> str | None:
    """Return why a requested weight can't be adapted as described, or None."""
    if one is None:
        return "the model has no such layer"
    obstacle = one.obstacle(config.method)
    if obstacle is not None:
        return f"can't be adapted: {obstacle}"
    if one.is_meta:
        return "its weight is on the meta device; give the model its weights first"
    if request.layout != one.layout:
        return f"expected the layout {request.layout}, found {one.layout} in the model"
    if request.geometry != one.geometry:
        return f"expected {_sizes(request.geometry)}, found {_sizes(one.geometry)} in the model"
    return one.misfit(config, request.r)


def _sizes(geometry: Geometry) -> str:
    stack = "".join(f"{size} x " for size in geometry.stack)
    return f"{stack}{geometry.in_features} -> {geometry.out_features}"


def _parameter_problem(one: ModelParameter | None, shape: tuple[int, ...]) -> str | None:
    """Return why a parameter can't be trained with the adapter as described, or None."""
    if one is None:
        return "the model has no such parameter"
    found = None if is_lazy(one.value) else tuple(one.value.shape)
    if found != shape:
        return f"expected shape {shape}, found {found} in the model"
    if one.value.is_meta:
        return "it is on the meta device; give the model its weights first"
    return _training_problem(one)


# --- selecting candidates ------------------------------------------------------------------------


def check_addable(
    view: ModelView,
    adapter: str,
    action: str = "add an adapter",
    before_wrapping: str = "inject first, then wrap. To load into an existing adapter, pass "
    "replace=True to load_adapter",
) -> None:
    """Raise unless an adapter of this name can be added to the model.

    Args:
        view: the model.
        adapter: the name.
        action: what was asked for, for errors.
        before_wrapping: what to do if DDP or FSDP wraps the model.
    """
    check_adapter_name(adapter)
    view.refuse_inside(action)
    view.refuse_wrapped(action, before_wrapping)
    if view.has(adapter):
        raise ArgumentError(
            f"the model has an adapter {adapter!r} already; choose another name, or remove it "
            f"with remove_adapters(model, {adapter!r})"
        )


def _checked_target(target: Any) -> Target:
    several = isinstance(target, (list, tuple)) and target
    if callable(target) or isinstance(target, str) or several:
        return target  # type: ignore[no-any-return]
    raise ArgumentTypeError(
        f"target_regex must be a regex, a list of them, {ALL_LINEAR!r} or a predicate "
        f"(name, module) -> bool, got {target!r} of type {type(target).__name__}"
    )


def _selected(view: ModelView, candidates: list[Candidate], target: Target) -> list[Candidate]:
    """Return the candidates that a target selects."""
    parts = target if isinstance(target, (list, tuple)) else [target]
    linear = set(_all_linear(view, candidates)) if ALL_LINEAR in parts else set()
    matches = _matcher([part for part in parts if part != ALL_LINEAR])
    modules = {module for module, names in view.names.items() if matches(names, module)}
    # nn.MultiheadAttention itself reads the weight of its child `out_proj`.
    modules |= {m.out_proj for m in modules if isinstance(m, nn.MultiheadAttention)}
    return [
        one
        for one in candidates
        if one in linear
        or (
            (one.module in modules or matches(one.names, one.module))
            and (one.attribute or _has_parameters(one.module))
        )
    ]


def _all_linear(view: ModelView, candidates: list[Candidate]) -> list[Candidate]:
    """Return the linear weights, without output heads that are tied to an embedding."""
    added = _modules_added_by_peft(view)
    tables = (one for one in candidates if isinstance(one.module, _TABLES))
    embeddings = {id(one.parameter) for one in tables} - {id(None)}
    return [
        one
        for one in candidates
        if one.slot is not None
        and one.slot.linear
        and id(one.parameter) not in embeddings
        and one.module not in added
    ]


_TABLES = (nn.Embedding, nn.EmbeddingBag)


def _has_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _matcher(parts: Sequence[Any]) -> Callable[[tuple[str, ...], nn.Module], bool]:
    """Return a function of a module's names and the module: whether a part selects it."""
    searches = [re.compile(part).search for part in parts if isinstance(part, str)]
    predicates = [part for part in parts if not isinstance(part, str)]
    return lambda names, module: (
        any(search(name) for search in searches for name in names)
        or any(predicate(names[0], module) for predicate in predicates)
    )


def _modules_added_by_peft(view: ModelView) -> set[nn.Module]:
    """Return the modules that PEFT has added beside the layers that it adapts."""
    tuner = imported_class("peft.tuners.tuners_utils", "BaseTunerLayer")
    return {
        inner
        for module in view.names
        if tuner is not None and isinstance(module, tuner)
        for inner, name in view.inside(module).items()
        if name and name.split(".")[0] != "base_layer"
    }


def _wanted_and_skipped(
    view: ModelView, selected: list[Candidate], config: AdapterConfig
) -> tuple[list[Candidate], list[SkippedModule]]:
    """Return those of the selected candidates that can be adapted, and the others with reasons."""
    # `exclude` may also name the output projection of torch's attention by the attention's name.
    attentions: dict[nn.Module, tuple[str, ...]] = {
        module.out_proj: names
        for module, names in view.names.items()
        if isinstance(module, nn.MultiheadAttention)
    }
    wanted, skipped = [], []
    for one in selected:
        names = (*one.names, *one.module_names, *attentions.get(one.module, ()))
        excluding = _matching(config.exclude, names)
        reason = "excluded" if excluding else one.obstacle(config.method)
        if reason is None:
            wanted.append(one)
        else:
            is_weight = bool(one.attribute) and not excluding
            skipped.append(SkippedModule(one.name, one.type_name, reason, is_weight))
    return wanted, skipped


def _refuse_unused_settings(
    config: AdapterConfig, candidates: list[Candidate], wanted: list[Candidate]
) -> None:
    """Raise if a regex matches nothing: `exclude` and `rank_pattern` may match any module."""
    modules = [name for one in candidates for name in (*one.names, *one.module_names)]
    parameters = [name for one in wanted for name in one.parameter_names]
    for argument, patterns, searched, nothing in (
        ("exclude", config.exclude, modules, "no module of the model"),
        ("rank_pattern", config.rank_pattern, modules, "no module of the model"),
        ("layouts", config.layouts, parameters, "none of the targets"),
        ("rows", config.rows, parameters, "none of the targets"),
    ):
        _refuse_unused(argument, patterns, _matching(patterns, searched), nothing)


def _refuse_unused(argument: str, patterns: Iterable[str], used: set[str], nothing: str) -> None:
    """Raise if a pattern is not used; `nothing` says what it should have matched."""
    unused = [pattern for pattern in patterns if pattern not in used]
    if unused:
        raise ArgumentError(
            f"{argument} {', '.join(map(repr, unused))} matches {nothing}; correct or remove it"
        )


def _matching(patterns: Iterable[str], names: Sequence[str]) -> set[str]:
    """Return the patterns that are found in any of the names."""
    return {p for p in patterns if any(re.search(p, name) for name in names)}


def _nothing_selected_message(
    target: Target, candidates: list[Candidate], skipped: list[SkippedModule], method: str
) -> str:
    """Return the message of the error for a target that selects nothing that can be adapted."""
    asked = "the predicate" if callable(target) else f"target_regex={target!r}"
    if skipped:
        reasons = grouped((f"{s.name} ({s.type_name})", s.reason) for s in skipped)
        shown = first_few(reasons, 5, "; ")
        return f"{asked} selects only modules that can't be adapted: {shown}"
    adaptable = [one.name for one in candidates if one.obstacle(method) is None]
    if not adaptable:
        return f"{asked} selects nothing, because the model has no layer that can be adapted"
    nearest = _nearest("" if callable(target) else str(target), adaptable)
    if not nearest:
        return f"{asked} does not select the model itself, its only layer; pass '^$'"
    return f"{asked} selects no layer that can be adapted; the nearest names are {nearest}"


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """Return the names most similar to a pattern, as text; empty if no module has a name."""
    # Only the end of the pattern is compared: the time grows with the product of both lengths.
    plain = re.sub(r"[^\w.]", "", pattern[-200:].replace("\\.", "."))
    last = plain.rsplit(".", 1)[-1]

    def likeness(name: str) -> float:
        parts = ((plain, name), (last, name.rsplit(".", 1)[-1]))
        return max(difflib.SequenceMatcher(None, a, b).ratio() for a, b in parts)

    best = sorted(filter(None, names), key=likeness, reverse=True)[:5]
    return ", ".join(map(repr, best))


def _misfit_message(misfits: list[SkippedModule], config: AdapterConfig) -> str:
    """Return the message of the error for weights that r or r_out does not fit."""
    shown = first_few(grouped((s.name or "(the model)", s.reason) for s in misfits), 3, "; ")
    remedy = "Choose a smaller `r`"
    if config.r_out is not None:
        remedy += ", or an `r_out` that divides the outputs of all"
    return (
        f"{shown}. {remedy}, give these layers their own r (`rank_pattern`), "
        "or leave them out (`exclude`)"
    )


# --- planned layers and parameters ---------------------------------------------------------------


def _planned(
    one: Candidate, config: AdapterConfig, r: int, dtype: torch.dtype | None = None
) -> PlannedLayer:
    """Return a weight with the block that it will get."""
    assert one.slot is not None
    geometry = one.geometry
    method = functional.method_of(config.method)
    shape = method.block_shape(one.layout, one.shape, r, config.r_out, one.rows)
    return PlannedLayer(
        name=one.name,
        type_name=one.type_name,
        method=config.method,
        r=r,
        r_out=config.r_out,
        in_features=geometry.in_features,
        out_features=geometry.out_features,
        parameters=math.prod(shape),
        layout=one.layout.pattern,
        module=one.module,
        slot=one.slot,
        dtype=dtype,
    )


def _tied(view: ModelView, layers: Iterable[PlannedLayer]) -> tuple[tuple[str, ...], ...]:
    """Return the names of each planned weight that several modules share."""
    planned = {id(layer.module._parameters.get(layer.slot.parameter)) for layer in layers}
    return tuple(
        one.names for one in view.parameters if len(one.names) > 1 and id(one.value) in planned
    )


def _also_trained(view: ModelView, config: AdapterConfig) -> tuple[str, ...]:
    """Return the clean names of the parameters that `also_train` matches by any of their names."""
    matched: list[str] = []
    used: set[str] = set()
    for one in view.parameters if config.also_train else ():
        matching = _matching(config.also_train, one.names)
        used |= matching
        if not matching:
            continue
        problem = _training_problem(one)
        if problem is not None:
            raise ArgumentError(
                f"also_train matches {one.name}, which {problem}; give a regex that leaves it out"
            )
        matched.append(one.name)
    _refuse_unused("also_train", config.also_train, used, "no parameter")
    return tuple(matched)


def _training_problem(one: ModelParameter) -> str | None:
    """Return why a parameter can't be trained with a new adapter, or None."""
    if is_quantised(one.value):
        return "is quantised and can't be trained with an adapter"
    if one.value.dtype not in BLOCK_DTYPES.values():
        return f"has dtype {one.value.dtype} and can't be trained with an adapter"
    if freezing.is_claimed(one.module, one.attribute):
        return "is already trained with another adapter, and can belong to only one"
    return None


def _counted_plan(
    view: ModelView,
    adapter: str,
    config: AdapterConfig,
    freeze: bool,
    layers: Sequence[PlannedLayer],
    also_train: tuple[str, ...],
    *,
    with_others: bool,
) -> Plan:
    """Return a plan, with its parameters counted.

    The blocks of other adapters are left out unless `with_others` is set: there may be many, and
    only a plan that is shown needs the numbers.
    """
    blocks = [
        block.block
        for _, layer in (view.layers if with_others else ())
        for block in layer.disha.blocks().values()
    ]
    added = sum(layer.parameters for layer in layers)
    trainable = added + sum(block.numel() for block in blocks if block.requires_grad)
    total = added + sum(block.numel() for block in blocks)
    trained = set(also_train)
    for one in view.parameters:
        if is_lazy(one.value):
            continue
        count = parameter_count(one.value)
        total += count
        claimed = freezing.is_claimed(one.module, one.attribute)
        stays_trainable = one.value.requires_grad and (claimed or not freeze)
        if stays_trainable or one.name in trained:
            trainable += count
    return Plan(
        adapter=adapter,
        config=config,
        freeze=freeze,
        layers=tuple(layers),
        skipped=(),
        also_train=also_train,
        added=added,
        trainable=trainable,
        total=total,
    )

"""Plan an injection: which layers, of what sizes, with what else trained. Changes nothing."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from disha import freezing
from disha.config import (
    ALL_LINEAR,
    BLOCK_DTYPES,
    AdapterConfig,
    as_patterns,
    check_adapter_name,
)
from disha.errors import ArgumentError, ArgumentTypeError, TargetError
from disha.layers import AdaptedLayer
from disha.layers.adapted import read_weight, refuse_inside
from disha.layers.attention import Projection
from disha.layers.quantised import is_quantised, parameter_count
from disha.survey import Survey
from disha.tables import WIDEST, table
from disha.text import brief, printable
from disha.tree import (
    ModuleNames,
    adapted_layers,
    adapter_names,
    named_parameters,
    parameter_aliases,
    parameter_owners,
    require_model,
    wrapped_for_distribution,
)

__all__ = [
    "LayerRequest",
    "Plan",
    "PlannedLayer",
    "SkippedModule",
    "Target",
    "can_train",
    "claimed_names",
    "plan_adapters",
    "plan_layers",
]

Target = str | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that will be adapted, and the block it will get.

    Attributes:
        name: its name in the model; empty for the model itself.
        type_name: the name of its class.
        method: `"bone"` or `"bat"`.
        r: shard size.
        r_out: size of the output shard of a tile, or None.
        in_features: size of its input.
        out_features: size of its output.
        parameters: values in the block.
        module: the layer.
        kind: the layer kind that adapts it.
        dtype: dtype of the block, or None for the configuration's.
        read: whether its owner reads its weight instead of calling it.
    """

    name: str
    type_name: str
    method: str
    r: int
    r_out: int | None
    in_features: int
    out_features: int
    parameters: int
    module: nn.Module = field(repr=False, compare=False)
    kind: type[AdaptedLayer] = field(repr=False, compare=False)
    dtype: torch.dtype | None = None
    read: bool = False


@dataclass(frozen=True)
class LayerRequest:
    """A layer to adapt by name, with the sizes it must have."""

    name: str
    r: int
    in_features: int
    out_features: int
    block_shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class SkippedModule:
    """A module that was asked for and will not be adapted, and why.

    Attributes:
        name: its name in the model.
        type_name: the name of its class.
        reason: why it is not.
    """

    name: str
    type_name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What an injection would do; `print(plan)` shows it as a table.

    Attributes:
        adapter: the adapter's name.
        config: its configuration.
        freeze: whether all other parameters are frozen.
        layers: the layers that would be adapted.
        skipped: the modules that were asked for and would not be, with reasons.
        also_train: clean names of the parameters to be trained and saved with the adapter.
        added: parameters in the new blocks.
        trainable: parameters that would require gradients afterwards, in the whole model.
        total: parameters of the model afterwards, blocks included; a quantised weight counts as
            many as the dense one has.

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

    Args:
        model: any model.
        target_regex: which layers, as for `inject_adapters`; so are all that follow.
        r: shard size.
        method: `"bone"` or `"bat"`.
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
        DishaError: everything that `inject_adapters` would raise.

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
        r_out=r_out,
        exclude=as_patterns("exclude", exclude),
        rank_pattern=rank_pattern or {},
        dropout=dropout,
        scale=scale,
        dtype=dtype,
        init=init,
        also_train=as_patterns("also_train", also_train),
    )
    survey = _changeable(require_model(model), adapter)
    names = survey.names
    selected = _select(survey, _as_predicate(target_regex, survey))
    candidates, skipped = _divide(selected, survey, config, target_regex)
    _check_rank_pattern(config, [names[module] for _, module in candidates])
    sizes = [(name, module, config.rank_of(*names[module])) for name, module in candidates]
    _check_sizes(config, survey, sizes)
    layers = tuple(_planned(name, module, config, r, survey) for name, module, r in sizes)
    also_trained = _match_parameters(config.also_train, names)
    return _counted_plan(names, adapter, config, freeze, layers, skipped, also_trained)


def plan_layers(
    model: nn.Module,
    adapter: str,
    config: AdapterConfig,
    requests: Sequence[LayerRequest],
    also_train: Mapping[str, tuple[int, ...]],
    freeze: bool,
) -> Plan:
    """Plan an adapter for layers that are known by name and size, as a file describes them.

    Args:
        model: any model.
        adapter: the adapter's name.
        config: its configuration; what it says of targets is not looked at.
        requests: the layers, each once.
        also_train: clean names of parameters to train too -> their shapes.
        freeze: whether everything else is frozen.

    Raises:
        ArgumentError: the name is taken, or layers or parameters are not there or of other sizes;
            one message lists all of them.
    """
    survey = _changeable(require_model(model), adapter)
    names = survey.names
    by_name = {name: module for module, all_names in names.items() for name in all_names}
    owners = parameter_owners(names)
    aliases, without_effect = parameter_aliases(names), survey.without_effect(config.dropout)
    problems, layers = [], []
    for request in requests:
        problem = _unmet(request, config, survey, by_name, without_effect)
        if problem is None:
            module = by_name[request.name]
            name = names[module][0]
            layers.append(_planned(name, module, config, request.r, survey, request.dtype))
        else:
            problems.append(f"{printable(request.name, WIDEST) or '(the model)'}: {problem}")
    for full, shape in also_train.items():
        problem = _unmet_parameter(owners, aliases.get(full), shape)
        if problem is not None:
            problems.append(f"parameter {printable(full, WIDEST)}: {problem}")
    if problems:
        shown = "\n".join(problems[:20])
        more = f"\nand {len(problems) - 20} more" if len(problems) > 20 else ""
        absent = next((r.name for r in requests if r.name not in by_name), None)
        if absent is not None:
            more += f"\nthe names nearest to {brief(absent)} are {_nearest(absent, list(by_name))}"
        raise ArgumentError(f"the adapter does not fit the model; nothing changed:\n{shown}{more}")
    trained = tuple(aliases[full] for full in also_train)
    return _counted_plan(names, adapter, config, freeze, tuple(layers), (), trained)


def _unmet(
    request: LayerRequest,
    config: AdapterConfig,
    survey: Survey,
    by_name: Mapping[str, nn.Module],
    without_effect: Mapping[nn.Module, str],
) -> str | None:
    """Return why a requested layer can't be adapted as described, or None."""
    module = by_name.get(request.name)
    if module is None:
        return "the model has no such layer"
    obstacle = survey.obstacle(module, config.method) or without_effect.get(module)
    if obstacle is not None:
        return f"can't be adapted: {obstacle}"
    kind = survey.kind(module)
    if read_weight(module, kind.weight_name).is_meta:
        return "its weight is on the meta device; give the model its weights first"
    geometry = kind.geometry(module)
    if (geometry.in_features, geometry.out_features) != (request.in_features, request.out_features):
        return (
            f"expected {request.in_features} -> {request.out_features}, "
            f"the model has {geometry.in_features} -> {geometry.out_features}"
        )
    misfit = kind.misfit(geometry, request.r, config.r_out)
    if misfit is not None:
        return misfit
    shape = kind.block_shape(module, config.method, request.r, config.r_out)
    if shape != request.block_shape:
        return f"expected a block of shape {shape}, found {request.block_shape}"
    return None


def _unmet_parameter(
    owners: Mapping[str, tuple[nn.Module, str]], full: str | None, shape: tuple[int, ...]
) -> str | None:
    """Return why a parameter can't be trained with the adapter as described, or None."""
    if full is None:
        return "the model has no such parameter"
    module, name = owners[full]
    parameter = module._parameters[name]
    found = None if parameter is None or is_lazy(parameter) else tuple(parameter.shape)
    if found != shape:
        return f"expected shape {shape}, the model has {found}"
    if parameter is not None and parameter.is_meta:
        return "it is on the meta device; give the model its weights first"
    return _untrainable(module, name)


# --- what is asked for ---------------------------------------------------------------------------


def _changeable(model: nn.Module, adapter: str) -> Survey:
    """Return what the model consists of, if an adapter of that name can be added to it."""
    check_adapter_name(adapter)
    refuse_inside((layer for _, layer in adapted_layers(model)), "add an adapter")
    survey = Survey(model)
    wrapped = wrapped_for_distribution(survey.names)
    if wrapped is not None:
        raise TargetError(
            f"the model is wrapped by {type(wrapped).__name__} already, which would not see new "
            "parameters; inject first, then wrap. Into an adapter that is there, load_adapter can "
            "load with replace=True"
        )
    if adapter in adapter_names(model):
        raise ArgumentError(
            f"the model has an adapter {adapter!r} already; choose another name, or remove it "
            f"with remove_adapters(model, {adapter!r})"
        )
    return survey


def _as_predicate(target: object, survey: Survey) -> Callable[[nn.Module], bool]:
    names = survey.names
    if target == ALL_LINEAR:
        embeddings = {m._parameters.get("weight") for m in names if isinstance(m, nn.Embedding)}
        tied = embeddings - {None}
        return lambda module: survey.is_linear(module) and survey.weight(module) not in tied
    if isinstance(target, str):
        search = re.compile(target).search
        return lambda module: any(search(name) for name in names[module])
    if callable(target):
        return lambda module: bool(target(names[module][0], module))
    raise ArgumentTypeError(
        f"target_regex must be a regex, {ALL_LINEAR!r} or a predicate (name, module) -> bool, "
        f"got {target!r} of type {type(target).__name__}"
    )


def _select(survey: Survey, predicate: Callable[[nn.Module], bool]) -> list[tuple[str, nn.Module]]:
    """Return the modules that are asked for; an attention module asks for its four layers."""
    asked = [module for module in survey.names if predicate(module)]
    wanted = {part for module in asked for part in survey.parts.get(module, (module,))}
    return [(name, module) for module, (name, *_) in survey.names.items() if module in wanted]


def _divide(
    selected: list[tuple[str, nn.Module]],
    survey: Survey,
    config: AdapterConfig,
    target: Target,
) -> tuple[list[tuple[str, nn.Module]], tuple[SkippedModule, ...]]:
    """Divide the selected modules into those to adapt and those to skip, with reasons."""
    excluded, used = _excluded(survey, config.exclude), set[str]()
    no_effect = survey.without_effect(config.dropout)
    candidates, skipped, without_effect = [], [], []
    for name, module in selected:
        used_here = excluded.get(module, set())
        used |= used_here
        reason = "excluded" if used_here else survey.obstacle(module, config.method)
        if reason is None and module in no_effect:
            without_effect.append((name, no_effect[module]))
        elif reason is None:
            candidates.append((name, module))
        elif _has_parameters(module):
            skipped.append(SkippedModule(name, type(module).__name__, reason))
    _check_all_used("exclude", config.exclude, used, "no module that the target selects")
    if without_effect:
        listing = "; ".join(f"{name}: {why}" for name, why in without_effect)
        raise TargetError(
            f"adapters would have no effect here; leave these layers out with exclude=. {listing}"
        )
    if not candidates:
        raise TargetError(_nothing_matched(target, survey, skipped, config.method))
    return candidates, tuple(skipped)


def _has_parameters(module: nn.Module) -> bool:
    own = any(parameter is not None for parameter in module._parameters.values())
    return own or isinstance(module, Projection)


def _excluded(survey: Survey, patterns: tuple[str, ...]) -> dict[nn.Module, set[str]]:
    """Return each excluded module -> the patterns that exclude it.

    A pattern that matches an attention module excludes its four layers.
    """
    excluded: dict[nn.Module, set[str]] = {}
    for module, names in survey.names.items():
        hits = {p for p in patterns if any(re.search(p, name) for name in names)}
        for part in (module, *survey.parts.get(module, ())) if hits else ():
            excluded.setdefault(part, set()).update(hits)
    return excluded


def _nothing_matched(
    target: Target, survey: Survey, skipped: list[SkippedModule], method: str
) -> str:
    asked = repr(target) if isinstance(target, str) else "the predicate"
    if skipped:
        shown = "; ".join(f"{s.name} ({s.type_name}): {s.reason}" for s in skipped[:5])
        more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        return f"{asked} selects only modules that can't be adapted: {shown}{more}"
    adaptable = [
        name for module, (name, *_) in survey.names.items() if not survey.obstacle(module, method)
    ]
    if not adaptable:
        return f"{asked} selects nothing: the model has no layer that can be adapted"
    nearest = _nearest(target if isinstance(target, str) else "", adaptable)
    return f"{asked} selects no layer that can be adapted; the nearest names are {nearest}"


def _nearest(pattern: str, names: list[str]) -> str:
    # Its end: comparing takes the product of both lengths.
    plain = re.sub(r"[^\w.]", "", pattern[-200:].replace("\\.", "."))
    last = plain.rsplit(".", 1)[-1]

    def likeness(name: str) -> float:
        parts = ((plain, name), (last, name.rsplit(".", 1)[-1]))
        return max(difflib.SequenceMatcher(None, a, b).ratio() for a, b in parts)

    best = sorted(names, key=likeness, reverse=True)[:5]
    return ", ".join(repr(name) for name in best)


# --- what it comes to ----------------------------------------------------------------------------


def _planned(
    name: str,
    module: nn.Module,
    config: AdapterConfig,
    r: int,
    survey: Survey,
    dtype: torch.dtype | None = None,
) -> PlannedLayer:
    kind = survey.kind(module)
    geometry = kind.geometry(module)
    shape = kind.block_shape(module, config.method, r, config.r_out)
    return PlannedLayer(
        name=name,
        type_name=type(module).__name__,
        method=config.method,
        r=r,
        r_out=config.r_out,
        in_features=geometry.in_features,
        out_features=geometry.out_features,
        parameters=math.prod(shape),
        module=module,
        kind=kind,
        dtype=dtype,
        read=module in survey.read,
    )


def _check_all_used(
    argument: str, patterns: Iterable[str], used: Iterable[str], nothing: str
) -> None:
    idle = [pattern for pattern in patterns if pattern not in set(used)]
    if idle:
        raise ArgumentError(
            f"{argument} {', '.join(map(repr, idle))} matches {nothing}; correct or remove it"
        )


def _check_rank_pattern(config: AdapterConfig, targets: list[tuple[str, ...]]) -> None:
    """Raise if an entry matches no name of any target."""
    used = [
        pattern
        for pattern in config.rank_pattern
        if any(re.search(pattern, name) for names in targets for name in names)
    ]
    _check_all_used("rank_pattern", config.rank_pattern, used, "none of the targets")


def _check_sizes(
    config: AdapterConfig, survey: Survey, sizes: list[tuple[str, nn.Module, int]]
) -> None:
    """Raise one error that lists every layer that r or r_out does not fit."""
    misfits = []
    for name, module, r in sizes:
        kind = survey.kind(module)
        misfit = kind.misfit(kind.geometry(module), r, config.r_out)
        if misfit is not None:
            misfits.append(f"{name or '(the model)'}: {misfit}")
    if misfits:
        shown = "; ".join(misfits[:10])
        more = f"; and {len(misfits) - 10} more" if len(misfits) > 10 else ""
        sizes_that_fit = "Choose a smaller r"
        if config.r_out is not None:
            sizes_that_fit += ", or an r_out that divides the outputs of all"
        raise ArgumentError(
            f"{shown}{more}. {sizes_that_fit}, give these layers their own r with rank_pattern=, "
            "or leave them out with exclude="
        )


def can_train(parameter: nn.Parameter) -> bool:
    """Whether a parameter is of a dtype that can be trained and saved."""
    return parameter.dtype in BLOCK_DTYPES.values()


def _match_parameters(patterns: tuple[str, ...], names: ModuleNames) -> tuple[str, ...]:
    """Return the clean names of the parameters that any pattern matches by any of their names."""
    matched, used = [], set()
    for aliases, (module, name) in named_parameters(names) if patterns else ():
        hits = [p for p in patterns if any(re.search(p, alias) for alias in aliases)]
        used.update(hits)
        if not hits:
            continue
        problem = _untrainable(module, name)
        if problem is not None:
            raise ArgumentError(f"also_train matches {aliases[0]}, which {problem}")
        matched.append(aliases[0])
    _check_all_used("also_train", patterns, used, "no parameter")
    return tuple(matched)


def _untrainable(module: nn.Module, name: str) -> str | None:
    """Return why a parameter can't be trained with a new adapter, or None."""
    parameter = module._parameters[name]
    assert parameter is not None
    if is_quantised(parameter):
        return "is quantised and can't be trained with an adapter"
    if not can_train(parameter):
        return f"has dtype {parameter.dtype} and can't be trained with an adapter"
    if name in freezing.claimed(module):
        return "is trained with another adapter already, and can't have values for two"
    return None


def _counted_plan(
    names: ModuleNames,
    adapter: str,
    config: AdapterConfig,
    freeze: bool,
    layers: tuple[PlannedLayer, ...],
    skipped: tuple[SkippedModule, ...],
    also_train: tuple[str, ...],
) -> Plan:
    owners = parameter_owners(names)
    base = [(full, module._parameters[name]) for full, (module, name) in owners.items()]
    counted = [
        (full, p, parameter_count(p)) for full, p in base if p is not None and not is_lazy(p)
    ]
    kept = claimed_names(names, owners)
    blocks = [
        layer.disha[other].block
        for layer in names
        if isinstance(layer, AdaptedLayer)
        for other in layer.disha
    ]
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


def claimed_names(names: ModuleNames, owners: dict[str, tuple[nn.Module, str]]) -> set[str]:
    """Return the clean names of parameters that adapters train already."""
    return {full for full, (module, name) in owners.items() if name in freezing.claimed(module)}

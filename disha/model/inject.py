"""Inject adapters into a model: walk, select, describe, check, apply.

walk        `ModelView`          the modules of the model, and their names
select      `Selection`          the weights that the target matches
describe    `BlockSpec`          a weight, its method, r and sizes, and what is tied to it
check       `reasons`            why a weight can't have the block
apply       `apply_plan`         make the blocks, and give the modules their new states
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from disha.config import (
    AdapterConfig,
    Init,
    MethodName,
    Patterns,
    Target,
    check_items,
    check_row_numbers,
    find_matching,
)
from disha.errors import ArgumentError, TargetError
from disha.functional.method import Groups
from disha.hints import with_hints
from disha.layers.adapted import set_state, state_with_parameters
from disha.layers.blocks import AdapterBlock
from disha.layers.memory import PLACES, ModelMemory
from disha.layers.new_blocks import make_block
from disha.layers.spec import BlockSpec
from disha.model import buffers
from disha.model.found import ModelTensor
from disha.model.plan import Plan, Skipped
from disha.model.reasons import reason_against, reason_against_claiming, reason_against_size
from disha.model.routing import reason_against_routing
from disha.model.selection import EXCLUDED, Selection, find_tied, list_reasons, refuse_unused
from disha.model.training import claim, freeze_the_rest
from disha.model.view import ModelView, all_or_nothing
from disha.sharding.ranks import broadcast
from disha.text import counted, first_few, join

M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")


@with_hints
def inject_adapters(
    model: M,
    target_regex: Target,
    r: int,
    *,
    adapter: str = "default",
    method: MethodName = "bone",
    r_out: int | None = None,
    groups: Groups = 1,
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
) -> M:
    """Adapt every weight whose name matches; return the same model.

    A weight has the name of its module. If a module has several weights, their own names are added
    (`experts.gate_up_proj`). The modules stay the same objects. Until a block is trained, the model
    computes exactly the same as before. A second call with another `adapter` adds that adapter and
    makes it the active one.

    Args:
        model: any model, compiled or not, but not yet wrapped by DDP or FSDP.
        target_regex: a regex, a list of them of which any may match, a predicate
            `(name, module) -> bool`, or `"all-linear"`. A regex is searched (`re.search`) in the
            dotted names of modules and of their weights.
            `"all-linear"` is every linear weight, including attention, recurrent layers and
            experts, but not an output head that is tied to an embedding.
        r: shard size, at most the in_features of every target.
        method: `"bone"` (also called `"miss"`), `"lora"`, or `"bat"`, whose update is not low-rank
            and takes more time, or the name of a method that `register_method` has added.
        layouts: regex of names -> layout, for parameters whose layout is unknown, such as
            `{"mixer.weight_in": "expert out in"}`. The regex is searched in the names of
            parameters and of modules; the name of a module means its `weight`. Only a key that is
            such a name changes a layout that is known.
        rows: regex of names -> ranges (first, stop) of outputs. Only these rows are adapted:
            `{"c_attn": [(0, 768), (1536, 2304)]}` adapts q and v of a fused qkv.
        r_out: size of the output shard, which must divide the out_features of every target. Bone
            becomes a tile with r x r_out parameters.
        groups: number of groups of shards. With more than one group, each output sees the shards
            of its own group only: as many parameters, but dW has a higher rank, up to groups * r.
            `"all"` makes as many groups as possible: one for each shard, if a weight has as many
            outputs. Only for Bone without `r_out`.
        adapter: the new adapter's name: not empty, and without a dot.
        exclude: regex, or several, of names to leave out.
        rank_pattern: regex of names -> r of the matching weights; the first match wins.
        dropout: probability of zeroing each input of the adapter in training.
        scale: factor s on the update; `set_adapter_scale` changes it later.
        dtype: dtype of the blocks. By default float32, or float64 over a float64 weight. Over a
            complex weight, it is always complex64.
        init: `"zeros"` (the adapter changes nothing until it is trained), or `"kaiming"` (random
            blocks, which act immediately).
        freeze: freeze all parameters, except those of adapters and those that `also_train` matches.
            `remove_adapters` restores their `requires_grad` flags.
        also_train: regex, or several, of names of parameters (such as `"norm.*weight"`) to train
            and save with the adapter, and of persistent buffers to save with it once they have
            changed. These stay parameters and buffers of the model: unlike blocks, they act
            whichever adapter is active. So each of them can belong to only one adapter.
        also_train_rows: regex of names of matrices -> numbers of their rows to train and save with
            the adapter: `{"embed_tokens": [32000, 32001]}` for two new tokens. A row is read in
            place of what the base and all adapters have there, and has no scale; of two active
            adapters that have it, the last one gives it. A tied head has the same rows. If the
            target matches the matrix too, it gets these rows in place of an adapter.

    Returns:
        `model` itself.

    Raises:
        TargetError: the target matches nothing that can be adapted, or the model is wrapped by DDP
            or FSDP.
        ArgumentError: a value is not allowed; r, r_out, a layout or rows do not fit a weight; the
            adapter's name is taken; or a regex in another argument matches nothing.
        ArgumentTypeError: an argument is of the wrong type.
        ModeError: adapters are merged (`MergeError`), or in a context.

    Warns:
        UserWarning: the target also selects weights that can't be adapted. The warning names them.

    The model is unchanged whenever this raises.

    Source: arXiv 2409.15371.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> model is disha.inject_adapters(model, "all-linear", r=4)
        True
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.disha.default.bone_block', '2.disha.default.bone_block']
    """
    config = AdapterConfig.from_arguments(locals(), target=target_regex)
    view = ModelView(model)
    plan = plan_injection(
        view, target_regex, adapter, config, also_train_rows, freeze=freeze, strict=True
    )
    _warn_of_skipped(plan)
    with all_or_nothing(view):
        apply_plan(view, plan)
    return model


def _with_arguments_of(
    function: Callable[P, Any],
) -> Callable[[Callable[..., Plan]], Callable[P, Plan]]:
    """Give a function the arguments of another one, for readers and for type checkers."""

    def give(other: Callable[..., Plan]) -> Callable[P, Plan]:
        with_arguments = wraps(other)(lambda *args, **kwargs: other(*args, **kwargs))
        with_arguments.__wrapped__ = function  # whose signature is shown
        with_arguments.__annotations__ = {**function.__annotations__, "return": "Plan"}
        return with_hints(with_arguments)

    return give


@_with_arguments_of(inject_adapters)
def plan_adapters(
    model: nn.Module,
    target_regex: Target,
    r: int,
    *,
    adapter: str = "default",
    also_train_rows: Mapping[str, Sequence[int]] | None = None,
    freeze: bool = True,
    **settings: Any,
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
        groups: number of groups of shards, or `"all"`.
        exclude: names to leave out.
        rank_pattern: regex of names -> r.
        layouts: regex of names -> layout.
        rows: regex of names -> ranges of outputs.
        dropout: probability of zeroing each input of the adapter.
        scale: factor on the update.
        dtype: dtype of the blocks.
        init: initial values of the blocks.
        also_train: names of parameters to train, and of buffers, to save with the adapter.
        also_train_rows: regex of names -> rows of matrices to train and save with it.
        freeze: whether all other parameters are frozen.
        settings: the arguments above that have no name here.

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
    given: dict[str, Any] = {"r": r, "target": target_regex, **settings}
    config = AdapterConfig(**given)
    view = ModelView(model)
    plan = plan_injection(
        view, target_regex, adapter, config, also_train_rows, freeze=freeze, strict=False
    )
    return _count_parameters(view, plan)


def plan_injection(
    view: ModelView,
    target: Target,
    adapter: str,
    config: AdapterConfig,
    also_train_rows: Mapping[str, Sequence[int]] | None,
    *,
    freeze: bool,
    strict: bool,
) -> Plan:
    """Plan an injection of a target, which may be a predicate, and so not in the configuration.

    If r or r_out does not fit a weight, raise if `strict`, and else list the weight as skipped.
    """
    view.check_can_add(adapter)
    selection = Selection(view, "target_regex", target, config)
    layers: list[BlockSpec] = []
    skipped: list[Skipped] = []
    if also_train_rows:
        new_rows = check_items("also_train_rows", also_train_rows, check_row_numbers)
        tables = Selection(view, "also_train_rows", [*new_rows], config, new_rows)
        layers, skipped = _describe(tables, adapter, [], strict)
    also_train = _choose_also_trained(view, config, layers)
    more_layers, more_skipped = _describe(selection, adapter, layers, strict)
    return Plan(
        adapter,
        config,
        freeze,
        layers=(*layers, *more_layers),
        also_train=also_train,
        skipped=(*skipped, *more_skipped),
        unknown=selection.unknown,
    )


def _describe(
    selection: Selection, adapter: str, planned: Sequence[BlockSpec], strict: bool
) -> tuple[list[BlockSpec], list[Skipped]]:
    """Return the blocks that selected weights get, and which are skipped, with their reasons.

    Weights that are `planned` already are left out. A module whose name matches `exclude` keeps
    the plain weight, even if it shares the parameter.
    """
    view = selection.view
    config = selection.config
    # Where a weight has a block already, or is tied to one that has. A weight that is found there
    # again, in a tied module or by `target_regex` after `also_train_rows`, gets no second block.
    adapted = {(view.modules[name], key) for spec in planned for name, key in spec.slots}
    layers = []
    unfit = []  # weights that could have a block of another size
    selected, skipped = selection.select()
    for candidate in selected:
        spec = candidate.spec
        if spec.has_layout:
            if candidate.slot in adapted:
                continue
            tied = find_tied(view, spec, config.exclude)
            if spec.is_new_rows:
                spec = spec.but(adapter=adapter, tied=tied, r=1)
            else:
                spec = spec.but(
                    adapter=adapter,
                    tied=tied,
                    method=config.method,
                    r=config.rank_of(*candidate.names, *candidate.module_names, *tied),
                    r_out=config.r_out,
                    scale=config.scale,
                )
            adapted.update((view.modules[name], key) for name, key in spec.slots[1:])
        reason = reason_against(view, spec)
        if reason is not None:
            skipped.append(candidate.skip(reason))
            continue
        reason = reason_against_size(view, spec)
        if reason is None:
            layers.append(spec)
        else:
            unfit.append(candidate.skip(reason))
    if not layers and not unfit:
        raise TargetError(selection.explain_nothing(skipped))
    selection.refuse_unused()
    if unfit and strict:
        raise ArgumentError(
            f"{list_reasons(unfit)}. Choose a smaller `r`, or an `r_out` that divides the outputs, "
            "give these layers their own r (`rank_pattern`), or leave them out (`exclude`)"
        )
    return layers, [*skipped, *unfit]


def _choose_also_trained(
    view: ModelView, config: AdapterConfig, tables: Sequence[BlockSpec]
) -> tuple[str, ...]:
    """Return the main names of the parameters and buffers that `also_train` matches."""
    if not config.also_train:
        return ()
    with_new_rows = {name for spec in tables for name in (spec.full_name, *spec.tied)}
    matched_names: list[str] = []
    chosen = []
    for tensor in view.tensors:
        if not find_matching(config.also_train, tensor.names):
            continue
        reason = reason_against_claiming(tensor)
        if not with_new_rows.isdisjoint(tensor.names):
            reason = "also_train_rows trains rows of it"
        if reason is not None:
            raise ArgumentError(
                f"also_train matches {tensor.name}: {reason}; give a regex that leaves it out"
            )
        matched_names += tensor.names
        if not tensor.is_statistic:  # statistics are saved with every adapter
            chosen.append(tensor.name)
    refuse_unused("also_train", config.also_train, matched_names)
    return tuple(chosen)


def _count_parameters(view: ModelView, plan: Plan) -> Plan:
    """Return a plan with the numbers of parameters, which only its reader needs."""

    def trains(parameter: ModelTensor) -> bool:
        if parameter.name in plan.also_train:
            return True
        is_frozen = plan.freeze and parameter.claimant is None
        return parameter.value.requires_grad and not is_frozen

    trainable, total = view.count_parameters(trains)
    return replace(plan, trainable=plan.added + trainable, total=plan.added + total)


def _warn_of_skipped(plan: Plan) -> None:
    """Warn if the target selects weights that can't be adapted, which is rarely intended."""
    weights = [
        f"{item.name}: {item.reason}"
        for item in plan.skipped
        if item.has_weight and item.reason != EXCLUDED
    ]
    if weights:
        warnings.warn(
            f"the target also selects {counted(len(weights), 'weight')} that can't be adapted: "
            f"{first_few(weights, 5, '; ')}. To leave them out without a warning, pass exclude=",
            stacklevel=4,  # the caller of inject_adapters, past the wrapper that adds hints
        )


# --- carrying a plan out -------------------------------------------------------------------------


def apply_plan(
    view: ModelView,
    plan: Plan,
    values: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    activate: bool = True,
) -> None:
    """Carry out a plan that was just made for this model.

    `values` are those of the blocks, by their keys; a block without any starts as `init` says. The
    new adapter becomes the only active one, or does not act yet without `activate`.
    """
    # Blocks are made before the model changes: this is what usually fails.
    blocks = defaultdict[nn.Module, list[AdapterBlock]](list)
    borrowed = defaultdict[nn.Module, list[tuple[str, AdapterBlock]]](list)
    for spec in plan.layers:
        module = view.modules[spec.module]
        block = make_block(module, spec, plan.config, values.get(spec.key), view.ranks.mesh)
        if block.split is None and not block.block.is_meta:
            # Weights that a tensor-parallel plan leaves whole have ranks too.
            broadcast(block.block, view.ranks.groups)
        blocks[module].append(block)
        for name, parameter in spec.slots[1:]:
            borrowed[view.modules[name]].append((parameter, block))
    memory = view.unite()
    for module in dict.fromkeys((*blocks, *borrowed)):
        parameters = [block.spec.parameter for block in blocks[module]]
        parameters += [name for name, _ in borrowed[module]]
        is_quantized = any(block.spec.quantized for block in blocks[module])
        state = state_with_parameters(
            module, parameters, is_quantized, memory, PLACES[module].names
        )
        active = (plan.adapter,) if activate else state.active
        state = state.with_adapter(plan.adapter, blocks[module], tuple(borrowed[module]), active)
        set_state(module, state)
    if activate:
        set_active(view, (plan.adapter,))
    view.guard_encoders()
    _note_plan(view, plan, memory)


def set_active(view: ModelView, adapters: tuple[str, ...]) -> None:
    """Let exactly these adapters act."""
    for layer in view.find_layers():
        if layer.disha.active != adapters:
            set_state(layer, layer.disha.state(type(layer)).but(active=adapters))


def _note_plan(view: ModelView, plan: Plan, memory: ModelMemory) -> None:
    """Let the model remember the new blocks, and set and remember flags and buffers."""
    claim(view, plan.adapter, plan.also_train, freezes=plan.freeze)
    if plan.freeze:
        freeze_the_rest(view)
    buffers.remember_buffers(view, plan.adapter, plan.also_train)
    state = memory.state
    (above, *_) = PLACES[view.modules[""]].names
    specs = plan.layers
    routing = {**state.routing, plan.adapter: reason_against_routing(view, plan.adapter)}
    if above:  # the plan is of a part, and only the whole model tells if samples can be routed
        specs = tuple(spec.renamed(partial(join, above)) for spec in specs)
        del routing[plan.adapter]
    memory.state = state.but(
        specs={**state.specs, **{(spec.adapter, spec.name): spec for spec in specs}},
        routing=routing,
    )

"""Plan an injection from a target: which weights get which blocks, and what else trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

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
from disha.model.plan import Place, Plan, PlannedLayer
from disha.model.reasons import (
    reason_against_adapting,
    reason_against_block,
    reason_against_claiming,
)
from disha.model.selection import Selection, find_tied, list_reasons, refuse_unused
from disha.model.view import ModelParameter, ModelView


@with_hints
def plan_adapters(
    model: nn.Module,
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
    config = AdapterConfig.from_arguments(locals(), target=target_regex)
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
    layers: list[PlannedLayer] = []
    skipped: list[PlannedLayer] = []
    if also_train_rows:
        new_rows = check_items("also_train_rows", also_train_rows, check_row_numbers)
        tables = Selection(view, "also_train_rows", [*new_rows], config, new_rows)
        layers, skipped = _plan_layers(tables, [], strict)
    more_layers, more_skipped = _plan_layers(selection, layers, strict)
    return Plan(
        adapter,
        config,
        freeze,
        layers=(*layers, *more_layers),
        also_train=_choose_also_trained(view, config),
        skipped=(*skipped, *more_skipped),
        unknown=selection.unknown,
    )


def _plan_layers(
    selection: Selection, planned: Sequence[PlannedLayer], strict: bool
) -> tuple[list[PlannedLayer], list[PlannedLayer]]:
    """Return which selected weights get a block, and which are skipped, with their reasons.

    Weights that are `planned` already are left out. A module whose name matches `exclude` keeps
    the plain weight, even if it shares the parameter.
    """
    # Where a weight has a block already, or is tied to one that has. A weight that is found there
    # again, in a tied module or by `target_regex` after `also_train_rows`, gets no second block.
    adapted: set[Place] = set()
    for layer in planned:
        adapted.add(layer.place)
        adapted.update(layer.tied.values())
    layers = []
    skipped = []
    unfit = []  # weights that could have a block of another size
    for layer in selection.select():
        if layer.reason is not None:  # `exclude` leaves it out
            skipped.append(layer)
            continue
        if layer.slot is not None:
            if layer.place in adapted:
                continue
            tied = find_tied(selection.view, layer, layer.config.exclude)
            adapted.update(tied.values())
            r = 1
            if not layer.is_new_rows:
                r = layer.config.rank_of(*layer.names, *layer.module_names, *tied)
            layer = replace(layer, tied=tied, r=r)
        reason = reason_against_adapting(layer)
        if reason is not None:
            skipped.append(replace(layer, reason=reason))
            continue
        reason = reason_against_block(layer)
        if reason is None:
            layers.append(layer)
        else:
            unfit.append(replace(layer, reason=reason))
    if not layers and not unfit:
        raise TargetError(selection.explain_nothing(skipped))
    selection.refuse_unused()
    if unfit and strict:
        raise ArgumentError(
            f"{list_reasons(unfit)}. Choose a smaller `r`, or an `r_out` that divides the outputs, "
            "give these layers their own r (`rank_pattern`), or leave them out (`exclude`)"
        )
    return layers, [*skipped, *unfit]


# --- other parameters, and counts ----------------------------------------------------------------


def _choose_also_trained(view: ModelView, config: AdapterConfig) -> tuple[str, ...]:
    """Return the main names of the parameters and buffers that `also_train` matches."""
    if not config.also_train:
        return ()
    matched_names: list[str] = []
    chosen = []
    for tensor in view.tensors:
        if not find_matching(config.also_train, tensor.names):
            continue
        reason = reason_against_claiming(tensor)
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

    def trains(parameter: ModelParameter) -> bool:
        if parameter.name in plan.also_train:
            return True
        is_frozen = plan.freeze and parameter.claimant is None
        return parameter.value.requires_grad and not is_frozen

    trainable, total = view.count_parameters(trains)
    return replace(plan, trainable=plan.added + trainable, total=plan.added + total)

"""Inject adapters into a model and remove them: only this code changes a model's structure."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from disha.config import AdapterConfig, Init, MethodName, Patterns, Target
from disha.errors import ArgumentError, ModeError
from disha.functional.method import Groups
from disha.hints import with_hints
from disha.layers.adapted import adapt, refuse_changed_class, restore
from disha.layers.blocks import AdapterBlock
from disha.layers.model_record import Flag, ModelRecord
from disha.layers.new_blocks import make_block
from disha.model import buffers
from disha.model.plan import EXCLUDED, Plan
from disha.model.target_plans import plan_injection
from disha.model.view import ModelView, all_or_nothing
from disha.sharding.ranks import broadcast
from disha.text import counted, first_few, join

M = TypeVar("M", bound=nn.Module)


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


def _warn_of_skipped(plan: Plan) -> None:
    """Warn if the target selects weights that can't be adapted, which is rarely intended."""
    weights = [
        f"{layer.name}: {layer.reason}"
        for layer in plan.skipped
        if layer.attribute and layer.reason != EXCLUDED
    ]
    if weights:
        warnings.warn(
            f"the target also selects {counted(len(weights), 'weight')} that can't be adapted: "
            f"{first_few(weights, 5, '; ')}. To leave them out without a warning, pass exclude=",
            stacklevel=4,  # the caller of inject_adapters, past the wrapper that adds hints
        )


def apply_plan(view: ModelView, plan: Plan, *, activate: bool = True) -> None:
    """Carry out a plan that was just made for this model.

    The new adapter becomes the only active one, or does not act yet without `activate`.
    """
    # Blocks are made before the model changes: this is what usually fails.
    blocks = defaultdict[nn.Module, list[AdapterBlock]](list)
    tied_blocks = defaultdict[nn.Module, list[tuple[str, AdapterBlock]]](list)
    for layer in plan.layers:
        assert layer.slot is not None
        block = make_block(
            layer.module, layer.slot, layer.method, layer.config, layer.r, layer.values
        )
        if block.split is None and not block.block.is_meta:
            # Weights that a tensor-parallel plan leaves whole have ranks too.
            broadcast(block.block, view.ranks.groups)
        blocks[layer.module].append(block)
        for module, name in layer.tied.values():
            tied_blocks[module].append((name, block))
    record = _note_plan(view, plan)
    for module in dict.fromkeys((*blocks, *tied_blocks)):
        own_blocks = blocks[module]
        tied = tied_blocks[module]
        parameters = [block.slot.parameter for block in own_blocks]
        parameters += [name for name, _ in tied]
        is_quantized = any(block.slot.quantized for block in own_blocks)
        names = view.names_in_record(module)
        adapters = adapt(module, parameters, is_quantized, record, names)
        adapters.add(plan.adapter, own_blocks, tied)
    # All layers, the new ones too. To set `active` also rebuilds the tables that forwards read,
    # so it is set even if what acts stays the same.
    for adapted in view.find_layers():
        active = (plan.adapter,) if activate else adapted.disha.active
        adapted.disha.active = active
    view.guard_encoders()
    _set_flags(view, plan)


def _note_plan(view: ModelView, plan: Plan) -> ModelRecord:
    """Note the new layers, their ties and the buffers in the record of the model; return it."""
    record, model_name = view.unite_records()
    for layer in plan.layers:
        borrowers = tuple(join(model_name, name) for name in layer.tied)
        record.layers[plan.adapter, join(model_name, layer.name)] = borrowers
    buffers.remember_buffers(view, plan.adapter, plan.also_train)
    return record


def remove_adapters(model: M, adapter: str | None = None) -> M:
    """Remove one adapter, or all; return the same model.

    A layer without adapters gets its former class and state-dict keys back. When the model has no
    adapter left, every `requires_grad` flag and the running statistics of batch norms are as they
    were before the first injection. Buffers that `also_train` named are as before the adapter that
    it trained them with; parameters that it named keep their values. No other adapter becomes
    active.

    Args:
        model: a model with adapters.
        adapter: the adapter to remove; all by default.

    Returns:
        `model` itself.

    Raises:
        ArgumentError: there is no such adapter, or something changed a layer's class after it was
            adapted (a parametrization, for example).
        TargetError: DDP or FSDP wraps the model.
        ModeError: adapters are merged (`MergeError`); or this thread is in a context of the model,
            or another one is in a context that names the adapter.

    Warns:
        UserWarning: other buffers have changed since the injection. They keep their values.

    The model is unchanged whenever this raises.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 16), "all-linear", r=4)
        >>> type(disha.remove_adapters(model)).__name__, model.weight.requires_grad
        ('Linear', True)
    """
    view = ModelView(model)
    view.refuse_inside("remove adapters")
    view.refuse_wrapped(
        "remove adapters",
        "remove them before wrapping (of DDP, from the module inside), or switch them off with "
        "set_active_adapters(model, [])",
    )
    if adapter is not None:
        view.require(adapter)
    removed = view.adapters if adapter is None else [adapter]
    check_removable(view, removed)
    with all_or_nothing(view) as undo:
        take_out(view, removed)
        for name in removed:
            buffers.release_buffers(view, name, undo)
        if not view.has_adapters_anywhere:
            buffers.put_back_buffers(view, undo)
            _warn_of_unsaved_buffers(view)
            view.forget_buffers()
    return model


def _warn_of_unsaved_buffers(view: ModelView) -> None:
    """Name the buffers that have changed, but whose former values nothing has kept."""
    changed = buffers.list_unsaved(view)
    if changed:
        warnings.warn(
            f"{counted(len(changed), 'buffer')} of the model changed while it had adapters, and "
            f"can't be put back: {first_few(changed, 3, ', ')}. Name them in also_train when you "
            "inject, and they are saved and put back",
            stacklevel=3,
        )


def take_out(view: ModelView, adapters: Sequence[str]) -> None:
    """Remove adapters, and give layers without any their own class back."""
    for layer in view.find_layers():
        for adapter in adapters:
            layer.disha.discard(adapter)
        if not len(layer.disha):
            restore(layer)
    view.guard_encoders()
    view.forget_layers(adapters)
    is_plain = not view.has_adapters_anywhere
    for parameter in view.parameters:
        flag = parameter.former
        if flag is None:
            continue
        if is_plain:
            parameter.value.requires_grad = flag.original
        elif flag.claimant in adapters:
            parameter.remember(Flag(flag.original))
            parameter.value.requires_grad = flag.without_adapter


def check_removable(view: ModelView, removed: Sequence[str]) -> None:
    """Raise if a class was changed, or another thread or task is in a context of an adapter."""
    view.refuse_half_of_ties("remove adapters")
    for layer, name in view.find_layers().items():
        if set(layer.disha) <= set(removed):
            refuse_changed_class(layer, name)
    for context in view.open_contexts():
        used = sorted(context.names.intersection(removed))
        if used:
            raise ModeError(
                f"can't remove adapter {used[0]!r} while another thread or task uses it, inside "
                f"{context.function}; remove it when those have ended"
            )


def adapter_parameters(model: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
    """Return all that trains with the adapters, or with one: blocks and `also_train`.

    All other parameters that require gradients, such as those of a new head, train with every
    adapter. This is what an optimizer needs and what `save_adapter` writes, each parameter once,
    in the order of `model.parameters()`.

    Args:
        model: a model with adapters.
        adapter: the adapter; all by default.

    Raises:
        ArgumentError: there is no such adapter.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 16), ".*", r=4, also_train="bias")
        >>> [tuple(parameter.shape) for parameter in disha.adapter_parameters(model)]
        [(16,), (4, 16)]
    """
    view = ModelView(model)
    view.reshard()
    model_blocks = view.blocks() if adapter is None else view.require(adapter)
    trained = {id(model_block.values) for model_block in model_blocks}
    trained |= {id(parameter.value) for parameter in view.list_trained(adapter)}
    # The order of the model, so that the state of an optimizer fits one with another list of it.
    return [parameter for parameter in view.list_parameters() if id(parameter) in trained]


def mark_only_adapters_trainable(model: nn.Module) -> None:
    """Make only the blocks and the `also_train` parameters require gradients.

    Args:
        model: a model with adapters.

    Raises:
        ArgumentError: the model has no adapter, so nothing would train.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 16), "all-linear", r=4, freeze=False)
        >>> disha.mark_only_adapters_trainable(model)
        >>> model.weight.requires_grad
        False
    """
    view = ModelView(model)
    blocks = [model_block.values for model_block in view.blocks()]
    if not blocks:
        raise ArgumentError("the model has no adapter, so nothing would train")
    with all_or_nothing(view):
        view.unite_records()
        for parameter in view.parameters:
            parameter.freeze()
            if parameter.claimant is not None:
                parameter.value.requires_grad = True
        for block in blocks:
            block.requires_grad_(True)


def _set_flags(view: ModelView, plan: Plan) -> None:
    """Set requires_grad as planned, and remember which parameters train with the adapter."""
    also_train = set(plan.also_train)
    for parameter in view.parameters:
        if parameter.name in also_train:
            # The parameter's flag if this adapter is removed, and others stay.
            flag_without = parameter.value.requires_grad and not plan.freeze
            parameter.claim(plan.adapter, flag_without)
        elif plan.freeze:
            parameter.freeze()

"""Inject and remove: the only code that changes a model's structure."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from disha import freezing
from disha.errors import ArgumentError
from disha.layers import AdaptedLayer
from disha.layers.adapted import CHILD_NAME, refuse_inside, restore
from disha.layers.attention import (
    Owner,
    Projection,
    connect,
    connected,
    disconnect,
    owner_kind_of,
    take_back,
    take_over,
)
from disha.layers.classes import refuse_changed_class
from disha.layers.fronts import adapt
from disha.plan import Plan, Target, can_train, claimed_names, plan_adapters
from disha.sharding import register_shards
from disha.tree import (
    adapted_layers,
    adapter_names,
    module_names,
    own_parameters,
    parameter_owners,
    refuse_wrapped,
    require_adapter,
    require_model,
)

__all__ = [
    "adapter_parameters",
    "apply_plan",
    "inject_adapters",
    "mark_only_adapters_trainable",
    "remove_adapters",
]


def inject_adapters(
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
) -> nn.Module:
    """Adapt every layer whose name matches; return the same model.

    The modules stay the same objects, and the model computes what it did until a block has
    trained. A second call with another `adapter` adds that one and makes it the active one.

    Args:
        model: any model, compiled or not, but not yet wrapped by DDP or FSDP.
        target_regex: regex that is searched (`re.search`) in the dotted names of modules; or a
            predicate `(name, module) -> bool`; or `"all-linear"`, every linear layer except an
            output head tied to an embedding.
        r: shard size, at most the in_features of every target.
        method: `"bone"`, or `"bat"`, whose update is not low-rank and costs more.
        r_out: size of the output shard, dividing the out_features of every target; makes Bone a
            tile with r x r_out parameters.
        adapter: the new adapter's name: not empty, without a dot.
        exclude: regex, or several, of names to leave out.
        rank_pattern: regex of names -> r for those layers; the first that is found wins.
        dropout: probability of zeroing each of an adapter's inputs in training.
        scale: runtime scale s; `set_adapter_scale` changes it later.
        dtype: dtype of the blocks; each weight's own by default, float32 over a quantised one.
        init: `"zeros"`, or `"kaiming"` for blocks that act at once.
        freeze: freeze all parameters that belong to no adapter and are not named by `also_train`.
            Flags come back with `remove_adapters`.
        also_train: regex, or several, of parameter names (`"norm.*weight"`, say) that are trained
            and saved with the adapter. They stay the model's own: unlike blocks, they act whichever
            adapter is active, so that a parameter can go with one adapter only.

    Returns:
        `model` itself.

    Raises:
        TargetError: nothing adaptable matches, a layer can't be adapted without its owner
            bypassing the adapter, or the model is wrapped by DDP or FSDP.
        ArgumentError: a value is not allowed, r or r_out does not fit a layer, the adapter's name
            is taken, or an entry of `exclude`, `rank_pattern` or `also_train` matches nothing.
        ArgumentTypeError: an argument is of the wrong type.
        ModeError: adapters are merged (`MergeError`), disabled or routed.

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
    with _no_collections():
        plan = plan_adapters(
            model,
            target_regex,
            r,
            method=method,
            r_out=r_out,
            adapter=adapter,
            exclude=exclude,
            rank_pattern=rank_pattern,
            dropout=dropout,
            scale=scale,
            dtype=dtype,
            init=init,
            freeze=freeze,
            also_train=also_train,
        )
        apply_plan(model, plan)
    return model


@contextmanager
def _no_collections() -> Iterator[None]:
    """Put garbage collection off.

    The new objects stay, and to look through all of them takes longer than to make them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Carry out a plan that was just made for this model, wholly or not at all."""
    with _no_collections(), ExitStack() as undo:
        blocks = [
            layer.kind.make_block(layer.module, plan.config, layer.r, layer.dtype)
            for layer in plan.layers
        ]
        undo.callback(_settle_owners, model)
        for layer, block in zip(plan.layers, blocks, strict=True):
            if isinstance(layer.module, AdaptedLayer):
                adapters = layer.module.disha
                undo.callback(adapters.discard, plan.adapter)
            else:
                adapted = adapt(layer.module, layer.kind, read=layer.read)
                undo.callback(restore, adapted)
                if isinstance(adapted, Projection) and not connected(adapted):
                    connect(adapted)
                    undo.callback(disconnect, adapted)
                adapters = adapted.disha
            adapters.add(plan.adapter, block)
        for _, adapted in adapted_layers(model):
            adapters = adapted.disha
            undo.callback(adapters.activate, adapters.active)
            adapters.activate((plan.adapter,))
        _settle_owners(model)
        _set_flags(model, plan, undo)
        undo.pop_all()


def remove_adapters(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Remove one adapter, or all; return the same model.

    A layer without any adapter left is again what it was before the first: class, state-dict
    keys, and, once the model has no adapter at all, every `requires_grad` flag. Parameters that
    were trained beside the adapter (`also_train`) keep their values. Removing an active adapter
    makes no other one active.

    Args:
        model: a model with adapters.
        adapter: the one to remove; all by default.

    Returns:
        `model` itself.

    Raises:
        ArgumentError: there is no such adapter, or a layer's class was changed after it was
            adapted (by a parametrization, say).
        TargetError: DDP or FSDP wraps the model.
        ModeError: adapters are merged (`MergeError`), disabled or routed.

    The model is unchanged whenever this raises.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 16), "all-linear", r=4)
        >>> type(disha.remove_adapters(model)).__name__, model.weight.requires_grad
        ('Linear', True)
    """
    layers = [layer for _, layer in adapted_layers(model)]
    refuse_inside(layers, "remove adapters")
    refuse_wrapped(
        model,
        "remove adapters",
        "remove them before wrapping (of DDP, from the module inside), or switch them off with "
        "set_active_adapters(model, [])",
    )
    if adapter is not None:
        require_adapter(model, adapter)
    doomed = adapter_names(model) if adapter is None else [adapter]
    for name, layer in adapted_layers(model):
        if set(layer.disha) <= set(doomed):
            refuse_changed_class(layer, name)
    for module, (name, *_) in module_names(model).items():
        if isinstance(module, Owner) and _adapters_below(module) <= set(doomed):
            refuse_changed_class(module, name)
    for layer in layers:
        for name in doomed:
            layer.disha.discard(name)
        if not len(layer.disha):
            restore(layer)
    _settle_owners(model)
    for module in module_names(model):
        for name in doomed:
            freezing.release(module, name)
    if not adapter_names(model):
        for module in module_names(model):
            freezing.restore_flags(module)
    return model


def adapter_parameters(model: nn.Module, adapter: str | None = None) -> Iterator[nn.Parameter]:
    """Iterate over the blocks of all adapters, or of one, each once.

    Args:
        model: a model with adapters.
        adapter: the adapter; all by default.

    Raises:
        ArgumentError: there is no such adapter.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 16), "all-linear", r=4)
        >>> [tuple(block.shape) for block in disha.adapter_parameters(model)]
        [(4, 16)]
    """
    register_shards(require_model(model))
    if adapter is not None:
        require_adapter(model, adapter)
    return (
        layer.disha[name].block
        for _, layer in adapted_layers(model)
        for name in layer.disha
        if adapter is None or name == adapter
    )


def mark_only_adapters_trainable(model: nn.Module) -> None:
    """Let all blocks and all `also_train` parameters require gradients, and nothing else.

    Args:
        model: a model with adapters.

    Raises:
        ArgumentError: the model has no adapter, so that nothing would train.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 16), "all-linear", r=4, freeze=False)
        >>> disha.mark_only_adapters_trainable(model)
        >>> model.weight.requires_grad
        False
    """
    if not adapter_names(model):
        raise ArgumentError("the model has no adapter, so nothing would be left to train")
    register_shards(model)
    names = module_names(model)
    claimed = {
        id(module._parameters[name]) for module in names for name in freezing.claimed(module)
    }
    for module, name, parameter in own_parameters(names):
        if can_train(parameter):
            freezing.set_requires_grad(module, name, id(parameter) in claimed)
    for block in adapter_parameters(model):
        block.requires_grad_(True)


def _settle_owners(model: nn.Module) -> None:
    """Let owners that bypass the layers below them call these where one is adapted, only there."""
    for module in list(module_names(model)):
        kind = owner_kind_of(module)
        needed = kind is not None and bool(_adapters_below(module))
        if isinstance(module, Owner) and not needed:
            take_back(module)
        elif kind is not None and needed and not isinstance(module, Owner):
            take_over(module, kind)


def _adapters_below(module: nn.Module) -> set[str]:
    return {
        adapter
        for layer in module.modules()
        if isinstance(layer, AdaptedLayer) and CHILD_NAME in layer._modules
        for adapter in layer.disha
    }


def _set_flags(model: nn.Module, plan: Plan, undo: ExitStack) -> None:
    """Set requires_grad as planned, and note what trains beside the adapter."""
    names = module_names(model)
    owners = parameter_owners(names)
    kept = claimed_names(names, owners)
    for module in {module for module, _ in owners.values()}:
        undo.callback(freezing.as_now(module))
    for full, (module, name) in owners.items():
        parameter = module._parameters[name]
        if parameter is None or not can_train(parameter):
            continue
        if full in plan.also_train:
            without = parameter.requires_grad and not plan.freeze
            freezing.claim(module, plan.adapter, name, without)
        elif plan.freeze and full not in kept:
            freezing.set_requires_grad(module, name, False)

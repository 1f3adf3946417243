"""What trains: the blocks of adapters, and the parameters that train with them."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from disha.errors import ArgumentError
from disha.layers.memory import Flag
from disha.model.view import ModelView, all_or_nothing


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
        view.unite()
        freeze_the_rest(view)
        for parameter in view.parameters:
            if parameter.claimant is not None:
                parameter.value.requires_grad = True
        for block in blocks:
            block.requires_grad_(True)


def freeze_the_rest(view: ModelView) -> None:
    """Freeze the parameters that train with no adapter, and remember that they were not frozen."""
    frozen = {}
    for parameter in view.parameters:
        former = parameter.former
        claimant = None if former is None else former.claimant
        if not parameter.value.requires_grad or claimant is not None:
            continue
        if former is None:
            frozen[parameter] = Flag(original=True)
        parameter.value.requires_grad = False  # lazy parameters do not have requires_grad_()
    view.remember(frozen)


def claim(view: ModelView, adapter: str, names: Container[str], *, freezes: bool) -> None:
    """Train parameters together with an adapter, and remember their flags without it."""
    claimed = {}
    for parameter in view.parameters:
        if parameter.name in names:
            trains = parameter.value.requires_grad
            former = parameter.former
            original = trains if former is None else former.original
            claimed[parameter] = Flag(original, adapter, trains and not freezes)
            parameter.value.requires_grad = True
    view.remember(claimed)

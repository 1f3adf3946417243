"""Activate, disable, scale and route adapters. None of this changes requires_grad.

The contexts (`adapters_active`, `adapters_disabled`, `route_adapters`) apply to the thread or
asyncio task that enters them. The other functions change the model for all threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn

from disha.checks import check_scale, check_type
from disha.effective.contexts import LOCK, NamedContext, Override, open_context, split_off_groups
from disha.errors import ArgumentError
from disha.functional.routed import Route
from disha.layers.adapted import refuse_merged
from disha.model.view import ModelView, all_or_nothing


def set_active_adapters(model: nn.Module, names: str | Sequence[str]) -> None:
    """Activate exactly these adapters. Several add up, each computed from the original weight.

    Args:
        model: a model with adapters.
        names: one name or several; an empty list for none.

    Raises:
        ArgumentError: a name is unknown.
        MergeError: adapters are merged.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 16), "all-linear", r=4, adapter="a")
        >>> model = disha.inject_adapters(model, "all-linear", r=2, adapter="b")
        >>> model.disha.active
        ('b',)
        >>> disha.set_active_adapters(model, ["a", "b"])
        >>> model.disha.active
        ('a', 'b')
    """
    view = ModelView(model)
    wanted = check_names(view, names)
    refuse_merged(view.find_layers(), "change the active adapters")
    with all_or_nothing(view):
        for layer in view.find_layers():
            layer.disha.active = wanted


def check_names(view: ModelView, names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of adapters, each once, or raise if the model lacks one."""
    check_type("names", names, Iterable, "an adapter's name or a list of them")
    if isinstance(names, str):
        names = [names]
    wanted = dict.fromkeys(names)
    for name in wanted:
        view.require(name)
    return tuple(wanted)


def adapters_active(model: nn.Module, names: str | Sequence[str]) -> AbstractContextManager[None]:
    """Run the body with exactly these adapters acting, in this thread or asyncio task only.

    Several threads can use one model with different adapters at the same time. The context covers
    tasks that are started inside it, can be nested, and leaves nothing behind when it ends.

    Args:
        model: a model with adapters.
        names: one name or several; an empty list for none.

    Raises:
        ArgumentError: a name is unknown.
        MergeError: adapters are merged.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 16), "all-linear", r=4, adapter="a")
        >>> model = disha.inject_adapters(model, "all-linear", r=2, adapter="b", init="kaiming")
        >>> x = torch.randn(2, 8)
        >>> with disha.adapters_active(model, "a"):
        ...     with_a = model(x)
        >>> torch.equal(with_a, model(x))  # "b" is the active one
        False
    """
    return _context(
        "adapters_active",
        "choose the acting adapters",
        model,
        lambda view: check_names(view, names),
    )


def adapters_disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Run the body with all adapters off, so adapted layers compute the same as their base.

    This holds for the thread or asyncio task that enters it, and for tasks that are started inside.
    Inside it, `adapters_active` and `route_adapters` have no effect. It can be nested, and leaves
    nothing behind when it ends. Parameters that were trained with an adapter (`also_train`) belong
    to the model and keep their values.

    Args:
        model: a model with adapters.

    Raises:
        MergeError: adapters are merged, so the weights are not the base's.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> model = nn.Linear(8, 4)
        >>> x = torch.randn(2, 8)
        >>> before = model(x)
        >>> model = disha.inject_adapters(model, "all-linear", r=4, init="kaiming")
        >>> with disha.adapters_disabled(model):
        ...     print(torch.equal(model(x), before))
        True
    """
    return _context("adapters_disabled", "disable adapters", model, lambda view: (), disables=True)


def _context(
    name: str,
    action: str,
    model: nn.Module,
    choose: Callable[[ModelView], Override],
    disables: bool = False,
) -> NamedContext:
    """Return the context of a function of this name. `choose` says what acts, when it opens."""

    @contextmanager
    def run() -> Iterator[None]:
        with ExitStack() as stack:
            with LOCK:  # so that no other thread adds or removes adapters meanwhile
                view = ModelView(model)
                override = choose(view)
                refuse_merged(view.find_layers(), action)
                groups = split_off_groups(layer.disha for layer in view.find_layers())
                stack.enter_context(open_context(groups, override, disables))
            yield

    return NamedContext(name, run())


def set_adapter_scale(model: nn.Module, scale: float, adapter: str = "default") -> None:
    """Set the scale s of an adapter, which multiplies its update: 0 for no effect.

    Adapters train with the scale 1, unless another was given; a LoRA of PEFT brings its alpha / r.

    Args:
        model: a model with adapters.
        scale: a finite number.
        adapter: the adapter's name.

    Raises:
        ArgumentError: the scale is not finite, or there is no such adapter.
        ArgumentTypeError: the scale is not a number.
        MergeError: adapters are merged.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 16), "all-linear", r=4)
        >>> disha.set_adapter_scale(model, 0.5)
        >>> model.disha["default"].scale
        0.5
    """
    check_scale(scale)
    view = ModelView(model)
    blocks = [model_block.block for model_block in view.require(adapter)]
    refuse_merged(view.find_layers(), "change an adapter's scale")
    with all_or_nothing(view) as undo:
        for block in blocks:
            undo.callback(setattr, block, "scale", block.scale)
            block.scale = scale


def route_adapters(
    model: nn.Module, names_per_sample: Sequence[str | None]
) -> AbstractContextManager[None]:
    """Run the body with a chosen adapter for each sample of a batch.

    The result equals running the samples one by one. The active adapters do not matter. This holds
    for the thread or asyncio task that enters it, and for tasks that are started inside.

    Every adapted layer must get the samples along the leading dimension of its input, with an equal
    part for each: (batch, ...) or (batch * n, ...). An `nn.MultiheadAttention` with
    `batch_first=False` works if only its own projections are adapted. If other layers are adapted
    too, this raises, because those may also get sequences first.

    Args:
        model: a model with adapters.
        names_per_sample: an adapter's name for each sample, or None for the base model.

    Raises:
        ArgumentError: a name is unknown; the list is empty; experts are adapted; the model takes
            sequences first; or, in the body, the leading size of a layer's input is not a multiple
            of the number of names.
        MergeError: adapters are merged.
        ModeError: in the body, an operation needs one weight for the complete batch.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 4), "all-linear", r=4, adapter="a")
        >>> model = disha.inject_adapters(model, "all-linear", r=2, adapter="b", init="kaiming")
        >>> x = torch.randn(3, 8)
        >>> with disha.route_adapters(model, ["a", "b", None]):
        ...     routed = model(x)
        >>> torch.allclose(routed[1], model(x)[1])  # "b" is the active one
        True
    """

    def choose(view: ModelView) -> Override:
        route = Route(tuple(names_per_sample))
        if not route.names:
            raise ArgumentError("names_per_sample is empty; give a name or None for each sample")
        check_names(view, route.adapters)
        _refuse_experts(view, route)
        _refuse_sequences_first(view, route)
        return route

    return _context("route_adapters", "route adapters", model, choose)


def _refuse_experts(view: ModelView, route: Route) -> None:
    """Raise if experts are routed."""
    for name, _, adapter, block in view.blocks():
        if adapter in route.adapters and "expert" in block.slot.layout.axes:
            raise ArgumentError(
                f"route_adapters can't route samples through {name}, because experts get the "
                "tokens of all samples in any order; leave experts out (exclude=)"
            )


def _refuse_sequences_first(view: ModelView, route: Route) -> None:
    """Raise if layers are routed outside of attention modules that take sequences first."""
    attention = [module for module in view.names if isinstance(module, nn.MultiheadAttention)]
    sequence_first = [view.names[module][0] for module in attention if not module.batch_first]
    inside = {child for module in attention for child in module.modules()}
    outside = [
        name
        for layer, name in view.find_layers().items()
        if layer not in inside and not set(route.adapters).isdisjoint(layer.disha)
    ]
    if sequence_first and outside:
        raise ArgumentError(
            f"route_adapters needs samples along the leading dimension, but {sequence_first[0]} "
            f"has batch_first=False, so other layers, such as {outside[0]}, may get sequences "
            "first. Build the model with batch_first=True, or adapt attention projections only"
        )

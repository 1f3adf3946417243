"""Activate, disable, scale and route adapters. None of this changes requires_grad.

The contexts (`adapters_active`, `adapters_disabled`, `route_adapters`) apply to the thread or
asyncio task that enters them. The other functions change the model for all threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn

from disha.checks import check_scale, check_type
from disha.effective.contexts import (
    LOCK,
    Group,
    NamedContext,
    Override,
    open_context,
    split_off_groups,
)
from disha.errors import ArgumentError
from disha.functional.routed import Route
from disha.layers.adapted import refuse_merged
from disha.layers.adapters import find_members
from disha.layers.memory import NOWHERE, PLACES
from disha.layers.wrappers import unwrap
from disha.model.inject import set_active
from disha.model.routing import reason_against_routing
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
        set_active(view, wanted)


def check_names(view: ModelView, names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of adapters, each once, or raise if the model lacks one."""
    wanted = list_names(names)
    for name in wanted:
        view.require(name)
    return wanted


def list_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of adapters, each once."""
    check_type("names", names, Iterable, "an adapter's name or a list of them")
    return (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))


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
        "adapters_active", "choose the acting adapters", model, lambda: list_names(names)
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
    return _context("adapters_disabled", "disable adapters", model, lambda: (), disables=True)


def _context(
    name: str,
    action: str,
    model: nn.Module,
    choose: Callable[[], Override],
    disables: bool = False,
) -> NamedContext:
    """Return the context of a function of this name. `choose` says what acts, when it opens."""

    @contextmanager
    def run() -> Iterator[None]:
        override = choose()
        with ExitStack() as stack:
            with LOCK:  # so that no other thread adds or removes adapters meanwhile
                groups = _find_groups(model, override, action)
                stack.enter_context(open_context(groups, override, disables))
            yield

    return NamedContext(name, run)


def _find_groups(model: nn.Module, override: Override, action: str) -> frozenset[Group]:
    """Return the groups of the model's layers, or raise if they can't do what the context says.

    A complete model answers from its state, if no other adapted layer is alive in the process: such
    a layer may be in the model. Otherwise the model is walked through.
    """
    adapters = override.adapters if isinstance(override, Route) else override
    memory, names = PLACES.get(unwrap(model), NOWHERE)
    state = memory.state
    asked = state.routing.keys() if isinstance(override, Route) else state.adapters
    knows_all = "" in names and asked >= {*adapters} and not state.merged
    if knows_all and memory.group.is_only_one():
        if isinstance(override, Route):
            _refuse_to_route(state.routing[adapter] for adapter in adapters)
        return frozenset([memory.group])
    members = find_members(model)
    known = {name for member in members for name in member}
    is_merged = any(member.merged is not None for member in members)
    if is_merged or not known.issuperset(adapters) or isinstance(override, Route):
        view = ModelView(model)
        check_names(view, adapters)
        if isinstance(override, Route):
            _refuse_to_route(reason_against_routing(view, adapter) for adapter in adapters)
        refuse_merged(view.find_layers(), action)
    return split_off_groups(members)


def _refuse_to_route(reasons: Iterable[str | None]) -> None:
    for reason in reasons:
        if reason is not None:
            raise ArgumentError(reason)


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

    def choose() -> Route:
        route = Route(tuple(names_per_sample))
        if not route.names:
            raise ArgumentError("names_per_sample is empty; give a name or None for each sample")
        return route

    return _context("route_adapters", "route adapters", model, choose)

"""Activate, disable, scale, route, combine. Nothing here touches requires_grad."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from disha import functional
from disha.config import check_scale
from disha.errors import ArgumentError, ArgumentTypeError
from disha.layers import AdaptedLayer, AdaptedWeight, Block, check_adapter_name, make_block
from disha.model import ModelView
from disha.routing import Route

__all__ = [
    "adapters_disabled",
    "combine_adapters",
    "route_adapters",
    "set_active_adapters",
    "set_adapter_scale",
]


def set_active_adapters(model: nn.Module, names: str | Sequence[str]) -> None:
    """Let exactly these adapters act; several add up, each computed from the original weight.

    Args:
        model: a model with adapters.
        names: one name or several; an empty list for none.

    Raises:
        ArgumentError: a name is unknown, or given twice.
        ArgumentTypeError: `names` is neither a str nor a sequence of them.
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
    wanted = (names,) if isinstance(names, str) else names
    if not isinstance(wanted, Sequence) or not all(isinstance(name, str) for name in wanted):
        raise ArgumentTypeError(
            f"names must be an adapter's name or a list of names, got {names!r}"
        )
    if len(set(wanted)) != len(wanted):
        raise ArgumentError(f"names lists an adapter twice: {list(wanted)}")
    view = ModelView(model)
    for name in wanted:
        view.require(name)
    view.refuse_merged("change the active adapters")
    for _, layer in view.layers:
        layer.disha.activate(tuple(wanted))


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run the body with all adapters off: the adapted layers compute what their base does.

    Can be nested; the state before comes back also when the body raises. Parameters that were
    trained beside an adapter (`also_train`) are the model's own and keep their values.

    Args:
        model: a model with adapters.

    Raises:
        MergeError: adapters are merged, so that switching them off would not give the base.

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
    view = ModelView(model)
    view.refuse_merged("disable adapters")
    layers = [layer for _, layer in view.layers]
    before = [layer.disha.enabled for layer in layers]
    try:
        for layer in layers:
            layer.disha.set_enabled(False)
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.disha.set_enabled(enabled)


def set_adapter_scale(model: nn.Module, scale: float, adapter: str = "default") -> None:
    """Set the runtime scale s of an adapter: 0 is no update, 1 as trained, beyond it more.

    Args:
        model: a model with adapters.
        scale: a finite number.
        adapter: the adapter's name.

    Raises:
        ArgumentError: the scale is not finite, or there is no such adapter.
        ArgumentTypeError: the scale is no number.
        MergeError: adapters are merged.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 16), "all-linear", r=4)
        >>> disha.set_adapter_scale(model, 0.5)
        >>> model.disha["default"].strength
        0.5
    """
    check_scale(scale)
    view = ModelView(model)
    weights = view.require(adapter)
    view.refuse_merged("change an adapter's scale")
    for _, weight in weights:
        weight.blocks[adapter].set_strength(scale)


@contextmanager
def route_adapters(model: nn.Module, names_per_sample: Sequence[str | None]) -> Iterator[None]:
    """Run the body with an adapter of its own for each sample of a batch.

    The result equals running the samples one by one. The active adapters do not matter meanwhile.

    Every adapted layer must see the samples along the leading dimension of its input, each as an
    equal part of it: (batch, ...) or (batch * n, ...). Of sequence-first layers,
    `nn.MultiheadAttention` is handled; a model that has one with `batch_first=False` is refused if
    other layers are adapted, as these then get sequences first too.

    Args:
        model: a model with adapters.
        names_per_sample: one adapter's name per sample, or None for the base model.

    Raises:
        ArgumentError: a name is unknown, there are none, experts are adapted, the model runs
            sequences first, or, in the body, a layer gets an input whose leading size is no
            multiple of the number of names.
        ArgumentTypeError: the names are no list of str and None.
        MergeError: adapters are merged.
        ModeError: in the body, an operation needs one effective weight for the whole batch.

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
    names = tuple(names_per_sample) if isinstance(names_per_sample, Sequence) else None
    if names is None or isinstance(names_per_sample, str):
        raise ArgumentTypeError(
            f"names_per_sample must be a list with a name or None per sample, got "
            f"{names_per_sample!r}"
        )
    if not names:
        raise ArgumentError("names_per_sample is empty; give a name or None per sample")
    view, route = ModelView(model), Route(names)
    for name in route.adapters:
        view.require(name)
    view.refuse_merged("route adapters")
    _refuse_stacks(view)
    _refuse_sequences_first(view)
    layers = [layer for _, layer in view.layers]
    before = [layer.disha.route for layer in layers]
    try:
        for layer in layers:
            layer.disha.route = route
        yield
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            layer.disha.route = earlier


def _refuse_stacks(view: ModelView) -> None:
    """Raise if experts are adapted: their inputs are tokens of all samples, in any order."""
    for name, weight in view.weights:
        if weight.slot.layout.is_stack:
            raise ArgumentError(
                f"route_adapters can't route samples through {name}, whose layout is "
                f"{weight.slot.layout.pattern!r}: experts get the tokens of all samples, in any "
                "order; leave them out with exclude=, or use one adapter at a time"
            )


def _refuse_sequences_first(view: ModelView) -> None:
    """Raise if layers beside a sequence-first attention module are adapted."""
    attention = [
        (name, module)
        for module, (name, *_) in view.names.items()
        if isinstance(module, nn.MultiheadAttention)
    ]
    inside = {child for _, module in attention for child in view.inside(module)}
    beside = [name for name, layer in view.layers if layer not in inside]
    first = [name for name, module in attention if not module.batch_first]
    if first and beside:
        raise ArgumentError(
            f"route_adapters needs samples along the leading dimension, and {first[0]} is an "
            f"nn.MultiheadAttention with batch_first=False, so that layers such as {beside[0]} "
            "may get sequences first; build the model with batch_first=True, or adapt attention "
            "projections only"
        )


def combine_adapters(
    model: nn.Module, weights: Mapping[str, float], into: str, *, r: int | None = None
) -> None:
    """Add a new adapter that is the weighted sum of others, exactly.

    dW = sum of w * s * dW of each, with the scale s that it has now: all kinds of blocks are linear
    in D, so the blocks add up. A layer that an adapter lacks counts as zero there. The new adapter
    has scale 1 and is not active yet.

    Args:
        model: a model with adapters.
        weights: adapter -> w.
        into: the new adapter's name.
        r: shard size of the new blocks: a multiple of every adapter's r, for adapters whose r
            differ. Bone and tile only.

    Raises:
        ArgumentError: an adapter is unknown, the name is taken, a weight is not finite, or blocks
            of different kinds or sizes can't be added.
        ArgumentTypeError: the weights are no dict of numbers.
        MergeError: adapters are merged.
        TargetError: DDP or FSDP wraps the model.

    The model is unchanged whenever this raises.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 4), "all-linear", r=4, adapter="a")
        >>> model = disha.inject_adapters(model, "all-linear", r=2, adapter="b")
        >>> disha.combine_adapters(model, {"a": 0.3, "b": 0.7}, into="c", r=4)
        >>> list(model.disha)
        ['a', 'b', 'c']
    """
    _check_weights(weights)
    check_adapter_name(into)
    view = ModelView(model)
    if into in view.adapters:
        raise ArgumentError(f"the model has an adapter {into!r} already; choose another name")
    for name in weights:
        view.require(name)
    view.refuse_inside("combine adapters")
    view.refuse_wrapped("combine adapters", "combine first, then wrap")
    added: dict[AdaptedLayer, list[Block]] = {}
    for name, weight in view.weights:
        blocks = weight.blocks
        parts = [(blocks[a], w) for a, w in weights.items() if a in blocks]
        if parts:
            added.setdefault(weight.layer, []).append(_sum_of_blocks(name, weight, parts, r))
    for layer, sums in added.items():
        layer.disha.add(into, sums)


def _check_weights(weights: object) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise ArgumentTypeError(f"weights must be a dict of adapter -> number, got {weights!r}")
    for weight in weights.values():
        check_scale(weight)


def _sum_of_blocks(
    name: str, weight: AdaptedWeight, parts: list[tuple[Block, float]], r: int | None
) -> Block:
    """Return a new block that is the weighted sum of a weight's blocks."""
    first = parts[0][0]
    sizes = {(block.method, block.r, block.r_out) for block, _ in parts}
    method, slot = functional.method_of(first.method), first.slot
    if (r is None and len(sizes) > 1) or not method.linear:
        raise ArgumentError(
            f"{name or 'the model'}: blocks of different kinds or sizes can't be added as they "
            f"are: {_listing(sizes)}; for Bone blocks, pass r=, a multiple of every r"
        )
    r = r or first.r
    alike = all(
        (block.method, block.r_out, block.slot.rows) == (first.method, first.r_out, slot.rows)
        for block, _ in parts
    )
    wide = [_widened(block, r) for block, _ in parts] if alike else [None]
    in_features = weight.geometry.in_features
    if any(values is None for values in wide) or r > in_features:
        raise ArgumentError(
            f"{name or 'the model'}: these blocks can't be added with r={r}: {_listing(sizes)}; "
            f"Bone blocks of one kind can, if every r divides it and it is at most "
            f"{in_features}"
        )
    config = first.config.changed(r=r, scale=1.0, rank_pattern={}, also_train=[])
    with torch.no_grad():
        values = functional.weighted_sum(
            [
                (values, factor * block.strength)
                for values, (block, factor) in zip(wide, parts, strict=True)
                if values is not None
            ]
        )
        total = make_block(weight.layer, slot, config, r, values.dtype)
        total.block.copy_(values)
    total.block.requires_grad_(any(block.block.requires_grad for block, _ in parts))
    return total


def _widened(block: Block, r: int) -> torch.Tensor | None:
    return functional.widened(block.method, block.slot.layout, block.block, block.r, r)


def _listing(sizes: set[tuple[str, int, int | None]]) -> str:
    return ", ".join(
        f"{method} r={r}" + ("" if r_out is None else f" r_out={r_out}")
        for method, r, r_out in sorted(sizes, key=str)
    )

"""Weighted sums of adapters, with the same rules for adapters of a model and for files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from disha import functional
from disha.config import AdapterConfig, check_scale
from disha.errors import AdapterFileWarning, ArgumentError, ArgumentTypeError
from disha.files.contents import (
    Contents,
    Source,
    adapter_contents,
    blocks_only,
    load_contents,
    records_of,
)
from disha.files.header import AdapterHeader, LayerRecord
from disha.fingerprint import same_base
from disha.model import ModelView
from disha.plan import check_addable
from disha.state import finite_as
from disha.text import counted, first_few, printable

__all__ = ["Summand", "combine_adapters", "combine_contents"]


@dataclass(frozen=True)
class Summand:
    """An adapter and its weight in a sum.

    Attributes:
        source: where it came from, for errors.
        contents: its header and all its tensors.
        weight: w.
    """

    source: Source
    contents: Contents
    weight: float

    @property
    def header(self) -> AdapterHeader:
        """The adapter's header."""
        return self.contents[0]


@dataclass(frozen=True)
class _Part:
    """One layer of one adapter."""

    source: Source
    record: LayerRecord
    tensor: Tensor
    weight: float

    def __str__(self) -> str:
        record = self.record
        return (
            f"r={record.r}, {record.in_features} -> {record.out_features}, {record.layout} with a "
            f"block {tuple(self.tensor.shape)} in {self.source}"
        )


def combine_adapters(
    model: nn.Module,
    weights: Mapping[str, float],
    into: str,
    *,
    r: int | None = None,
    also_train: bool = True,
) -> None:
    """Add a new adapter that is the weighted sum of others, exactly.

    dW = sum of w * s * dW over the adapters, with their current scales s. The methods are linear in
    D, so the blocks add up. If an adapter lacks a layer, its dW there is zero. The new adapter has
    scale 1 and is not active yet.

    Args:
        model: a model with adapters.
        weights: adapter -> w. All adapters have one method, and one r_out if they are tiles.
        into: the new adapter's name.
        r: shard size of the new blocks, a multiple of every adapter's r; the least common multiple
            by default. The r of BAT blocks can't change.
        also_train: False to combine only the blocks of adapters that have other parameters too.
            Such parameters are values, not updates, so they have no sum.

    Raises:
        ArgumentError: an adapter is unknown, the name is taken, a weight is not finite, blocks
            can't be added, their sum is not finite, or an adapter has parameters besides its blocks
            and `also_train` is set.
        ArgumentTypeError: the weights are not a dict of numbers.
        AdapterStateError: an adapter holds values that are not finite, or blocks of several
            methods.
        ModeError: adapters are merged (`MergeError`), disabled or routed.
        TargetError: DDP or FSDP wraps the model.

    The model is unchanged whenever this raises.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 4), "all-linear", r=4, adapter="a")
        >>> model = disha.inject_adapters(model, "all-linear", r=2, adapter="b")
        >>> disha.combine_adapters(model, {"a": 0.3, "b": 0.7}, into="c")
        >>> list(model.disha), model.disha["c"].r
        (['a', 'b', 'c'], 4)
    """
    if not isinstance(weights, Mapping) or not weights:
        raise ArgumentTypeError(f"weights must be a dict of adapter -> number, got {weights!r}")
    if r is not None:
        AdapterConfig(r)  # checks r
    view = ModelView(model)
    check_addable(view, into, "combine adapters", "combine first, then wrap")
    summands = []
    for adapter, weight in weights.items():
        contents = adapter_contents(view, adapter)
        contents = contents if also_train else blocks_only(*contents)
        summands.append(Summand(f"adapter {adapter!r}", contents, weight))
    header, tensors = combine_contents(summands, r)
    load_contents(view, "the sum", header, tensors, into, freeze=False, activate=False)
    for _, layer, _, new in view.require(into):
        blocks = layer.disha.blocks()
        own = [blocks[name, new.slot.name] for name in weights if (name, new.slot.name) in blocks]
        new.block.requires_grad_(any(block.block.requires_grad for block in own))


def combine_contents(summands: Sequence[Summand], r: int | None = None) -> Contents:
    """Return the adapter that is the weighted sum of others, as `combine_adapters` does.

    The result has scale 1 and no metadata.

    Args:
        summands: the adapters.
        r: shard size of the new blocks; the least common multiple by default.

    Raises:
        ArgumentError: there is no adapter, a weight is not finite, blocks can't be added, their sum
            is not finite, or an adapter has parameters besides its blocks.
        ArgumentTypeError: a weight is not a number.

    Warns:
        AdapterFileWarning: the adapters were saved from different base weights.
    """
    if not summands:
        raise ArgumentError("there is no adapter to combine; give at least one")
    for summand in summands:
        check_scale(summand.weight, "the weight of an adapter")
        _refuse_other_parameters(summand)
    _check_one_method(summands)
    parts: dict[str, list[_Part]] = {}
    for summand in summands:
        header, tensors = summand.contents
        for layer in header.layers:
            part = _Part(summand.source, layer, tensors[layer.key], summand.weight)
            parts.setdefault(layer.name, []).append(part)
    sums = [_sum(of_one_layer, r) for of_one_layer in parts.values()]
    _warn_of_other_bases(parts)
    found = {layer.key: total for layer, total in sums}
    header = AdapterHeader(
        config=_common_config([summand.header.config for summand in summands], sums[0][0].r),
        layers=tuple(layer for layer, _ in sums),
        also_train=(),
        tensors=records_of(found),
        metadata={},
    )
    return header, found


def _refuse_other_parameters(summand: Summand) -> None:
    names = summand.header.also_train
    if names:
        raise ArgumentError(
            f"{summand.source} holds parameters besides its blocks ({first_few(names, 3, ', ')}). "
            "These are values, not updates, so they have no weighted sum; leave out `also_train`"
        )


def _check_one_method(summands: Sequence[Summand]) -> None:
    found: dict[tuple[str, int | None], str] = {}
    for summand in summands:
        config = summand.header.config
        r_out = "" if config.r_out is None else f" with r_out={config.r_out}"
        found.setdefault(
            (config.method, config.r_out), f"{config.method}{r_out} in {summand.source}"
        )
    if len(found) > 1:
        raise ArgumentError(
            f"adapters of different methods can't be combined: {', '.join(found.values())}; an "
            "adapter has one method and one r_out"
        )


def _sum(parts: Sequence[_Part], r: int | None) -> tuple[LayerRecord, Tensor]:
    """Return the weighted sum of a layer's blocks."""
    first = parts[0].record
    r = math.lcm(*(part.record.r for part in parts)) if r is None else r
    name = first.name or "(the model)"
    blocks = _widened(name, parts, r)
    alike = {
        (one.record.in_features, one.record.out_features, one.record.layout, one.record.rows)
        for one in parts
    }
    if len(alike) > 1 or len({block.shape for block in blocks}) > 1:
        raise ArgumentError(
            f"layer {name!r} is not the same in all adapters: {_listing(parts)}; these adapters "
            "are for different models"
        )
    if r > first.in_features:
        raise ArgumentError(
            f"layer {name!r}: the sum needs r={r}, but the layer has only {first.in_features} "
            f"inputs: {_listing(parts)}; export the adapters as LoRA, and combine those"
        )
    total = functional.weighted_sum(
        [
            (block, part.weight * part.record.scale)
            for block, part in zip(blocks, parts, strict=True)
        ]
    )
    if not finite_as(total, total.dtype):
        raise ArgumentError(
            f"layer {name!r}: the sum is not finite as {total.dtype}; give smaller weights"
        )
    return replace(first, r=r, scale=1.0, base=_common_base(parts)), total


def _widened(name: str, parts: Sequence[_Part], r: int) -> list[Tensor]:
    """Return the blocks for shards of r."""
    blocks = []
    for part in parts:
        one = part.record
        method = functional.method_of(one.method)
        block = method.wider_block(one.layout, part.tensor, one.r, r)
        if not method.additive:
            raise ArgumentError(
                f"layer {name!r}: {method.name} blocks can't be added, because dW is not linear in "
                "the block; load them as several adapters instead, whose updates add up"
            )
        if block is None:
            raise ArgumentError(
                f"layer {name!r}: {method.name} blocks can't be added with r={r}: "
                f"{_listing(parts)}; give an r that is a multiple of each, or adapters of equal r"
            )
        blocks.append(block)
    return blocks


def _listing(parts: Sequence[_Part]) -> str:
    return "; ".join(map(str, parts))


def _common_base(parts: Sequence[_Part]) -> str | None:
    """Return the common fingerprint of all parts that have one; None if they differ."""
    known = [part.record.base for part in parts if part.record.base is not None]
    return known[0] if known and all(same_base(known[0], other) for other in known) else None


def _warn_of_other_bases(parts: Mapping[str, Sequence[_Part]]) -> None:
    other = [
        name
        for name, of_one_layer in parts.items()
        if _common_base(of_one_layer) is None
        and any(part.record.base is not None for part in of_one_layer)
    ]
    if other:
        layers = printable(first_few(other, 3, ", "))
        warnings.warn(
            f"the adapters were saved from different base weights in {counted(len(other), 'layer')}"
            f" ({layers}), so their sum fits none of them; combine adapters that were trained on "
            "one base",
            AdapterFileWarning,
            stacklevel=3,
        )


def _common_config(configs: Sequence[AdapterConfig], r: int) -> AdapterConfig:
    first = configs[0]
    alike = all((one.target, one.exclude) == (first.target, first.exclude) for one in configs)
    return first.changed(
        r=r,
        target=first.target if alike else None,
        exclude=list(first.exclude) if alike else [],
        rank_pattern={},
        scale=1.0,
        dtype=None,
        also_train=[],
    )

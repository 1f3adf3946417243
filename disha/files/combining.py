"""Weighted sums of adapters away from their models."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from disha import functional
from disha.config import AdapterConfig, check_scale
from disha.errors import AdapterFileError, ArgumentError
from disha.files.contents import AdapterFileWarning, Contents, Source
from disha.files.header import AdapterHeader, LayerRecord, TensorRecord
from disha.fingerprint import same_base
from disha.state import finite_as
from disha.text import printable

__all__ = ["Summand", "combine_contents"]


@dataclass(frozen=True)
class Summand:
    """An adapter and the weight that it has in a sum.

    Attributes:
        source: where it came from, as errors name it.
        contents: its header and all its tensors.
        weight: w.
    """

    source: Source
    contents: Contents
    weight: float

    @property
    def header(self) -> AdapterHeader:
        """What describes the adapter."""
        return self.contents[0]


@dataclass(frozen=True)
class _Block:
    """One layer of one adapter."""

    source: Source
    record: LayerRecord
    tensor: Tensor
    weight: float

    def widened(self, r: int) -> Tensor | None:
        """Return the block for shards of r, a multiple of its own, or None if there is none."""
        record = self.record
        return functional.widened(record.method, record.layout, self.tensor, record.r, r)


def combine_contents(summands: Sequence[Summand]) -> Contents:
    """Return the adapter whose dW is the sum of w * s * dW of several, exactly.

    The methods are linear in D, so the blocks add up, as in `combine_adapters`. A layer
    that an adapter lacks counts as zero there; Bone blocks of different r get the least common
    multiple of theirs. The result has scale 1 and no metadata.

    Args:
        summands: the adapters, of one kind.

    Raises:
        AdapterFileError: they don't go together: kinds, sizes or layouts differ, or the sum is
            not finite.
        ArgumentError: there is none, a weight is not finite, or an adapter holds parameters
            beside its blocks, of which a sum makes no sense.

    Warns:
        AdapterFileWarning: they were saved from different base weights.
    """
    if not summands:
        raise ArgumentError("there is no adapter to combine; give at least one")
    for summand in summands:
        check_scale(summand.weight, "the weight of an adapter")
        _refuse_other_parameters(summand)
    _check_one_kind(summands)
    layers: list[LayerRecord] = []
    tensors: dict[str, Tensor] = {}
    for blocks in _by_layer(summands):
        record, total = _sum(blocks)
        layers.append(record)
        tensors[record.key] = total
    _warn_of_other_bases(layers, summands)
    header = AdapterHeader(
        config=_common_config([summand.header.config for summand in summands], layers[0].r),
        layers=tuple(layers),
        also_train=(),
        tensors={key: TensorRecord(tuple(t.shape), t.dtype) for key, t in tensors.items()},
        metadata={},
    )
    return header, tensors


def _refuse_other_parameters(summand: Summand) -> None:
    names = summand.header.also_train
    if names:
        raise ArgumentError(
            f"{summand.source} holds parameters beside its blocks ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}), which are values and no updates, so that a "
            "weighted sum of them makes no sense; leave out `also_train`"
        )


def _by_layer(summands: Sequence[Summand]) -> list[list[_Block]]:
    """Return the blocks of each layer, in the order in which layers are first named."""
    layers: dict[str, list[_Block]] = {}
    for summand in summands:
        header, tensors = summand.contents
        for record in header.layers:
            block = _Block(summand.source, record, tensors[record.key], summand.weight)
            layers.setdefault(record.name, []).append(block)
    return list(layers.values())


def _sum(blocks: list[_Block]) -> tuple[LayerRecord, Tensor]:
    """Return the weighted sum of a layer's blocks."""
    first = blocks[0].record
    r = math.lcm(*(block.record.r for block in blocks))
    _check_addable(blocks, r)
    total = functional.weighted_sum(
        [
            (tensor, block.weight * block.record.scale)
            for block, tensor in zip(blocks, _widened(blocks, r), strict=True)
        ]
    )
    if not finite_as(total, total.dtype):
        raise AdapterFileError(
            f"layer {first.name!r}: the sum is not finite as {total.dtype}; give smaller weights"
        )
    return replace(first, r=r, scale=1.0, base=_common_base(blocks)), total


def _check_addable(blocks: list[_Block], r: int) -> None:
    name = blocks[0].record.name
    sizes = {(one.record.in_features, one.record.out_features) for one in blocks}
    if len(sizes) > 1:
        raise AdapterFileError(
            f"layer {name!r} has different sizes: {_listing(blocks)}; these adapters are for "
            "different models"
        )
    if len({(block.record.layout, block.record.rows) for block in blocks}) > 1:
        found = ", ".join(f"{block.record.layout.pattern!r} in {block.source}" for block in blocks)
        raise AdapterFileError(
            f"layer {name!r} is laid out in different ways ({found}): these adapters are for "
            "different models"
        )
    if r > blocks[0].record.in_features and len({block.record.r for block in blocks}) > 1:
        raise AdapterFileError(
            f"layer {name!r}: the sum would need r={r}, the least common multiple, and has only "
            f"{blocks[0].record.in_features} inputs: {_listing(blocks)}; export the adapters as "
            "LoRA, and combine there"
        )


def _widened(blocks: list[_Block], r: int) -> list[Tensor]:
    """Return the blocks for shards of r."""
    name, method = blocks[0].record.name, functional.method_of(blocks[0].record.method)
    found = [tensor for block in blocks if (tensor := block.widened(r)) is not None]
    if len(found) < len(blocks) or not (method.linear or len(blocks) == 1):
        remedy = "only if they have one r" if method.linear else "in the model only"
        raise AdapterFileError(
            f"layer {name!r}: {method.name} blocks can be added {remedy}: {_listing(blocks)}"
        )
    shapes = {tuple(tensor.shape) for tensor in found}
    if len(shapes) > 1:
        raise AdapterFileError(
            f"layer {name!r}: blocks of shapes {sorted(shapes)} can't be added; these adapters "
            "are for different models"
        )
    return found


def _listing(blocks: Iterable[_Block]) -> str:
    return ", ".join(
        f"r={one.record.r}, {one.record.in_features} -> {one.record.out_features} in {one.source}"
        for one in blocks
    )


def _check_one_kind(summands: Sequence[Summand]) -> None:
    """Raise if adapters that share no layer are of different kinds: a file holds one."""
    kinds = {(one.header.config.method, one.header.config.r_out) for one in summands}
    if len(kinds) > 1:
        found = ", ".join(
            f"{one.header.config.method}"
            + ("" if one.header.config.r_out is None else f" r_out={one.header.config.r_out}")
            + f" in {one.source}"
            for one in summands
        )
        raise AdapterFileError(
            f"adapters of different kinds can't be combined: {found}; a file holds one kind"
        )


def _common_base(blocks: list[_Block]) -> str | None:
    """Return the fingerprint that all share who have one; None where they don't."""
    known = [block.record.base for block in blocks if block.record.base is not None]
    alike = all(same_base(known[0], other) for other in known)
    return known[0] if known and alike else None


def _warn_of_other_bases(layers: Iterable[LayerRecord], summands: Sequence[Summand]) -> None:
    named = {
        record.name
        for summand in summands
        for record in summand.header.layers
        if record.base is not None
    }
    other = [layer.name for layer in layers if layer.base is None and layer.name in named]
    if other:
        shown = printable(", ".join(other[:3])) + (", ..." if len(other) > 3 else "")
        warnings.warn(
            f"the adapters were saved from different base weights in {len(other)} layers "
            f"({shown}), so that their sum is for none of these; combine adapters that "
            "were trained on one base",
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

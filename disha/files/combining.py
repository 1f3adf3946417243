"""Weighted sums of the adapters of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from disha import functional
from disha.checks import check_positive_int, check_scale
from disha.errors import ArgumentError, ArgumentTypeError
from disha.files.contents import LayerBlock, Source, contents_of_blocks, keep_blocks
from disha.files.header import AdapterContents
from disha.files.loading import load_contents
from disha.files.saving import adapter_contents
from disha.functional import method_of
from disha.layers.spec import BlockSpec
from disha.model.state import is_finite_as
from disha.model.view import ModelView, all_or_nothing
from disha.text import first_few


class Summand(NamedTuple):
    """An adapter, its weight w in a sum, and where it came from, for errors."""

    source: Source
    contents: AdapterContents
    weight: float


def combine_adapters(
    model: nn.Module,
    weights: Mapping[str, float],
    into: str,
    *,
    r: int | None = None,
    also_train: bool = True,
) -> None:
    """Add a new adapter that is the weighted sum of others, exactly.

    The new dW of a layer is the sum of w * s * dW over the adapters that have this layer, where s
    is an adapter's present scale. As dW is linear in the block, the blocks themselves are added.
    The new adapter has scale 1 and is not active yet.

    Args:
        model: a model with adapters.
        weights: adapter -> w. The adapters must have the same method and the same r_out.
        into: the new adapter's name.
        r: shard size of the new blocks, a multiple of every adapter's r; by default, the least
            common multiple. BAT blocks must all have the same r, and keep it.
        also_train: parameters and buffers that an adapter's `also_train` names are values, not
            updates, so they have no sum, and this raises. Pass False to combine only the blocks of
            such adapters. Running statistics, and what trains without being named, belong to the
            model, and stay as they are.

    Raises:
        ArgumentError: an adapter is unknown, the name is taken, a weight is not finite, blocks
            can't be added, their sum is not finite, or an adapter has parameters or buffers of its
            `also_train` and this is not False here.
        ArgumentTypeError: the weights are not a dict of numbers.
        AdapterStateError: an adapter holds values that are not finite, or blocks of several
            methods.
        ModeError: adapters are merged (`MergeError`), or in a context.
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
        check_positive_int("r", r)
    view = ModelView(model)
    view.check_can_add(into, "combine adapters", "combine first, then wrap")
    summands = []
    for adapter, weight in weights.items():
        contents = adapter_contents(view, adapter)
        # Without `also_train`, an adapter has besides its blocks only what stays in the model.
        has_claims = any(tensor.claimant == adapter for tensor in view.tensors)
        if not also_train or not has_claims:
            contents = keep_blocks(contents)
        summands.append(Summand(f"adapter {adapter!r}", contents, weight))
    total = combine_contents(summands, r)
    with all_or_nothing(view) as undo:
        load_contents(view, "the sum", total, into, freeze=False, activate=False, around=undo)
        trained = {
            model_block.name
            for model_block in view.blocks()
            if model_block.adapter in weights and model_block.values.requires_grad
        }
        for model_block in view.require(into):
            model_block.values.requires_grad_(model_block.name in trained)


class Term(NamedTuple):
    """A block of an adapter, its coefficient in a sum, and the source of the adapter."""

    source: Source
    spec: BlockSpec
    block: Tensor
    coefficient: float

    def __str__(self) -> str:
        spec = self.spec
        sizes = f"{spec.in_features} -> {spec.out_features}"
        shape = tuple(self.block.shape)
        return f"r={spec.r}, {sizes}, {spec.layout} with a block {shape} in {self.source}"


def combine_contents(summands: Sequence[Summand], r: int | None) -> AdapterContents:
    """Return the weighted sum of adapters, which has the scale 1 and no metadata."""
    _check_can_be_combined(summands)
    terms: dict[str, list[Term]] = {}
    for source, contents, weight in summands:
        for spec in contents.layers:
            term = Term(source, spec, contents.tensors[spec.key], float(weight) * spec.scale)
            terms.setdefault(spec.name, []).append(term)
    blocks = [_sum_blocks(terms_of_layer, r) for terms_of_layer in terms.values()]
    first, _ = blocks[0]
    config = summands[0].contents.config.changed(
        r=first.r, rank_pattern={}, scale=1.0, dtype=None, target=None, exclude=()
    )
    return contents_of_blocks(config, blocks)


def _check_can_be_combined(summands: Sequence[Summand]) -> None:
    """Raise unless the adapters hold blocks alone, of one method, and their weights are finite."""
    first = summands[0].contents.config
    for summand in summands:
        check_scale(summand.weight, "the weight of an adapter")
        config = summand.contents.config
        parameters = summand.contents.also_train
        if parameters:
            raise ArgumentError(
                f"{summand.source} holds parameters besides its blocks "
                f"({first_few(parameters, 3, ', ')}). These are values, not "
                "updates, so they have no weighted sum; leave out `also_train`"
            )
        if (config.method, config.r_out) != (first.method, first.r_out):
            raise ArgumentError(
                "adapters of different methods or r_out can't be combined; make one sum of each"
            )


def _sum_blocks(terms: Sequence[Term], r: int | None) -> LayerBlock:
    """Return the spec and the block of a layer: the weighted sum of its blocks."""
    first = terms[0].spec
    layer = f"layer {first.name or '(the model)'!r}"
    if first.is_new_rows:
        raise ArgumentError(
            f"{layer}: new rows are values, not updates, so they have no weighted sum; "
            "leave out `also_train_rows`"
        )
    # Fingerprints are left out, because one base has several: they depend on its dtype.
    layers = {term.spec.but(r=1, scale=1.0, base=None) for term in terms}
    if len(layers) > 1:
        raise ArgumentError(f"{layer} is not the same in all adapters: {_list(terms)}")
    r, total = _add_blocks(terms, r, layer)
    if not is_finite_as(total, total.dtype):
        raise ArgumentError(
            f"{layer}: the sum is not finite as {total.dtype}; give smaller weights"
        )
    bases = {term.spec.base for term in terms}
    base = first.base if len(bases) == 1 else None
    return first.but(r=r, scale=1.0, base=base), total


def _add_blocks(terms: Sequence[Term], r: int | None, layer: str) -> tuple[int, Tensor]:
    """Return the sum of the blocks of one weight, and its r, which is at least the one given."""
    first = terms[0].spec
    method = method_of(first.method)
    geometry = first.geometry
    blocks = [(term.block, term.spec.r, term.coefficient) for term in terms]
    joined = method.join([(term.block, term.coefficient) for term in terms], geometry)
    if joined is not None:
        rows = sum(term.spec.r for term in terms)
        blocks = [(joined, rows, 1.0)]
        r = max(r or 0, rows)
    elif not method.additive:
        raise ArgumentError(
            f"{layer}: {method.name} blocks can't be added, because dW is not linear in the block; "
            "load them as several adapters instead, whose updates add up"
        )
    r = r or math.lcm(*(term.spec.r for term in terms))
    if joined is None and r > first.in_features:
        raise ArgumentError(
            f"{layer}: the sum needs r={r}, but the layer has only {first.in_features} inputs: "
            f"{_list(terms)}; export the adapters as LoRA, and combine those"
        )
    wide_terms = []
    for block, block_r, coefficient in blocks:
        wide = method.wider_block(first.layout, block, geometry, block_r, r)
        if wide is None:
            raise ArgumentError(
                f"{layer}: {method.name} blocks can't be added with r={r}: {_list(terms)}; "
                "give an r that is a multiple of each, or adapters of equal r"
            )
        wide_terms.append((wide, coefficient))
    return r, functional.weighted_sum(wide_terms)


def _list(terms: Sequence[Term]) -> str:
    return "; ".join(map(str, terms))

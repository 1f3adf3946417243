"""Routing: each sample of a batch goes through its own adapter.

A `Route` says which adapter each sample has. `Routed` has the updates of one weight by adapter, and
its products give each sample those of its adapter: the product of all samples with W, plus that of
each adapter with its samples. How the latter are added depends on the updates:

    A and R are matrices, as of Bone and LoRA    to the rows of each adapter, where they are
                                                 (`row_products`); nothing is sorted
    other updates of low rank, dropout,          to samples that are sorted by adapter, if those of
    other layers, compiled code                  one adapter are not neighbours already
    a linear layer with an update of no          not added: each adapter has a whole product with
    low rank, as BAT                             its samples, since it would else need two
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from disha.errors import ArgumentError, ModeError
from disha.functional import Layout, Update, adapted_linear
from disha.functional.layouts import MATRIX
from disha.functional.lookups import is_lookup
from disha.functional.low_rank import Lowered, go_up
from disha.functional.new_rows import ChangeRows
from disha.functional.row_products import Rows, add_row_products
from disha.functional.shard_sums import (
    autocasts,
    is_cast,
    may_define_backward,
    overflow_safe_shard_sum,
)
from disha.functional.update import Factors, factors_of
from disha.functional.weight_updates import Change, DeltaOf, Updates
from disha.text import counted

Term = TypeVar("Term")
"""What adds something to the samples of an adapter: an update, or its factors."""

OfAdapters: TypeAlias = list[tuple[str, Term]]
RowsByAdapter: TypeAlias = Mapping[str | None, Sequence[Rows]]

FEW_ROWS = 8
"""Rows of an adapter that stand in shorter pieces are gathered, and multiplied at once."""


class Route:
    """An adapter for each sample of a batch, or None for no adapter.

    Each of the `names` covers an equal part of an input's first dimension.
    """

    def __init__(self, names: tuple[str | None, ...]) -> None:
        self.names = names
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}  # by `_on_device`
        self._rows: dict[tuple[int, torch.device], RowsByAdapter] = {}  # by `rows_by_adapter`

    @cached_property
    def adapters(self) -> tuple[str, ...]:
        """The adapters of the samples, each once, in order."""
        names = [name for name in self.names if name is not None]
        return tuple(dict.fromkeys(names))

    def entries_of_name(self, size: int) -> int:
        """Return how many entries of a leading dimension of this size each name covers."""
        samples = len(self.names)
        if size % samples:
            raise ArgumentError(
                f"route_adapters got {counted(samples, 'name')}, but a layer got an input with the "
                f"leading size {size}; it must be a multiple of the number of names, so give one "
                "name for each sample of the batch"
            )
        return size // samples

    def by_adapter(
        self, size: int, device: torch.device
    ) -> tuple[list[tuple[str | None, Tensor]], Tensor | None]:
        """Return each adapter with the indices of its samples, and all indices in that order.

        They count along a leading dimension of this size. The order is None if the samples of each
        adapter are neighbours, so that nothing has to be sorted.
        """
        entries = self.entries_of_name(size)
        indices: dict[str | None, list[int]] = {}
        for sample, name in enumerate(self.names):
            of_sample = range(sample * entries, (sample + 1) * entries)
            indices.setdefault(name, []).extend(of_sample)
        sorted_indices: list[int] = []
        for indices_of_adapter in indices.values():
            sorted_indices += indices_of_adapter
        order = self._on_device(tuple(sorted_indices), device)
        parts = torch.split(order, [len(part) for part in indices.values()])
        is_sorted = sorted_indices == list(range(size))
        return list(zip(indices, parts)), None if is_sorted else order

    def split(self, x: Tensor) -> tuple[list[tuple[str | None, Tensor]], Tensor | None]:
        """Return each adapter with its samples in x; and the indices of all, as `by_adapter` does.

        The samples are gathered once for all adapters: each gathering adds to the whole gradient.
        """
        indices_by_adapter, order = self.by_adapter(x.shape[0], x.device)
        sorted_x = x if order is None else x.index_select(0, order)
        parts = torch.split(sorted_x, [len(indices) for _, indices in indices_by_adapter])
        adapters = [adapter for adapter, _ in indices_by_adapter]
        return list(zip(adapters, parts)), order

    def rows_by_adapter(self, size: int, device: torch.device) -> RowsByAdapter:
        """Return the rows of each adapter in a matrix of so many, as slices where that pays."""
        key = size, device
        if key not in self._rows:  # every layer asks for the same
            self._rows[key] = self._find_rows(size, device)
        return self._rows[key]

    def _find_rows(self, size: int, device: torch.device) -> RowsByAdapter:
        entries = self.entries_of_name(size)
        pieces_by_name: dict[str | None, list[slice]] = {}
        start = 0
        for name, samples in groupby(self.names):
            stop = start + entries * len(list(samples))
            pieces_by_name.setdefault(name, []).append(slice(start, stop))
            start = stop
        rows: dict[str | None, list[Rows]] = {}
        for name, pieces in pieces_by_name.items():
            shortest = min(piece.stop - piece.start for piece in pieces)
            rows[name] = [*pieces]
            if len(pieces) > 1 and shortest < FEW_ROWS:
                indices = [row for piece in pieces for row in range(piece.start, piece.stop)]
                rows[name] = [self._on_device(tuple(indices), device)]
        return rows

    def _on_device(self, indices: tuple[int, ...], device: torch.device) -> Tensor:
        """Return indices as a tensor, the same one each time."""
        # Every layer needs the same indices, and a captured graph can't copy them to a device.
        key = (indices, device)
        if key not in self._indices:
            with torch.inference_mode(False):
                on_device = torch.tensor(indices, dtype=torch.int64, device=device)
            if type(on_device) is not Tensor:
                return on_device  # torch.export is tracing, and it has no values
            self._indices[key] = on_device
        return self._indices[key]


class Routed(Updates):
    """The updates of a weight, by adapter, when each sample has its own adapter."""

    def __init__(self, route: Route, by_adapter: Mapping[str, tuple[Update, ...]]) -> None:
        super().__init__(tuple([update for updates in by_adapter.values() for update in updates]))
        # None even if the route has a single adapter. An operation that needs the same updates for
        # all samples then raises for one adapter as it does for two.
        self.shared = None
        self.is_routed = True
        self.route = route
        self.by_adapter = by_adapter

    def updates_of(self, adapter: str | None) -> tuple[Update, ...]:
        """Return the updates that an adapter has here, which may be none."""
        return () if adapter is None else self.by_adapter.get(adapter, ())

    def shared_for_input(self, x: Tensor, shape: Sequence[int]) -> tuple[Update, ...] | None:
        """Return the updates that all samples of an input have, or None if samples differ.

        Raise if the input has no samples, or not a multiple of the number of names.
        """
        # Without samples, an input is a vector, an index, or channels with a position for each
        # axis of the kernel.
        if x.dim() < len(shape) - is_lookup(x):
            raise ArgumentError(
                "route_adapters needs samples along the leading dimension of each input, and a "
                f"weight of shape {tuple(shape)} got an input of shape {tuple(x.shape)}; "
                "pass a batch, or use one adapter at a time"
            )
        self.route.entries_of_name(x.shape[0])  # raises if the names don't divide the samples
        names = self.route.names
        if len(set(names)) > 1:
            if is_lookup(x) and x.dim() == 1 and _may_be_positions(x):
                raise ArgumentError(
                    f"route_adapters can't tell whether indices of shape {tuple(x.shape)} are "
                    "samples or positions that all samples share; pass (samples, n), or leave this "
                    "table out (exclude=)"
                )
            return None
        return self.updates_of(names[0])

    def samples_by_adapter(self, x: Tensor) -> Sequence[tuple[str | None, Tensor]]:
        """Return each adapter with the indices of its samples."""
        indices_by_adapter, _ = self.route.by_adapter(x.shape[0], x.device)
        return indices_by_adapter

    def map(self, change: Change, change_rows: ChangeRows) -> Updates | None:
        """Return the updates of a view, or None if a block can't be cut there."""
        by_adapter = {}
        for adapter, updates in self.by_adapter.items():
            of_view = change(updates)
            if of_view is None:
                return None
            by_adapter[adapter] = tuple(of_view)
        return Routed(self.route, by_adapter)

    def compute_weight(self, weight: Tensor, layout: Layout) -> Tensor:
        """Return W if no adapter acts, or raise, because samples have different weights."""
        if not self.all_updates:
            return weight
        raise ModeError(
            "samples can't be routed here: this operation needs one computed weight for all "
            "samples; use one adapter at a time, or exclude the weight"
        )

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product of a linear layer, whose weight is (out, in)."""
        shared = self.shared_for_input(x, weight.shape)
        if shared is None and not x.shape[0]:
            shared = ()  # there are no samples
        if shared is not None:
            return adapted_linear(x, weight, bias, shared)
        if any(not update.method.low_rank for update in self.all_updates):
            return _linear_by_adapter(x, weight, bias, self)
        geometry = MATRIX.geometry(weight.shape)
        factors = {}
        for adapter, updates in self.by_adapter.items():
            factors[adapter] = [factors_of(update, MATRIX, geometry) for update in updates]
        if _may_multiply_rows(x, weight, self.all_updates):
            return _linear_by_rows(x, weight, bias, self.route, factors)
        size = _size_of_sums(factors)
        if size is None:
            return self.product(F.linear, x, weight, bias, MATRIX)
        # The shard sums are the same for all adapters, and smaller than the inputs to sort.
        sums, overflow_scale = overflow_safe_shard_sum(x, size)

        def delta_of(sums: Tensor, factors: Factors) -> Tensor:
            return go_up(F.linear, Lowered(sums, overflow_scale, factors, MATRIX))

        return _add_by_adapter(F.linear(x, weight, bias), sums, self.route, factors, delta_of)

    def add_updates(self, output: Tensor, x: Tensor, delta_of: DeltaOf) -> Tensor:
        """Return an output plus, for each sample, what the updates of its own adapter add."""
        return _add_by_adapter(output, x, self.route, self.by_adapter, delta_of)


def _size_of_sums(factors: Mapping[str, Sequence[Factors]]) -> int | None:
    """Return the size of the shard sums of all updates, or None if they do not have the same."""
    sizes: set[int] = set()
    for of_adapter in factors.values():
        for one in of_adapter:
            if not isinstance(one.down, int) or one.update.dropout:
                return None
            sizes.add(one.down)
    return sizes.pop() if len(sizes) == 1 else None


def _add_by_adapter(
    output: Tensor,
    x: Tensor,
    route: Route,
    terms: Mapping[str, Sequence[Term]],
    delta_of: Callable[[Tensor, Term], Tensor],
) -> Tensor:
    """Sort x by adapter, and add to each sample of an output what the terms of its adapter give."""
    parts, order = route.split(x)
    deltas = []
    for adapter, part in parts:
        of_adapter = () if adapter is None else terms.get(adapter, ())
        delta = None
        for term in of_adapter:
            of_term = delta_of(part, term)
            delta = of_term if delta is None else delta + of_term
        if delta is None:
            delta = output.new_zeros(part.shape[0], *output.shape[1:])
        deltas.append(delta)
    return _add_sorted(output, torch.cat(deltas).to(output.dtype), order)


def _add_sorted(output: Tensor, delta: Tensor, order: Tensor | None) -> Tensor:
    """Return an output plus a sorted delta, whose rows belong to those that the order tells."""
    if order is None:
        return output + delta
    return output.index_add(0, order, delta)


def _may_be_positions(indices: Tensor) -> bool:
    """Whether indices (n,) count up, as those of positions do; compiled code can't tell."""
    if is_compiling():
        return True
    if indices.is_meta or len(indices) < 2:
        return False
    return bool((indices.diff() == 1).all())


def _linear_by_adapter(x: Tensor, weight: Tensor, bias: Tensor | None, routed: Routed) -> Tensor:
    """Sort the samples by adapter, multiply those of each, and put the outputs back in order."""
    parts, order = routed.route.split(x)
    outputs = []
    for adapter, part in parts:
        outputs.append(adapted_linear(part, weight, bias, routed.updates_of(adapter)))
    sorted_output = torch.cat(outputs)
    if order is None:
        return sorted_output
    return torch.empty_like(sorted_output).index_copy(0, order, sorted_output)


# --- a linear layer whose updates are matrices: each adapter's products are added to its rows -----


def _may_multiply_rows(x: Tensor, weight: Tensor, updates: Sequence[Update]) -> bool:
    """Whether `_linear_by_rows` can compute the product."""
    if any(update.dropout or update.method.compact for update in updates):
        return False
    return may_define_backward(x, weight, *[update.block for update in updates])


def _linear_by_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    route: Route,
    factors: Mapping[str, Sequence[Factors]],
) -> Tensor:
    """Return W x + b, with s R^T (A x) of each adapter added to its rows."""
    inputs = x.reshape(-1, x.shape[-1])
    rows = route.rows_by_adapter(inputs.shape[0], x.device)
    # The updates go down before W x. So in backward, W x creates the gradient of x, and the updates
    # add to it.
    lowered, inputs = _go_down_by_rows(inputs, factors, rows)
    output = F.linear(inputs, weight, bias)
    for sums, overflow_scale, of_sums in lowered:
        ups = [(adapter, one.dense_up()) for adapter, one in of_sums]
        output = _add_by_rows(output, sums, rows, ups, overflow_scale)
    return output.view(*x.shape[:-1], weight.shape[0])


def _go_down_by_rows(
    inputs: Tensor, factors: Mapping[str, Sequence[Factors]], rows: RowsByAdapter
) -> tuple[list[tuple[Tensor, float, OfAdapters[Factors]]], Tensor]:
    """Return each A x / f, with f and the factors that go up from it; and a view of the inputs.

    All adapters with shard sums of one size share these. Of adapters with an A of their own, those
    with the same k share one tensor, in which each has its rows.
    """
    with_sums: dict[int, OfAdapters[Factors]] = {}
    with_matrices: dict[tuple[int, int], OfAdapters[Factors]] = {}
    downs: dict[tuple[int, int], OfAdapters[Tensor]] = {}
    for adapter, of_adapter in factors.items():
        for position, one in enumerate(of_adapter):
            if isinstance(one.down, int):
                with_sums.setdefault(one.down, []).append((adapter, one))
            else:
                key = one.down.shape[-2], position  # two of one adapter have the same rows
                with_matrices.setdefault(key, []).append((adapter, one))
                downs.setdefault(key, []).append((adapter, one.down.mT))
    sums_of_size, inputs = _shard_sums_of_sizes(inputs, with_sums)
    lowered = [(*sums_of_size[size], of_size) for size, of_size in with_sums.items()]
    for key, of_k in with_matrices.items():
        dtype = torch.get_autocast_dtype(inputs.device.type) if is_cast(inputs) else inputs.dtype
        start = inputs.new_zeros(inputs.shape[0], key[0], dtype=dtype)
        lowered.append((_add_by_rows(start, inputs, rows, downs[key]), 1.0, of_k))
    return lowered, inputs


def _shard_sums_of_sizes(
    x: Tensor, sizes: Iterable[int]
) -> tuple[dict[int, tuple[Tensor, float]], Tensor]:
    """Return S(x) / f and f for each size of shards, and a view of x (n, in) to multiply W by.

    In backward, the gradient of S(x) is added to that of the view as it is, and not repeated in
    memory first.
    """
    sums: dict[int, tuple[Tensor, float]] = {}
    for size in sorted(sizes, reverse=True):
        multiples = [done for done in sums if done % size == 0]
        if multiples:
            larger_sums, former_scale = sums[multiples[-1]]
            smaller_sums, overflow_scale = overflow_safe_shard_sum(larger_sums, size)
            sums[size] = smaller_sums, former_scale * overflow_scale
        elif x.shape[1] % size or x.dtype == torch.float16 or autocasts(x):
            sums[size] = overflow_safe_shard_sum(x, size)
        else:
            shards = x.view(x.shape[0], -1, size)
            sums[size] = shards.sum(1), 1.0
            x = shards.view(x.shape)
    return sums, x


def _add_by_rows(
    output: Tensor,
    x: Tensor,
    rows: RowsByAdapter,
    matrices: OfAdapters[Tensor],
    factor: float = 1.0,
) -> Tensor:
    """Add to the rows of each adapter the product of those of x with its matrix."""
    pairs = [(part, matrix) for adapter, matrix in matrices for part in rows[adapter]]
    dtype = output.dtype
    of_matrices = [matrix.to(dtype) for _, matrix in pairs]
    return add_row_products(output, x.to(dtype), [part for part, _ in pairs], of_matrices, factor)

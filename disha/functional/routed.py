"""Routing: each sample of a batch goes through its own adapter.

A `Route` says which adapter each sample has, a `Routed` which updates of one weight that means. Its
products give each sample its own updates. A linear product takes the cheapest of four ways:

- all samples have the same adapter: the usual product;
- a method does not reduce to shard sums: one product for each run of samples with one adapter;
- the adapters have blocks of one size: the shard sums of all samples at once, times each block;
- otherwise: the product with W, plus that of each adapter with its own samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from disha.errors import ArgumentError, ModeError
from disha.functional import Geometry, Layout, Update, adapted_linear
from disha.functional.bone import routed_delta
from disha.functional.layouts import MATRIX
from disha.functional.lookups import is_lookup
from disha.functional.shard_sums import scaled, shard_sums
from disha.functional.update import shard_sum_terms
from disha.functional.updates import Change, DeltaOf, Updates
from disha.private_torch import must_not_write
from disha.text import counted

Run = tuple[str | None, int]
"""An adapter, or None, and how many entries of a leading dimension go through it."""


@dataclass(frozen=True)
class Route:
    """An adapter for each sample of a batch, or None for no adapter."""

    names: tuple[str | None, ...]  # each covers an equal part of the rows of an input, in order
    _kept: dict[tuple[tuple[int, ...], torch.device], Tensor] = field(
        default_factory=dict, compare=False
    )

    @cached_property
    def adapters(self) -> tuple[str, ...]:
        """The adapters of the samples, each once."""
        return tuple(dict.fromkeys(name for name in self.names if name is not None))

    def parts(self, size: int) -> int:
        """Return how many entries of a leading dimension of this size each name covers."""
        samples = len(self.names)
        if size % samples:
            raise ArgumentError(
                f"route_adapters got {counted(samples, 'name')}, but a layer got an input with the "
                f"leading size {size}; it must be a multiple of the number of names, so give one "
                "name for each sample of the batch"
            )
        return size // samples

    def runs(self, names: Sequence[str | None], size: int) -> list[Run]:
        """Return the runs of samples that have these adapters. An adapter may have several."""
        parts = self.parts(size)
        return [(name, parts * len(list(same))) for name, same in groupby(names)]

    def by_adapter(
        self, size: int, device: torch.device
    ) -> tuple[list[tuple[str, Tensor]], Tensor]:
        """Return each adapter with its indices along a leading dimension, and all these indices.

        What has no adapter comes last, under an empty name.
        """
        places = self._places(self.adapters)
        parts = self.parts(size)
        order = sorted(range(len(places)), key=places.__getitem__)
        runs = self.runs([self.names[sample] for sample in order], size)
        entries_of_samples = [range(sample * parts, (sample + 1) * parts) for sample in order]
        indices = self._on_device(tuple(chain.from_iterable(entries_of_samples)), device)
        each = torch.split(indices, [entries for _, entries in runs])
        return [(name or "", entries) for (name, _), entries in zip(runs, each)], indices

    def choices(self, adapters: Sequence[str], device: torch.device) -> Tensor:
        """Return the index of each sample's adapter, or the number of adapters for no adapter."""
        return self._on_device(tuple(self._places(adapters)), device)

    def _places(self, adapters: Sequence[str]) -> list[int]:
        place = {adapter: index for index, adapter in enumerate(adapters)}
        return [place.get(name or "", len(place)) for name in self.names]

    def _on_device(self, indices: tuple[int, ...], device: torch.device) -> Tensor:
        # Kept because every layer needs the same indices, and a captured graph can't copy them.
        key = (indices, device)
        if key not in self._kept:
            with torch.inference_mode(False):
                self._kept[key] = torch.tensor(indices, dtype=torch.int64, device=device)
        return self._kept[key]


class Routed(Updates):
    """The updates of a weight, by adapter, when each sample has its own adapter."""

    def __init__(
        self,
        route: Route,
        by_adapter: Mapping[str, tuple[Update, ...]],
        batch: int = 0,  # the number of samples if they are the second dimension
    ) -> None:
        super().__init__(tuple([update for updates in by_adapter.values() for update in updates]))
        self.of_all_samples = None  # also for a route with one adapter: what works must with two
        self.route = route
        self.by_adapter = by_adapter
        self.batch = batch

    def of_input(self, x: Tensor, shape: Sequence[int]) -> tuple[Update, ...] | None:
        """Return the updates for the samples of an input, or None if these have their own.

        Raise unless the input has samples first, a multiple of the number of names.
        """
        # One input is a vector, an index, or channels with as many positions as the kernel.
        if x.dim() < len(shape) - is_lookup(x):
            raise ArgumentError(
                "route_adapters needs samples along the leading dimension of each input, and a "
                f"weight of shape {tuple(shape)} got an input of shape {tuple(x.shape)}; "
                "pass a batch, or use one adapter at a time"
            )
        self.route.parts(x.shape[0])
        names = self.route.names
        return self.by_adapter.get(names[0] or "", ()) if len(set(names)) == 1 else None

    def map(self, change: Change) -> Updates | None:
        """Return the updates of a view, or None if there are none."""
        views = {adapter: change(updates) for adapter, updates in self.by_adapter.items()}
        found = {adapter: tuple(kept) for adapter, kept in views.items() if kept is not None}
        return Routed(self.route, found, self.batch) if len(found) == len(views) else None

    def for_attention(self, query: Tensor) -> Updates:
        """Return the updates for torch's attention, where samples are the second dimension."""
        if query.dim() != 3:
            raise ArgumentError(
                "route_adapters needs samples, but an attention got a query without a batch "
                f"dimension, of shape {tuple(query.shape)}; pass a batch, or use one adapter at a "
                "time"
            )
        return Routed(self.route, self.by_adapter, query.shape[1])

    def compute_weight(self, weight: Tensor, layout: Layout) -> Tensor:
        """Raise: no one weight is that of all samples."""
        raise ModeError(
            "samples can't be routed here: this operation needs one computed weight for all "
            "samples; use one adapter at a time, or exclude the weight"
        )

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product of a linear layer, whose weight is (out, in)."""
        if self.batch:
            # Samples are the second dimension, or the first two dimensions are flattened.
            first = x.reshape(-1, self.batch, x.shape[-1]).transpose(0, 1)
            output = Routed(self.route, self.by_adapter).linear(first, weight, bias)
            return output.transpose(0, 1).contiguous().view(*x.shape[:-1], output.shape[-1])
        same = self.of_input(x, weight.shape)
        if same is not None or not x.shape[0]:
            return adapted_linear(x, weight, bias, same or ())
        if not all(update.method.uses_shard_sum for update in self.every):
            return _linear_by_adapter(x, weight, bias, self)
        alike = _alike(self.by_adapter, MATRIX.geometry(weight.shape))
        if alike is None:
            return self.product(F.linear, x, weight, bias, MATRIX)
        output = F.linear(x, weight, bias)
        if is_compiling() or must_not_write():
            choices = self.route.choices(list(alike), x.device)
            delta = routed_delta(x, list(alike.values()), choices)
            return output + delta.to(output.dtype)
        return _with_alike(output, x, self.route, alike)

    def add_updates(self, output: Tensor, x: Tensor, delta_of: DeltaOf) -> Tensor:
        """Return an output plus, for each sample, what the updates of its own adapter add."""
        each, _ = self.route.by_adapter(x.shape[0], x.device)
        for adapter, rows in each:
            for update in self.by_adapter.get(adapter, ()):
                delta = delta_of(x.index_select(0, rows), update)
                output = output.index_add(0, rows, delta.to(output.dtype))
        return output


def _linear_by_adapter(x: Tensor, weight: Tensor, bias: Tensor | None, routed: Routed) -> Tensor:
    """Sort the samples by adapter, multiply each run, and put the outputs back in order."""
    each, order = routed.route.by_adapter(x.shape[0], x.device)
    parts = []
    for adapter, rows in each:
        updates = routed.by_adapter.get(adapter, ())
        parts.append(adapted_linear(x.index_select(0, rows), weight, bias, updates))
    together = torch.cat(parts)
    return torch.empty_like(together).index_copy(0, order, together)


FEW_ROWS = 8
"""Samples of fewer rows are sorted by adapter, so that each adapter adds one product.

Sorting costs passes over the output. Without sorting, each sample costs one product.
"""


def _with_alike(output: Tensor, x: Tensor, route: Route, alike: Mapping[str, Tensor]) -> Tensor:
    """Return an output plus S(x) s R of each sample, where all matrices s R have one shape."""
    size = x.shape[0]
    r, out_features = next(iter(alike.values())).shape
    rows = x.reshape(size, -1, x.shape[-1])  # (size, positions, in)
    outputs = output.reshape(size, -1, out_features)  # (size, positions, out)
    sums, overflow_scale = shard_sums(rows, r)  # (size, positions, r)
    matrices = {adapter: matrix.to(x.dtype) for adapter, matrix in alike.items()}
    runs = route.runs(route.names, size)
    few = rows.shape[1] * route.parts(size) < FEW_ROWS and len(runs) > len(alike)
    in_place = not torch.is_grad_enabled() and outputs.is_contiguous() and output.dtype == x.dtype
    if in_place and not few:
        sizes = [entries for _, entries in runs]
        each = zip(runs, torch.split(outputs, sizes), torch.split(sums, sizes))
        for (adapter, _), outputs_of_run, sums_of_run in each:
            if adapter in matrices:
                flat_outputs = outputs_of_run.view(-1, out_features)
                flat_sums = sums_of_run.flatten(0, 1)  # (entries * positions, r)
                flat_outputs.addmm_(flat_sums, matrices[adapter], alpha=overflow_scale)
        return outputs.reshape(output.shape)
    each_rows, order = route.by_adapter(size, x.device)
    sorted_sums = sums.index_select(0, order)
    parts = torch.split(sorted_sums, [len(entries) for _, entries in each_rows])
    deltas = []  # (entries, positions, out) of each adapter
    for (adapter, _), sums_of_adapter in zip(each_rows, parts):
        if adapter in matrices:
            deltas.append(sums_of_adapter @ matrices[adapter])
        else:
            shape = (*sums_of_adapter.shape[:-1], out_features)
            deltas.append(sums_of_adapter.new_zeros(shape))
    delta = scaled(torch.cat(deltas), overflow_scale).to(output.dtype)
    add = outputs.index_add if torch.is_grad_enabled() else outputs.index_add_
    return add(0, order, delta).reshape(output.shape)


def _alike(
    by_adapter: Mapping[str, tuple[Update, ...]], geometry: Geometry
) -> dict[str, Tensor] | None:
    """Return s R of each adapter if all have one size and no tiles or dropout, else None."""
    found = {}
    for adapter, updates in by_adapter.items():
        small = shard_sum_terms(updates, MATRIX, geometry)
        if len(small) > 1 or any(reduced.dropout for reduced in small):
            return None
        if small:
            found[adapter] = small[0].matrix
    sizes = {(matrix.shape, matrix.dtype) for matrix in found.values()}
    if len(sizes) != 1 or next(iter(sizes))[0][-1] != geometry.out_features:
        return None
    return found

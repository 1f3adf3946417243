"""Routing: each sample of a batch goes through its own adapter.

A `Route` says which adapter each sample has. `Routed` has the updates of one weight by adapter, and
its products give each sample those of its adapter: the product of all samples with W, plus that of
each adapter with its samples. If a linear layer has an update that is not of low rank, each
adapter has a whole product with its samples instead: else it would need two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TypeVar

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
from disha.functional.shard_sums import overflow_safe_shard_sum
from disha.functional.update import Factors, factors_of
from disha.functional.weight_updates import Change, DeltaOf, Updates
from disha.private_torch import must_not_write
from disha.text import counted

Term = TypeVar("Term")
"""What adds something to the samples of an adapter: an update, or its factors."""


class Route:
    """An adapter for each sample of a batch, or None for no adapter.

    Each of the `names` covers an equal part of an input's first dimension.
    """

    def __init__(self, names: tuple[str | None, ...]) -> None:
        self.names = names
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}  # by `_on_device`

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
    ) -> tuple[list[tuple[str | None, Tensor]], Tensor]:
        """Return each adapter with the indices of its samples, and all indices in that order.

        They count along a leading dimension of this size. Samples without an adapter come last,
        under None.
        """
        entries = self.entries_of_name(size)
        indices: dict[str | None, list[int]] = {adapter: [] for adapter in self.adapters}
        if None in self.names:
            indices[None] = []
        for sample, name in enumerate(self.names):
            indices[name] += range(sample * entries, (sample + 1) * entries)
        sorted_indices: list[int] = []
        for indices_of_adapter in indices.values():
            sorted_indices += indices_of_adapter
        order = self._on_device(tuple(sorted_indices), device)
        parts = torch.split(order, [len(part) for part in indices.values()])
        return list(zip(indices, parts)), order

    def split(self, x: Tensor) -> tuple[list[tuple[str | None, Tensor, Tensor]], Tensor]:
        """Return each adapter, the indices of its samples in x, and these; and all indices.

        The samples are gathered once for all adapters: each gathering adds to the whole gradient.
        """
        indices_by_adapter, order = self.by_adapter(x.shape[0], x.device)
        adapters, indices = zip(*indices_by_adapter)
        parts = torch.split(x.index_select(0, order), [part.shape[0] for part in indices])
        return list(zip(adapters, indices, parts)), order

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


FEW_TOKENS = 8
"""Adapters with fewer tokens each are added at once, to save the time of 64 small additions.

With 64 adapters of one token, one by one takes 1.15 of the time; with 64 of 32 tokens, it takes
0.95, because it needs no tensor of the size of the output.
"""


def _add_by_adapter(
    output: Tensor,
    x: Tensor,
    route: Route,
    terms: Mapping[str, Sequence[Term]],
    delta_of: Callable[[Tensor, Term], Tensor],
) -> Tensor:
    """Sort x by adapter, and add to each sample of an output what the terms of its adapter give."""
    parts, order = route.split(x)
    has_few = output.shape[:-1].numel() < FEW_TOKENS * len(parts)
    must_copy = torch.is_grad_enabled() or is_compiling() or must_not_write()
    deltas = []
    for adapter, indices, part in parts:
        of_adapter = () if adapter is None else terms.get(adapter, ())
        delta = None
        for term in of_adapter:
            of_term = delta_of(part, term)
            delta = of_term if delta is None else delta + of_term
        if delta is None:
            delta = output.new_zeros(part.shape[0], *output.shape[1:])
        if must_copy or has_few:
            deltas.append(delta)
        else:
            output.index_add_(0, indices, delta.to(output.dtype))
    if not deltas:
        return output
    add = torch.Tensor.index_add if must_copy else torch.Tensor.index_add_
    return add(output, 0, order, torch.cat(deltas).to(output.dtype))


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
    for adapter, _, part in parts:
        outputs.append(adapted_linear(part, weight, bias, routed.updates_of(adapter)))
    sorted_output = torch.cat(outputs)
    return torch.empty_like(sorted_output).index_copy(0, order, sorted_output)

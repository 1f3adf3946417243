"""All updates of one weight as one object: the same for all samples here, or routed in `routed`.

Whoever multiplies by a weight, views it or computes it asks this object, and need not know whether
samples are routed, or whether some rows of the weight have new values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from disha import functional
from disha.errors import ModeError
from disha.functional.layouts import MATRIX, Layout
from disha.functional.linear import adapted_linear
from disha.functional.lookups import is_lookup
from disha.functional.low_rank import Product
from disha.functional.new_rows import ChangeRows, NewRows
from disha.functional.products import update_product
from disha.functional.update import Update

Change = Callable[[Sequence[Update]], Sequence[Update] | None]
"""Updates of a weight -> those of a view of it, or None if a block can't be cut there."""

DeltaOf = Callable[[Tensor, Update], Tensor]
"""(input, update) -> the product of the input with s dW."""


class Updates:
    """The updates of a weight, the same for all samples.

                         here              in `Routed`
    all_updates          every update      every update, of all adapters
    shared               all_updates       None: samples may differ
    shared_for_input(x)  all_updates       those of the adapter that all samples of x have, or
                                           None if their adapters differ
    """

    shared: tuple[Update, ...] | None
    is_routed = False

    def __init__(self, updates: tuple[Update, ...]) -> None:
        self.all_updates = self.shared = updates
        self.acts = bool(updates)  # whether there is any

    @property
    def blocks(self) -> list[Tensor]:
        """The block of each update."""
        return [update.block for update in self.all_updates]

    @property
    def drops_inputs(self) -> bool:
        """Whether an update has dropout now."""
        return any(update.dropout for update in self.all_updates)

    def shared_for_input(self, x: Tensor, shape: Sequence[int]) -> tuple[Update, ...] | None:
        """Return the updates that all samples of an input have, or None if samples differ."""
        return self.all_updates

    def samples_by_adapter(self, x: Tensor) -> Sequence[tuple[str | None, Tensor | None]]:
        """Return each adapter with the indices of its samples; None stands for all of them."""
        return [(None, None)]

    def map(self, change: Change, change_rows: ChangeRows) -> Updates | None:
        """Return the updates of a view, or None if a block can't be cut there."""
        of_view = change(self.all_updates)
        return None if of_view is None else Updates(tuple(of_view))

    def transposed(self) -> Updates:
        """Return the updates of the transposed weight, whose layout tells the rest."""
        return self

    def compute_weight(self, weight: Tensor, layout: Layout) -> Tensor:
        """Return W + sum of s dW."""
        if self.drops_inputs:
            raise ModeError(
                "the adapter's dropout can't act here: it drops inputs, and this operation needs a "
                "computed weight; use dropout=0, or exclude the weight"
            )
        return functional.computed_weight(weight, layout, self.all_updates)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product of a linear layer, whose weight is (out, in)."""
        return adapted_linear(x, weight, bias, self.all_updates)

    def product(
        self,
        multiply: Product,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        """Return a product as `functional.adapted_product` does."""
        shared = self.shared_for_input(x, weight.shape)
        if shared is not None:
            return functional.adapted_product(multiply, x, weight, bias, layout, shared)

        def delta_of(inputs: Tensor, update: Update) -> Tensor:
            return update_product(multiply, inputs, weight, layout, update)

        return self.add_updates(multiply(x, weight, bias), x, delta_of)

    def add_updates(self, output: Tensor, x: Tensor, delta_of: DeltaOf) -> Tensor:
        """Return an output plus what each update adds to it."""
        for update in self.all_updates:
            output = output + delta_of(x, update).to(output.dtype)
        return output


class WithNewRows(Updates):
    """The updates of a matrix of which some rows have new values.

    If two adapters that act have new values for one row, the later adapter gives it.
    """

    def __init__(
        self, updates: Updates, by_adapter: Mapping[str | None, Sequence[NewRows]]
    ) -> None:
        self.updates = updates
        self.by_adapter = by_adapter  # under None if all samples have the same
        self.shared = None
        self.acts = True
        self.is_routed = updates.is_routed

    @property
    def blocks(self) -> list[Tensor]:
        """The blocks of the updates, and those of the new rows."""
        return self.updates.blocks + [rows.block for rows in self._list_rows()]

    @property
    def drops_inputs(self) -> bool:
        """Whether an update has dropout now."""
        return self.updates.drops_inputs

    def map(self, change: Change, change_rows: ChangeRows) -> Updates | None:
        """Return the updates of a view, or None if a block can't be cut there."""
        updates = self.updates.map(change, change_rows)
        return None if updates is None else self._with(updates, change_rows)

    def transposed(self) -> Updates:
        """Return the updates of the transposed matrix."""
        return self._with(self.updates, lambda rows: rows.replace(transposed=not rows.transposed))

    def compute_weight(self, weight: Tensor, layout: Layout) -> Tensor:
        """Return W + sum of s dW, with the new rows."""
        weight = self.updates.compute_weight(weight, layout)
        for rows in self._list_rows():
            weight = rows.write_weight(weight)
        return weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product of a linear layer, whose weight is (out, in)."""
        if self._are_columns():
            return F.linear(x, self.compute_weight(weight, MATRIX), bias)
        return self._write(F.linear, x, weight, bias, self.updates.linear(x, weight, bias))

    def product(
        self, multiply: Product, x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout
    ) -> Tensor:
        """Return a product as `functional.adapted_product` does."""
        if self._are_columns() and not is_lookup(x):
            return multiply(x, self.compute_weight(weight, layout), bias)
        output = self.updates.product(multiply, x, weight, bias, layout)
        return self._write(multiply, x, weight, bias, output)

    def _write(
        self, multiply: Product, x: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor
    ) -> Tensor:
        """Return the output of a product with what the new rows give, for each sample its own."""
        for adapter, samples in self.updates.samples_by_adapter(x):
            new_rows = self.by_adapter.get(adapter, ())
            if not new_rows:
                continue
            inputs = x if samples is None else x.index_select(0, samples)
            former = output if samples is None else output.index_select(0, samples)
            of_w = None if self.updates.acts else (weight, former)
            part = former
            for rows in new_rows:
                part = rows.write_product(multiply, inputs, bias, part, of_w)
            output = part if samples is None else output.index_copy(0, samples, part)
        return output

    def _with(self, updates: Updates, change_rows: ChangeRows) -> Updates:
        """Return updates of a view with those of the new rows that it has."""
        by_adapter = {}
        for adapter, new_rows in self.by_adapter.items():
            of_view = [change_rows(rows) for rows in new_rows]
            by_adapter[adapter] = [rows for rows in of_view if rows is not None]
        return WithNewRows(updates, by_adapter) if any(by_adapter.values()) else updates

    def _list_rows(self) -> list[NewRows]:
        return [rows for new_rows in self.by_adapter.values() for rows in new_rows]

    def _are_columns(self) -> bool:
        return any(rows.transposed for rows in self._list_rows())

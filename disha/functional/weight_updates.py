"""All updates of one weight as one object: the same for all samples here, or routed in `routed`.

Whoever multiplies by a weight, views it or computes it asks this object, and need not know whether
samples are routed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from disha import functional
from disha.errors import ModeError
from disha.functional.layouts import Layout
from disha.functional.linear import adapted_linear
from disha.functional.products import Product, update_product
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

    def __init__(self, updates: tuple[Update, ...]) -> None:
        self.all_updates = self.shared = updates

    def shared_for_input(self, x: Tensor, shape: Sequence[int]) -> tuple[Update, ...] | None:
        """Return the updates that all samples of an input have, or None if samples differ."""
        return self.all_updates

    def map(self, change: Change) -> Updates | None:
        """Return the updates of a view, or None if a block can't be cut there."""
        of_view = change(self.all_updates)
        return None if of_view is None else Updates(tuple(of_view))

    def compute_weight(self, weight: Tensor, layout: Layout) -> Tensor:
        """Return W + sum of s dW."""
        if any(update.dropout for update in self.all_updates):
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

"""New rows: values that some rows of a matrix have in place of those of W.

They have no dW: nothing is added, scaled or rounded, and what W or
another update has in such a row does not matter. In a product, only what these rows give is
computed again, and put in its place:

    the matrix (rows, columns)    what is replaced
    is looked up                  the chosen rows that are new
    is multiplied, x W^T          the outputs of the new rows
    is looked up, transposed      the outputs of the new rows
    is multiplied, x W            nothing: W is computed, with its new rows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.functional.layouts import Geometry, Layout, OutputRanges
from disha.functional.lookups import is_lookup, output_numbers
from disha.functional.low_rank import Product
from disha.functional.method import Method, method_of
from disha.functional.parts import count_before, ranges_inside

NEW_ROWS = "rows"
"""What files and state dicts call new rows, where the name of a method stands otherwise."""


class _NewRowsOfMatrix(Method):
    """What is asked of any block, here of one with new rows: its name, and its shape."""

    name = NEW_ROWS
    additive = True

    def __reduce__(self) -> str:
        return "ROWS"  # the one below

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        return geometry.in_features, geometry.out_features

    def reason_against(self, layout: Layout, geometry: Geometry, r: int, r_out: int | None) -> None:
        return None  # r and r_out are those of the adapter's other blocks


ROWS = _NewRowsOfMatrix()


def method_of_block(name: str) -> Method:
    """Return what a file or a state dict calls so: a method, or `ROWS`."""
    return ROWS if name == NEW_ROWS else method_of(name)


class NewRows(NamedTuple):
    """The values of some rows of a matrix.

    Attributes:
        block: D (columns, rows): each of its columns is a row of the matrix.
        ranges: the numbers of these rows, as ranges (first, stop) in order.
        acts: whether they act. Only compiled code asks; elsewhere, it is None, and they do.
        transposed: whether the matrix is seen transposed, so that its columns have these values.
    """

    block: Tensor
    ranges: OutputRanges
    acts: Tensor | None = None
    transposed: bool = False

    def replace(self, **fields: Any) -> NewRows:
        """Return the rows with other values of some fields."""
        return NewRows(**(dict(zip(NewRows._fields, self)) | fields))

    def write_weight(self, weight: Tensor) -> Tensor:
        """Return a matrix with these rows; all others keep every bit."""
        values = self._as_in_matrix().to(weight.dtype)
        return self._write(int(self.transposed), values, weight)

    def write_product(
        self,
        multiply: Product,
        x: Tensor,
        bias: Tensor | None,
        output: Tensor,
        of_w: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Return the output of a product, or of a lookup, with what these rows give.

        If no update acts on W, `of_w` is W and the output of its product: rows that are as in W
        keep every bit of that.
        """
        if is_lookup(x) and not self.transposed:
            is_new, rows = self._look_up(x)
            return torch.where(is_new, rows.to(output.dtype), output)
        values = self._as_in_matrix()
        if is_lookup(x):
            return self._write(-1, multiply(x, values, bias).to(output.dtype), output)
        numbers = output_numbers(self.ranges, x.device)
        if bias is not None:
            bias = bias[numbers]
        part = multiply(x, values.to(x.dtype), bias).to(output.dtype)
        if of_w is not None:
            # A product with fewer outputs may round in another way.
            weight, output_of_w = of_w
            is_as_in_w = (values.to(weight.dtype) == weight.index_select(0, numbers)).all(-1)
            bits_of_w = output_of_w.index_select(-1, numbers).detach() + (part - part.detach())
            part = torch.where(is_as_in_w, bits_of_w, part)
        return self._write(-1, part, output)

    def _as_in_matrix(self) -> Tensor:
        """Return the values as they lie in the matrix: (rows, columns), unless it is transposed."""
        return self.block if self.transposed else self.block.mT

    def _write(self, dim: int, values: Tensor, whole: Tensor) -> Tensor:
        """Return a tensor with these values at the numbers of the rows along a dimension."""
        numbers = output_numbers(self.ranges, whole.device)
        if self.acts is not None:
            values = torch.where(self.acts, values, whole.index_select(dim, numbers))
        return whole.index_copy(dim, numbers, values)

    def _look_up(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return which indices choose a new row (..., 1), and the values of that row."""
        before_all = indices.new_full((1,), -1)
        numbers = output_numbers(self.ranges, indices.device).to(indices.dtype)
        numbers = torch.cat([before_all, numbers])
        table = F.pad(self.block.mT, (0, 0, 1, 0))
        # The last number that is not larger; torch warns of indices that are not contiguous.
        place = torch.searchsorted(numbers, indices.contiguous(), right=True) - 1
        is_new = numbers[place] == indices
        if self.acts is not None:
            is_new = is_new & self.acts
        return is_new.unsqueeze(-1), F.embedding(place, table)

    def of_part(self, part: Sequence[tuple[int, int]]) -> NewRows:
        """Return those of a part of the matrix, a range (start, stop) for each dimension."""
        rows, columns = reversed(part) if self.transposed else part
        start, stop = (count_before(self.ranges, edge) for edge in rows)
        block = self.block[slice(*columns), start:stop]
        return self.replace(block=block, ranges=ranges_inside(self.ranges, *rows))


ChangeRows = Callable[[NewRows], NewRows | None]
"""New rows of a matrix -> those of a view of it, or None if it has none of them."""

"""What a file says of an adapted weight and of its block: the record of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from disha.config import as_json
from disha.functional import Geometry, Layout
from disha.functional.layouts import OutputRanges
from disha.functional.new_rows import NEW_ROWS, method_of_block
from disha.text import counted, join

Tensors = Mapping[str, Tensor]
"""Tensors by their keys in a file or a state dict."""

ASSUMED: dict[str, Any] = {
    "scale": 1,
    "groups": 1,
    "padding_idx": None,
    "kernel": [],
    "rows": [],
    "tied": [],
    "base": None,
}
"""What a reader assumes of a layer's entry where a field is absent."""


@dataclass(frozen=True)
class LayerRecord:
    """One adapted weight: its name, its sizes, its block, and the fingerprint of its base."""

    name: str  # the layer's; that of a parameter other than `weight` follows it
    _: KW_ONLY
    method: str  # or `NEW_ROWS`
    r: int
    r_out: int | None = None  # of a tile
    in_features: int
    out_features: int  # with `rows`, the number of these rows
    scale: float = 1.0
    base: str | None = None  # fingerprint of the base weight, if it has one
    layout: Layout
    rows: OutputRanges = ()  # the adapted outputs; empty for all
    kernel: tuple[int, ...] = ()  # of a convolution, if its block does not show it
    tied: tuple[str, ...] = ()  # its other names, of modules that read the update too

    @property
    def key(self) -> str:
        """The block's key in the file."""
        return join(self.name, method_of_block(self.method).block_name)

    @property
    def is_new_rows(self) -> bool:
        """Whether its block has new rows (`also_train_rows`), and none of a method."""
        return self.method == NEW_ROWS

    def to_json(self) -> dict[str, Any]:
        """Return all fields of the layer as JSON values, including those of its layout."""
        fields: dict[str, Any] = as_json(vars(self) | vars(self.layout))
        fields["layout"] = fields.pop("pattern")  # the layout as text, in place of the object
        return fields

    def to_entry(self, method: str) -> dict[str, Any]:
        """Return the layer's entry in a header whose configuration has this method.

        A field is left out if it has the value that a reader assumes when it is absent.
        """
        fields = self.to_json()
        fields["in"] = fields.pop("in_features")
        fields["out"] = fields.pop("out_features")
        del fields["r_out"]  # the configuration has it
        assumed = ASSUMED | {"method": method}
        return {
            field: value
            for field, value in fields.items()
            if field not in assumed or value != assumed[field]
        }

    def geometry(self, block_shape: tuple[int, ...]) -> Geometry:
        """Return the sizes of the adapted weight; those of its stack are in the block's shape."""
        stack = method_of_block(self.method).stack_of(self.layout, block_shape)
        stack = (*stack, *self.kernel)
        return self.layout.geometry_of_stack(self.in_features, self.out_features, stack)

    def weight_shape(self, block_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the adapted rows of the weight."""
        return self.layout.shape(self.geometry(block_shape))

    def reason_against_block(self, block_shape: tuple[int, ...]) -> str | None:
        """Return why a block of that shape can't be this layer's, or None if it can."""
        layout = self.layout
        misfit = f"a block of shape {tuple(block_shape)} does not fit the layout {layout.pattern!r}"
        method = method_of_block(self.method)
        if len(block_shape) < method.block_axes:
            return misfit
        weight_shape = self.weight_shape(block_shape)
        if layout.reason_against_shape(weight_shape) is not None:
            return misfit
        geometry = layout.geometry(weight_shape)
        reason = method.reason_against(layout, geometry, self.r, self.r_out)
        if reason is not None:
            return reason
        padding = layout.padding_idx
        if padding is not None and padding not in range(self.in_features):
            return f"padding_idx={padding}, but the table has {counted(self.in_features, 'row')}"
        count = sum(stop - first for first, stop in self.rows)
        if self.rows and count != self.out_features:
            return f"it lists {counted(count, 'row')}, but its output has {self.out_features}"
        expected = method.block_shape(layout, weight_shape, self.r, self.r_out)
        if block_shape == expected:
            return None
        return f"expected a block of shape {expected}, found {tuple(block_shape)}"

    def reason_against_weight(
        self, block_shape: tuple[int, ...], shape: tuple[int, ...]
    ) -> str | None:
        """Return why a weight of that shape can't be this layer's, or None if it can."""
        layout = self.layout
        rows = self.rows
        if layout.reason_against_shape(shape) is None:
            outputs = layout.geometry(shape).out_features
            has_rows = all(stop <= outputs for _, stop in rows)
            if has_rows and layout.geometry(shape, rows) == self.geometry(block_shape):
                return None
        expected = str(self.weight_shape(block_shape))
        if rows:
            ranges = ", ".join(f"{first}:{stop}" for first, stop in rows)
            expected += f" in rows {ranges}"
        return f"the weight has the shape {tuple(shape)}; the adapter is for {expected}"

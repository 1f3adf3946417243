"""BlockSpec: one weight, and the block that an adapter has for it.

The same description stands everywhere. `layers.kinds` declares the weights of a module by it, a
target completes it, a plan and the header of a file are lists of it, a block holds its own, the
state of a model has all of them, and `summary` prints them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any

from disha.config import as_json
from disha.functional import Geometry, Layout, Method
from disha.functional.layouts import OutputRanges
from disha.functional.new_rows import NEW_ROWS, method_of_block
from disha.layers.value import Value
from disha.text import counted, join

UNKNOWN = Layout("")
"""The layout of a weight that nobody has declared."""


@dataclass(frozen=True)
class BlockSpec(Value):
    """One weight, and the block that an adapter has for it.

    Attributes:
        name: the weight's name in targets and files: that of its module, and behind it, unless the
            parameter is `weight`, a name of its own.
        layout: the layout of the weight; `UNKNOWN` if nobody has declared it.
        shape: the shape of the weight. A file does not tell the outputs behind the last one that is
            adapted, so there it ends with that one.
        outputs: ranges (first, stop) of the adapted outputs; empty for all.
        method: the name of the block's method, or `"rows"` for new rows; empty before one is
            chosen.
        r: shard size.
        r_out: size of the output shard of a tile, else None.
        scale: the scale s with which the block was made, or saved.
        base: fingerprint of the base weight, if a file has one.
        tied: the full names of the other parameters that are this one, whose modules read the
            update too.
        names: all names of the weight, if the module is shared and has several.
        adapter: the adapter that has the block. A file does not tell.
        module: the name of the module. A file does not tell.
        parameter: the module's attribute that has the weight; empty for a module without one.
        quantized: whether the weight is quantised: then a hook adds the update to the module's
            output.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> spec = disha.plan_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4).layers[0]
        >>> spec.name, spec.in_features, spec.out_features, spec.block_shape
        ('0', 8, 16, (4, 16))
    """

    name: str
    _: KW_ONLY
    layout: Layout = UNKNOWN
    shape: tuple[int, ...] = ()
    outputs: OutputRanges = ()
    method: str = ""
    r: int = 0
    r_out: int | None = None
    scale: float = 1.0
    base: str | None = None
    tied: tuple[str, ...] = ()
    names: tuple[str, ...] = field(default=(), compare=False)
    adapter: str = field(default="", compare=False)
    module: str = field(default="", compare=False)
    parameter: str = field(default="weight", compare=False)
    quantized: bool = field(default=False, compare=False)

    @classmethod
    def of_block(
        cls,
        name: str,
        block_shape: Sequence[int],
        *,
        method: str,
        layout: Layout,
        in_features: int,
        out_features: int,
        outputs: OutputRanges = (),
        kernel: tuple[int, ...] = (),
        **fields: Any,
    ) -> BlockSpec:
        """Return the spec of a weight that is known by its sizes and its block, as in a file.

        Args:
            name: the weight's name.
            block_shape: the shape of its block, which shows the stack of the weight.
            method: the name of its method.
            layout: its layout.
            in_features: size of its input.
            out_features: size of its output, or the number of its adapted outputs.
            outputs: the adapted outputs; empty for all.
            kernel: the kernel of a convolution, if its block does not show it.
            fields: other fields.
        """
        known_method = method_of_block(method)
        shape: tuple[int, ...] = ()
        if len(block_shape) >= known_method.block_axes:  # else it can't be this weight's
            stack = (*known_method.stack_of(layout, block_shape), *kernel)
            all_outputs = outputs[-1][1] if outputs else out_features
            shape = layout.shape(layout.geometry_of_stack(in_features, all_outputs, stack))
        return cls(name, method=method, layout=layout, shape=shape, outputs=outputs, **fields)

    @property
    def has_layout(self) -> bool:
        """Whether its layout is known."""
        return self.layout != UNKNOWN

    def placed(self, module_names: Sequence[str], own_name: str, **fields: Any) -> BlockSpec:
        """Return the spec in a module with these names, below which it has its own."""
        names = tuple([join(name, own_name) for name in module_names])
        return self.but(name=names[0], names=names, module=module_names[0], **fields)

    def renamed(self, rename: Callable[[str], str | None]) -> BlockSpec:
        """Return the spec under other names; what has none is left out of those that are tied."""
        tied = tuple(name for name in map(rename, self.tied) if name is not None)
        return self.but(name=rename(self.name), module=rename(self.module), tied=tied)

    @cached_property
    def geometry(self) -> Geometry:
        """The sizes of the weight, or of its adapted outputs."""
        return self.layout.geometry(self.shape, self.outputs)

    @property
    def in_features(self) -> int:
        """Size of its input."""
        return self.geometry.in_features

    @property
    def out_features(self) -> int:
        """Size of its output, or the number of its adapted outputs."""
        return self.geometry.out_features

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel of a convolution, if its block does not show it."""
        return self.geometry.kernel() if self.method_of_block.spans_kernel else ()

    @property
    def is_new_rows(self) -> bool:
        """Whether its block has new rows (`also_train_rows`), and no update of a method."""
        return self.method == NEW_ROWS

    @cached_property
    def method_of_block(self) -> Method:
        """The method of its block; `ROWS` for new rows."""
        return method_of_block(self.method)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """The shape of its block."""
        return self.method_of_block.block_shape(
            self.layout, self.shape, self.r, self.r_out, self.outputs
        )

    @property
    def parameters(self) -> int:
        """Number of values in its block."""
        return math.prod(self.block_shape)

    @property
    def key(self) -> str:
        """The block's key in a file."""
        return join(self.name, self.method_of_block.block_name)

    @property
    def own_name(self) -> str:
        """Its name below its module; empty for `weight`."""
        return self.name.removeprefix(self.module).removeprefix(".")

    @property
    def full_name(self) -> str:
        """The name of its parameter, with the attribute, also if that is `weight`."""
        return join(self.module, self.parameter)

    @property
    def slots(self) -> list[tuple[str, str]]:
        """The module and the attribute of its parameter, and of those that are tied to it."""
        tied = [name.rpartition(".") for name in self.tied]
        return [(self.module, self.parameter), *((module, name) for module, _, name in tied)]

    @property
    def remedy(self) -> str:
        """An argument that would declare another layout, which only the user can know."""
        example = {2: "out in", 3: "expert out in"}.get(len(self.shape), "out in *kernel")
        layouts = {f"^{re.escape(self.name)}$": example}
        return f"layouts={layouts}"

    @property
    def row(self) -> tuple[object, ...]:
        """What a table says of it: its name, method, r, sizes and number of values."""
        method = "new rows" if self.is_new_rows else self.method
        sizes = f"{self.in_features} -> {self.out_features}"
        return self.name or "(the model)", method, self.r, sizes, f"{self.parameters:,}"

    def to_json(self) -> dict[str, Any]:
        """Return what a file can say of it, as JSON values."""
        fields = {
            "name": self.name,
            "method": self.method,
            "r": self.r,
            "r_out": self.r_out,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "scale": self.scale,
            "base": self.base,
            "layout": self.layout.pattern,
            "groups": self.layout.groups,
            "padding_idx": self.layout.padding_idx,
            "rows": self.outputs,
            "kernel": self.kernel,
            "tied": self.tied,
        }
        return {name: as_json(value) for name, value in fields.items()}

    @property
    def reason_against_layout(self) -> str | None:
        """Why the weight can't be adapted if its layout is unknown, or None if it is known."""
        if self.has_layout:
            return None
        return (
            f"the layout of this weight {self.shape} is unknown; declare it, such as "
            f"{self.remedy}, as your code uses it: see docs/guides/custom-model.md"
        )

    def reason_against_r(self) -> str | None:
        """Return why the weight can't have a block of this size, or None if it can."""
        return self.method_of_block.reason_against(self.layout, self.geometry, self.r, self.r_out)

    def reason_against_block(self, block_shape: Sequence[int]) -> str | None:
        """Return why a block of that shape, in a file, can't be this one, or None if it can."""
        found = tuple(block_shape)
        layout = self.layout
        if len(found) < self.method_of_block.block_axes or layout.reason_against_shape(self.shape):
            return f"a block of shape {found} does not fit the layout {layout.pattern!r}"
        reason = self.reason_against_r()
        if reason is not None:
            return reason
        padding = layout.padding_idx
        if padding is not None and padding not in range(self.in_features):
            return f"padding_idx={padding}, but the table has {counted(self.in_features, 'row')}"
        if found != self.block_shape:
            return f"expected a block of shape {self.block_shape}, found {found}"
        return None

    def reason_against_shape(self, shape: tuple[int, ...]) -> str | None:
        """Return why a weight of that shape can't have the block, or None if it can."""
        layout = self.layout
        if layout.reason_against_shape(shape) is None:
            last = self.outputs[-1][1] if self.outputs else 0
            has_outputs = last <= layout.geometry(shape).out_features
            if has_outputs and layout.geometry(shape, self.outputs) == self.geometry:
                return None
        expected = str(layout.shape(self.geometry))
        if self.outputs:
            ranges = ", ".join(f"{first}:{stop}" for first, stop in self.outputs)
            expected += f" in rows {ranges}"
        return f"the weight has the shape {tuple(shape)}; the adapter is for {expected}"

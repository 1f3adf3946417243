"""Support for layers of bitsandbytes: read their weights, get gradients, and merge densely.

This module does not import bitsandbytes: a user with one of its layers has already imported it.

A 4-bit weight has its scales in `quant_state`. An 8-bit one is int8, with one scale per row in
`SCB`, which moves to its layer in the first forward.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disha.sharding import imported_class

__all__ = [
    "BitsandbytesLayer",
    "is_4bit",
    "is_8bit",
    "is_library_class",
    "is_library_forward",
    "kept_packed",
    "parameter_count",
    "read_4bit",
    "read_8bit",
]


def is_4bit(module: nn.Module | None, weight: Any) -> bool:
    """Whether a weight is a 4-bit one."""
    return isinstance(weight, Tensor) and _quant_state(weight) is not None


def is_8bit(module: nn.Module | None, weight: Any) -> bool:
    """Whether a weight is an 8-bit one that has scales."""
    int8 = isinstance(weight, Tensor) and weight.dtype == torch.int8
    return int8 and _row_scales(module, weight) is not None


def is_library_class(module: nn.Module | None) -> bool:
    """Whether a module is a layer of bitsandbytes for quantised weights, even before quantising."""
    names = ("Linear4bit", "Linear8bitLt", "Embedding4bit", "Embedding8bit")
    return isinstance(module, _classes(*names))


def is_library_forward(cls: type[nn.Module]) -> bool:
    """Whether a class's forward is bitsandbytes' own: W x + b by kernels for a quantised W."""
    return any(cls.forward is known.forward for known in _classes("Linear4bit", "Linear8bitLt"))


def _classes(*names: str) -> tuple[Any, ...]:
    found = (imported_class("bitsandbytes.nn", name) for name in names)
    return tuple(cls for cls in found if cls is not None)


def parameter_count(parameter: Tensor) -> int:
    """Return the number of values in a parameter; a packed one counts as unpacked."""
    state = _quant_state(parameter)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


def read_4bit(module: nn.Module, weight: Any) -> Tensor:
    """Return the dense weight in the layer's compute dtype, or in its former dtype without one."""
    kernels = sys.modules["bitsandbytes.functional"]
    data, state = _unpacked(kernels, weight)
    compute_dtype = getattr(module, "compute_dtype", None)
    if compute_dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = compute_dtype
    dense: Tensor = kernels.dequantize_4bit(data, state)
    return dense


def read_8bit(module: nn.Module, weight: Any) -> Tensor:
    """Return the dense weight in float32, because its former dtype is not recorded."""
    kernels = sys.modules["bitsandbytes.functional"]
    dense: Tensor = kernels.int8_vectorwise_dequant(weight.data, _row_scales(module, weight))
    return dense


def _quant_state(weight: Tensor) -> Any:
    """Return the scales of a 4-bit weight, even if pickling has lost its class."""
    return getattr(weight, "quant_state", None)


def _row_scales(module: nn.Module | None, weight: Tensor) -> Tensor | None:
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    return scales if isinstance(scales, Tensor) else None


# --- weights that a CPU kernel has packed --------------------------------------------------------


def _is_packed(weight: Tensor) -> bool:
    """Whether a forward has packed a 4-bit weight in place, for a kernel.

    The first forward in eval mode does this on CPUs with AVX512-BF16. The scales become a
    transposed bfloat16 matrix.
    """
    return getattr(_quant_state(weight), "packing_format_for_cpu", False) is True


def _unpacked(kernels: Any, weight: Tensor) -> tuple[Tensor, Any]:
    """Return the data of a 4-bit weight and a copy of its scales, both unpacked."""
    state = copy.copy(_quant_state(weight))
    if not _is_packed(weight):
        return weight.data, state
    absmax = state.absmax.T.reshape(-1).float()
    state.original_nested = False  # otherwise bitsandbytes quantises the scales again
    data, state = kernels._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = absmax
    return data, state


@contextmanager
def kept_packed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep packed weights unchanged while the body makes a state dict.

    When bitsandbytes saves a packed weight, it unpacks the weight in place. It rounds the scales
    again, or does not unpack them at all. The 4-bit entries of a state dict made in this context
    are not usable.
    """
    weights = [weight for module in modules for weight in module._parameters.values()]
    states = [_quant_state(one) for one in weights if one is not None and _is_packed(one)]
    for state in states:
        state.packing_format_for_cpu = False
    try:
        yield
    finally:
        for state in states:
            state.packing_format_for_cpu = True


class _KernelOutput(torch.autograd.Function):
    """y = W x + b by the kernel for packed weights, with gradients: dX = dY W, db = sum of dY."""

    @staticmethod
    def forward(
        input: Tensor,
        bias: Tensor | None,
        layer: nn.Module,
        weight: Tensor,
        run: Callable[[Tensor], Tensor],
    ) -> Tensor:
        return run(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, bias, ctx.layer, ctx.weight, _ = inputs
        ctx.dtypes = (input.dtype, None if bias is None else bias.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        input_dtype, bias_dtype = ctx.dtypes
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            with torch.no_grad():
                weight = read_4bit(ctx.layer, ctx.weight)
            grad_input = (grad.to(weight.dtype) @ weight).to(input_dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=bias_dtype)
        return grad_input, grad_bias, None, None, None


# --- a base class of adapted layers --------------------------------------------------------------


class BitsandbytesLayer(nn.Module):
    """The first base class of an adapted linear layer of bitsandbytes, before the layer's own."""

    disha: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the library's forward, or a plain product while a dense weight is merged in."""
        input: Any = args[0] if args else next(iter(kwargs.values()), None)
        weight: Any = self._parameters["weight"]
        bias: Any = self._parameters["bias"]
        if self._is_dense():  # computed in W's dtype and returned in the input's, as in the library
            bias = None if bias is None else bias.to(weight.dtype)
            return F.linear(input.to(weight.dtype), weight, bias).to(input.dtype)
        if not _is_packed(weight) or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        run = super().forward
        return _KernelOutput.apply(input, bias, self, weight, run)  # type: ignore[no-untyped-call]

    def _is_dense(self) -> bool:
        merged = self.disha.merged
        return merged is not None and any(one.dense for one in merged.originals.values())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._is_dense():
            # A dense weight is saved as a plain layer's, without the quantised one's scales.
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

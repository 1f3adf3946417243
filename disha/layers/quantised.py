"""Quantised weights: how they are recognised, counted, and read as dense ones.

Bone adds to what a quantised layer returns and never comes here. BAT and a dense merge need W, and
get it by the means of the library that quantised it. No such library is imported: whoever has a
quantised model has imported it already.

- bitsandbytes 4-bit: values of four bits, packed in a tensor of any dtype and shape; scales in the
  weight's `quant_state`.
- bitsandbytes 8-bit: int8, with one scale per row in the weight's `SCB` until the first forward
  moves it to the layer's `state`.
- Tensor subclasses that say how to dequantise them, as torchao's do, inside a plain `nn.Linear`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from disha.config import BLOCK_DTYPES

__all__ = [
    "UNKNOWN",
    "Quantisation",
    "dense_linear",
    "dequantised",
    "is_dense",
    "is_library_forward",
    "is_quantised",
    "kept_packed",
    "loses_gradients",
    "parameter_count",
    "quantisation_of",
    "with_gradients",
]


@dataclass(frozen=True)
class Quantisation:
    """How a weight is quantised.

    Attributes:
        name: what messages call it.
        read: (module, weight) -> the dense weight in the dtype in which the layer computes with
            it, or None where that is not known.
        in_kernels: whether the layer's own forward takes nothing but the quantised weight.
    """

    name: str
    read: Callable[[nn.Module, Tensor], Tensor] | None
    in_kernels: bool


def quantisation_of(module: nn.Module | None, weight: object) -> Quantisation | None:
    """Return how a weight is quantised, or None where it is in none of the known ways.

    Args:
        module: the module that has it, if known: it may hold a part of the scales.
        weight: the weight.
    """
    if is_dense(weight):
        return None
    if not isinstance(weight, Tensor) or isinstance(weight, _UNINITIALISED):
        return None
    if _quant_state(weight) is not None:
        return FOUR_BIT
    if weight.dtype == torch.int8 and _row_scales(module, weight) is not None:
        return EIGHT_BIT
    if _dequantises_itself(weight):
        return SUBCLASS
    if _is_from_torchao(weight):
        return UNREADABLE_SUBCLASS
    return None


def is_dense(weight: object) -> bool:
    """Whether a weight is a plain tensor of floating-point numbers."""
    return type(weight) in _PLAIN and weight.dtype in _DENSE_DTYPES  # type: ignore[attr-defined]


def is_quantised(parameter: Tensor) -> bool:
    """Whether a parameter, known by itself, holds quantised values: none that could be trained."""
    return quantisation_of(None, parameter) is not None


def dequantised(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight of `module` as a dense one; `weight` itself where it is dense."""
    found = quantisation_of(module, weight)
    if found is None or found.read is None:
        return weight
    with torch.no_grad():
        return found.read(module, weight)


def parameter_count(parameter: Tensor) -> int:
    """Return how many numbers a parameter stands for: packing does not make them fewer."""
    state = _quant_state(parameter)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


def dense_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return W x + b, computed in W's dtype and returned in the input's, as quantised layers do."""
    bias = None if bias is None else bias.to(weight.dtype)
    return F.linear(input.to(weight.dtype), weight, bias).to(input.dtype)


_PLAIN = (Tensor, nn.Parameter)
_UNINITIALISED = (UninitializedParameter, UninitializedBuffer)
_DENSE_DTYPES = tuple(BLOCK_DTYPES.values())


def _imported(module: str, name: str) -> Any:
    """Return a name of a module that has been imported by now, or None."""
    return getattr(sys.modules.get(module), name, None)


# --- bitsandbytes --------------------------------------------------------------------------------


def _quant_state(weight: Tensor) -> Any:
    """Return the scales of a 4-bit weight, which pickling leaves on it when its class is lost."""
    return getattr(weight, "quant_state", None)


def _row_scales(module: nn.Module | None, weight: Tensor) -> Tensor | None:
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    return scales if isinstance(scales, Tensor) else None


def _read_4bit(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the dense weight in the layer's compute dtype, or else the dtype it had before."""
    functional = sys.modules["bitsandbytes.functional"]
    data, state = _unpacked(functional, weight)
    compute_dtype = getattr(module, "compute_dtype", None)
    if compute_dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = compute_dtype
    dense: Tensor = functional.dequantize_4bit(data, state)
    return dense


def _unpacked(functional: Any, weight: Tensor) -> tuple[Tensor, Any]:
    """Return a 4-bit weight's data and a copy of its scales, in the layout that they start in.

    On CPUs with AVX512-BF16, the first forward in eval mode packs both for a kernel, in place:
    scales become a transposed bfloat16 matrix.
    """
    state = copy.copy(_quant_state(weight))
    if not _is_packed(weight):
        return weight.data, state
    absmax = state.absmax.T.reshape(-1).float()
    state.original_nested = False  # bitsandbytes would quantise the scales anew, which we have
    data, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = absmax
    return data, state


def _read_8bit(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the dense weight in float32: of the dtype that it had before, nothing is left."""
    functional = sys.modules["bitsandbytes.functional"]
    dense: Tensor = functional.int8_vectorwise_dequant(weight.data, _row_scales(module, weight))
    return dense


FOUR_BIT = Quantisation("bitsandbytes 4-bit", _read_4bit, in_kernels=True)
EIGHT_BIT = Quantisation("bitsandbytes 8-bit", _read_8bit, in_kernels=True)


def is_library_forward(cls: type[nn.Module]) -> bool:
    """Whether a class's forward is bitsandbytes' own: W x + b by kernels for a quantised W."""
    classes = (
        _imported("bitsandbytes.nn", "Linear4bit"),
        _imported("bitsandbytes.nn", "Linear8bitLt"),
    )
    return any(known is not None and cls.forward is known.forward for known in classes)


def _is_packed(weight: Tensor) -> bool:
    return getattr(_quant_state(weight), "packing_format_for_cpu", False) is True


@contextmanager
def kept_packed(model: nn.Module) -> Iterator[None]:
    """Let the model's state dict be listed without changing its weights.

    bitsandbytes unpacks a packed 4-bit weight when it is saved: in place, and with scales that are
    rounded once more, or not unpacked at all. The 4-bit entries of a state dict that is made in
    here are of no use.
    """
    weights = [weight for module in model.modules() for weight in module._parameters.values()]
    states = [_quant_state(weight) for weight in weights if weight is not None]
    packed = [state for state in states if getattr(state, "packing_format_for_cpu", False)]
    for state in packed:
        state.packing_format_for_cpu = False
    try:
        yield
    finally:
        for state in packed:
            state.packing_format_for_cpu = True


def loses_gradients(weight: Tensor, bias: Tensor | None, input: object) -> bool:
    """Whether gradients are wanted from a kernel that gives none: that for packed weights."""
    if not torch.is_grad_enabled() or not _is_packed(weight):
        return False
    wanted = (input, bias)
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in wanted)


def with_gradients(
    layer: nn.Module, weight: Tensor, run: Callable[[Tensor], Tensor], input: Tensor
) -> Tensor:
    """Return `run(input)`, which is W x + b, with the gradients that its kernel does not give."""
    bias = layer._parameters["bias"]
    output: Tensor = _KernelOutput.apply(  # type: ignore[no-untyped-call]
        input, bias, layer, weight, run
    )
    return output


class _KernelOutput(torch.autograd.Function):
    """y = W x + b by a kernel without gradients: dX = dY W, db = sum of dY."""

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
            weight = dequantised(ctx.layer, ctx.weight)
            grad_input = (grad.to(weight.dtype) @ weight).to(input_dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=bias_dtype)
        return grad_input, grad_bias, None, None, None


# --- tensor subclasses ---------------------------------------------------------------------------


def _dequantises_itself(weight: Tensor) -> bool:
    return type(weight).dequantize is not Tensor.dequantize


def _is_from_torchao(weight: Tensor) -> bool:
    base = _imported("torchao.utils", "TorchAOBaseTensor")
    return base is not None and isinstance(weight, base)


def _read_subclass(module: nn.Module, weight: Any) -> Tensor:
    """Return the dense weight in the dtype that the tensor passes for."""
    # torchao's NF4Tensor has a `dequantize` that means something else.
    original = getattr(weight, "get_original_weight", None)
    dense: Tensor = weight.dequantize() if original is None else original()
    return dense.to(weight.dtype)


SUBCLASS = Quantisation("a quantised tensor", _read_subclass, in_kernels=False)
UNREADABLE_SUBCLASS = Quantisation("a quantised tensor", None, in_kernels=False)
UNKNOWN = Quantisation("in a format of its own", None, in_kernels=True)
"""Of a layer with a forward of its own and a weight of a dtype that no dense weight has."""

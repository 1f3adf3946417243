"""Layers of bitsandbytes: read their weights, and merge densely, without importing the library.

A 4-bit weight has its scales in `quant_state`. An 8-bit one is int8, with one scale per row in
`SCB`, which moves to its layer in the first forward.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from disha.errors import ModeError
from disha.sharding.imported import imported_class


def bits_of(module: nn.Module | None, weight: Tensor) -> int | None:
    """Return 4 or 8 if bitsandbytes has quantised a weight to so many bits, or None."""
    # Not by its class, which pickling may have lost.
    if getattr(weight, "quant_state", None) is not None:
        return 4
    is_8bit = weight.dtype == torch.int8 and _row_scales(module, weight) is not None
    return 8 if is_8bit else None


def library_classes() -> tuple[Any, ...]:
    """Return the classes of layers that quantise their weights; none without the library."""
    names = ("Linear4bit", "Linear8bitLt", "Embedding4bit", "Embedding8bit")
    classes = (imported_class("bitsandbytes.nn", name) for name in names)
    return tuple(filter(None, classes))


def is_library_forward(cls: type[nn.Module]) -> bool:
    """Whether a class's forward is bitsandbytes' own: W x + b by kernels for a quantised W."""
    linear = [known for known in library_classes() if issubclass(known, nn.Linear)]
    return any(cls.forward is known.forward for known in linear)


def unpacked_shape(parameter: Tensor, module: nn.Module | None = None) -> torch.Size | None:
    """Return the shape of the weight that 4-bit values in a parameter stand for, else None."""
    owner: Any = parameter
    if isinstance(module, ParametrizationList):
        owner = module[0]  # the parametrization has the state of a weight that it computes
    state = getattr(owner, "quant_state", None)
    return None if state is None else torch.Size(state.shape)


def read_4bit(module: nn.Module, weight: Any) -> Tensor:
    """Return the dense weight in the layer's compute dtype, or in its former dtype without one."""
    refuse_repacked(weight)
    state = copy.copy(weight.quant_state)
    compute_dtype = getattr(module, "compute_dtype", None)
    if compute_dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = compute_dtype
    return sys.modules["bitsandbytes.functional"].dequantize_4bit(weight.data, state)


def read_8bit(module: nn.Module, weight: Any) -> Tensor:
    """Return the dense weight in float32, because its former dtype is not recorded."""
    kernels = sys.modules["bitsandbytes.functional"]
    return kernels.int8_vectorwise_dequant(weight.data, _row_scales(module, weight))


READERS = {4: read_4bit, 8: read_8bit}
"""Bits -> the function that reads such a weight."""


def _row_scales(module: nn.Module | None, weight: Tensor) -> Tensor | None:
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    return scales if isinstance(scales, Tensor) else None


def refuse_repacked(weight: Any) -> None:
    """Raise if a 4-bit weight is packed for a kernel that has no gradients."""
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ModeError(
            "bitsandbytes has packed a 4-bit weight for this CPU; inject adapters before the model "
            "runs in evaluation mode"
        )


class BitsandbytesLayer(nn.Module):
    """The first base class of an adapted linear layer of bitsandbytes, before the layer's own."""

    disha: Any

    @property
    def support_avx512bf16_for_cpu(self) -> bool:
        """No: the weight stays as it is (see `refuse_repacked`)."""
        return False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the library's forward, or a plain product while a dense weight is merged in."""
        weight: Any = self._parameters["weight"]
        if not self.disha.is_dense:
            state = getattr(self, "quant_state", None)
            if state is not None and bits_of(self, weight) is None:  # FSDP has made it anew
                weight.quant_state = state
            return super().forward(*args, **kwargs)
        input: Any = args[0] if args else next(iter(kwargs.values()), None)
        bias: Any = self._parameters["bias"]
        # computed in W's dtype and returned in the input's, as in the library
        bias = None if bias is None else bias.to(weight.dtype)
        return F.linear(input.to(weight.dtype), weight, bias).to(input.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.disha.is_dense:
            # A dense weight is saved as a plain layer's, without the quantised one's scales.
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

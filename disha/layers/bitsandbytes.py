"""Layers of bitsandbytes: how to read their weights, and how they compute with a dense merged one.

Nothing here imports the library. A 4-bit weight has its scales in `quant_state`. An 8-bit weight is
int8 with one scale for each row in `SCB`, which the first forward moves to the layer.
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


def bits_of(module: nn.Module | None, weight: Tensor) -> int | None:
    """Return to how many bits bitsandbytes has quantised a weight, 4 or 8; None if it has not."""
    # The class of the weight does not tell: pickling may have lost it.
    if getattr(weight, "quant_state", None) is not None:
        return 4
    if weight.dtype == torch.int8 and _row_scales(module, weight) is not None:
        return 8
    return None


def library_classes() -> tuple[Any, ...]:
    """Return the library's classes of quantised layers; none if it is not imported."""
    library = sys.modules.get("bitsandbytes.nn")
    if library is None:
        return ()
    return library.Linear4bit, library.Linear8bitLt, library.Embedding4bit, library.Embedding8bit


def is_library_forward(cls: type[nn.Module]) -> bool:
    """Whether a class runs the forward of a linear layer of bitsandbytes, by its own kernels."""
    linear_classes = library_classes()[:2]
    return any(cls.forward is known.forward for known in linear_classes)


def unpacked_shape(parameter: Tensor, module: nn.Module | None) -> torch.Size | None:
    """Return the shape of the weight that 4-bit values in a parameter stand for, else None."""
    owner: Any = parameter
    if isinstance(module, ParametrizationList):
        owner = module[0]  # the parametrization has the state of a weight that it computes
    state = getattr(owner, "quant_state", None)
    return None if state is None else torch.Size(state.shape)


def read_4bit(module: nn.Module, weight: Any) -> Tensor:
    """Return the dense weight in the layer's compute dtype, or else in its former dtype."""
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
    """Return the scales of an 8-bit weight, which are its own or its layer's."""
    scales = getattr(weight, "SCB", None)
    if scales is None:
        state = getattr(module, "state", None)
        scales = getattr(state, "SCB", None)
    return scales if isinstance(scales, Tensor) else None


def refuse_repacked(weight: Any) -> None:
    """Raise if a 4-bit weight is packed for a kernel that has no gradients."""
    state = getattr(weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise ModeError(
            "bitsandbytes has packed a 4-bit weight for this CPU; inject adapters before the model "
            "runs in evaluation mode"
        )


class BitsandbytesLayer(nn.Module):
    """What an adapted linear layer of bitsandbytes inherits from first."""

    disha: Any

    @property
    def support_avx512bf16_for_cpu(self) -> bool:
        """Say no, so that bitsandbytes does not repack the weight (see `refuse_repacked`)."""
        return False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the library's forward; with a dense merged weight, compute W x + b."""
        weight: Any = self._parameters["weight"]
        if not self.disha.is_dense:
            state = getattr(self, "quant_state", None)
            if state is not None and bits_of(self, weight) is None:
                weight.quant_state = state  # FSDP has made a new parameter without it
            return super().forward(*args, **kwargs)
        # The layer takes one tensor, by position or by name.
        input: Any = (*args, *kwargs.values())[0]
        bias: Any = self._parameters["bias"]
        if bias is not None:
            bias = bias.to(weight.dtype)
        # The library too computes in W's dtype, and returns the input's.
        return F.linear(input.to(weight.dtype), weight, bias).to(input.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.disha.is_dense:
            # It is saved as a plain linear layer, without the scales of the quantised weight.
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

"""Base models kept in 8 or 4 bits by bitsandbytes (QBone): the extra `quant`.

Layers of bitsandbytes replace the linear layers of the decoder layers. Embeddings, norms and the
output head stay dense. 8 bits means LLM.int8: each row has one scale, and inputs are rounded to
float16 and then to 8 bits. 4 bits means nf4 in blocks of 64, whose scales are quantised too.

Sources: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022,
and "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

import disha
from disha.finetune.errors import CheckpointError

if TYPE_CHECKING:
    from disha.finetune.models.decoder import Decoder

__all__ = [
    "FOUR_BIT",
    "WeightBits",
    "is_quantised",
    "quantise_layers",
    "require_bitsandbytes",
    "set_weight",
]

WeightBits = Literal[8, 4]

FOUR_BIT = {"quant_type": "nf4", "compress_statistics": True}

# On the CPU, bitsandbytes 0.50 reads 4-bit rows correctly only in multiples of 64 values, and packs
# only groups of 32 rows.
CPU_IN, CPU_OUT = 64, 32


def quantise_layers(
    model: Decoder, bits: WeightBits, dtype: torch.dtype, device: torch.device
) -> None:
    """Replace the linear layers of the decoder layers by quantised ones, without weights yet.

    Args:
        model: a decoder without weights, on the meta device.
        bits: 8 or 4.
        dtype: the number format that 4-bit layers compute in.
        device: where the model will be.

    Raises:
        CheckpointError: a layer has sizes that 4 bits on the CPU do not allow.
        MissingPackageError: bitsandbytes is not installed.
    """
    require_bitsandbytes()
    for layer in model.model.layers:
        linears = [(path, one) for path, one in layer.named_modules() if type(one) is nn.Linear]
        for path, linear in linears:
            if bits == 4 and device.type == "cpu":
                _check_sizes(path, linear)
            layer.set_submodule(path, _quantised(linear, bits, dtype))


def is_quantised(module: nn.Module) -> bool:
    """Return whether `module` is one of the layers that `quantise_layers` makes."""
    if sys.modules.get("bitsandbytes") is None:  # no layer was quantised
        return False
    layers = require_bitsandbytes().nn
    return isinstance(module, (layers.Linear8bitLt, layers.Linear4bit))


def set_weight(module: nn.Module, dense: Tensor, device: torch.device) -> None:
    """Quantise a weight, and store it in a layer.

    Args:
        module: a layer that `quantise_layers` made.
        dense: the weight (out, in), on the CPU.
        device: where the quantised weight goes.
    """
    layers = require_bitsandbytes().nn
    if isinstance(module, layers.Linear4bit):
        weight = layers.Params4bit(dense, requires_grad=False, module=module, **FOUR_BIT)
    else:
        weight = layers.Int8Params(dense, requires_grad=False, has_fp16_weights=False)
    module.weight = weight.to(device)  # quantises


def _check_sizes(path: str, linear: nn.Linear) -> None:
    if linear.in_features % CPU_IN or linear.out_features % CPU_OUT:
        raise CheckpointError(
            f"the model's {path} has {linear.in_features} inputs and {linear.out_features} "
            f"outputs; 4 bits on the CPU need multiples of {CPU_IN} and of {CPU_OUT}. Use --bits 8"
        )


def _quantised(linear: nn.Linear, bits: WeightBits, dtype: torch.dtype) -> nn.Linear:
    layers = require_bitsandbytes().nn
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if bits == 8:
        made = layers.Linear8bitLt(*sizes, bias, has_fp16_weights=False, device="meta")
    else:
        made = layers.Linear4bit(*sizes, bias, compute_dtype=dtype, device="meta", **FOUR_BIT)
    return made  # type: ignore[no-any-return]


def require_bitsandbytes() -> Any:
    """Return the library bitsandbytes.

    Raises:
        MissingPackageError: it is not installed.
    """
    # Otherwise every 8-bit layer logs that it rounds inputs to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise disha.MissingPackageError(
            f"a base model in 8 or 4 bits needs bitsandbytes, which can't be imported ({error}); "
            "run: pip install 'disha-torch[quant]'"
        ) from error

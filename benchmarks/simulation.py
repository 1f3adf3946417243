"""Bases without values, for `disha.finetune.memory` to simulate a training step with.

One process stands for several devices, in a process group that does not communicate.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import nn as quantized
from bitsandbytes.functional import quantize_4bit
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoModelForCausalLM, PreTrainedModel

from disha.finetune.base import quantize_stacks


def make_base(config: Any, bits: int, attn_implementation: str) -> PreTrainedModel:
    """Return a base in its dtype, or in 4 bits. In a mode without values, it has none."""
    made: Any = AutoModelForCausalLM
    dtype = config.dtype
    model = made.from_config(config, dtype=dtype, attn_implementation=attn_implementation).eval()
    if bits == 4:
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and module is not head:
                model.set_submodule(name, _quantize(module, model.dtype))
        model.is_loaded_in_4bit = True
        quantize_stacks(model)
    return model


def _quantize(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """Return a linear layer in 4 bits."""
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    with unset_fake_temporarily():  # the class of its weight holds no fake tensor
        quantize_4bit(torch.zeros(64), compress_statistics=True)  # makes a map that is kept
        make: Any = quantized.LinearNF4
        layer = make(*sizes, dtype, quant_storage=dtype, device="meta")
    data, layer.quant_state = quantize_4bit(
        linear.weight.data, quant_type="nf4", compress_statistics=True, quant_storage=dtype
    )
    layer.weight = nn.Parameter(data, requires_grad=False)
    layer.bias = linear.bias
    layer.register_forward_pre_hook(_note_state)  # FSDP makes a parameter of its own
    _note_state(layer)
    return layer


def _note_state(layer: Any, *_: object) -> None:
    """Note on a weight how it is quantised, as the class of bitsandbytes does."""
    noted = {"compress_statistics": True, "quant_type": "nf4"}
    vars(layer.weight).update(noted, quant_state=layer.quant_state)

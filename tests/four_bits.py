"""Mixtures of experts in 4 bits of bitsandbytes, and the memory of a training step of one.

Memory is what the model stores, and the most that the allocator gives out in a step beyond that:
activations, gradients, the optimizer, and dequantised stacks.
"""

from __future__ import annotations

import torch
from bitsandbytes.nn import LinearNF4
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import disha
from benchmarks.memory import allocated_peak
from benchmarks.steps import full_step, language_loss


def quantize_stacks(model: nn.Module) -> nn.Module:
    """Quantise the stacks of experts."""
    for name, module in list(model.named_modules()):
        if name.endswith("experts"):
            for stack in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(module, stack, compress_statistics=True)
    return model


def quantize(model: nn.Module, storage: torch.dtype = torch.uint8) -> nn.Module:
    """Quantise the projections and the stacks of experts."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
            sizes = module.in_features, module.out_features, module.bias is not None
            layer = LinearNF4(*sizes, module.weight.dtype, quant_storage=storage)
            layer.load_state_dict(module.state_dict())
            model.set_submodule(name, layer.to("cpu"))  # quantises
    return quantize_stacks(model)


def mixtral() -> MixtralForCausalLM:
    """Return a Mixtral of 13 million parameters in bfloat16, with random weights."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
    )
    return MixtralForCausalLM(config).to(torch.bfloat16)


def step_bytes(model: nn.Module) -> int:
    """Return the bytes of a model, and of a training step with an adapter and checkpointing."""
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    disha.inject_adapters(model, "all-linear", r=8, dtype=torch.bfloat16)
    model.activation_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(disha.adapter_parameters(model))
    step = full_step(language_loss(model, torch.arange(64)[None]), optimizer)
    step()  # the optimizer makes its state
    return stored + allocated_peak(step, torch.device("cpu"))

"""The memory of a training step of a Mixtral in 4 bits, divided by that in 16 bits.

    python -m benchmarks.four_bits

Memory is what the model stores, and the most that the allocator gives out in a step beyond that:
activations, gradients, the optimizer, and dequantised stacks. Without activation checkpointing,
autograd keeps each dequantised stack until its backward.
"""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear8bitLt, LinearNF4
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import disha
from benchmarks.memory import allocated_peak
from benchmarks.steps import full_step, language_loss

LAYERS, WIDTH, INNER, EXPERTS, TOKENS = 16, 128, 256, 8, 64


def mixtral(dtype: torch.dtype = torch.bfloat16) -> MixtralForCausalLM:
    """Return a Mixtral of 13 million parameters, with random weights."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
    )
    return MixtralForCausalLM(config).to(dtype)


def quantize_stacks(model: nn.Module) -> nn.Module:
    """Quantise the stacks of experts."""
    for name, module in list(model.named_modules()):
        if name.endswith("experts"):
            for stack in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(module, stack, compress_statistics=True)
    return model


def quantize(model: nn.Module, storage: torch.dtype = torch.uint8, bits: int = 4) -> nn.Module:
    """Quantise the projections, and in 4 bits the stacks of experts too."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
            sizes = module.in_features, module.out_features, module.bias is not None
            if bits == 4:
                layer = LinearNF4(*sizes, module.weight.dtype, quant_storage=storage)
            else:
                layer = Linear8bitLt(*sizes, has_fp16_weights=False)
            layer.load_state_dict(module.state_dict())
            model.set_submodule(name, layer.to("cpu"))  # quantises
    return quantize_stacks(model) if bits == 4 else model


def step_bytes(model: nn.Module, *, checkpointing: bool, **options: object) -> int:
    """Return the bytes of a model, and of a training step with an adapter."""
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    disha.inject_adapters(model, "all-linear", r=8, dtype=torch.bfloat16, **options)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(disha.adapter_parameters(model))
    tokens = torch.arange(TOKENS)[None]
    step = full_step(language_loss(model, tokens), optimizer)
    step()  # the optimizer makes its state
    return stored + allocated_peak(step, torch.device("cpu"))


def share(*, checkpointing: bool = True, **options: object) -> float:
    """Return the memory of a step in 4 bits, divided by that in 16 bits."""
    few, many = (
        step_bytes(model, checkpointing=checkpointing, **options)
        for model in (quantize(mixtral()), mixtral())
    )
    return few / many


if __name__ == "__main__":
    print(f"with activation checkpointing    {share():.2f}")
    print(f"without activation checkpointing {share(checkpointing=False):.2f}")

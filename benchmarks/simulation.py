"""The memory of a training step, measured without using it.

In torch's fake mode, operations return tensors that have a shape and no values. torch's tracker
adds up the storages that are alive at once, which is what an allocator would have to give out. One
process stands for several devices, in a process group that does not communicate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes import nn as quantized
from bitsandbytes.functional import quantize_4bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from disha.finetune.base import quantize_stacks


def memory_modes() -> tuple[Any, Any]:
    """Return a mode in which tensors have no values, and one that adds up the memory in use."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tracker = MemTracker()
    # Its hooks would also add up the memory of each module, which takes long, and raises for
    # modules with frozen parameters.
    tracker._mod_tracker.register_user_hooks = lambda *hooks: None  # type: ignore[method-assign]
    return fake, tracker


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor on this rank, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def step_memory(
    model: nn.Module, optimizer: Any, loss_of: Callable[[], Tensor], modes: Any = None
) -> dict[str, int]:
    """Return the bytes of a training step on this device, by what they are for.

    The model and the optimizer stay as they are. `loss_of` runs the model, and returns the loss;
    `modes` are the `memory_modes` in which the model was made, if it has no values.
    """
    fake, tracker = modes or memory_modes()
    device = next(model.parameters()).device
    # The optimizer's decay of real weights would act.
    former = [
        (weight, weight.grad, weight.detach().clone())
        for weight in model.parameters()
        if weight.requires_grad
    ]
    state = dict(optimizer.state)
    optimizer.state.clear()
    with fake, tracker:
        # Every operation sees fake copies of the weights. They are kept alive, so each counts once.
        _weights = [local_part(weight).detach() for weight in model.parameters()]
        before = tracker.get_tracker_snapshot()[device]
        loss_of().backward()
        peak = tracker.get_tracker_snapshot("peak")[device]
        optimizer.step()  # makes its state, which every later step has too
        after = tracker.get_tracker_snapshot()[device]
    for weight, gradient, values in former:
        weight.grad = gradient
        weight.data.copy_(values)
    optimizer.state.clear()
    optimizer.state.update(state)
    trained = sum(
        local_part(weight).nbytes for weight in model.parameters() if weight.requires_grad
    )
    return {
        "weights": before["Total"] - trained,
        "adapter": trained,
        "gradients": trained,
        "optimizer": after["Optstate"],
        "activations": peak["Total"] - before["Total"] - trained,
        "peak": peak["Total"] + after["Optstate"],
    }


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

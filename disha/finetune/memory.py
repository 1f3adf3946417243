"""The memory of a training step, measured without using it, and whether a machine has as much.

In torch's fake mode, operations return tensors that have a shape and no values. torch's tracker
adds up the storages that are alive at once, which is what an allocator would have to give out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from disha.finetune.flags import FEW_BITS
from disha.private_torch import memory_modes

KEPT = 2**27
"""Bytes that the allocator of a processor keeps of what is freed: twice what it takes from the
system piece by piece (64 MiB), as measured for one model."""

SCALES = 0.016
"""Bytes for the scales of a weight in few bits, which are themselves quantised."""


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
    with warnings.catch_warnings(action="ignore"), fake, tracker:
        # Every operation sees fake copies of the weights. They are kept alive, so each counts once.
        _weights = [local_part(weight).detach() for weight in model.parameters()]
        before = tracker.get_tracker_snapshot()[device]
        loss_of().backward()  # type: ignore[no-untyped-call]
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


def run_memory(trainer: Any, bits: str) -> dict[str, int]:
    """Return the bytes of a step of a run with the longest rows that it has, by what they are for.

    The base is held in `bits`; its weights here are those that compute.
    """
    args = trainer.args
    model = trainer.model.train()
    if args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # from transformers 5.24
        (enable or model.gradient_checkpointing_enable)(args.gradient_checkpointing_kwargs)
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-args.train_batch_size :]
    batch = trainer.data_collator([trainer.train_dataset[n] for n in longest])
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    program = psutil.Process().memory_info().rss + KEPT
    found = step_memory(model, torch.optim.AdamW(trained), lambda: trainer.scored(batch))
    if bits in FEW_BITS:
        saved, largest = _few_bits(model, int(bits) / 8)
        found["weights"] -= saved
        found["activations"] += largest
    return {"program": program, **found}


def _few_bits(model: Any, size: float) -> tuple[int, int]:
    """Return by how many bytes few bits shrink the linear layers, and their largest weight."""
    head = model.get_output_embeddings()
    weights = [
        next(module.parameters(recurse=False))
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    saved = sum(weight.nbytes - weight.numel() * (size + SCALES) for weight in weights)
    return int(saved), max(weight.nbytes for weight in weights)


def free_memory(device: torch.device) -> int:
    """Return the bytes that a run may take on a device: of an accelerator, all that it has."""
    if device.type == "cpu":
        return psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return torch.get_device_module(device).mem_get_info(device)[1]

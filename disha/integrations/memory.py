"""The memory of a training step, measured without using it.

In torch's fake mode, operations return tensors that have a shape and no values. torch's tracker
adds up the storages that are alive at once, which is what an allocator would have to give out. One
process stands for several devices, in a process group that does not communicate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from disha.private_torch import memory_modes, with_values
from disha.sharding.tensors import local_part

__all__ = ["memory_modes", "step_memory", "with_values"]


def step_memory(
    model: nn.Module, optimizer: Any, loss_of: Callable[[], Tensor], modes: Any = None
) -> dict[str, int]:
    """Return the bytes of a training step on this device, by what they are for.

    The model and the optimizer stay as they are.

    Args:
        model: the model, with its adapters.
        optimizer: its optimizer.
        loss_of: runs the model, and returns the loss; what it computes has no values.
        modes: the `memory_modes` in which the model was made, if it has no values.
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

"""What a training step needs on a device, counted in a step that runs without memory.

In torch's fake mode, operations give tensors that have shapes alone, and torch's tracker adds up
the storages that live at once: what an allocator has to give out. Several devices are one process,
in a group that communicates nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from disha.functional.private_torch import FAKE_MODE, memory_tracker, required
from disha.sharding.tensors import local_part


def step_memory(model: nn.Module, optimizer: Any, loss_of: Callable[[], Tensor]) -> dict[str, int]:
    """Return the bytes of a training step on this device, by what they are for.

    The values of the model stay as they are.

    Args:
        model: the model, with its adapters.
        optimizer: its optimizer.
        loss_of: runs the model, and returns the loss; what it computes has no values.
    """
    fake = required(FAKE_MODE)(allow_non_fake_inputs=True)
    # These stand for the weights in all operations. While they live, each weight is counted once.
    weights = [fake.from_tensor(local_part(weight)) for weight in model.parameters()]
    with fake, memory_tracker() as tracker:
        tracker.track_external(weights)
        loss_of().backward()  # type: ignore[no-untyped-call]
        [peak] = tracker.get_tracker_snapshot("peak").values()
        optimizer.step()  # which makes its state; from then on, each step has it too
        [after] = tracker.get_tracker_snapshot().values()
    trained = sum(weight.nbytes for weight in weights if weight.requires_grad)
    return {
        "weights": peak["Other"] - trained,
        "adapter": trained,
        "gradients": trained,
        "optimizer": after["Optstate"],
        "activations": peak["Total"] - peak["Other"] - trained,
        "peak": peak["Total"] + after["Optstate"],
    }

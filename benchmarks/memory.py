"""The table of memory: bytes kept for backward, and the peak of a training step.

Kept bytes are those of the tensors that autograd saves: each storage once, without parameters. The
peak is the most that the allocator has given out at once in a step, beyond what was there before:
kept tensors, gradients and temporaries. Both are counts, equal in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.candidates import CANDIDATES, EVERY_METHOD, adapted_model
from benchmarks.protocol import R
from benchmarks.steps import TrainingStep

LAYERS, WIDTH, TOKENS = 4, 1024, 512


def stack(layers: int, width: int, device: torch.device) -> tuple[nn.Sequential, list[str]]:
    """Return square float32 linear layers, an activation after each, and their names."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for _ in range(layers):
        model.append(nn.Linear(width, width, bias=False)).append(nn.GELU())
    return model.to(device), [str(2 * layer) for layer in range(layers)]


def kept_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd keeps at the end of a forward, without parameters."""
    storages: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()  # kept alive while counting: no address is used twice
    assert output.grad_fn is not None
    return sum(storages.values())


def allocated_peak(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that are allocated at once during `run`, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [
        event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def memory(device: torch.device) -> list[dict[str, Any]]:
    """Count what a stack of layers keeps and allocates."""
    model, names = stack(LAYERS, WIDTH, device)
    x = torch.randn(TOKENS, WIDTH, device=device, requires_grad=True)
    kept, peak = {}, {}
    for name in EVERY_METHOD:
        adapted = adapted_model(CANDIDATES[name], model, names, R)
        kept[name] = kept_bytes(adapted, partial(adapted, x))
        step = TrainingStep(adapted, lambda model=adapted: model(x).square().mean(), [x])
        step()
        step.clear()
        peak[name] = allocated_peak(step, device)
        step.clear()
    sizes = {"layers": LAYERS, "width": WIDTH, "tokens": TOKENS}
    return [{**sizes, "kept_bytes": kept, "peak_bytes": peak}]

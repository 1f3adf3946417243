"""The table of memory: bytes kept for backward, and the peak of a training step.

Kept bytes are those of the tensors that autograd saves: each storage once, without parameters. The
peak is the most that the allocator has given out at once in a step, beyond what was there before:
kept tensors, gradients and temporaries. Both are counts, equal in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.candidates import CANDIDATES, adapted_model, missing_package
from benchmarks.protocol import R
from benchmarks.steps import TrainingStep

__all__ = ["allocated_peak", "kept_bytes", "memory", "stack", "status_bytes"]

LAYERS, TOKENS = 4, 512


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


def memory(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Count what a stack of layers keeps and allocates, and measure processes that train one."""
    width = 256 if quick else 1024
    model, names = stack(LAYERS, width, device)
    x = torch.randn(TOKENS, width, device=device)
    r = min(R, width // 8)
    kept, peak, left_out = {}, {}, {}
    for name, candidate in CANDIDATES.items():
        why = missing_package(candidate)
        if why is not None:
            left_out[name] = why
            continue
        adapted = adapted_model(candidate, model, names, r)
        leaf = x.clone().requires_grad_()
        kept[name] = kept_bytes(adapted, partial(adapted, leaf))
        step = _step(adapted, leaf)
        step()
        step.clear()
        peak[name] = allocated_peak(step, device)
    counted = {
        "what": "counted",
        "layers": LAYERS,
        "width": width,
        "tokens": TOKENS,
        "dtype": "float32",
        "r": r,
        "kept_bytes": kept,
        "peak_bytes": peak,
        "left_out": left_out,
    }
    return [counted]


def _step(model: nn.Module, x: Tensor) -> TrainingStep:
    return TrainingStep(model, lambda: model(x).square().mean(), [x])


def status_bytes(field: str, process: int | str = "self") -> int | None:
    """Return a figure of a process's memory in bytes; None if the system does not report it."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = next((line for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found.split()[1]) * 1024

"""The table of start-up: seconds to adapt a model, and to save and load an adapter."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import disha
from benchmarks.protocol import Budget, compare
from benchmarks.timers import ClockTimer, Run, Timer
from benchmarks.whole_model import projections

FILE_R = 512
"""Large, so that an adapter has half as many bytes as its base."""
ROUNDS, WARM_UP = 5, 1
BUDGET = Budget(10.0, ROUNDS, 20, WARM_UP)
SIZES = ((4, 1024), (16, 1024), (64, 1024), (16, 4096))
"""Layers and inputs. The last has as many bytes of adapter as the second, over a larger base."""


def start_up(device: torch.device) -> list[dict[str, Any]]:
    """Measure injection on the meta device and the CPU, and files of several sizes."""
    return [
        _injection("inject 1,000 layers, meta", lambda: _layers(1000, "meta")),
        _injection("inject 1,000 layers of 64 x 64, CPU", lambda: _layers(1000, "cpu")),
        _injection("plan and inject a 7B Llama, meta", llama_7b, plan=True),
        *(_files(*size) for size in SIZES),
    ]


def loras_start_up(device: torch.device) -> list[dict[str, Any]]:
    """Measure by processor time, which other work disturbs less, how long LoRAs take to begin."""
    timer = ClockTimer(time.process_time)
    return [_injection("plan and inject a 7B Llama, meta", llama_7b, plan=True, timer=timer)]


def llama_7b() -> nn.Module:
    """Return a model with the sizes of a 7B Llama, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())


def _layers(count: int, device: str) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(64, 64, device=device) for _ in range(count)))


def _injection(
    what: str, make: Callable[[], nn.Module], plan: bool = False, timer: Timer | None = None
) -> dict[str, Any]:
    from peft import LoraConfig, MissConfig

    adapt: dict[str, Callable[[nn.Module], object]] = {
        "bone": lambda model: _inject(model, "bone", plan),
        "bat": lambda model: _inject(model, "bat", plan),
        "lora": lambda model: _inject(model, "lora", plan),
        "peft_miss": lambda model: _peft(MissConfig, model),
        "peft_lora": lambda model: _peft(LoraConfig, model),
    }
    # Each run needs a new model; they are made before the clock starts.
    runs = {
        name: _on_each(one, [make() for _ in range(ROUNDS + WARM_UP)])
        for name, one in adapt.items()
    }
    return {"what": what, "seconds": compare(runs, Budget(0.0, ROUNDS, ROUNDS, WARM_UP), timer)}


def _on_each(adapt: Callable[[nn.Module], object], models: list[nn.Module]) -> Run:
    remaining = iter(models)
    return lambda: adapt(next(remaining))


def _inject(model: nn.Module, method: str, plan: bool) -> None:
    if plan:
        disha.plan_adapters(model, r"_proj$", r=8, method=method)
    disha.inject_adapters(model, r"_proj$|^\d+$", r=8, method=method)


def _peft(kind: Callable[..., Any], model: nn.Module) -> None:
    from peft import inject_adapter_in_model

    config = kind(r=8, target_modules=projections(model))
    meta = next(model.parameters()).is_meta
    inject_adapter_in_model(config, model, low_cpu_mem_usage=meta)


def _files(layers: int, in_features: int) -> dict[str, Any]:
    def base() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(in_features, 1024, bias=False) for _ in range(layers)))

    model, plain = base(), base()
    plain.load_state_dict(model.state_dict())  # loading onto another base would warn
    disha.inject_adapters(model, "all-linear", r=FILE_R, init="kaiming")
    tensors = {key: value.clone() for key, value in disha.adapter_state_dict(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        path, raw = Path(folder, "adapter.safetensors"), Path(folder, "raw.safetensors")
        disha.save_adapter(model, path)
        safetensors.torch.save_file(tensors, raw)

        def load() -> None:
            disha.load_adapter(plain, path)
            disha.remove_adapters(plain)

        runs: dict[str, Run] = {
            "save": lambda: disha.save_adapter(model, path),
            "load": load,
            "swap": lambda: disha.load_adapter(model, path, replace=True),
            "tensors_save": lambda: safetensors.torch.save_file(tensors, raw),
            "tensors_load": lambda: {
                key: value.clone() for key, value in safetensors.torch.load_file(raw).items()
            },
        }
        seconds = compare(runs, BUDGET)
        size = path.stat().st_size
    return {
        "what": "files",
        "adapter_bytes": size,
        "base_bytes": sum(parameter.nbytes for parameter in plain.parameters()),
        "seconds": seconds,
    }

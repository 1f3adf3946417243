"""The table of start-up: seconds to adapt a model, and to save and load an adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import disha
from benchmarks.candidates import CANDIDATES, missing_package
from benchmarks.protocol import Budget, Run, compare

__all__ = ["llama_7b", "start_up"]

FILE_R = 512
"""Large, so that an adapter has half as many bytes as its base."""


def start_up(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Measure injection on the meta device and the CPU, and files of several sizes."""
    many, layers = (100, (2, 4)) if quick else (1000, (4, 16, 64))
    budget = Budget(3.0, 1, 3, 1) if quick else Budget(10.0, 5, 20, 1)
    cases = [
        _injection(f"inject {many:,} layers, meta", lambda: _many(many, 64, "meta"), budget),
        _injection(
            f"inject {many:,} layers of 64 x 64, CPU", lambda: _many(many, 64, "cpu"), budget
        ),
        _injection("plan and inject a 7B Llama, meta", llama_7b, budget, plan=True),
    ]
    cases += [_files(count, 1024, budget) for count in layers]
    # As many bytes of adapter as in one of those, over a base four times as large.
    return [*cases, _files(layers[1], 4096, budget)]


def llama_7b() -> nn.Module:
    """Return a model with the sizes of a 7B Llama, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())  # type: ignore[no-any-return]


def _many(layers: int, width: int, device: str) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, device=device) for _ in range(layers)))


def _names(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def _injection(
    what: str, make: Callable[[], nn.Module], budget: Budget, plan: bool = False
) -> dict[str, Any]:
    adapt: dict[str, Callable[[nn.Module], object]] = {
        "bone": lambda model: _inject(model, "bone", plan),
        "bat": lambda model: _inject(model, "bat", plan),
    }
    left_out = {}
    for name in ("peft_miss", "peft_lora"):
        why = missing_package(CANDIDATES[name])
        if why is None:
            adapt[name] = _peft(name)
        else:
            left_out[name] = why
    # Each run needs a new model; they are made before the clock starts.
    rounds = budget.least_rounds
    fixed = Budget(0.0, least_rounds=rounds, most_rounds=rounds, warm_up=budget.warm_up)
    runs = {
        name: _on_each(one, [make() for _ in range(rounds + budget.warm_up)])
        for name, one in adapt.items()
    }
    return {
        "what": what,
        "layers": len(_names(make())),
        "seconds": compare(runs, fixed),
        "left_out": left_out,
    }


def _on_each(adapt: Callable[[nn.Module], object], models: list[nn.Module]) -> Run:
    remaining = iter(models)
    return lambda: adapt(next(remaining))


def _inject(model: nn.Module, method: str, plan: bool) -> None:
    if plan:
        disha.plan_adapters(model, r"_proj$", r=8, method=method)
    disha.inject_adapters(model, r"_proj$|^\d+$", r=8, method=method)


def _peft(name: str) -> Callable[[nn.Module], object]:
    from peft import LoraConfig, MissConfig, inject_adapter_in_model

    kinds = {"peft_miss": MissConfig, "peft_lora": LoraConfig}

    def adapt(model: nn.Module) -> object:
        config = kinds[name](r=8, target_modules=_names(model))
        meta = next(model.parameters()).is_meta
        return inject_adapter_in_model(config, model, low_cpu_mem_usage=meta)

    return adapt


def _files(layers: int, in_features: int, budget: Budget) -> dict[str, Any]:
    def base() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(in_features, 1024, bias=False) for _ in range(layers)))

    model = disha.inject_adapters(base(), "all-linear", r=FILE_R, init="kaiming")
    plain = base()
    plain.load_state_dict(_base_state(model))  # loading onto another base would warn
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
        seconds = compare(runs, budget)
        size = path.stat().st_size
    return {
        "what": "files",
        "layers": layers,
        "adapter_bytes": size,
        "base_bytes": sum(parameter.nbytes for parameter in plain.parameters()),
        "seconds": seconds,
        "left_out": {},
    }


def _base_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if ".disha." not in key}

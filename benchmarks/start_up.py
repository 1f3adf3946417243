"""The table of start-up: seconds to adapt a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import disha
from benchmarks.protocol import Budget, Run, compare
from benchmarks.timers import ClockTimer
from benchmarks.whole_model import projections

BUDGET = Budget(0.0, least_rounds=5, most_rounds=5, warm_up=1)


def start_up(device: torch.device) -> list[dict[str, Any]]:
    """Measure planning and injection of a model of 7B on the meta device, by processor time."""
    from peft import LoraConfig, MissConfig

    adapt: dict[str, Callable[[nn.Module], object]] = {
        "bone": partial(_inject, method="bone"),
        "bat": partial(_inject, method="bat"),
        "lora": partial(_inject, method="lora"),
        "peft_miss": partial(_inject_peft, MissConfig),
        "peft_lora": partial(_inject_peft, LoraConfig),
    }
    seconds = compare(
        {name: _on_new_models(one) for name, one in adapt.items()},
        BUDGET,
        ClockTimer(time.process_time),  # other work disturbs it less
    )
    return [{"what": "plan and inject a 7B Llama, meta", "seconds": seconds}]


def _on_new_models(adapt: Callable[[nn.Module], object]) -> Run:
    """Return a run that adapts another model each time; all are made before the clock starts."""
    models = iter([llama_7b() for _ in range(BUDGET.most_rounds + BUDGET.warm_up)])
    return lambda: adapt(next(models))


def llama_7b() -> nn.Module:
    """Return a model with the sizes of a 7B Llama, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())


def _inject(model: nn.Module, method: str) -> None:
    disha.plan_adapters(model, r"_proj$", r=8, method=method)
    disha.inject_adapters(model, r"_proj$", r=8, method=method)


def _inject_peft(kind: Callable[..., Any], model: nn.Module) -> None:
    from peft import inject_adapter_in_model

    config = kind(r=8, target_modules=projections(model))
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)

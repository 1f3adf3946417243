"""The table of experts: a training step of mixtures of experts.

Only the stacked weights of the experts are adapted: by disha's Bone, BAT and LoRA, and by PEFT's
LoRA (`target_parameters`), with equally many trained parameters as far as ranks allow. The models
are random models of transformers, in each of its implementations of experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import disha
from benchmarks.candidates import BASE, lora_rank
from benchmarks.memory import kept_bytes
from benchmarks.protocol import Budget, compare
from benchmarks.steps import (
    TrainingStep,
    check_gradients,
    fill,
    language_loss,
    require_gradient,
    trainable,
)

TARGET = r"experts\.(gate_up|down)_proj$"
TARGET_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SCALE = 0.02
BUDGET = Budget(20.0, 7, 60)

MIXTRAL = ("Mixtral", "intermediate_size", "num_local_experts")
QWEN3 = ("Qwen3Moe", "moe_intermediate_size", "num_experts")
"""The prefix of classes in transformers, and what a configuration calls `inner` and `experts`."""


class ExpertModel(NamedTuple):
    """A mixture of experts of one layer, each of hidden x inner, and one sequence of tokens."""

    names: tuple[str, str, str]
    hidden: int
    inner: int
    experts: int
    chosen: int
    r: int
    length: int


MODELS = (
    ExpertModel(MIXTRAL, 512, 1024, 8, 2, 64, 512),
    ExpertModel(QWEN3, 512, 256, 32, 4, 32, 512),
)


def experts(device: torch.device) -> list[dict[str, Any]]:
    """Measure every model in two implementations."""
    return [_measure(model, one, device) for model in MODELS for one in ("eager", "grouped_mm")]


def _measure(size: ExpertModel, implementation: str, device: torch.device) -> dict[str, Any]:
    base = _built(size, implementation, device)
    rank = lora_rank([(size.hidden, 2 * size.inner), (size.inner, size.hidden)], size.r)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1024, (1, size.length), generator=generator).to(device)
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        BASE: lambda model: model,
        "bone": lambda model: disha.inject_adapters(model, TARGET, size.r),
        "bat": lambda model: disha.inject_adapters(model, TARGET, size.r, method="bat"),
        "lora": lambda model: disha.inject_adapters(model, TARGET, rank, method="lora"),
        "peft_lora": lambda model: _lora(model, rank),
    }
    steps, kept = {}, {}
    for name, adapt in ways.items():
        shared = {id(parameter): parameter for parameter in base.parameters()}
        model = adapt(copy.deepcopy(base, dict(shared))).train()
        fill(trainable(model), SCALE)
        model.get_input_embeddings().register_forward_hook(require_gradient)
        step = steps[name] = TrainingStep(model, language_loss(model, ids))
        step()
        check_gradients(name, model)
        step.clear()
        kept[name] = kept_bytes(model, step.loss)
    model = {"model": size.names[0], "implementation": implementation, "experts": size.experts}
    sizes = {"hidden": size.hidden, "inner": size.inner, "tokens": size.length, "r": size.r}
    return {**model, **sizes, "kept_bytes": kept, "seconds": compare(steps, BUDGET)}


def _built(size: ExpertModel, implementation: str, device: torch.device) -> nn.Module:
    """Return the model, random and frozen."""
    import transformers

    architecture, inner, experts = size.names
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=1024,
        hidden_size=size.hidden,
        num_hidden_layers=1,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 64,
        head_dim=64,
        num_experts_per_tok=size.chosen,
        **{inner: size.inner, experts: size.experts},
    )
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{architecture}ForCausalLM")._from_config(
        config, experts_implementation=implementation, dtype=torch.float32
    )
    return model.to(device).requires_grad_(False).train()


def _lora(model: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=[], target_parameters=TARGET_PARAMETERS
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)

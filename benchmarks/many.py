"""The table of adapters that train at once: one batch of k adapters against one after the other.

Each step is loss, forward and backward of a Llama, by processor time, which other work disturbs
less. *One adapter* is the same batch with a single adapter: no way to route can be faster.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import disha
from benchmarks.candidates import BASE, CANDIDATES, adapted_model
from benchmarks.memory import kept_bytes
from benchmarks.protocol import Budget, Run, compare
from benchmarks.steps import CandidateError, TrainingStep, fill, language_loss, require_gradient
from benchmarks.timers import ClockTimer
from benchmarks.whole_model import projections

LAYERS, WIDTH, LENGTH, RANK, SCALE = 2, 576, 32, 16, 0.02
SIZES = ((1, 1), (4, 1), (8, 1), (16, 1), (32, 1), (64, 1), (8, 4), (8, 16))
"""Numbers of adapters, and rows of each."""
BUDGET = Budget(8.0, 3, 25, 1)


def many(device: torch.device) -> list[dict[str, Any]]:
    """Measure a step of k adapters at once, beside k steps of one adapter."""
    return [_measure(adapters, rows, device) for adapters, rows in SIZES]


def _measure(adapters: int, rows: int, device: torch.device) -> dict[str, Any]:
    base = _llama(device)
    names = [f"a{number}" for number in range(adapters)]
    ids = torch.randint(base.config.vocab_size, (adapters * rows, LENGTH), device=device)
    parts = ids.split(rows)
    runs: dict[str, Run] = {}
    kept: dict[str, int] = {}
    for method in ("bone", "lora"):
        model = _with_adapters(base, names, method)
        runs |= _at_once(model, method, names, ids, rows)
        _check(runs[f"{method}_at_once"], model, parts, names)
        with disha.route_adapters(model, [name for name in names for _ in range(rows)]):
            kept[f"{method}_at_once"] = kept_bytes(model, language_loss(model, ids))
        with disha.adapters_active(model, names[0]):
            kept[f"{method}_one_by_one"] = kept_bytes(model, language_loss(model, parts[0]))
    for name in ("peft_miss", "peft_lora"):
        model = _of_one(base, name)
        runs[f"{name}_one_by_one"] = _one_by_one([_step(model, part) for part in parts])
        kept[f"{name}_one_by_one"] = kept_bytes(model, language_loss(model, parts[0]))
    seconds = compare(runs, BUDGET, ClockTimer(time.process_time))
    sizes = {"layers": LAYERS, "width": WIDTH, "r": RANK, "length": LENGTH}
    case = {"adapters": adapters, "rows": rows, **sizes, "kept_bytes": kept, "seconds": seconds}
    base_bytes = sum(weight.nbytes for weight in base.parameters())
    return {**case, "base_bytes": base_bytes}


def _llama(device: torch.device) -> Any:
    """Return a Llama with the layers of SmolLM2-135M, but fewer, and a small vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads: Any = {"num_attention_heads": 9, "num_key_value_heads": 3}
    sizes: Any = {"hidden_size": WIDTH, "intermediate_size": 1536, "vocab_size": 1000}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **heads, **sizes)).to(device)
    model.get_input_embeddings().register_forward_hook(require_gradient)
    return model.requires_grad_(False)


def _with_adapters(base: Any, names: list[str], method: str) -> Any:
    """Return a copy of the model, over the same weights, with adapters of one method."""
    model = adapted_model(CANDIDATES[BASE], base, projections(base), RANK)
    # LoRA has the rank of MiSS, not its number of parameters: both have products of the same size.
    for name in names:
        disha.inject_adapters(model, "_proj$", RANK, method=method, adapter=name)
    fill(disha.adapter_parameters(model), SCALE)
    return model


def _of_one(base: Any, name: str) -> nn.Module:
    """Return a copy of the model with one adapter of PEFT, of the same rank."""
    from peft import LoraConfig, MissConfig, inject_adapter_in_model

    model = adapted_model(CANDIDATES[BASE], base, projections(base), RANK)
    names = projections(model)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)
    config = lora if name == "peft_lora" else MissConfig(r=RANK, target_modules=names)
    inject_adapter_in_model(config, model)
    fill([weight for weight in model.parameters() if weight.requires_grad], SCALE)
    return model


def _step(model: nn.Module, ids: Tensor) -> TrainingStep:
    return TrainingStep(model, language_loss(model, ids))


def _one_by_one(steps: list[TrainingStep]) -> Run:
    def run() -> None:
        for step in steps:
            step()

    return run


def _at_once(model: Any, method: str, names: list[str], ids: Tensor, rows: int) -> dict[str, Run]:
    names_of_rows = [name for name in names for _ in range(rows)]

    def inside(context: Any, step: TrainingStep) -> Tensor:
        with context():
            return step()

    def one_by_one() -> None:
        for name, part in zip(names, ids.split(rows), strict=True):
            inside(partial(disha.adapters_active, model, name), _step(model, part))

    step = _step(model, ids)
    route = partial(disha.route_adapters, model, names_of_rows)
    alone = partial(disha.adapters_active, model, names[0])
    return {
        f"{method}_at_once": partial(inside, route, step),
        f"{method}_one_adapter": partial(inside, alone, step),
        f"{method}_one_by_one": one_by_one,
    }


def _check(at_once: Run, model: Any, parts: Any, names: list[str]) -> None:
    """Check that each adapter gets the gradients that it gets alone, up to the mean over rows."""
    at_once()
    found = [weight.grad for weight in disha.adapter_parameters(model, names[-1])]
    with disha.adapters_active(model, names[-1]):
        _step(model, parts[-1])()
    for weight, gradient in zip(disha.adapter_parameters(model, names[-1]), found, strict=True):
        expected: Any = weight.grad
        largest = float(expected.abs().max())
        if not torch.allclose(gradient * len(parts), expected, rtol=0, atol=1e-3 * largest):
            raise CandidateError("an adapter gets another gradient in a batch than alone")

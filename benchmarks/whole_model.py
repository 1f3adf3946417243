"""The table on a whole language model: one training step of SmolLM2-135M, from its wheel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.candidates import (
    BASE,
    CANDIDATES,
    CandidateError,
    adapted_model,
    check_same_results,
    missing_package,
    trainable,
)
from benchmarks.hot_spots import time_by_operators
from benchmarks.layers import parameter_counts
from benchmarks.protocol import compare, synchroniser
from benchmarks.settings import ModelRun, Profile, R
from disha.finetune.inputs import demo_model
from disha.finetune.models.decoder import Decoder
from disha.finetune.models.gguf import GGUFCheckpoint

__all__ = ["COMPARED", "model_step", "projections", "read_model"]

COMPARED = (BASE, "bone", "bat", "peft_miss", "peft_bat", "peft_lora")


def projections(model: Decoder) -> list[str]:
    """Return the names of all linear layers but the head, which is tied to the embedding."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def model_step(profile: Profile, device: torch.device) -> list[dict[str, Any]]:
    """Measure loss, forward and backward of a language model, down to the embedding's output.

    That output requires a gradient in every candidate, the frozen base included: all of them have
    the same way back, and differ in their adapters only.
    """
    return [_measure(run, profile, device) for run in profile.model_steps]


def read_model(dtype: torch.dtype, device: torch.device) -> Decoder:
    """Return the language model, without adapters."""
    return GGUFCheckpoint.open(demo_model()).load_model(dtype, device)


def _measure(run: ModelRun, profile: Profile, device: torch.device) -> dict[str, Any]:
    base = read_model(run.dtype, device)
    base.model.layers = base.model.layers[: run.layers]
    generator = torch.Generator().manual_seed(0)
    shape = (run.batch, run.length + 1)
    ids = torch.randint(base.config.vocabulary, shape, generator=generator).to(device)
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    models, steps, losses, left_out = {}, {}, {}, {}
    for name in COMPARED:
        why = missing_package(CANDIDATES[name])
        if why is not None:
            left_out[name] = why
            continue
        models[name] = adapted_model(CANDIDATES[name], base, projections(base), R)
        steps[name] = _step(models[name], tokens, labels)
        losses[name] = _checked_loss(name, models[name], steps[name])
    check_same_results(losses, run.dtype)
    seconds = compare(steps, profile.model_step_budget, synchronise=synchroniser(device))
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
        "operators": time_by_operators(steps, device),
        "left_out": left_out,
    }


def _step(model: nn.Module, tokens: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    model.model.embed_tokens.register_forward_hook(_require_gradient)
    parameters = trainable(model)

    def run() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss: Tensor = model.summed_loss(tokens, labels) / labels.numel()
        loss.backward()
        return loss.detach()

    return run


def _require_gradient(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.requires_grad_()


def _checked_loss(name: str, model: nn.Module, step: Callable[[], Tensor]) -> Tensor:
    loss = step()
    for parameter in trainable(model):
        gradient = parameter.grad
        if gradient is None or not gradient.any() or not torch.isfinite(gradient).all():
            raise CandidateError(f"{name}: a gradient is missing, zero or not finite")
    if not torch.isfinite(loss):
        raise CandidateError(f"{name}: the loss is {float(loss)}")
    return loss

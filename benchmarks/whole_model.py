"""The table of a whole language model: one training step of SmolLM2-135M."""

from __future__ import annotations

from functools import partial
from typing import Any

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
from benchmarks.cost_model import Linear
from benchmarks.layers import parameter_counts
from benchmarks.protocol import compare, synchroniser
from benchmarks.rates import measured_rates
from benchmarks.settings import ModelRun, Profile, R
from benchmarks.steps import CandidateError, TrainingStep, check_gradients, require_gradient
from disha.finetune.inputs import demo_model
from disha.finetune.models.decoder import Decoder
from disha.finetune.models.gguf import GGUFCheckpoint

__all__ = ["COMPARED", "language_model", "model_step", "projections", "read_model", "token_loss"]

COMPARED = (BASE, "bone", "bat", "peft_miss", "peft_bat", "peft_lora", "loralib")


def projections(model: Decoder) -> list[str]:
    """Return the names of all linear layers except the head, which is tied to the embedding."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def model_step(profile: Profile, device: torch.device) -> list[dict[str, Any]]:
    """Measure loss, forward and backward of a language model, down to the embedding's output.

    That output requires a gradient in every candidate, the frozen base included. So all of them
    have the same backward pass, and differ only in their adapters.
    """
    return [_measure(run, profile, device) for run in profile.model_steps]


def read_model(dtype: torch.dtype, device: torch.device) -> Decoder:
    """Return the language model, without adapters."""
    return GGUFCheckpoint(demo_model()).load_model(dtype, device)


def language_model(run: ModelRun, device: torch.device) -> tuple[Decoder, Tensor, Tensor]:
    """Return the language model of a run, and random tokens with the ones that follow them."""
    base = read_model(run.dtype, device)
    base.model.layers = base.model.layers[: run.layers]
    generator = torch.Generator().manual_seed(0)
    shape = (run.batch, run.length + 1)
    ids = torch.randint(base.config.vocabulary, shape, generator=generator).to(device)
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return base, tokens, labels


def _measure(run: ModelRun, profile: Profile, device: torch.device) -> dict[str, Any]:
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
    seconds = compare(steps, profile.model_step_budget, synchronise=synchroniser(device))
    sizes = [
        Linear(layer.in_features, layer.out_features)
        for layer in map(base.get_submodule, projections(base))
    ]
    rates = measured_rates(sizes, labels.numel(), R, run.dtype, device, profile.rates_budget)
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
    return F.cross_entropy(model(tokens).float().flatten(0, 1), labels.flatten())


def _checked_loss(name: str, model: nn.Module, step: TrainingStep) -> Tensor:
    loss = step()
    check_gradients(name, model)
    if not torch.isfinite(loss):
        raise CandidateError(f"{name}: the loss is {float(loss)}")
    return loss

"""The table of compiled models: what inductor generates for a training step, and how long it takes.

A small whole model of each layout is compiled, frozen and adapted. In the generated code, fused
loops and calls of products are counted, and the bytes that they read and write, as inductor counts
them. A layer and a language model are timed, compiled and not.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import disha
from benchmarks.candidates import BASE, CANDIDATES, adapted_model, missing_package
from benchmarks.layouts import LAYOUTS, Whole
from benchmarks.protocol import compare, synchroniser
from benchmarks.settings import LayerSize, ModelRun, Profile, R
from benchmarks.steps import TrainingStep, check_gradients, fill, require_gradient, trainable
from benchmarks.whole_model import language_model, projections, token_loss

__all__ = ["COMPILED", "COUNTED", "compile_model", "compiled", "counted", "generated"]

COUNTED = (BASE, "bone", "bat", "peft_miss", "peft_lora")
COMPILED = "_compiled"
"""What the name of a candidate ends in where its step is compiled."""

SCALE = 0.02
MORE_COMPILATIONS = 64
"""The limit of compilations for one piece of code, which all candidates share."""

CALLS = {
    "loops": r"^ +cpp_fused_\w+\(",
    "products": r"^ +(?:\w+ = )?(?:extern_kernels\.\w+|torch\.ops\.\w+\.\w+(?:\.\w+)?)\(",
}
"""What is counted -> how a line of generated code begins that calls it."""


def compiled(profile: Profile, device: torch.device) -> list[dict[str, Any]]:
    """Count for every layout, and time a layer and a language model."""
    found = []
    if device.type == "cpu":  # the code for a GPU has other kernels
        found = [counted(name, profile.compiled_width) for name in profile.compiled_layouts]
    with torch._dynamo.config.patch(recompile_limit=MORE_COMPILATIONS):
        found += [_layer(size, profile, device) for size in profile.compiled_layers]
        found += [_model(run, profile, device) for run in profile.compiled_models]
    return found


# --- counts --------------------------------------------------------------------------------------


def counted(layout: str, width: int) -> dict[str, Any]:
    """Return a case with the counts of each candidate for a model of a layout.

    Args:
        layout: a name in `LAYOUTS`.
        width: of the model.
    """
    whole, r = LAYOUTS[layout], max(4, width // 16)
    counts, left_out = {}, {}
    for name in COUNTED:
        why = missing_package(CANDIDATES[name])
        if why is not None:
            left_out[name] = why
        elif name == BASE or not name.startswith("peft"):
            counts[name] = _counts(whole, name, width, r)
        elif whole.peft and (whole.miss or name != "peft_miss"):
            with contextlib.suppress(BackendCompilerFailed):  # PEFT writes into its inputs
                counts[name] = _counts(whole, name, width, r)
    return {
        "what": "counted",
        "layout": layout,
        "width": width,
        "r": r,
        "counts": counts,
        "left_out": left_out,
    }


def _counts(whole: Whole, name: str, width: int, r: int) -> dict[str, int]:
    torch.manual_seed(0)
    model = _adapted(whole.build(width).requires_grad_(False), whole, name, r)
    fill(trainable(model), SCALE)
    x, dtype = whole.inputs(width), whole.compiled_dtype
    given = x if whole.has_indices else x.to(dtype).requires_grad_()
    return generated(model.to(dtype), given, rescales=name in ("bone", "bat"))


def _adapted(model: nn.Module, whole: Whole, name: str, r: int) -> nn.Module:
    if name == BASE:
        return model
    if not name.startswith("peft"):
        return disha.inject_adapters(model, whole.target, r, method=name, **whole.options)
    from peft import LoraConfig, MissConfig, inject_adapter_in_model

    if name == "peft_miss":
        return inject_adapter_in_model(MissConfig(r=r, **whole.peft), model)
    rank = max(1, r // 2)
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, **whole.peft), model)


def generated(model: nn.Module, x: Tensor, rescales: bool = False) -> dict[str, int]:
    """Return what a compiled training step consists of.

    The loops are written, but no compiler of C++ runs, which takes seconds for each; so the step
    computes nothing. It runs twice.

    Args:
        model: whose step is compiled.
        x: its input.
        rescales: whether its adapter has another scale the second time.

    Returns:
        "loops" and "products", "bytes" that they read and write, "graphs" and "breaks" of them.
    """
    import torch._inductor.compile_fx as compile_fx
    from torch._dynamo.utils import counters
    from torch._functorch import config as autograd_config
    from torch._inductor import config, cpu_vec_isa, metrics
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    counters.clear()
    metrics.reset()
    graph = torch.compile(model)

    def step() -> None:
        output = graph(x)
        if output.requires_grad:
            output.square().sum().backward()

    log = mock.Mock(isEnabledFor=lambda level: True)  # bytes are counted where they are logged
    with (
        autograd_config.patch(enable_autograd_cache=False),
        config.patch(fx_graph_cache=False),
        mock.patch.object(compile_fx, "inductor_metrics_log", log),
        mock.patch.object(AsyncCompile, "cpp_pybinding", return_value=mock.Mock()),
        mock.patch.object(cpu_vec_isa, "pick_vec_isa", return_value=cpu_vec_isa.invalid_vec_isa),
    ):
        _, codes = run_and_get_code(step)
        size = metrics.num_bytes_accessed
        if rescales:
            disha.set_adapter_scale(model, 0.5)
        step()
    text = "\n".join(codes)
    return {
        **{name: len(re.findall(call, text, re.M)) for name, call in CALLS.items()},
        "bytes": size,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


# --- times ---------------------------------------------------------------------------------------


def compile_model(model: nn.Module) -> nn.Module:
    """Return a compiled model."""
    return torch.compile(model)  # type: ignore[return-value]


def _timed(
    steps: Mapping[str, TrainingStep], profile: Profile, device: torch.device
) -> dict[str, list[float]]:
    for step in steps.values():
        step()  # compiles
    return compare(steps, profile.compiled_budget, synchronise=synchroniser(device))


def _steps(
    base: nn.Module,
    names: Sequence[str],
    r: int,
    timed: Sequence[str],
    make: Callable[[nn.Module, nn.Module], TrainingStep],
) -> tuple[dict[str, TrainingStep], dict[str, str]]:
    """Return the steps of each candidate, eager and compiled, and who is left out.

    Args:
        base: the model.
        names: its linear layers.
        r: the shard size.
        timed: the candidates.
        make: returns the step of a model that is called in another way.
    """
    steps, left_out = {}, {}
    for name in timed:
        why = missing_package(CANDIDATES[name])
        if why is not None:
            left_out[name] = why
            continue
        model = adapted_model(CANDIDATES[name], base, names, r)
        steps[name] = make(model, model)
        steps[name]()
        check_gradients(name, model)
        steps[name + COMPILED] = make(model, compile_model(model))
    return steps, left_out


def _layer(size: LayerSize, profile: Profile, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = nn.Linear(size.width, size.width, bias=False, device=device, dtype=size.dtype)
    x = torch.randn(size.tokens, size.width, device=device, dtype=size.dtype, requires_grad=True)
    r = min(R, size.width // 8)

    def make(model: nn.Module, called: nn.Module) -> TrainingStep:
        return TrainingStep(model, lambda: called(x).float().square().mean(), [x])

    steps, left_out = _steps(nn.Sequential(layer), ["0"], r, profile.compiled_candidates, make)
    return {
        "what": "timed",
        "width": size.width,
        "tokens": size.tokens,
        "dtype": str(size.dtype).removeprefix("torch."),
        "r": r,
        "seconds": _timed(steps, profile, device),
        "left_out": left_out,
    }


def _model(run: ModelRun, profile: Profile, device: torch.device) -> dict[str, Any]:
    base, tokens, labels = language_model(run, device)
    base.model.embed_tokens.register_forward_hook(require_gradient)

    def make(model: nn.Module, called: nn.Module) -> TrainingStep:
        return TrainingStep(model, lambda: token_loss(called, tokens, labels))

    steps, left_out = _steps(base, projections(base), R, profile.compiled_candidates, make)
    return {
        "what": "timed",
        "model": "SmolLM2-135M",
        "layers": run.layers,
        "tokens": run.batch * run.length,
        "dtype": str(run.dtype).removeprefix("torch."),
        "r": R,
        "seconds": _timed(steps, profile, device),
        "left_out": left_out,
    }

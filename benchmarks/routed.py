"""The table of routed batches: each sample of a batch has an adapter of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import disha
from benchmarks.candidates import BASE, lora_rank
from benchmarks.protocol import Budget, R, Run, compare
from benchmarks.steps import CandidateError, fill, forward, frozen_stack, trainable

LAYERS, WIDTH, SAMPLES, SCALE = 4, 1024, 64, 0.02
BUDGET = Budget(8.0, 5, 100)


def routed(device: torch.device) -> list[dict[str, Any]]:
    """Compare a batch that is routed to several adapters with running them one by one.

    That is one forward for each adapter, with its own samples. The time includes setting the route,
    switching the adapter, and PEFT's `adapter_names`.
    """
    return [_measure(adapters, tokens, device) for tokens in (1, 32) for adapters in (1, 8, 64)]


def _measure(adapters: int, tokens: int, device: torch.device) -> dict[str, Any]:
    names = [f"a{sample % adapters}" for sample in range(SAMPLES)]
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, tokens, WIDTH, device=device)
    base = partial(frozen_stack, LAYERS, WIDTH, device)
    runs: dict[str, Run] = {BASE: forward(base(), x)}
    for method in ("bone", "bat"):
        runs |= _disha(base(), method, names, x)
    runs |= _peft(base(), names, x)
    for method in ("bone", "bat", "peft_lora"):
        _check(method, runs[f"{method}_routed"](), runs[f"{method}_one_by_one"](), names)
    batch = {"adapters": adapters, "samples": SAMPLES, "tokens": tokens * SAMPLES}
    model = {"layers": LAYERS, "width": WIDTH, "r": R}
    return {**batch, **model, "seconds": compare(runs, BUDGET)}


def _disha(model: nn.Module, method: str, names: Sequence[str], x: Tensor) -> dict[str, Run]:
    for adapter in dict.fromkeys(names):
        disha.inject_adapters(model, "all-linear", R, method=method, adapter=adapter)
    fill(trainable(model), SCALE)

    def all_at_once() -> Tensor:
        with torch.no_grad(), disha.route_adapters(model, names):
            return model(x)

    switch = _one_by_one(lambda name: disha.set_active_adapters(model, name), model, names, x)
    return {f"{method}_routed": all_at_once, f"{method}_one_by_one": switch}


def _peft(base: nn.Sequential, names: Sequence[str], x: Tensor) -> dict[str, Run]:
    from peft import LoraConfig, get_peft_model

    rank = lora_rank([(WIDTH, WIDTH)], R)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[str(i) for i in range(LAYERS)])
    first, *others = dict.fromkeys(names)
    model: Any = get_peft_model(base, config, first, autocast_adapter_dtype=False)
    for adapter in others:
        model.add_adapter(adapter, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    fill(trainable(model), SCALE)
    model.eval()

    def all_at_once() -> Tensor:
        with torch.no_grad():
            return model(x, adapter_names=list(names))

    switch = _one_by_one(model.set_adapter, model, names, x)
    return {"peft_lora_routed": all_at_once, "peft_lora_one_by_one": switch}


def _one_by_one(
    switch: Callable[[str], object], model: nn.Module, names: Sequence[str], x: Tensor
) -> Run:
    rows = {
        adapter: torch.tensor([i for i, name in enumerate(names) if name == adapter]).to(x.device)
        for adapter in dict.fromkeys(names)
    }

    def run() -> list[Tensor]:
        outputs = []
        with torch.no_grad():
            for adapter, mine in rows.items():
                switch(adapter)
                outputs.append(model(x.index_select(0, mine)))
        return outputs

    return run


def _check(name: str, together: Tensor, parts: list[Tensor], names: Sequence[str]) -> None:
    for adapter, part in zip(dict.fromkeys(names), parts, strict=True):
        mine = [i for i, one in enumerate(names) if one == adapter]
        if not torch.allclose(together[mine], part, rtol=1e-3, atol=1e-4):
            raise CandidateError(f"{name}: the routing differs from running adapter by adapter")

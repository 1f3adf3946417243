"""The table of routed batches: each sample of a batch has an adapter of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import disha
from benchmarks.candidates import (
    BASE,
    CANDIDATES,
    lora_rank,
    missing_package,
)
from benchmarks.protocol import Budget, R, Run, compare, synchroniser
from benchmarks.steps import CandidateError, fill, forward, frozen_stack, trainable

__all__ = ["routed"]

LAYERS = 4
SCALE = 0.02


def routed(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Compare a batch that is routed to several adapters with two other ways to run it.

    Adapter by adapter means one forward for each adapter, with its own samples. One adapter for
    all means a model with a single adapter and without a route. The time includes setting the
    route, switching the adapter, and PEFT's `adapter_names`.
    """
    sizes = (8, 256, (1,), (1, 4)) if quick else (64, 1024, (1, 32), (1, 8, 64))
    samples, width, lengths, counts = sizes
    budget = Budget(1.0, 2, 10) if quick else Budget(8.0, 5, 100)
    return [
        _measure(samples, width, adapters, tokens, budget, device)
        for tokens in lengths
        for adapters in counts
    ]


def _measure(
    samples: int, width: int, adapters: int, tokens: int, budget: Budget, device: torch.device
) -> dict[str, Any]:
    r = min(R, width // 8)
    names = [f"a{sample % adapters}" for sample in range(samples)]
    torch.manual_seed(0)
    x = torch.randn(samples, tokens, width, device=device)

    def base() -> nn.Sequential:
        return frozen_stack(LAYERS, width, device)

    runs: dict[str, Run] = {BASE: forward(base(), x)}
    left_out = {}
    for method in ("bone", "bat"):
        runs |= _disha(base(), method, r, names, x)
        one = disha.inject_adapters(base(), "all-linear", r, method=method)
        fill(trainable(one), SCALE)
        runs[f"{method}_one_adapter"] = forward(one, x)
    why = missing_package(CANDIDATES["peft_lora"])
    if why is None:
        runs |= _peft(base(), r, names, x)
        one, _ = _peft_model(base(), r, names[:1])
        runs["peft_lora_one_adapter"] = forward(one, x)
    else:
        left_out["peft_lora"] = why
    for name in runs:
        if name != BASE and name.endswith("_routed"):
            one_by_one = runs[name.replace("_routed", "_one_by_one")]
            _check(name, runs[name](), one_by_one(), names)
    return {
        "adapters": adapters,
        "samples": samples,
        "tokens": tokens * samples,
        "layers": LAYERS,
        "width": width,
        "dtype": "float32",
        "r": r,
        "seconds": compare(runs, budget, synchronise=synchroniser(device)),
        "left_out": left_out,
    }


def _disha(
    model: nn.Module, method: str, r: int, names: Sequence[str], x: Tensor
) -> dict[str, Run]:
    for adapter in dict.fromkeys(names):
        disha.inject_adapters(model, "all-linear", r, method=method, adapter=adapter)
    fill(trainable(model), SCALE)

    def all_at_once() -> Tensor:
        with torch.no_grad(), disha.route_adapters(model, names):
            return model(x)

    switch = _one_by_one(lambda name: disha.set_active_adapters(model, name), model, names, x)
    return {f"{method}_routed": all_at_once, f"{method}_one_by_one": switch}


def _peft(model: nn.Sequential, r: int, names: Sequence[str], x: Tensor) -> dict[str, Run]:
    peft, switch = _peft_model(model, r, names)

    def all_at_once() -> Tensor:
        with torch.no_grad():
            return peft(x, adapter_names=list(names))

    return {
        "peft_lora_routed": all_at_once,
        "peft_lora_one_by_one": _one_by_one(switch, peft, names, x),
    }


def _peft_model(
    model: nn.Sequential, r: int, names: Sequence[str]
) -> tuple[nn.Module, Callable[[str], object]]:
    """Return a model of PEFT with these adapters, and the function that activates one."""
    from peft import LoraConfig, get_peft_model

    width = model[0].in_features
    rank = lora_rank([(width, width)], r)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[str(i) for i in range(LAYERS)])
    adapters = list(dict.fromkeys(names))
    peft = get_peft_model(model, config, adapters[0], autocast_adapter_dtype=False)
    for adapter in adapters[1:]:
        peft.add_adapter(adapter, config)
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_("lora_" in name)
    fill(trainable(peft), SCALE)
    peft.eval()
    return peft, peft.set_adapter


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


def _check(name: str, together: object, parts: object, names: Sequence[str]) -> None:
    assert isinstance(together, Tensor)
    assert isinstance(parts, list)
    for adapter, part in zip(dict.fromkeys(names), parts, strict=True):
        mine = [i for i, one in enumerate(names) if one == adapter]
        if not torch.allclose(together[mine], part, rtol=1e-3, atol=1e-4):
            raise CandidateError(f"{name}: the routing differs from running adapter by adapter")

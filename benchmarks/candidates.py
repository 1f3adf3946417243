"""The candidates: ways to adapt linear layers, with equally many trained parameters.

The block of Bone or BAT has r * out values in a layer. A tile gets shards of 2 r and half of the
outputs, LoRA the rank p with p * (in + out) values, LoKr a factor of 2 and rank r. Only MiSS of
size 2 r, which has as high a rank as two groups, has twice the parameters. All adapters have the
dtype of the base weight. By default PEFT keeps adapters of 16-bit weights in float32, which would
cost it time; `autocast_adapter_dtype=False` turns that off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import disha
from benchmarks.steps import CandidateError, fill, trainable

BASE = "frozen"
"""The candidate that all others are compared with: the model without adapters, frozen."""

MODEL_SCALE, LAYER_SCALE = 0.02, 0.1
"""Standard deviation of the values in blocks. A single layer needs more to show in 16 bits."""


class Candidate(NamedTuple):
    """A way to adapt linear layers. Those of one method return the same for equal blocks."""

    name: str
    title: str
    method: str
    adapt: Callable[[nn.Module, Sequence[str], int], None]


def lora_rank(sizes: Iterable[tuple[int, int]], r: int) -> int:
    """Return the rank with as many parameters as Bone, rounded down to a multiple of 8.

    Kernels prefer that. LoRA then has slightly fewer parameters and slightly less work.
    """
    sizes = list(sizes)
    rank = sum(r * out for _, out in sizes) // sum(width + out for width, out in sizes)
    return max(1, rank - rank % 8 if rank >= 8 else rank)


def _sizes(model: nn.Module, names: Sequence[str]) -> list[tuple[int, int]]:
    layers = [model.get_submodule(name) for name in names]
    return [(layer.in_features, layer.out_features) for layer in layers]


def _freeze(model: nn.Module, names: Sequence[str], r: int) -> None:
    model.requires_grad_(False)


def _disha(model: nn.Module, names: Sequence[str], r: int, **more: Any) -> None:
    disha.inject_adapters(model, lambda name, _: name in names, r, **more)


def _tile(model: nn.Module, names: Sequence[str], r: int) -> None:
    (half,) = {out // 2 for _, out in _sizes(model, names)}
    _disha(model, names, 2 * r, r_out=half)


def _lora(model: nn.Module, names: Sequence[str], r: int) -> None:
    _disha(model, names, lora_rank(_sizes(model, names), r), method="lora")


def _with_double_shards(model: nn.Module, names: Sequence[str], r: int) -> None:
    _disha(model, names, 2 * r)


def _peft_miss(model: nn.Module, names: Sequence[str], r: int, **more: object) -> None:
    from peft import MissConfig, inject_adapter_in_model

    inject_adapter_in_model(MissConfig(r=r, target_modules=list(names), **more), model)


def _peft_lora(model: nn.Module, names: Sequence[str], r: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    rank = lora_rank(_sizes(model, names), r)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(names))
    inject_adapter_in_model(config, model)


def _loralib(model: nn.Module, names: Sequence[str], r: int) -> None:
    import loralib

    rank = lora_rank(_sizes(model, names), r)
    model.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        sizes, bias = (base.in_features, base.out_features), base.bias is not None
        layer = loralib.Linear(*sizes, r=rank, lora_alpha=rank, merge_weights=False, bias=bias)
        layer.weight, layer.bias = base.weight, base.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)


def _lycoris(
    model: nn.Module, names: Sequence[str], algorithm: str, rank: int, **more: object
) -> None:
    import lycoris

    kind = {"lora": lycoris.LoConModule, "lokr": lycoris.LokrModule}[algorithm]
    model.requires_grad_(False)
    for name in names:
        layer = model.get_submodule(name)
        # In bypass mode the update is applied to the input, not added to the weight: much faster.
        module = kind("lycoris", layer, lora_dim=rank, alpha=rank, bypass_mode=True, **more)
        module.to(layer.weight.device, layer.weight.dtype).apply_to()
        layer.add_module("lycoris", module)


def _lycoris_lora(model: nn.Module, names: Sequence[str], r: int) -> None:
    _lycoris(model, names, "lora", lora_rank(_sizes(model, names), r))


def _lycoris_lokr(model: nn.Module, names: Sequence[str], r: int) -> None:
    _lycoris(model, names, "lokr", r, factor=2)


CANDIDATES: Mapping[str, Candidate] = {
    candidate.name: candidate
    for candidate in (
        Candidate(BASE, "frozen base", "frozen", _freeze),
        Candidate("bone", "disha MiSS", "bone", _disha),
        Candidate("tile", "disha tile", "other", _tile),
        Candidate("bat", "disha BAT", "bat", partial(_disha, method="bat")),
        Candidate("lora", "disha LoRA", "other", _lora),
        Candidate("groups2", "MiSS, 2 groups", "other", partial(_disha, groups=2)),
        Candidate("groups4", "MiSS, 4 groups", "other", partial(_disha, groups=4)),
        Candidate("groups_all", "MiSS, n groups", "other", partial(_disha, groups="all")),
        Candidate("bone_2r", "MiSS of size 2 r", "other", _with_double_shards),
        Candidate("peft_miss", "PEFT MiSS", "bone", _peft_miss),
        Candidate("peft_bat", "PEFT BAT", "bat", partial(_peft_miss, init_weights="bat")),
        Candidate("peft_lora", "PEFT LoRA", "other", _peft_lora),
        Candidate("loralib", "loralib LoRA", "other", _loralib),
        Candidate("lycoris_lora", "LyCORIS LoRA", "other", _lycoris_lora),
        Candidate("lycoris_lokr", "LyCORIS LoKr", "other", _lycoris_lokr),
    )
}
EVERY_METHOD = (
    *(BASE, "bone", "tile", "bat", "lora", "peft_miss", "peft_bat", "peft_lora"),
    *("loralib", "lycoris_lora", "lycoris_lokr"),
)
"""The candidates of equal parameters, without those of groups."""


def adapted_model(
    candidate: Candidate, model: nn.Module, names: Sequence[str], r: int, scale: float = MODEL_SCALE
) -> nn.Module:
    """Return a copy of `model`, adapted, its blocks filled; the base parameters are shared."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, dict(shared))
    weight = twin.get_submodule(names[0]).weight
    candidate.adapt(twin, names, r)
    for parameter in trainable(twin):
        parameter.data = parameter.data.to(weight.device, weight.dtype)
    fill(trainable(twin), scale)
    if any(id(parameter) in shared for parameter in trainable(twin)):
        raise CandidateError(f"{candidate.title} trains a parameter of the base")
    return twin


def check_layer(candidate: Candidate, layer: nn.Module, plain: nn.Module, x: Tensor) -> Tensor:
    """Return the layer's output after checking that its blocks act and learn."""
    x = x.detach().requires_grad_()
    output = layer(x)
    for gradient in torch.autograd.grad(output.square().sum(), [x, *trainable(layer)]):
        if not torch.isfinite(gradient).all() or not gradient.any():
            raise CandidateError(f"{candidate.title}: a gradient is zero or not finite")
    with torch.no_grad():
        base = plain(x)
        acts = not torch.equal(output, base)
        if acts is (candidate.method == "frozen") or not torch.isfinite(output).all():
            raise CandidateError(f"{candidate.title}: the output is not that of base and adapter")
    return output.detach()


def check_same_results(outputs: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raise a CandidateError if candidates of the same method differ by more than rounding."""
    for method in ("bone", "bat"):
        names = [name for name in outputs if CANDIDATES[name].method == method]
        for name in names[1:]:
            first, other = outputs[names[0]], outputs[name]
            tolerance = 1e-4 if dtype == torch.float32 else 4e-2
            largest = float(first.abs().max())
            if float((first - other).abs().max()) > tolerance * largest:
                raise CandidateError(f"{name} and {names[0]} return different outputs")

"""The trial of one model: inject, train nothing, act, merge, unmerge, save, remove, load.

It uses only the public names of `disha`, and compares the model's outputs before and after.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import disha
from benchmarks.zoo.cases import Built, NotRun, run, seed, short, tensors

R = 2
BLOCK_STDS = (0.05, 0.02, 0.005, 0.001, 0.0002)
"""Candidates for the size of random blocks. The first that keeps the output similar is used."""
LARGEST_EFFECT = 3.0
PERTURBATION = 20.0
"""The factor by which values are enlarged to show whether a block acts."""
SAME = 1e-6
"""The largest relative difference that fused kernels may make."""
MERGED_SAME = 1e-4
ROUNDING = 1e-7
STATUSES = ("held", "refused", "silent", "wrong", "exception", "not run")
"""The outcomes of a trial, from the best to the worst."""

Outputs = list[Tensor]
Blocks = dict[str, nn.Parameter]


@dataclass
class Result:
    """The result of one architecture's trial.

    `exact` says that injecting changed no bit of the output, `layers` is the number of blocks, and
    `unused` has the weights that the model itself does not use for this input.
    """

    library: str
    name: str
    note: str = ""
    status: str = "held"
    reasons: list[str] = field(default_factory=list)
    layers: int = 0
    unused: list[str] = field(default_factory=list)
    exact: bool = False
    seconds: float = 0.0

    def fail(self, status: str, reason: str) -> None:
        """Record a failure. The worst one gives the status."""
        self.status = max(self.status, status, key=STATUSES.index)
        self.reasons.append(f"{status}: {reason}")

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Record how a step fails. The trial goes on after it."""
        try:
            yield
        except disha.DishaError as error:
            self.fail("refused", f"{what}: {short(error, 300)}")
        except Exception as error:
            self.fail("exception", f"{what}: {short(error, 300)}")

    def compare(self, what: str, expected: Outputs, found: Outputs, most: float = SAME) -> None:
        distance = _distance(expected, found)
        if not distance <= most:
            largest = f"{distance:.1e} of its largest value"
            self.fail("wrong", f"{what}: the output differs by {largest}")


def trial(built: Built, result: Result) -> None:
    """Try one model, and record the outcome in `result`."""
    before = _plain(built)
    with result.step("inject_adapters"):
        _inject(built.model)
    blocks = _blocks(built.model)
    result.layers = len(blocks)
    if not blocks:
        return
    with result.step("forward"):
        found = _outputs(built)
        result.exact = _equal(before, found)
        result.compare("injected", before, found)
        std = _settle(built, blocks, before)
        _judge(built, blocks, _idle(built, blocks, std), std, result)
    with result.step("merge_adapters"):
        _merge_and_unmerge(built, result)
    with result.step("files"):
        _save_and_load(built, before, result)


# --- outputs -------------------------------------------------------------------------------------


def _outputs(built: Built) -> Outputs:
    with torch.no_grad():
        return [_plain_tensor(t) for t in tensors(run(built))]


def _plain_tensor(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return tensor.to(torch.float64, copy=True) if tensor.is_floating_point() else tensor.clone()


def _plain(built: Built) -> Outputs:
    first, second = _outputs(built), _outputs(built)
    if not first or not any(t.numel() for t in first):
        raise NotRun("the output has no tensors")
    if not all(torch.isfinite(t).any() for t in first if t.numel()):
        raise NotRun("the plain model's output is not finite")
    if not _equal(first, second):
        raise NotRun("the plain model's output is not the same twice")
    return first


def _equal(first: Outputs, second: Outputs) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(_finite(a), _finite(b))
        for a, b in zip(first, second, strict=True)
    )


def _finite(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(0.0, 0.0, 0.0) if tensor.is_floating_point() else tensor


def _distance(first: Outputs, second: Outputs) -> float:
    """Return the largest difference as part of the largest value, of the tensor where it is most.

    Whole numbers (which is the best of several, say) are left out: rounding may change them.
    """
    if [a.shape for a in first] != [b.shape for b in second]:
        return float("inf")
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.numel() and a.is_floating_point():
            a, b = _finite(a), _finite(b)
            worst = max(worst, float((a - b).abs().max() / max(float(a.abs().max()), 1e-9)))
    return worst


# --- blocks --------------------------------------------------------------------------------------


def _inject(model: nn.Module) -> None:
    """Adapt every layer, those that are too small for r with r = 1."""
    seed()
    skipped = disha.plan_adapters(model, ".", R).skipped
    small = [re.escape(one.name) for one in skipped if one.reason.startswith("r=")]
    ranks = {f"^(?:{'|'.join(small)})$": 1} if small else None
    disha.inject_adapters(model, ".", R, rank_pattern=ranks)


def _blocks(model: nn.Module) -> Blocks:
    """Return the blocks by name; none if there is no adapter."""
    wanted = {id(block) for block in disha.adapter_parameters(model)}
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def _settle(built: Built, blocks: Blocks, before: Outputs) -> float:
    """Give the blocks random values that act without dominating the output; return their size."""
    for std in BLOCK_STDS:
        seed()
        with torch.no_grad():
            for block in blocks.values():
                block.copy_(torch.randn_like(block) * std)
        outputs = _outputs(built)
        finite = all(torch.isfinite(t).all() for t, b in zip(outputs, before, strict=False)
                     if t.is_floating_point() and torch.isfinite(b).all())  # fmt: skip
        if finite and _distance(before, outputs) <= LARGEST_EFFECT:
            break
    return std


@contextmanager
def _changed(parameters: Iterable[Tensor], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Give parameters other values in a `with` block."""
    kept = [(p, p.detach().clone()) for p in parameters]
    with torch.no_grad():
        for p, value in kept:
            p.copy_(change(value))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


def _noise(std: float) -> Callable[[Tensor], Tensor]:
    return lambda value: torch.randn_like(value) * std


# --- which blocks act ----------------------------------------------------------------------------


def _idle(built: Built, blocks: Blocks, std: float) -> list[str]:
    """Return the blocks that don't change the output, whatever values they have."""
    suspects = _without_gradient(built, blocks)
    if not suspects:
        return []
    reference = _outputs(built)

    def changes(names: list[str]) -> bool:
        with _changed([blocks[name] for name in names], _noise(std * PERTURBATION)):
            return not _equal(reference, _outputs(built))

    return _without_effect(suspects, changes)


def _without_effect(names: list[str], changes: Callable[[list[str]], bool]) -> list[str]:
    """Return the names that change nothing, by trying all and then halves."""
    if not names or not changes(names):
        return names
    if len(names) == 1:
        return []
    half = len(names) // 2
    return _without_effect(names[:half], changes) + _without_effect(names[half:], changes)


def _without_gradient(built: Built, blocks: Blocks) -> list[str]:
    """Return the blocks that get no gradient, or one of zeros; all where none can be computed."""
    total: Tensor | float = 0.0
    try:
        with torch.enable_grad():
            for i, tensor in enumerate(tensors(run(built))):
                if tensor.requires_grad and tensor.numel():
                    torch.manual_seed(i)
                    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                    plain = plain.nan_to_num(0.0, 0.0, 0.0).double()
                    total = total + (plain * torch.randn_like(plain)).sum()
            if isinstance(total, Tensor):
                total.backward()
    except disha.DishaError:
        raise
    except Exception:
        return list(blocks)  # the model itself can't be differentiated
    idle = [name for name, block in blocks.items() if block.grad is None or not block.grad.any()]
    for block in blocks.values():
        block.grad = None
    return idle


def _judge(built: Built, blocks: Blocks, idle: list[str], std: float, result: Result) -> None:
    """Separate inactive blocks from blocks whose weights the model does not use.

    Such a weight changes nothing when it is merged with other values of its block. Where merging is
    refused, it gets noise.
    """
    if not idle:
        return
    model = built.model

    def merged(names: list[str]) -> Outputs:
        with _changed([blocks[name] for name in names], _noise(std * PERTURBATION)):
            disha.merge_adapters(model, untie=True)
            try:
                return _outputs(built)
            finally:
                disha.unmerge_adapters(model)

    def noisy(names: list[str]) -> Outputs:
        layers = tuple(f"{_layer(name)}." for name in names)
        weights = [
            p
            for name, p in model.named_parameters()
            if name.startswith(layers) and name not in blocks and p.ndim >= 2
        ]
        with _changed(weights, lambda value: value + torch.randn_like(value)):
            return _outputs(built)

    output_with = merged
    try:
        usual = merged([])
    except disha.MergeError:
        usual, output_with = _outputs(built), noisy
    unused = set(_without_effect(idle, lambda names: not _equal(usual, output_with(names))))
    for name in idle:
        if name in unused:
            result.unused.append(_layer(name))
        else:
            result.fail("silent", f"{_layer(name)}: its weight acts, its block does not")


def _layer(block: str) -> str:
    return re.split(r"\.disha\b", block)[0]


# --- merge, unmerge, save, remove, load ----------------------------------------------------------


def _merge_and_unmerge(built: Built, result: Result) -> None:
    """Where the model makes much of rounding (a router, say), merging may differ by more."""
    adapted = _outputs(built)
    disha.merge_adapters(built.model, untie=True)
    merged = _outputs(built)
    disha.unmerge_adapters(built.model)
    result.compare("unmerged", adapted, _outputs(built))
    if not _distance(adapted, merged) <= MERGED_SAME:
        result.compare("merged", adapted, merged, 10 * _sensitivity(built, adapted))


def _sensitivity(built: Built, reference: Outputs) -> float:
    """Return how much the output changes if all weights change in their last bits."""
    seed()
    weights = [p for p in built.model.parameters() if p.is_floating_point()]
    with _changed(weights, lambda value: value * (1 + torch.randn_like(value) * ROUNDING)):
        return _distance(reference, _outputs(built))


def _save_and_load(built: Built, before: Outputs, result: Result) -> None:
    model, adapted = built.model, _outputs(built)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        disha.save_adapter(model, path)
        result.compare("after save_adapter", adapted, _outputs(built))
        disha.remove_adapters(model)
        result.compare("after remove_adapters", before, _outputs(built))
        disha.load_adapter(model, path)
        result.compare("after load_adapter", adapted, _outputs(built))

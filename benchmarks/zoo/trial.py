"""The trial of one model: inject, check, save, remove, load.

It uses only the public names of `disha`, and compares the model's outputs before and after.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import disha
from benchmarks.zoo.cases import Built, NotRun, run, seed, short, tensors

R = 2
BLOCK_STD = 0.005
"""Size of the random blocks that are saved: they act without dominating the output."""
SAME = 1e-6
"""The largest relative difference that fused kernels may make."""
STATUSES = ("held", "refused", "silent", "wrong", "exception", "not run")
"""The outcomes of a trial, from the best to the worst."""

Outputs = list[Tensor]


@dataclass
class Result:
    """The result of one architecture's trial.

    `layers` is the number of blocks, and `unused` has the weights that the model itself does not
    use for this input.
    """

    library: str
    name: str
    note: str = ""
    status: str = "held"
    reasons: list[str] = field(default_factory=list)
    layers: int = 0
    unused: list[str] = field(default_factory=list)
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

    def compare(self, what: str, expected: Outputs, found: Outputs) -> None:
        distance = _distance(expected, found)
        if not distance <= SAME:
            largest = f"{distance:.1e} of its largest value"
            self.fail("wrong", f"{what}: the output differs by {largest}")


def trial(built: Built, result: Result) -> None:
    """Try one model, and record the outcome in `result`."""
    before = _plain(built)
    with result.step("inject_adapters"):
        _inject(built)
    result.layers = len(disha.adapter_parameters(built.model))
    with result.step("forward"):
        result.compare("injected", before, _outputs(built))
    with result.step("check_adapters"):
        _check(built, result)
    with result.step("files"):
        _save_and_load(built, before, result)


def _inject(built: Built) -> None:
    """Adapt every layer, those that are too small for r with r = 1."""
    seed()
    skipped = disha.plan_adapters(built.model, ".", R).skipped
    small = [re.escape(one.name) for one in skipped if one.reason.startswith("r=")]
    ranks = {f"^(?:{'|'.join(small)})$": 1} if small else None
    disha.inject_adapters(built.model, ".", R, rank_pattern=ranks)


def _check(built: Built, result: Result) -> None:
    """Record what the check finds. A weight is unused if merging its block changes nothing too."""
    checked = disha.check_adapters(built.model, *built.args, **built.kwargs).weights
    for reason in sorted({one.reason for one in checked if one.merges is None}):
        result.fail("refused", f"merge_adapters: {reason}")
    for one in checked:
        if one.merges is False and not one.acts:
            result.fail("silent", f"{one.name}: its weight acts, its block does not")
        elif one.merges is False:
            result.fail("wrong", f"merge_adapters: {one.name}: {one.reason}")
        elif not one.acts:
            result.unused.append(one.name)


def _save_and_load(built: Built, before: Outputs, result: Result) -> None:
    model = built.model
    seed()
    with torch.no_grad():
        for block in disha.adapter_parameters(model):
            block.copy_(torch.randn_like(block) * BLOCK_STD)
    adapted = _outputs(built)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        disha.save_adapter(model, path)
        result.compare("after save_adapter", adapted, _outputs(built))
        disha.remove_adapters(model)
        result.compare("after remove_adapters", before, _outputs(built))
        disha.load_adapter(model, path)
        result.compare("after load_adapter", adapted, _outputs(built))


# --- outputs -------------------------------------------------------------------------------------


def _plain(built: Built) -> Outputs:
    """Return the outputs of the plain model, which must be finite, and the same twice."""
    first, second = _outputs(built), _outputs(built)
    if not any(tensor.numel() for tensor in first):
        raise NotRun("the output has no tensors")
    if not all(torch.isfinite(tensor).any() for tensor in first if tensor.numel()):
        raise NotRun("the plain model's output is not finite")
    if _distance(first, second) > 0:
        raise NotRun("the plain model's output is not the same twice")
    return first


def _outputs(built: Built) -> Outputs:
    with torch.no_grad():
        return [_comparable(tensor) for tensor in tensors(run(built))]


def _comparable(tensor: Tensor) -> Tensor:
    """Return a copy that is dense and real; whole numbers stay whole."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return tensor.to(torch.float64, copy=True) if tensor.is_floating_point() else tensor.clone()


def _distance(first: Outputs, second: Outputs) -> float:
    """Return the largest difference as part of the largest value, of the tensor where it is most.

    Whole numbers (which is the best of several, say) are left out: rounding may change them.
    """
    if [a.shape for a in first] != [b.shape for b in second]:
        return float("inf")
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.numel() and a.is_floating_point():
            a, b = a.nan_to_num(0.0, 0.0, 0.0), b.nan_to_num(0.0, 0.0, 0.0)
            worst = max(worst, float((a - b).abs().max() / max(float(a.abs().max()), 1e-9)))
    return worst

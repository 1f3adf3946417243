"""The trial of one model: inject, train nothing, act, merge, unmerge, save, remove, load.

It uses only the public names of `disha`, and compares the model's outputs before and after.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import disha
from benchmarks.zoo.cases import Built, NotRun, run, seed, tensors

__all__ = ["Result", "trial"]

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
NAMED = re.compile(r"[\w.\-]+")

Outputs = list[Tensor]


@dataclass
class Result:
    """The result of one architecture's trial.

    Attributes:
        library: its library.
        name: its name there.
        note: which class it is.
        status: `"held"`, `"silent"`, `"wrong"`, `"exception"`, `"refused"`, or `"not run"`.
        reasons: why the status is not "held", in short.
        refused: texts of errors of disha. If possible, the trial continued without these layers.
        layers: the number of blocks.
        unused: weights that the model itself does not use for this input.
        exact: whether injecting changed no bit of the output.
        block_std: the size of the blocks' random values.
        effect: the largest change that all blocks made, relative to the largest output.
        seconds: how long it took.
    """

    library: str
    name: str
    note: str = ""
    status: str = "held"
    reasons: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    layers: int = 0
    unused: list[str] = field(default_factory=list)
    exact: bool = False
    block_std: float = BLOCK_STDS[0]
    effect: float = 0.0
    seconds: float = 0.0

    RANKS = ("held", "refused", "silent", "wrong", "exception", "not run")

    def fail(self, status: str, reason: str) -> None:
        """Record a failure. The worst one gives the status."""
        if self.RANKS.index(status) > self.RANKS.index(self.status):
            self.status = status
        self.reasons.append(f"{status}: {reason}")

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def trial(built: Built, result: Result) -> None:
    """Try one model, and record the outcome in `result`."""
    model = built.model
    before = _plain(built)
    plain = _copied(built)
    injected = _measured(result, "inject_adapters", lambda: _inject(model, ".", result))
    if injected is _FAILED or not injected:
        return
    blocks = _blocks(model)
    result.layers = len(blocks)
    _compare(result, "injected", before, _output(built, result), SAME, exact=True)
    if result.status == "exception":
        return
    if _measured(result, "forward", lambda: _settle(built, blocks, before, result)) is _FAILED:
        return
    idle = _measured(result, "finding idle blocks", lambda: _idle(built, blocks, result))
    if idle is not _FAILED and idle:
        _judge(built, plain, blocks, idle, result)
    _there_and_back(built, result, before)


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


def _copied(built: Built) -> Built | None:
    """Return the same with a copy of the model, which gets no adapter, if it can be copied."""
    try:
        return Built(copy.deepcopy(built.model), built.args, built.kwargs)
    except Exception:
        return None


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
    if len(first) != len(second) or any(
        a.shape != b.shape for a, b in zip(first, second, strict=False)
    ):
        return float("inf")
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.numel() and a.is_floating_point():
            a, b = _finite(a), _finite(b)
            worst = max(worst, float((a - b).abs().max() / max(float(a.abs().max()), 1e-9)))
    return worst


def _output(built: Built, result: Result) -> Outputs | None:
    found = _measured(result, "forward", lambda: _outputs(built))
    return None if found is _FAILED else found


def _compare(
    result: Result,
    what: str,
    expected: Outputs,
    found: Outputs | None,
    tolerance: float,
    exact: bool = False,
) -> None:
    if found is None:
        return
    if exact:
        result.exact = _equal(expected, found)
    distance = _distance(expected, found)
    if not distance <= tolerance:
        result.fail("wrong", f"{what}: the output differs by {distance:.1e} of its largest value")


# --- calls of disha ------------------------------------------------------------------------------

_FAILED = object()


def _measured(result: Result, what: str, call: Callable[[], Any]) -> Any:
    """Return the result of a call, or record how it failed."""
    try:
        return call()
    except disha.DishaError as error:
        result.refused.append(f"{what}: {_text(error)}")
        if what in ("inject_adapters", "forward"):
            result.fail("refused", f"{what}: {_text(error)}")
    except Exception as error:
        result.fail("exception", f"{what}: {_text(error)}")
    return _FAILED


def _text(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def _inject(model: nn.Module, target: Any, result: Result, without: set[str] | None = None) -> bool:
    """Inject. Layers that are refused get r = 1, and are left out if that is refused too."""
    low: set[str] = set()
    excluded: set[str] = set(without or ())
    seed()
    for _ in range(60):
        options: dict[str, Any] = {}
        if low:
            options["rank_pattern"] = {_these(low): 1}
        if excluded:
            options["exclude"] = _these(excluded)
        try:
            disha.inject_adapters(model, target, R, **options)
            return True
        except disha.DishaError as error:
            skipped = disha.plan_adapters(model, target, R, **options).skipped
            too_small = {one.name for one in skipped if one.reason.startswith("r=")} - low
            if too_small and isinstance(error, disha.ArgumentError):
                low |= too_small
                continue
            named = _named(model, str(error)) - excluded
            result.refused.append(f"inject_adapters: {_text(error)}")
            if not named:
                result.fail("refused", f"inject_adapters: {_text(error)}")
                return False
            low -= named
            excluded |= named
    result.fail("refused", "inject_adapters: gave up after 60 refusals")
    return False


def _these(names: set[str]) -> str:
    return f"^(?:{'|'.join(re.escape(name) for name in sorted(names))})$"


def _named(model: nn.Module, message: str) -> set[str]:
    """Return the names in a message that are names of modules or parameters of the model."""
    known = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {
        f"{name}.{part}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.MultiheadAttention)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    return {m.strip(".") for m in NAMED.findall(message)} & known


def _blocks(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the blocks by name; none if there is no adapter."""
    wanted = {id(block) for block in disha.adapter_parameters(model)}
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


@torch.no_grad()
def _fill(blocks: dict[str, nn.Parameter], std: float) -> None:
    seed()
    for block in blocks.values():
        block.copy_(torch.randn_like(block) * std)


def _settle(built: Built, blocks: dict[str, nn.Parameter], before: Outputs, result: Result) -> None:
    """Give the blocks random values that act without dominating the output."""
    for std in BLOCK_STDS:
        result.block_std = std
        _fill(blocks, std)
        outputs = _outputs(built)
        finite = all(torch.isfinite(t).all() for t, b in zip(outputs, before, strict=False)
                     if t.is_floating_point() and torch.isfinite(b).all())  # fmt: skip
        if finite and _distance(before, outputs) <= LARGEST_EFFECT:
            return


# --- which blocks act ----------------------------------------------------------------------------


def _idle(built: Built, blocks: dict[str, nn.Parameter], result: Result) -> list[str]:
    """Return the blocks that don't change the output, whatever values they have."""
    suspects = _without_gradient(built, blocks, result)
    if not suspects:
        return []
    reference = _outputs(built)

    def changes(names: list[str]) -> bool:
        std = result.block_std * PERTURBATION
        with torch.no_grad():
            saved = {name: blocks[name].clone() for name in names}
            for name in names:
                blocks[name].copy_(torch.randn_like(blocks[name]) * std)
            try:
                return not _equal(reference, _outputs(built))
            finally:
                for name in names:
                    blocks[name].copy_(saved[name])

    return _without_effect(suspects, changes)


def _without_effect(names: list[str], changes: Callable[[list[str]], bool]) -> list[str]:
    """Return the names that change nothing, by trying all and then halves."""
    if not names or not changes(names):
        return names
    if len(names) == 1:
        return []
    half = len(names) // 2
    return _without_effect(names[:half], changes) + _without_effect(names[half:], changes)


def _without_gradient(built: Built, blocks: dict[str, nn.Parameter], result: Result) -> list[str]:
    """Return the blocks for which one backward pass gives no gradient, or a gradient of zeros."""
    for block in blocks.values():
        block.grad = None
    try:
        with torch.enable_grad():
            total: Any = 0.0
            for i, tensor in enumerate(tensors(run(built))):
                if tensor.requires_grad and tensor.numel():
                    torch.manual_seed(i)
                    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                    plain = plain.nan_to_num(0.0, 0.0, 0.0).double()
                    total = total + (plain * torch.randn_like(plain)).sum()
            if isinstance(total, Tensor):
                total.backward()
    except Exception as error:
        if isinstance(error, disha.DishaError):
            raise
        result.reasons.append(f"no gradients, so every block was tried: {_text(error)}")
    idle = [
        name
        for name, block in blocks.items()
        if block.grad is None or not bool((block.grad != 0).any())
    ]
    for block in blocks.values():
        block.grad = None
    return idle


def _judge(
    built: Built,
    plain: Built | None,
    blocks: dict[str, nn.Parameter],
    idle: list[str],
    result: Result,
) -> None:
    """Separate inactive blocks from blocks whose weights the plain model does not use.

    The plain model gets the merged weights of all blocks, and then others for the idle ones.
    """
    usual, usual_output = _merged_values(built, blocks, [], 0.0)

    def changes(names: list[str]) -> bool:
        values, output = _merged_values(built, blocks, names, result.block_std * PERTURBATION)
        if plain is None:
            return output is None or usual_output is None or not _equal(usual_output, output)
        if values:
            return not _equal(with_weights(usual), with_weights(values))
        return not _equal(with_weights({}), with_weights(_noisy(plain.model, names)))

    def with_weights(values: dict[str, Tensor]) -> Outputs:
        assert plain is not None
        with _replaced(plain.model, values):
            return _outputs(plain)

    unused = _measured(result, "judging idle blocks", lambda: _without_effect(idle, changes))
    if unused is _FAILED:
        return
    for name in idle:
        if name in unused:
            result.unused.append(_layer(name))
        else:
            result.fail("silent", f"{_layer(name)}: its weight acts, its block does not")


def _noisy(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Return other values for the weights of layers, where merging them is refused."""
    prefixes = tuple(f"{_layer(name)}." for name in names)
    return {
        full: p.detach() + torch.randn_like(p)
        for full, p in _parameters(model)
        if full.startswith(prefixes) and p.ndim >= 2
    }


def _layer(block: str) -> str:
    return re.split(r"\.disha\b", block)[0]


def _merged_values(
    built: Built, blocks: dict[str, nn.Parameter], names: list[str], std: float
) -> tuple[dict[str, Tensor], Outputs | None]:
    """Return the parameters that merging changes, with these blocks perturbed, and the output."""
    model, output = built.model, None
    originals = {n: p.detach().clone() for n, p in _parameters(model) if n not in blocks}
    saved = {n: blocks[n].detach().clone() for n in names}
    changed = {}
    with torch.no_grad():
        for n in names:
            blocks[n].copy_(torch.randn_like(blocks[n]) * std)
    try:
        disha.merge_adapters(model, untie=True)
        for n, p in _parameters(model):
            if n in originals and not torch.equal(p, originals[n]):
                changed[n] = p.detach().clone()
        output = _outputs(built)
    except disha.DishaError:
        pass  # another step tries merging and counts it
    finally:
        disha.unmerge_adapters(model)
        with torch.no_grad():
            for n, value in saved.items():
                blocks[n].copy_(value)
    return changed, output


@contextmanager
def _replaced(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Give modules other parameters in a `with` block.

    One use of a shared parameter only is changed where only that is named, as a block would.
    """
    kept = []
    for full, value in values.items():
        owner_name, _, own = full.rpartition(".")
        try:
            owner = model.get_submodule(owner_name)
        except AttributeError:
            continue
        if own in owner._parameters:
            kept.append((owner, own, owner._parameters[own]))
            owner._parameters[own] = nn.Parameter(value.detach(), requires_grad=False)
    try:
        yield
    finally:
        for owner, own, parameter in reversed(kept):
            owner._parameters[own] = parameter


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)


# --- merge, unmerge, save, remove, load ----------------------------------------------------------


def _there_and_back(built: Built, result: Result, before: Outputs) -> None:
    model = built.model
    if not _mergeable(model, result):
        return
    adapted = _output(built, result)
    if adapted is None:
        return
    result.effect = _distance(before, adapted)
    merged = _measured(result, "merge_adapters", lambda: disha.merge_adapters(model, untie=True))
    if merged is not _FAILED:
        found = _output(built, result)
        unmerged = _measured(result, "unmerge_adapters", lambda: disha.unmerge_adapters(model))
        if unmerged is _FAILED:
            return
        _compare(result, "unmerged", adapted, _output(built, result), SAME)
        _compare_merged(built, result, adapted, found)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        steps: tuple[tuple[str, Callable[[], Any], Outputs], ...] = (
            ("save_adapter", lambda: disha.save_adapter(model, path), adapted),
            ("remove_adapters", lambda: disha.remove_adapters(model), before),
            ("load_adapter", lambda: disha.load_adapter(model, path), adapted),
        )
        for what, call, expected in steps:
            if _measured(result, what, call) is _FAILED:
                result.fail("wrong", f"{what} did not work")
                return
            _compare(result, f"after {what}", expected, _output(built, result), SAME)


def _mergeable(model: nn.Module, result: Result) -> bool:
    """Leave out layers that can't be merged, until the others can; return whether any are left."""
    excluded: set[str] = set()
    for _ in range(40):
        if excluded:
            disha.remove_adapters(model)
            if not _inject(model, ".", Result(result.library, result.name), excluded):
                return False
            _fill(_blocks(model), result.block_std)
        try:
            disha.merge_adapters(model, untie=True)
        except disha.DishaError as error:
            named = _layers_named(model, str(error)) - excluded
            result.fail("refused", f"merge_adapters: {_text(error)}")
            if not named:
                return True  # the other steps can still be tried
            excluded |= named
            continue
        except Exception as error:
            result.fail("exception", f"merge_adapters: {_text(error)}")
            return True
        disha.unmerge_adapters(model)
        return True
    return True


def _layers_named(model: nn.Module, message: str) -> set[str]:
    """Return the adapted layers that a message names: by name, by a parameter's, or by class."""
    layers = {_layer(block) for block in _blocks(model)}
    named = _named(model, message)
    found = {n for n in layers if n in named or any(m.rpartition(".")[0] == n for m in named)}
    if found:
        return found
    modules = dict(model.named_modules(remove_duplicate=False))
    words = set(re.findall(r"\w+", message))
    return {
        n
        for n in layers & modules.keys()
        if any(c.__name__ in words and not _of_torch(c) for c in type(modules[n]).__mro__)
    }


def _of_torch(cls: type) -> bool:
    return cls.__module__.split(".")[0] in ("torch", "builtins", "disha")


def _compare_merged(built: Built, result: Result, adapted: Outputs, merged: Outputs | None) -> None:
    """Compare with the merged model's output.

    Where the model makes much of rounding (a router that decides between experts, say), it may
    differ by some times what rounding the weights otherwise changes.
    """
    if merged is None:
        return
    distance = _distance(adapted, merged)
    if distance <= MERGED_SAME or distance <= 10 * _sensitivity(built, adapted):
        return
    result.fail(
        "wrong",
        f"merged: the output differs by {distance:.1e} of its largest value, all blocks make "
        f"{result.effect:.1e}",
    )


@torch.no_grad()
def _sensitivity(built: Built, reference: Outputs) -> float:
    """Return how much the output changes if all weights change in their last bits."""
    seed()
    kept = [(p, p.clone()) for p in built.model.parameters() if p.is_floating_point()]
    for p, _ in kept:
        p.mul_(1 + torch.randn_like(p) * ROUNDING)
    try:
        return _distance(reference, _outputs(built))
    finally:
        for p, value in kept:
            p.copy_(value)

"""The table of devices: what can be checked about them without one. `python -m benchmarks.devices`.

Whole models run on the device of `benchmarks.pretend`: injection, loading, steps of training,
merging, routing, saving. All operations of a step are watched. A fact holds, or the table says what
breaks it; there are no times.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import disha
from benchmarks import pretend
from benchmarks.layouts import LAYOUTS, Whole
from benchmarks.settings import Profile
from benchmarks.steps import fill, trainable

__all__ = ["FACTS", "checked", "devices"]

WIDTH, R = 16, 4
SCALE = 0.1

FACTS: Mapping[str, str] = {
    "placed": "every tensor that an operation gets or returns is on the device, numbers excepted",
    "typed": "the output has the dtype of the frozen model's output; a gradient, that of its block",
    "unsynchronised": "nothing in forward or backward waits for the device or copies from it",
    "repeated": "a step on other values runs the same operations, as a CUDA graph requires",
    "equal": "outputs and gradients are those of the CPU",
    "compiled": "in the graphs of a compiled step, every tensor is on the device",
    "lives": "loading, an optimizer's step, merging, exact unmerging and saving work there",
    "routed": "each sample can have its own adapter, with no copy after the first forward",
}
"""A fact of a layout and a method -> what it means."""

NOT_ASKED = "-"
"""What stands for a fact that says nothing about a layout."""


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of the base, of the blocks, and of autocast."""

    base: torch.dtype
    blocks: torch.dtype
    autocast: torch.dtype | None = None

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context of a step."""
        cast = self.autocast
        return nullcontext() if cast is None else torch.autocast(device.type, cast)

    @property
    def tolerance(self) -> float:
        """The largest relative difference that rounding explains."""
        return 1e-4 if self.base == torch.float32 and self.autocast is None else 4e-2


DTYPES = (
    Dtypes(torch.float32, torch.float32),
    Dtypes(torch.bfloat16, torch.bfloat16),
    Dtypes(torch.bfloat16, torch.float32),
    Dtypes(torch.float32, torch.float32, torch.bfloat16),
)

WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
"""What torch knows of operations whose result the host has to wait for."""


class Watch(TorchDispatchMode):
    """Notes the operations, and those that leave the device or wait for it.

    Args:
        device: where everything is to happen.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.operations: list[tuple[str, tuple[tuple[int, ...], ...]]] = []
        self.misplaced: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note it."""
        result = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        shapes = tuple(tuple(one.shape) for one in (*given, *made))
        self.operations.append((str(func), shapes))
        elsewhere = [one.dim() and one.device != self.device for one in (*given, *made)]
        copies = len({one.device for one in (*given, *made)}) > 1 and "copy" in str(func)
        if copies or self._waits(func, given):
            self.waits.append(str(func))
        elif any(elsewhere):
            self.misplaced.append(str(func))
        return result

    @staticmethod
    def _waits(func: Any, given: Sequence[Tensor]) -> bool:
        if "index" in str(func):
            return any(one.dtype == torch.bool for one in given)  # a mask
        return any(tag in func.tags for tag in WAITS)


def devices(profile: Profile, device: torch.device) -> list[dict[str, Any]]:
    """Check every layout with Bone and BAT, in a process of its own.

    Args:
        profile: is not used: there are no sizes.
        device: is not used: the device only pretends.
    """
    command = [sys.executable, "-m", "benchmarks.devices"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def checked() -> Iterator[dict[str, Any]]:
    """Yield for every layout and method: each fact -> what breaks it, or an empty string."""
    device = pretend.start()
    _try(Watch(device))
    for layout, whole in LAYOUTS.items():
        for method in ("bone", "bat"):
            facts = dict.fromkeys(FACTS, "")
            for dtypes in DTYPES:
                for fact, wrong in _step_facts(whole, method, dtypes, device).items():
                    facts[fact] = facts[fact] or wrong
            facts["compiled"] = (
                _broken(_compile, whole, method, device) if whole.compiles else NOT_ASKED
            )
            facts["lives"] = _broken(_live, whole, method, device)
            facts["routed"] = _broken(_route, whole, method, device) if whole.routes else NOT_ASKED
            yield {"layout": layout, "method": method, "facts": facts, "left_out": {}}


def _try(watch: Watch) -> None:
    """Check that a watch sees what it is for."""
    x = torch.ones(3, device=watch.device)
    with watch:
        x.sum().item()
        x.cpu()
        x[x > 0]
        torch.ones(2)
    expected = ["aten._local_scalar_dense.default", "aten._to_copy.default", "aten.index.Tensor"]
    if watch.waits != expected or watch.misplaced != ["aten.ones.default"]:
        raise AssertionError(f"the watch saw {watch.waits} and {watch.misplaced}")


def _broken(check: Callable[..., str], *args: Any) -> str:
    try:
        return check(*args)
    except (disha.DishaError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"


def _model(whole: Whole, method: str | None, dtypes: Dtypes, device: torch.device) -> nn.Module:
    """Return a model, the same each time, on a device before it is adapted."""
    torch.manual_seed(0)
    model = whole.build(WIDTH).to(dtypes.base).requires_grad_(False).to(device)
    if method is not None:
        options = {"method": method, "dtype": dtypes.blocks, **whole.options}
        disha.inject_adapters(model, whole.target, R, **options)
        fill(trainable(model), SCALE)
    return model


def _input(whole: Whole, dtypes: Dtypes, device: torch.device, seed: int = 0) -> Tensor:
    x = whole.inputs(WIDTH, seed)
    return x.to(device) if whole.has_indices else x.to(device, dtypes.base).requires_grad_()


def _step(model: nn.Module, x: Tensor, dtypes: Dtypes) -> tuple[Tensor, list[Tensor]]:
    """Return the output and the gradients, the input's included."""
    with dtypes.context(x.device):
        output = model(x)
    leaves = [*trainable(model), *([x] if x.requires_grad else [])]
    return output, list(torch.autograd.grad(output.float().square().sum(), leaves))


def _step_facts(whole: Whole, method: str, dtypes: Dtypes, device: torch.device) -> dict[str, str]:
    model = _model(whole, method, dtypes, device)
    frozen = _model(whole, None, dtypes, device)
    watches, inputs = (
        (Watch(device), Watch(device)),
        [_input(whole, dtypes, device, seed) for seed in range(2)],
    )
    _step(model, inputs[0], dtypes)  # what is computed once and kept is no part of a step
    outputs = []
    for watch, x in zip(watches, inputs, strict=True):
        with watch:
            outputs.append(_step(model, x, dtypes))
    first, second = watches
    with dtypes.context(device):
        expected = frozen(inputs[0]).dtype
    output, grads = outputs[0]
    blocks = [block.dtype for block in trainable(model)]
    typed = output.dtype == expected and [one.dtype for one in grads[: len(blocks)]] == blocks
    cpu = torch.device("cpu")
    there = _step(_model(whole, method, dtypes, cpu), _input(whole, dtypes, cpu), dtypes)
    far = [
        difference
        for one, other in zip([output, *grads], [there[0], *there[1]], strict=True)
        if (difference := _difference(one, other)) > dtypes.tolerance
    ]
    return {
        "placed": ", ".join(dict.fromkeys(first.misplaced)),
        "typed": "" if typed else f"{output.dtype}, gradients {[one.dtype for one in grads]}",
        "unsynchronised": ", ".join(dict.fromkeys(first.waits)),
        "repeated": "" if first.operations == second.operations else "other operations",
        "equal": "" if not far else f"a difference of {max(far):.1e}",
    }


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference / the largest value."""
    one, other = one.detach().cpu().float(), other.detach().cpu().float()
    return float((one - other).abs().max() / other.abs().max())


def _compile(whole: Whole, method: str, device: torch.device) -> str:
    """Compile a step for the device, and return what is not as it should be."""
    dtypes = DTYPES[1]  # grouped products of other dtypes are not compiled for devices
    model, x = _model(whole, method, dtypes, device), _input(whole, dtypes, device)
    wrong = []

    def note(graph: Any, inputs: Sequence[Tensor]) -> Any:
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.device != device:
                wrong.append(f"{node.name} is on {value.device}")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=note))
    output, _ = _step(compiled, x, dtypes)
    if _difference(output, model(x)) > dtypes.tolerance:
        wrong.append("the output is not the eager one")
    return ", ".join(wrong)


def _live(whole: Whole, method: str, device: torch.device) -> str:
    """Go through the life of an adapter, and return what is not as it should be."""
    dtypes = DTYPES[0]
    trained, model = (_model(whole, method, dtypes, device) for _ in range(2))
    x = _input(whole, dtypes, device)
    optimizer = torch.optim.AdamW(trainable(trained), lr=0.1)
    trained(x).square().sum().backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        first, second = (Path(folder, f"{name}.safetensors") for name in ("first", "second"))
        disha.save_adapter(trained, first)
        disha.load_adapter(model, first, replace=True)
        disha.save_adapter(model, second)
        if first.read_bytes() != second.read_bytes():
            return "the file that is saved is not the one that was loaded"
    weights = copy.deepcopy({name: one.cpu() for name, one in model.state_dict().items()})
    with torch.no_grad():
        output = model(x)
        disha.merge_adapters(model)
        merged = model(x)
        disha.unmerge_adapters(model)
    if _difference(merged, output) > dtypes.tolerance:
        return "merging changes the output"
    if any(not torch.equal(one.cpu(), weights[name]) for name, one in model.state_dict().items()):
        return "unmerging does not restore every bit"
    if any(one.device != device for one in (*model.parameters(), *model.buffers())):
        return "a parameter or a buffer has left the device"
    return ""


def _route(whole: Whole, method: str, device: torch.device) -> str:
    """Give the samples two adapters in turn, and return what is not as it should be."""
    dtypes = DTYPES[0]
    model = _model(whole, method, dtypes, device)
    disha.inject_adapters(model, whole.target, R, adapter="other", method=method, **whole.options)
    x = _input(whole, dtypes, device).detach()
    names: list[str | None] = [("default", "other", None)[one % 3] for one in range(len(x))]
    disha.set_active_adapters(model, "default")
    own, watch = model(x), Watch(device)
    with disha.adapters_disabled(model):
        plain = model(x)
    with disha.route_adapters(model, names), torch.no_grad():
        model(x)
        with watch:
            routed = model(x)
    wrong = [*watch.misplaced, *watch.waits]
    expected = torch.stack([(own, plain, plain)[one % 3][one] for one in range(len(x))])
    if _difference(routed, expected) > dtypes.tolerance:
        wrong.append("a sample got another adapter's output")
    return ", ".join(dict.fromkeys(wrong))


if __name__ == "__main__":
    print(json.dumps(list(checked())))

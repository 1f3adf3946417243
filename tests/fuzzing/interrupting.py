"""Operations that are interrupted at every point: the model is then as before, or as after.

An interruption is an exception that a trace function raises: as a Python function is entered
(`call`), or before a line of the library runs (`line`). Ctrl-C and a lack of memory come at such
points. One run has one interruption, in a model and a folder that are made anew for it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType, FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import disha
from disha import contexts

__all__ = ["KINDS", "OPERATIONS", "Operation", "Outcome", "interrupt", "interrupt_by_name"]

KINDS = ("call", "line")
"""What comes after an interruption: the body of any function, or a line of the library."""

ERRORS = (KeyboardInterrupt, MemoryError)
OWN = str(Path(disha.__file__).parent)

Run = Callable[[nn.Module, Path], object]


@dataclasses.dataclass(frozen=True)
class Operation:
    """Something that changes a model or a file.

    Attributes:
        name: its name in reports.
        make: makes the model, from before the operation. `FILE` in the folder is an adapter of it.
        run: the operation, with the model and the folder.
        kinds: what it survives an interruption before, of `KINDS`.
    """

    name: str
    make: Callable[[], nn.Module]
    run: Run
    kinds: Sequence[str] = KINDS


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of interrupting an operation at many points.

    Attributes:
        points: how many points the operation has.
        tried: at how many of them it was interrupted.
        before: how often the model was as before.
        failures: a description of each point after which it was neither as before nor as after.
    """

    points: int
    tried: int
    before: int
    failures: tuple[str, ...]


# --- models --------------------------------------------------------------------------------------


class Coarse(Tensor):
    """A weight that only its own class can read, as a quantised one."""

    def dequantize(self) -> Tensor:
        """Return the dense weight."""
        return self.detach().as_subclass(Tensor).clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = nn.Parameter(self.dequantize().as_subclass(Coarse), requires_grad=False)
        return memo[id(self)]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear:
            args = [one.dequantize() if isinstance(one, cls) else one for one in args]
        return super().__torch_function__(function, types, args, kwargs or {})


class Plain(nn.Module):
    """Tokens through an embedding, two linear layers and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.norm.bias.requires_grad = False
        self.last.eval()

    def forward(self, tokens: Tensor) -> Any:
        """Return the logits."""
        return self.head(self.last(self.norm(self.first(self.embed(tokens)))))


class Various(nn.Module):
    """A layer of each sort that is adapted in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.opaque = nn.Linear(8, 8)
        coarse = self.opaque.weight.detach().as_subclass(Coarse)
        self.opaque.weight = nn.Parameter(coarse, requires_grad=False)

    def forward(self, tokens: Tensor) -> Any:
        """Return the hidden states."""
        hidden, _ = self.recurrent(self.embed(tokens))
        return self.opaque(self.encoder(hidden, src_key_padding_mask=tokens == 0))


class Computed(nn.Module):
    """Two layers whose weights are computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.first = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.last = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, tokens: Tensor) -> Any:
        """Return the hidden states."""
        return self.last(self.first(self.embed(tokens)))


def _inject(model: nn.Module, adapter: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    options = {"init": "kaiming", "r": 2, "target_regex": "all-linear", **options}
    return disha.inject_adapters(model, adapter=adapter, **options)


def _random_inject(model: nn.Module, adapter: str) -> nn.Module:
    """Inject an adapter with what it can have: dropout, a scale, parameters that train with it."""
    also = "norm.*weight" if isinstance(model, Plain) else None
    return _inject(model, adapter, r=4, dropout=0.25, scale=0.5, also_train=also)


@functools.cache
def _prototype(cls: type[nn.Module], adapters: Sequence[str], merged: bool) -> nn.Module:
    torch.manual_seed(0)
    model = cls()
    for adapter in adapters:
        (_random_inject if adapter == "a" else _inject)(model, adapter)
    if merged:
        disha.merge_adapters(model, list(adapters), untie=True, dense=True)
    return model


@functools.cache
def _file(cls: type[nn.Module]) -> bytes:
    """Return an adapter file for a model of the class, with other values than "a" has."""
    with tempfile.TemporaryDirectory() as folder:
        model = copy.deepcopy(_prototype(cls, ("a",), False))
        with torch.no_grad():
            for key, value in disha.adapter_state_dict(model, "a").items():
                value.add_(0.5 if key.endswith("block") else 1.0)
        disha.set_adapter_scale(model, 2.0, "a")
        disha.save_adapter(model, Path(folder, FILE), "a")
        return Path(folder, FILE).read_bytes()


FILE = "adapter.safetensors"
TOKENS = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])


# --- operations ----------------------------------------------------------------------------------


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value + 1 for key, value in disha.adapter_state_dict(model, "a").items()}


def _inside(context: AbstractContextManager[None], model: nn.Module) -> None:
    with context:
        model(TOKENS)


def _on(
    cls: type[nn.Module], adapters: tuple[str, ...], runs: dict[str, Run], merged: bool = False
) -> Iterator[Operation]:
    for name, run in runs.items():
        make = functools.partial(_copied, cls, adapters, merged)
        yield Operation(f"{name}, {cls.__name__.lower()}", make, run)


def _copied(cls: type[nn.Module], adapters: tuple[str, ...], merged: bool) -> nn.Module:
    return copy.deepcopy(_prototype(cls, adapters, merged))


def _inside(context: AbstractContextManager[None], model: nn.Module) -> None:
    with context:
        model(TOKENS)


FIRST: dict[str, Run] = {
    "inject": lambda model, _: _random_inject(model, "a"),
    "load": lambda model, folder: disha.load_adapter(model, folder / FILE, "a"),
}
"""Operations on a model without adapters."""

FROM_LINEAR: dict[str, Run] = {
    "from a linear layer": lambda model, _: disha.BoneLinear.from_linear(model.first, r=2)
}

SPECIAL: dict[str, Run] = {
    "inject another": lambda model, _: _inject(model, "c", freeze=False),
    "load in place": lambda model, folder: disha.load_adapter(
        model, folder / FILE, "a", replace=True
    ),
    "remove one": lambda model, _: disha.remove_adapters(model, "a"),
    "remove all": lambda model, _: disha.remove_adapters(model),
}
"""Operations on a model with the adapters "a" and "b" that do something special in some layers."""

OTHER: dict[str, Run] = {
    "load another": lambda model, folder: disha.load_adapter(
        model, folder / FILE, "c", also_train=False, dtype=torch.float64
    ),
    "load a state dict": lambda model, _: disha.load_adapter_state_dict(model, _state(model), "a"),
    "combine": lambda model, _: disha.combine_adapters(
        model, {"a": 0.5, "b": 2.0}, "c", also_train=False
    ),
    "save": lambda model, folder: disha.save_adapter(model, folder / FILE, "a"),
    "activate": lambda model, _: disha.set_active_adapters(model, ["b", "a"]),
    "scale": lambda model, _: disha.set_adapter_scale(model, 3.0, "a"),
    "disable": lambda model, _: _inside(disha.adapters_disabled(model), model),
    "choose": lambda model, _: _inside(disha.adapters_active(model, "b"), model),
    "route": lambda model, _: _inside(disha.route_adapters(model, ["a", "b"]), model),
    "train only adapters": lambda model, _: disha.mark_only_adapters_trainable(model),
    "input gradients": lambda model, _: disha.enable_input_gradients(model),
    "check": lambda model, _: disha.check_adapters(model, TOKENS),
}
"""Operations on such a model that are the same in all layers."""

CONTEXTS: dict[str, Run] = {
    "disable": lambda model, _: _inside(disha.adapters_disabled(model), model),
    "act": lambda model, _: _inside(disha.adapters_active(model, "a"), model),
    "route": lambda model, _: _inside(disha.route_adapters(model, ["a", None]), model),
}
"""Contexts. The first line that ends one can be interrupted, as in any context of Python."""

MERGE: dict[str, Run] = {
    "merge": lambda model, _: disha.merge_adapters(model, untie=True, dense=True)
}
UNMERGE: dict[str, Run] = {"unmerge": lambda model, _: disha.unmerge_adapters(model)}


def _operations() -> Iterator[Operation]:
    both = ("a", "b")
    for cls in (Plain, Various, Computed):
        yield from _on(cls, (), FIRST)
        yield from _on(cls, both, SPECIAL)
    yield from _on(Plain, (), FROM_LINEAR)
    yield from _on(Plain, both, OTHER)
    for operation in _on(Plain, both, CONTEXTS):
        yield dataclasses.replace(operation, kinds=("call",))
    for cls in (Plain, Various):
        yield from _on(cls, both, MERGE)
        yield from _on(cls, both, UNMERGE, merged=True)


OPERATIONS = {operation.name: operation for operation in _operations()}


# --- what a model is -----------------------------------------------------------------------------


def _described(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Return all that must be as before or as after, in a form that can be compared."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[int, str] = {}
    for name, module in modules.items():
        names.setdefault(id(module), f"module {name}")
        for own, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                names.setdefault(id(value), f"tensor {name}.{own}")
    state = {
        f"{name}.{attribute}": _plain(value, names)
        for name, module in modules.items()
        for attribute, value in sorted(module.__dict__.items())
    }
    for name, module in modules.items():
        state[f"{name}: class"] = type(module)
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            state[f"{name}.{own}: tensor"] = tensor if tensor is None else _values(tensor)
    state["keys"] = list(model.state_dict())
    state["files"] = {name: Path(folder, name).read_bytes() for name in _files(folder)}
    state["thread"] = (
        len(contexts.OPEN),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
    )
    torch.manual_seed(2)
    modes = [(module, module.training) for module in modules.values()]
    state["output"] = _values(model.eval()(TOKENS))
    for module, training in modes:
        module.training = training
    return state


def _files(folder: Path) -> list[str]:
    """Return the names of the files, without those that a writer has left behind."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".tmp"))


def _values(tensor: Tensor) -> tuple[Any, ...]:
    plain = tensor.detach().as_subclass(Tensor).contiguous().flatten()
    return (
        type(tensor).__name__,
        tensor.dtype,
        tuple(tensor.shape),
        tensor.requires_grad,
        bytes(plain.view(torch.uint8).tolist()),
    )


def _plain(value: Any, names: dict[int, str]) -> Any:
    """Return a value of an attribute in a form that can be compared."""
    if id(value) in names:
        return names[id(value)]
    if isinstance(value, Tensor):
        return _values(value)
    if isinstance(value, dict):
        hooks = all(isinstance(key, int) for key in value)  # whose numbers only count up
        plain = {key: _plain(one, names) for key, one in value.items()}
        return list(plain.values()) if hooks else list(plain.items())
    if isinstance(value, (list, tuple)):
        return [_plain(one, names) for one in value]
    if isinstance(value, (FunctionType, MethodType, type)):
        return value.__qualname__
    if dataclasses.is_dataclass(value):
        return (type(value).__name__, _plain(vars(value), names))
    if isinstance(value, (str, int, float, bool, set, frozenset, type(None), torch.dtype)):
        return value
    return type(value).__name__


def _identities(model: nn.Module) -> dict[str, int]:
    found = {name: id(module) for name, module in model.named_modules()}
    return found | {name: id(parameter) for name, parameter in model.named_parameters()}


# --- interrupting --------------------------------------------------------------------------------


class _Tracer:
    """Counts the points of a kind, and raises an error at one of them."""

    def __init__(self, kind: str, at: int | None, error: type[BaseException]) -> None:
        self.kind, self.at, self.error = kind, at, error
        self.count, self.where = 0, ""

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == self.kind:
            if self.count == self.at:
                code = frame.f_code
                self.where = f"{code.co_name} ({code.co_filename}:{frame.f_lineno})"
                raise self.error  # Python then calls this no more
            self.count += 1
        return self if self.kind == "line" and frame.f_code.co_filename.startswith(OWN) else None

    def run(self, function: Callable[[], object]) -> None:
        """Run a function, and note nothing after it."""
        trace, profile, unraisable = sys.gettrace(), sys.getprofile(), sys.unraisablehook
        sys.unraisablehook = lambda _: None  # Python itself goes on if a generator can't be closed
        (sys.settrace if self.kind == "line" else sys.setprofile)(self)
        try:
            function()
        finally:
            sys.settrace(trace)
            sys.setprofile(profile)
            sys.unraisablehook = unraisable


class _Trial:
    """One run of an operation, in a model and a folder of its own."""

    def __init__(self, operation: Operation, folder: Path) -> None:
        self.operation, self.folder = operation, folder
        self.model = operation.make()
        Path(folder, FILE).write_bytes(_file(_root_class(self.model)))
        self.identities = _identities(self.model)

    def run(self) -> None:
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.result = self.operation.run(self.model, self.folder)

    def state(self) -> dict[str, Any]:
        return _described(self.model, self.folder)


def _root_class(model: nn.Module) -> type[nn.Module]:
    return getattr(type(model), "original_class", type(model))


def interrupt(operation: Operation, kind: str = "call", tries: int | None = None) -> Outcome:
    """Interrupt an operation at every point, or at some.

    Args:
        operation: the operation.
        kind: one of `KINDS`. Not all lines, because torch itself does not survive an interruption
            before some of its own.
        tries: at how many points, as far apart as possible; at all by default.
    """
    states = {}
    for name in ("warm up", "before", "after"):
        with _trial_of(operation) as trial:
            tracer = _Tracer(kind, None, KeyboardInterrupt)
            if name != "before":
                tracer.run(trial.run)
            states[name] = trial.state()
    points = tracer.count
    tries = points if tries is None else min(tries, points)
    before, failures = 0, []
    for number in range(tries):
        error = ERRORS[number % len(ERRORS)]
        tracer = _Tracer(kind, (2 * number + 1) * points // (2 * tries), error)
        with _trial_of(operation) as trial:
            try:
                tracer.run(trial.run)
            except BaseException:  # safetensors turns some into errors of its own
                if not tracer.where:
                    raise
            found = _found(trial, states["before"], states["after"])
        torch.set_grad_enabled(True)
        before += found == "before"
        if found not in ("before", "after"):
            failures.append(f"{error.__name__} at {kind} {tracer.at}, {tracer.where}: {found}")
    return Outcome(points, tries, before, tuple(failures))


def interrupt_by_name(job: tuple[str, str, int | None]) -> Outcome:
    """Interrupt the operation of a name, as `interrupt` does with the other arguments."""
    name, kind, tries = job
    return interrupt(OPERATIONS[name], kind, tries)


@contextmanager
def _trial_of(operation: Operation) -> Iterator[_Trial]:
    with tempfile.TemporaryDirectory() as folder:
        yield _Trial(operation, Path(folder))


def _found(trial: _Trial, before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return "before" or "after" if the state is that; else what is wrong with it."""
    try:
        now = trial.state()
    except Exception as error:
        return f"the model can't be used: {type(error).__name__}: {error}"
    if now != before and now != after:
        names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
        return f"half: {', '.join(names[:8])}"
    if now == before and _identities(trial.model) != trial.identities:
        return "other objects"
    left_behind = len(os.listdir(trial.folder)) - len(_files(trial.folder))
    if now == after and now != before and not left_behind:
        return "after"
    try:
        trial.run()
        again = trial.state()
    except Exception as error:
        return f"can't be done again: {type(error).__name__}: {error}"
    if len(os.listdir(trial.folder)) > len(_files(trial.folder)):
        return "what was left behind stays"
    if again != after:
        return "done again, the result is another"
    return "before" if now == before else "after"

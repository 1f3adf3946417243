"""Tiny models that each carry one pathology, and how tests compare a model with what it was."""

import contextlib
import copy
import functools
import gc
import importlib.metadata
import io
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from disha.layers import weights
from disha.layers.adapted import AdaptedLayer
from disha.layers.blocks import AdapterBlock
from disha.sharding.tensors import write

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, and no test waits for an answer
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more would start a process that imports torch
# Accelerate asks hundreds of times in a run what is installed: each answer takes a millisecond.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
hypothesis.settings.register_profile("busy", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("busy")
collect_ignore = ["typed_api.py"]  # for type checkers, and never run


def pytest_collection_modifyitems() -> None:
    leave_guards_untimed()


def leave_guards_untimed() -> None:
    """To log how long guards take, dynamo would empty caches of the processor when it compiles."""
    import torch._dynamo.guards  # takes seconds, which those who compile nothing need not wait

    torch._dynamo.guards.profile_guard_manager = lambda *given: 0.0


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Search for no garbage meanwhile: what the tests import stays, and would be searched often."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


class Made(nn.Module):
    """A module of these parts. Its forward calls `run` with the module and the input."""

    def __init__(self, run: Callable[..., Any], **parts: object) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


class Attention(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(self.q_proj(x) * self.v_proj(x))


class Layered(nn.Module):
    """Two attention layers, an embedding, a head: names such as `layers.1.attn.q_proj`."""

    def __init__(self, width: int = 8, vocabulary: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": Attention(width)}) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer["attn"](x)
        return self.head(x)


class Tied(Layered):
    """The head shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class Shared(nn.Module):
    """One linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.second(torch.relu(self.first(x))))


class Doubled(nn.Linear):
    """A subclass of a user, whose forward reaches that of its base class."""

    def forward(self, input):
        return 2 * super().forward(input)


class InOut(nn.Module):
    """A linear layer that keeps its weight as (in, out), and that no library knows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def perturb(model: nn.Module, seed: int = 0, size: float = 0.3) -> nn.Module:
    """Give every block random values, so that adapters do something; return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AdaptedLayer):
                for one in module.disha.blocks_by_name().values():
                    block = one.block
                    dtype = block.dtype if block.is_complex() else torch.float32
                    values = torch.randn(block.shape, generator=generator, dtype=dtype)
                    write(block, values * size)
    return model


def merged_weight(layer: AdaptedLayer) -> torch.Tensor:
    """Return the weight of a layer plus the update of its first adapter."""
    name = next(iter(layer.disha))
    return weights.sum_with_updates(layer, layer.disha[name].spec, [name])


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the tensors of a state, and of the parts of quantised ones."""
    values = {}
    for name, value in model.state_dict().items():
        parts = {} if type(value) is torch.Tensor else vars(value)
        tensors = {key: part for key, part in parts.items() if isinstance(part, torch.Tensor)}
        for key, tensor in (tensors or {"": value}).items():
            values[f"{name} {key}"] = tensor.detach().clone()
    return values


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def snapshot(model: nn.Module) -> dict[str, object]:
    """Return everything that a refused operation must leave as it was."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "objects": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "hooks": {
            name: (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            for name, module in model.named_modules()
        },
        "values": values_of(model),
        "flags": flags(model),
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "active": {
            name: (module.disha.active, module.disha.find_override(), module.disha.merged)
            for name, module in model.named_modules()
            if isinstance(module, AdaptedLayer)
        },
        "scales": [one.scale for one in model.modules() if isinstance(one, AdapterBlock)],
    }


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return torch.equal(*(one.contiguous().flatten().view(torch.uint8) for one in (first, second)))


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    values_before, values_after = before.pop("values"), after.pop("values")
    assert after == before
    assert values_after.keys() == values_before.keys()
    for name, value in values_before.items():
        assert same_bits(values_after[name], value), name
    before["values"] = values_before


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Compare tensors, or lists or dicts of them, with a relative and an absolute tolerance."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def near(actual: torch.Tensor, expected: torch.Tensor, limit: float = 1e-10) -> None:
    """Compare tensors of one shape and dtype with a limit relative to the largest value."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    largest = max(1.0, float(expected.detach().abs().max()))
    assert (actual - expected).detach().abs().max() <= limit * largest


def assert_same(actual: Any, expected: Any) -> None:
    """Compare tensors, or lists or dicts of them, bit for bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class SizesMade(TorchDispatchMode):
    """Notes the sizes of the tensors that operations make, except for transposed ones."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and "aten.t." not in str(func):
            self.sizes.append(result.numel())
        return result


def kept_by(run):
    """Return the bytes that autograd keeps for backward, by the address of their storage."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return kept


@contextlib.contextmanager
def refused(
    model: nn.Module, kind: type[BaseException], says: str | None = None
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Expect an error that leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(kind, match=says) as caught:
        yield caught
    assert_unchanged(model, before)


def freshly_compiled(model: Any, backend: Any = "eager", fullgraph: bool = True) -> Any:
    """Compile a model or function, which was not compiled before, by default as one graph."""
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=fullgraph)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved_by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def logged_by(library: str) -> Iterator[list[str]]:
    """Collect what a library logs, in a list that grows."""
    logger, messages = logging.getLogger(library), _Messages()
    logger.addHandler(messages)
    yield messages.texts
    logger.removeHandler(messages)


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved_by_torch}

needs_fully_shard = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="fully_shard of this torch asks streams for what those of the CPU do not have",
)
needs_complex_files = pytest.mark.skipif(
    torch.complex64 not in safetensors.torch._SIZE,
    reason="this safetensors writes no complex numbers",
)
needs_grouped_products = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "grouped_mm"),
    reason="this torch multiplies groups on accelerators only",
)


def once(folder: Path, name: str, make: Callable[[Path], object]) -> tuple[Path, Any]:
    """Return a path that one of the processes of a test run has filled, and what that returned.

    All of them share both; what `make` returns goes through JSON.

    Args:
        folder: the `shared_folder`.
        name: of what is made.
        make: makes it, at the path that it is given.
    """
    place, done = folder / name, folder / f"{name}.done"
    with open(folder / f"{name}.lock", "w") as lock:
        if "PYTEST_XDIST_WORKER" in os.environ:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            done.write_text(json.dumps(make(place)), encoding="utf-8")
    return place, json.loads(done.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder that all processes of a test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


HAS_ACCELERATOR = torch.accelerator.is_available()


def seed_torch(value: int = 0) -> None:
    """Seed torch's generators.

    Without an accelerator, `torch.manual_seed` would note the stack for when there is one. That
    takes milliseconds, and the notes are kept.
    """
    if HAS_ACCELERATOR:
        torch.manual_seed(value)
    else:
        torch.default_generator.manual_seed(value)


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed_torch(0)


@pytest.fixture
def model() -> Layered:
    return Layered()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(10).view(2, 5)

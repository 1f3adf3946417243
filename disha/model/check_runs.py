"""Run a model for a check: each run starts from the same state and leaves nothing behind.

A forward may change buffers, put other data into a parameter, or change a weight in place. All of
it comes back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from disha.effective.weight import base_inside
from disha.errors import ArgumentError
from disha.functional.shard_sums import PLAIN, as_real, merge_dtype
from disha.layers.blocks import AdapterBlock
from disha.layers.quantized import quantized_weight
from disha.model.found import ModelBlock
from disha.model.view import ModelView
from disha.private_torch import TorchDispatchMode, tree_leaves, written_arguments
from disha.sharding.tensors import is_sharded
from disha.sharding.zero import is_partitioned


@dataclass
class Runner:
    """Runs a model so that each run starts from the same state and leaves nothing behind.

    Each run is in evaluation or in training mode, as its argument `training` says.
    """

    view: ModelView
    blocks: list[AdapterBlock]
    call: Callable[[], Any]

    @contextmanager
    def mode(self, *, training: bool) -> Iterator[None]:
        """Run the body in this mode, from the same random state, and put the buffers back."""
        self.view.model.train(training)
        for block in self.blocks:
            block.train(False)  # a dropout may leave nothing of its inputs
        # Keeping the random state of a GPU would start CUDA, even if the model does not use it.
        started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = range(torch.cuda.device_count()) if started else ()
        with torch.random.fork_rng(devices), _keep_buffers(self.view.names):
            yield

    def outputs(self) -> list[Tensor]:
        """Return the outputs of the model with their graph; call it in `mode`."""
        outputs = tensors_in(self.call())
        if not any(output.isfinite().any() for output in outputs):
            raise ArgumentError(
                "the model returns no finite floating-point number, real or complex, with these "
                "inputs; pass others, or check the part that does"
            )
        return outputs

    def run(self, *, training: bool) -> list[Tensor]:
        """Return the outputs of the model in this mode, without their graph."""
        # Gradients are on meanwhile, because some models differentiate in their forward.
        with self.mode(training=training):
            return [output.detach() for output in self.outputs()]


@contextmanager
def _keep_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put the buffers of modules back after the body, in which forwards may change them."""
    kept = []
    for module in modules:
        if quantized_weight(module) is not None:
            continue  # its buffers may be packed weights, which are large and do not change
        for name, buffer in module._buffers.items():
            if buffer is not None and not is_lazy(buffer) and not buffer.is_meta:
                kept.append((module, name, buffer, buffer.detach().clone()))
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in kept:
                module._buffers[name] = buffer
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


# --- outputs -------------------------------------------------------------------------------------


def tensors_in(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in an output of any type.

    A complex tensor counts as a real one, with its real and imaginary parts.
    """
    tensors = []
    visited: dict[int, Any] = {}  # id -> value, which keeps it alive: so no id comes twice
    waiting = deque([output])
    while waiting:
        value = waiting.popleft()
        if id(value) in visited:
            continue  # an output may refer to itself
        visited[id(value)] = value
        if isinstance(value, Tensor):
            tensor = as_real(value.values() if value.is_nested else value)
            if tensor.is_floating_point():
                tensors.append(tensor)
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif not isinstance(value, (type, ModuleType, Enum, nn.Module)):
            waiting += getattr(value, "__dict__", {}).values()
    return tensors


# --- weights that a forward changes --------------------------------------------------------------


def dense_weights(model_blocks: list[ModelBlock]) -> dict[AdapterBlock, nn.Parameter]:
    """Return each block -> its adapted parameter, where this rank holds all of its values."""
    weights = {}
    for _, layer, _, block in model_blocks:
        parameter = layer._parameters.get(block.spec.parameter)
        if parameter is None or block.spec.quantized or parameter.is_meta:
            continue
        if not is_sharded(parameter) and not is_partitioned(parameter):
            weights[block] = parameter
    return weights


def sum_weights(model_blocks: list[ModelBlock]) -> dict[AdapterBlock, float]:
    """Return each block -> the sum of its weight's values. If the weight changes, so does the sum.

    A weight that has NaN is left out.
    """
    sums = {}
    for block, weight in dense_weights(model_blocks).items():
        total = float(as_real(weight.detach()).sum(dtype=merge_dtype(weight.dtype)))
        if not math.isnan(total):
            sums[block] = total
    return sums


class UndoesWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets `undo` put back what a forward does to weights: other data, or writes into theirs.

    A weight is copied only before an operation writes into it.
    """

    def __init__(self, active: list[ModelBlock], undo: ExitStack) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._undo = undo
        self._unwritten: dict[int, list[Tensor]] = {}  # by their memory, which several may share
        for weight in dense_weights(active).values():
            address = weight.untyped_storage().data_ptr()
            self._unwritten.setdefault(address, []).append(weight.data)
            undo.callback(setattr, weight, "data", weight.data)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        places = written_arguments(func)
        values = [value for place, value in enumerate(args) if place in places]
        values += [value for name, value in named.items() if name in places]
        for tensor in tree_leaves(base_inside(values)):
            self._keep(tensor)
        return func(*args, **named)

    def _keep(self, written: Any) -> None:
        if type(written) not in PLAIN:
            return
        for data in self._unwritten.pop(written.untyped_storage().data_ptr(), []):
            self._undo.callback(data.copy_, data.clone())

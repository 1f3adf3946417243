"""Estimates the memory and time of a training step without training.

One batch goes forward and backward through the model, adapter and loss, with tensors that have
shapes but no values. The memory is that of the tensors that exist at the same time. The time is the
number of multiply-adds, divided by the speed of one matrix product on this machine.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

import disha
from disha.finetune.adapting import arguments
from disha.finetune.base_model import model_dtype
from disha.finetune.data.batches import Batch
from disha.finetune.settings import FinetuneSettings
from disha.finetune.training.layers import enable_gradient_checkpointing, repeated_layers
from disha.finetune.training.objectives import Objective, objective_for
from disha.finetune.training.optimizers import state_bytes, trained

__all__ = ["Estimate", "Measuring", "estimate", "operations_per_second"]

PRODUCT = 1024
"""Rows and columns of the matrices whose product is timed."""

QUANTISED_BYTES = {"8": 1.0, "4": 0.5 + 0.127 / 8}
"""Bytes per weight of a quantised layer. For 4 bits, this includes the scales of the blocks."""


@dataclass(frozen=True)
class Estimate:
    """What training takes on each process.

    Args:
        base: bytes of the base model's weights.
        adapter: bytes of the adapter's parameters.
        optimizer: bytes of the optimizer's moments of all trained parameters.
        batch: bytes of all other tensors of a batch, forward and backward, at their peak: what is
            kept for backward, gradients, and temporary tensors.
        operations: multiplications and additions of a batch.
    """

    base: int
    adapter: int
    optimizer: int
    batch: int
    operations: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.base + self.adapter + self.optimizer + self.batch


def estimate(
    model: nn.Module, settings: FinetuneSettings, batch: Batch, *, has_tokenizer: bool = True
) -> Estimate | str:
    """Inject the adapter, and estimate what a batch takes.

    Args:
        model: the base model, with or without values.
        settings: the settings of the run.
        batch: the batch.
        has_tokenizer: whether the model learns from text.

    Returns:
        The estimate. If the model has no values and can't run without them, the reason.

    Raises:
        DishaError: the adapter does not fit the model.
    """
    base = _base_bytes(model, settings)
    disha.inject_adapters(model, **arguments(model, settings.adapter))
    adapter = sum(parameter.nbytes for parameter in disha.adapter_parameters(model))
    if settings.training.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    optimizer = sum(state_bytes(settings.training.optimizer, one) for one in trained(model))
    is_empty = any(parameter.is_meta for parameter in model.parameters())
    _make_runnable(model)
    objective = objective_for(model, has_tokenizer=has_tokenizer)
    try:
        measured = _run(objective, batch, settings, real=False)
    except Exception as error:  # a model's own code may need values, and can raise anything
        if is_empty:
            return f"{type(error).__name__}: {error}"
        measured = _run(objective, batch, settings, real=True)
    return Estimate(base, adapter, optimizer, *measured)


def _base_bytes(model: nn.Module, settings: FinetuneSettings) -> int:
    total = sum(parameter.nbytes for parameter in model.parameters())
    if not settings.model.quantised:
        return total
    modules = itertools.chain(*(layer.modules() for layer in repeated_layers(model)))
    weights = [module.weight for module in modules if isinstance(module, nn.Linear)]
    packed = QUANTISED_BYTES[settings.model.bits] * sum(weight.numel() for weight in weights)
    return total - sum(weight.nbytes for weight in weights) + int(packed)


def _make_runnable(model: nn.Module) -> None:
    """Give all tensors without values the same piece of memory, which is never written.

    If they stayed on the meta device, operations would take other ways than in training.
    """
    empty = [one for one in (*model.parameters(), *model.buffers()) if one.is_meta]
    memory = torch.empty(max((one.nbytes for one in empty), default=0), dtype=torch.uint8)

    def placed(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        return memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    model._apply(placed)  # type: ignore[no-untyped-call]


def _run(
    objective: Objective, batch: Any, settings: FinetuneSettings, *, real: bool
) -> tuple[int, int]:
    """Run a batch forward and backward; return its memory and its operations."""
    parameters = trained(objective)
    objective.train()
    measuring = Measuring(real=real)
    with _AllLearned(), measuring:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.training.bf16):
            loss = objective(batch)
        torch.autograd.grad(loss, parameters, allow_unused=True)
    return measuring.peak, measuring.operations


class Measuring(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory of all new tensors and the arithmetic of matrix products inside the block.

    Args:
        real: whether operations compute. If not, they make plain tensors of the right shapes,
            whose memory is never touched. So all code does the same as in training.
    """

    def __init__(self, *, real: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._real = real
        self._storages: dict[int, Any] = {}
        self._now = self.peak = self.operations = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = self._output(function, args, kwargs)
        name = function._overloadpacket.__name__.removesuffix("_")  # in place or not
        product = getattr(torch.ops.aten, name, None)
        if product in flop_registry:
            self.operations += flop_registry[product](*args, **kwargs, out_val=output)
        return output

    def _output(self, function: Any, args: Any, kwargs: Any) -> Any:
        if any(one.alias_info for one in function._schema.returns):  # a view, or done in place
            if self._real or not function._schema.is_mutable:
                return function(*args, **kwargs)
            return kwargs["out"] if "out" in kwargs else args[0]
        if self._real:
            return tree_map_only(Tensor, self._noted, function(*args, **kwargs))
        if function is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # models ask whether a mask is True everywhere, as it is in full rows
        if function._schema.name == "aten::_grouped_mm":
            return self._grouped(*args, **kwargs)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        args, kwargs = tree_map_only(Tensor, _without_values, (args, kwargs))
        return tree_map_only(Tensor, self._untouched, function(*args, **kwargs))

    def _grouped(self, a: Tensor, b: Tensor, offsets: Tensor | None = None, *_: Any) -> Tensor:
        """Return a product of experts. Torch gives its shape without values for bfloat16 only."""
        groups = [len(offsets)] if offsets is not None and a.dim() == b.dim() == 2 else []
        if a.dim() == b.dim() == 3:
            groups = [len(a)]
        made = a.new_empty(*groups, a.shape[-2], b.shape[-1])
        self.operations += 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]
        return self._noted(made)

    def _untouched(self, shape: Tensor) -> Tensor:
        return self._noted(torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype))

    def _noted(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._storages:

            def forget(_: object) -> None:
                del self._storages[key]
                self._now -= size

            self._storages[key] = weakref.ref(storage, forget)
            self._now += size
            self.peak = max(self.peak, self._now)
        return tensor


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _AllLearned(TorchFunctionMode):
    """Lets every mask choose everything. What it chooses depends on values, which are not there."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        is_mask = function is Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool
        if is_mask:
            return args[0].flatten(0, args[1].dim() - 1)
        return function(*args, **(kwargs or {}))


def operations_per_second(settings: FinetuneSettings) -> float:
    """Time a matrix product in the number format of training."""
    from torch.utils.benchmark import Timer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if settings.training.bf16 else model_dtype(settings.model, device)
    square = torch.rand(PRODUCT, PRODUCT, dtype=dtype, device=device)
    timer = Timer("a @ a", globals={"a": square}, num_threads=torch.get_num_threads())
    return 2 * PRODUCT**3 / timer.blocked_autorange(min_run_time=0.1).median

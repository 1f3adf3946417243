"""check_adapters: show that each adapted weight of a model acts, trains and merges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from disha.errors import ArgumentError, DishaError
from disha.layers.adapted import AdaptedLayer
from disha.layers.blocks import AdapterBlock
from disha.model.merge import merge
from disha.model.view import ModelBlock, ModelView, clean_key
from disha.sharding.imported import imported_class
from disha.sharding.tensors import gathered, write
from disha.sharding.zero import release, whole_shape
from disha.text import counted, first_few, grouped, printable, table

Run = Callable[[], list[Tensor]]
"""Runs the model and returns its floating-point outputs."""

SIZE = 0.02
"""Standard deviation of the random values that blocks get during the check."""

WORDS = {True: "yes", False: "NO", None: "-"}
"""What is found -> the word in the table."""


@dataclass(frozen=True)
class CheckedWeight:
    """What the check found for one block of one weight."""

    name: str  # the weight's name in the model
    adapter: str
    read: bool  # whether the model read the weight
    acts: bool  # whether the block changes the output
    gradient: bool  # whether the block gets a gradient
    merges: bool | None  # whether the output stays the same when merged; None if that is refused
    reason: str = ""  # why it is not in order, or why merging is refused

    @property
    def ok(self) -> bool:
        """Whether the block acts and trains, and merging keeps the output or is refused."""
        return self.acts and self.gradient and self.merges is not False


@dataclass(frozen=True)
class CheckReport:
    """What `check_adapters` found; `print(report)` shows it as a table.

    Attributes:
        weights: one entry for each active block.
        untrained: parameters that require gradients, but are not in the optimizer.
        unknown: how many parameters the optimizer has that the model lacks, such as the blocks of a
            module that was replaced.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
        >>> model.forward = lambda x: model["used"](x)
        >>> model = disha.inject_adapters(model, "all-linear", r=2)
        >>> report = disha.check_adapters(model, torch.randn(3, 4))
        >>> report.ok, [one.name for one in report.problems]
        (False, ['idle'])
    """

    weights: tuple[CheckedWeight, ...]
    untrained: tuple[str, ...] = ()
    unknown: int = 0

    @property
    def problems(self) -> tuple[CheckedWeight, ...]:
        """The entries with a problem."""
        return tuple(weight for weight in self.weights if not weight.ok)

    @property
    def ok(self) -> bool:
        """Whether every block acts, trains and merges, and the optimizer has all that trains."""
        return not self.problems and not self.untrained

    def __str__(self) -> str:
        rows = [
            (weight.name or "(the model)", weight.adapter,
             *map(WORDS.get, (weight.read, weight.acts, weight.gradient, weight.merges)))
            for weight in self.weights
        ]  # fmt: skip
        lines = [table(("weight", "adapter", "read", "acts", "gradient", "merges"), rows)]
        reasons = grouped((weight.name, weight.reason) for weight in self.weights if weight.reason)
        lines += map(printable, reasons)
        if self.untrained:
            lines.append(
                f"the optimizer lacks {counted(len(self.untrained), 'parameter')} that should "
                f"train ({first_few(self.untrained, 5, ', ')}); give it adapter_parameters(model)"
            )
        if self.unknown:
            lines.append(f"the optimizer has {counted(self.unknown, 'parameter')} of other modules")
        good = len(self.weights) - len(self.problems)
        return "\n".join([*lines, f"{good:,} of {counted(len(self.weights), 'block')} in order"])


def check_adapters(
    model: nn.Module,
    *inputs: Any,
    optimizer: torch.optim.Optimizer | None = None,
    **kwargs: Any,
) -> CheckReport:
    """Run a model and report for each active block whether it acts, trains and merges.

    The model runs in evaluation mode: once with random values in all blocks, once merged, and once
    for each block that gets no gradient. Afterwards, values, modes, gradients and random states are
    as before.

    Args:
        model: a model with adapters, not merged.
        inputs: positional arguments for the model.
        optimizer: the optimizer; the report names the parameters that should train but that it
            lacks, and counts those of other modules.
        kwargs: keyword arguments for the model.

    Returns:
        A `CheckReport`.

    Raises:
        ArgumentError: no adapter is active, the model returns no floating-point tensor, or an
            adapted layer was parametrised (`torch.nn.utils.parametrize`).
        ModeError: adapters are merged (`MergeError`), or in a context.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(4, 2)), "0", r=2)
        >>> print(disha.check_adapters(model, torch.randn(3, 4)))
        weight  adapter  read  acts  gradient  merges
        0       default  yes   yes   yes       yes
        1 of 1 block in order
    """
    view = ModelView(model)
    view.refuse_inside("check adapters")
    active = [
        model_block
        for model_block in view.blocks()
        if model_block.adapter in model_block.layer.disha.active
    ]
    if not active:
        raise ArgumentError("no adapter is active; activate one with set_active_adapters")
    for model_block in active:
        _refuse_parametrised(model_block.name, model_block.layer)
    runs: Any = model
    engine = imported_class("deepspeed.runtime.engine", "DeepSpeedEngine")
    if isinstance(model, engine):
        runs = model.module  # the engine takes every backward for one of training
    with ExitStack() as undo:  # whatever the check changes comes back
        found = _checked(view, undo, active, lambda: _tensors(runs(*inputs, **kwargs)))
    return CheckReport(found, *(() if optimizer is None else _compared(model, optimizer)))


def _refuse_parametrised(name: str, layer: AdaptedLayer) -> None:
    """Raise if an adapted parameter was replaced by a parametrization, which hides the adapters."""
    computed: Any = layer._modules.get("parametrizations") or ()
    for parameter in layer._adapted_parameters:
        if parameter in computed and not hasattr(layer._original_class, parameter):
            raise ArgumentError(
                f"{name} was parametrised after it was adapted, so its adapters no longer act; "
                "remove the adapters, parametrise the layer, and adapt it again"
            )


def _compared(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[tuple[str, ...], int]:
    """Return which parameters that should train an optimizer lacks, and how many the model does."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = dict(model.named_parameters())
    untrained = tuple(
        clean_key(name)
        for name, parameter in parameters.items()
        if parameter.requires_grad and id(parameter) not in trained
    )
    return untrained, len(trained.difference(map(id, parameters.values())))


def _checked(
    view: ModelView, undo: ExitStack, active: list[ModelBlock], outputs_of: Run
) -> tuple[CheckedWeight, ...]:
    """Return what is found in a model, which this changes."""

    def run() -> list[Tensor]:
        # All runs start from the same random state, and none changes it.
        started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = range(torch.cuda.device_count()) if started else ()
        with torch.random.fork_rng(devices):
            return outputs_of()

    for module in view.model.modules():
        undo.callback(setattr, module, "training", module.training)
    view.reshard()
    view.model.eval()
    with torch.inference_mode(False), torch.enable_grad():
        blocks = [model_block.block for model_block in active]
        zeros = {block for block in blocks if not gathered(block.block).count_nonzero()}
        frozen = {block for block in blocks if not block.block.requires_grad}
        _randomise(blocks, undo)
        undo.callback(view.reshard)  # a forward gathers what is sharded
        read, outputs = _read(run, blocks)
        reached = _with_gradient(outputs, read)
        outputs = [output.detach() for output in outputs]
        acting = {block for block in blocks if block in reached or _changes(run, block, outputs)}
        try:
            merging = _merging(view, run, outputs, active)
            refusal = ""
        except DishaError as error:
            merging = {}
            refusal = str(error)
        # Whether a block can leave zeros depends on its method, so one block of each is tried.
        tried = {block.method: block for block in blocks if block in zeros and block in reached}
        stuck = {method for method, block in tried.items() if not _leaves_zeros(run, block, undo)}
    found = []
    for name, layer, adapter, block in active:
        is_read = block in read
        acts = block in acting
        gradient = block in reached
        starts = not (block in zeros and block.method in stuck)
        reason = _reason(is_read, acts, gradient, starts, is_frozen=block in frozen)
        trains = not reason
        merges = merging.get(layer)
        found.append(CheckedWeight(name, adapter, is_read, acts, trains, merges, reason or refusal))
    return tuple(found)


def _reason(read: bool, acts: bool, gradient: bool, starts: bool, is_frozen: bool) -> str:
    if not read:
        return "the model does not use this weight, or not with these inputs"
    if not acts:
        return "the model reads this weight, but the update does not reach the output"
    if not gradient:
        return "it acts, but a detach or a custom function stops its gradient"
    if is_frozen:
        return "it acts, but it is frozen; to train it, call mark_only_adapters_trainable"
    return "" if starts else "a block of zeros gets no gradient by its method; use init='kaiming'"


def _randomise(blocks: list[AdapterBlock], undo: ExitStack) -> None:
    """Give blocks random values, and make them require gradients."""
    generator = torch.Generator("cpu").manual_seed(0)
    for block in blocks:
        undo.callback(block.block.requires_grad_, block.block.requires_grad)
        shape = whole_shape(block.block)
        write(block.block, torch.randn(shape, generator=generator, device="cpu") * SIZE, undo)
        block.block.requires_grad_(True)


def _read(run: Run, blocks: list[AdapterBlock]) -> tuple[dict[AdapterBlock, Tensor], list[Tensor]]:
    """Return the blocks that the model reads, with the values that it gets, and its outputs."""
    read: dict[AdapterBlock, Tensor] = {}

    def noting(block: AdapterBlock, *args: Any, **kwargs: Any) -> Any:
        update = type(block).update(block, *args, **kwargs)
        read[block] = update.block  # FSDP2 has gathered it for this forward
        return update

    with ExitStack() as undo:
        for block in blocks:
            block.__dict__["update"] = partial(noting, block)
            undo.callback(block.__dict__.pop, "update")
        outputs = run()
    if not outputs:
        raise ArgumentError("the model returns no floating-point tensor; check the part that does")
    return read, outputs


def _with_gradient(outputs: list[Tensor], read: dict[AdapterBlock, Tensor]) -> set[AdapterBlock]:
    """Return the blocks that get a gradient from a random sum of the outputs."""
    generator = torch.Generator("cpu").manual_seed(1)
    sums = []
    for output in outputs:
        if output.requires_grad:
            factors = torch.randn(output.shape, generator=generator, device="cpu")
            sums.append((output * factors.to(output)).sum())
    if not sums or not read:
        return set()
    values = [*read.values()]
    gradients = torch.autograd.grad(sums, values, allow_unused=True)
    release(values)
    return {
        block
        for block, gradient in zip(read, gradients)
        if gradient is not None and gradient.count_nonzero()
    }


def _leaves_zeros(run: Run, block: AdapterBlock, undo: ExitStack) -> bool:
    """Whether a block of zeros gets a gradient, without which it stays zero."""
    write(block.block, torch.zeros(whole_shape(block.block), device="cpu"), undo)
    read, outputs = _read(run, [block])
    return block in _with_gradient(outputs, read)


def _changes(run: Run, block: AdapterBlock, outputs: list[Tensor]) -> bool:
    """Whether the outputs change when a block changes."""
    with torch.no_grad(), ExitStack() as undo:
        write(block.block, gathered(block.block) + 50 * SIZE, undo)
        changed = run()
    return any(not torch.equal(a, b) for a, b in zip(changed, outputs, strict=True))


def _merging(
    view: ModelView, run: Run, outputs: list[Tensor], active: list[ModelBlock]
) -> dict[AdaptedLayer, bool]:
    """Return layer -> whether the output stays the same when it is merged."""
    borrowers = view.borrowers()
    tied = {
        model_block.layer: [model_block.layer, *borrowers[model_block.block].values()]
        for model_block in active
    }
    if _merged_alike(view, run, outputs):
        return dict.fromkeys(tied, True)
    return {
        layer: _merged_alike(ModelView(nn.ModuleList(together)), run, outputs)
        for layer, together in tied.items()
    }


def _merged_alike(view: ModelView, run: Run, outputs: list[Tensor]) -> bool:
    with ExitStack() as undo:
        merge(view, undo)
        # Not around merging: its inference mode would then end by disabling gradients.
        with torch.no_grad():
            return all(map(_alike, run(), outputs))


def _alike(output: Tensor, expected: Tensor) -> bool:
    """Whether an output is the same up to rounding."""
    limit = float(torch.finfo(expected.dtype).eps ** 0.5)
    finite = expected[expected.isfinite()].abs()
    size = max(1.0, float(finite.max())) if finite.numel() else 1.0
    return torch.allclose(output, expected, rtol=limit, atol=limit * size, equal_nan=True)


def _tensors(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in the output of a model, of any type."""
    if isinstance(output, Tensor):
        output = output.values() if output.is_nested else output
        return [output] if output.is_floating_point() else []
    inside = output
    if not isinstance(output, (Mapping, list, tuple)):
        inside = getattr(output, "__dict__", {})
    parts = inside.values() if isinstance(inside, Mapping) else inside
    return [tensor for part in parts for tensor in _tensors(part)]

"""check_adapters: show that each adapted weight of a model acts, trains and merges."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from disha.errors import ArgumentError, DishaError
from disha.functional import Method
from disha.functional.shard_sums import merge_dtype
from disha.layers.adapted import AdaptedLayer
from disha.layers.blocks import AdapterBlock
from disha.layers.quantized import quantized_slot
from disha.model.merge import merge
from disha.model.view import ModelBlock, ModelView, clean_key
from disha.sharding.imported import imported_class
from disha.sharding.tensors import gather, is_sharded, write
from disha.sharding.zero import is_partitioned, repartition, whole_shape
from disha.text import counted, first_few, group_by_reason, printable, table

SIZE = 0.02
"""Standard deviation of the random values that blocks get during the check."""

WORDS = {True: "yes", False: "NO", None: "-"}
"""What a column of the table says."""


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
        rows = []
        for weight in self.weights:
            answers = (weight.read, weight.acts, weight.gradient, weight.merges)
            words = [WORDS[answer] for answer in answers]
            rows.append((weight.name or "(the model)", weight.adapter, *words))
        lines = [table(("weight", "adapter", "read", "acts", "gradient", "merges"), rows)]
        reasons = group_by_reason(
            (weight.name, weight.reason) for weight in self.weights if weight.reason
        )
        lines += [printable(reason) for reason in reasons]
        if self.untrained:
            lines.append(
                f"the optimizer lacks {counted(len(self.untrained), 'parameter')} that should "
                f"train ({first_few(self.untrained, 5, ', ')}); give it adapter_parameters(model)"
            )
        if self.unknown:
            lines.append(f"the optimizer has {counted(self.unknown, 'parameter')} of other modules")
        good = len(self.weights) - len(self.problems)
        lines.append(f"{good:,} of {counted(len(self.weights), 'block')} in order")
        return "\n".join(lines)


def check_adapters(
    model: nn.Module,
    *inputs: Any,
    optimizer: torch.optim.Optimizer | None = None,
    **kwargs: Any,
) -> CheckReport:
    """Run a model and report for each active block whether it acts, trains and merges.

    The model runs in evaluation mode: twice with random values in all blocks, once merged, and once
    for each block that gets no gradient. If a block does not act or gets no gradient there, the
    model also runs in training mode, without the adapters' own dropout. So a head that only
    training uses is in order, and so is a model that differentiates in its forward (forces of an
    energy) and keeps the graph of that in training only.

    Afterwards, parameters, buffers, modes, gradients and the random states of torch are as before.
    What else a forward changes, such as a counter that is a Python number, is not seen.

    Args:
        model: a model with adapters, not merged.
        inputs: positional arguments for the model.
        optimizer: the optimizer; the report names the parameters that should train but that it
            lacks, and counts those of other modules.
        kwargs: keyword arguments for the model.

    Returns:
        A `CheckReport`.

    Raises:
        ArgumentError: no adapter is active, the model returns no floating-point or complex tensor,
            or none with a finite number, or an adapted layer was parametrised
            (`torch.nn.utils.parametrize`).
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
        weights = _check(view, undo, active, lambda: runs(*inputs, **kwargs))
    if optimizer is None:
        return CheckReport(weights)
    untrained, unknown = _compare_with_optimizer(model, optimizer)
    return CheckReport(weights, untrained, unknown)


def _refuse_parametrised(name: str, layer: AdaptedLayer) -> None:
    """Raise if an adapted parameter was replaced by a parametrization, which hides the adapters."""
    computed: Any = layer._modules.get("parametrizations")
    if computed is None:
        return
    for parameter in layer._adapted_parameters:
        if parameter in computed and not hasattr(layer._original_class, parameter):
            raise ArgumentError(
                f"{name} was parametrised after it was adapted, so its adapters no longer act; "
                "remove the adapters, parametrise the layer, and adapt it again"
            )


def _compare_with_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[tuple[str, ...], int]:
    """Return which parameters that should train an optimizer lacks, and how many the model does."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    untrained = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in trained:
            untrained.append(clean_key(name))
        trained.discard(id(parameter))
    return tuple(untrained), len(trained)


# --- running the model ---------------------------------------------------------------------------


class _Runner:
    """Runs a model so that each run starts from the same state and leaves nothing behind."""

    def __init__(self, view: ModelView, blocks: list[AdapterBlock], call: Callable[[], Any]):
        self.blocks = blocks
        self._view = view
        self._call = call

    @contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        """Run the body in this mode, from the same random state, and put the buffers back."""
        self._view.model.train(training)
        for block in self.blocks:
            block.train(False)  # without its dropout, which a merged weight can't have
        # To keep the random state of a GPU would start CUDA where nothing has used it.
        started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = range(torch.cuda.device_count()) if started else ()
        with torch.random.fork_rng(devices), _restore_buffers(self._view.names):
            yield

    def outputs(self) -> list[Tensor]:
        """Return the outputs of the model with their graph; call it in `mode`."""
        outputs = tensors_in(self._call())
        if not outputs:
            raise ArgumentError(
                "the model returns no floating-point tensor, real or complex; check the part that "
                "does"
            )
        finite = [bool(output.isfinite().any()) for output in outputs if output.numel()]
        if finite and not any(finite):
            raise ArgumentError(
                "the model returns no finite number with these inputs, so nothing can be compared; "
                "pass others, or check the weights"
            )
        return outputs

    def run(self, training: bool) -> list[Tensor]:
        """Return the outputs of the model in this mode."""
        # With gradients, because some models differentiate in their forward.
        with self.mode(training):
            return [output.detach() for output in self.outputs()]


@contextmanager
def _restore_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put the buffers of modules back after the body, in which forwards may change them."""
    kept = []
    for module in modules:
        if quantized_slot(module) is not None:
            continue  # its buffers may be packed weights, which are large and do not change
        for name, buffer in module._buffers.items():
            if buffer is not None and not is_lazy(buffer) and not buffer.is_meta:
                kept.append((module, name, buffer, buffer.detach().clone()))
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in kept:
                if module._buffers[name] is not buffer:
                    module._buffers[name] = buffer
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


def tensors_in(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in an output of any type, complex ones as real tensors."""
    tensors = []
    visited: dict[int, Any] = {}  # id -> value, which keeps it alive: so no id comes twice
    waiting = deque([output])
    while waiting:
        value = waiting.popleft()
        if id(value) in visited:
            continue  # an output may refer to itself
        visited[id(value)] = value
        if not isinstance(value, Tensor):
            waiting += _parts_of(value)
            continue
        tensor = value.values() if value.is_nested else value
        tensor = _as_real(tensor)
        if tensor.is_floating_point():
            tensors.append(tensor)
    return tensors


def _as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as its real and imaginary parts, and any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _parts_of(value: Any) -> list[Any]:
    """Return what a container or an object of an output holds."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (type, ModuleType, Enum, nn.Module)):
        return []
    return list(getattr(value, "__dict__", {}).values())


# --- the check -----------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What was seen of the blocks while the model ran in one mode."""

    training: bool
    outputs: list[Tensor]
    read: set[AdapterBlock]
    acting: set[AdapterBlock]
    reached: set[AdapterBlock]  # those that get a gradient
    error: str  # why gradients could not be computed, if so


def _check(
    view: ModelView, undo: ExitStack, active: list[ModelBlock], call: Callable[[], Any]
) -> tuple[CheckedWeight, ...]:
    """Return what is seen of each block; `undo` takes back what this changes."""
    for module in view.model.modules():
        undo.callback(setattr, module, "training", module.training)
    view.reshard()
    blocks = [model_block.block for model_block in active]
    runner = _Runner(view, blocks, call)
    with torch.inference_mode(False), torch.enable_grad():
        zeros = {block for block in blocks if not gather(block.block).count_nonzero()}
        frozen = {block for block in blocks if not block.block.requires_grad}
        _randomise(blocks, undo)
        _restore_data(active, undo)
        undo.callback(view.reshard)  # a forward gathers what is sharded
        with _undo_changes_in_place(active, undo):
            evaluating = _observe(runner, blocks, training=False)
        seen = [evaluating]
        merges = _compare_merged(view, runner, evaluating, active)
        in_order = evaluating.acting & evaluating.reached
        idle = [block for block in blocks if block not in in_order]
        training, error_in_training = _observe_idle(runner, idle, active, undo)
        if training is not None:
            seen.append(training)
            # Blocks that act only in training change nothing in evaluation, merged or not.
            only_training = training.acting - evaluating.acting
            acting = [model_block for model_block in active if model_block.block in only_training]
            merges |= _compare_merged(view, runner, training, acting)
        stuck = _find_stuck_blocks(runner, zeros, seen, undo)
    weights = []
    for model_block in active:
        block = model_block.block
        reason = _reason_against(block, seen)
        if reason and error_in_training:
            reason += f"; in training mode it raises {error_in_training} with these inputs"
        elif not reason and block in frozen:
            reason = "it acts, but it is frozen; to train it, call mark_only_adapters_trainable"
        elif not reason and block in stuck:
            reason = "a block of zeros gets no gradient by its method; use init='kaiming'"
        weights.append(_conclude(model_block, seen, reason, merges[model_block.layer]))
    return tuple(weights)


def _conclude(
    model_block: ModelBlock, seen: list[_Seen], reason: str, merged: tuple[bool | None, str]
) -> CheckedWeight:
    """Return the entry of a block, given why it does not train, and how it merges."""
    name, _, adapter, block = model_block
    merges, difference = merged
    trains = not reason
    if trains:
        reason = difference
    return CheckedWeight(
        name,
        adapter,
        read=any(block in mode.read for mode in seen),
        acts=any(block in mode.acting for mode in seen),
        gradient=trains,
        merges=merges,
        reason=reason,
    )


def _reason_against(block: AdapterBlock, seen: list[_Seen]) -> str:
    """Return why a block does not act or gets no gradient; empty if it does both."""
    if not any(block in mode.read for mode in seen):
        return "the model does not use this weight, or not with these inputs"
    if not any(block in mode.acting for mode in seen):
        return "the model reads this weight, but the update does not reach the output"
    if any(block in mode.reached for mode in seen):
        return ""
    errors = [mode.error for mode in seen if mode.error]
    if errors:
        return f"it acts, but its gradient can't be computed: {errors[-1]}"
    return "it acts, but a detach or a custom function stops its gradient"


def _observe(runner: _Runner, blocks: list[AdapterBlock], training: bool) -> _Seen:
    """Return which of the blocks are read, act and get gradients in this mode."""
    with runner.mode(training):
        read, outputs = _run_and_note_reads(runner, blocks)
        try:
            reached = _find_with_gradient(outputs, read)
            error = ""
        except DishaError:
            raise
        except RuntimeError as failure:  # for example, the forward has freed a part of the graph
            reached = set()
            error = str(failure).partition(".")[0]  # its first sentence
    outputs = [output.detach() for output in outputs]
    acting = set(reached)
    for block in blocks:
        if block not in reached and _changes_outputs(runner, block, outputs, training):
            acting.add(block)
    return _Seen(training, outputs, set(read), acting, reached, error)


def _observe_idle(
    runner: _Runner, idle: list[AdapterBlock], active: list[ModelBlock], undo: ExitStack
) -> tuple[_Seen | None, str]:
    """Return what is seen in training mode of blocks that are idle in evaluation.

    Without such blocks, that is None. If the model raises, it is None too, and the second value is
    the name of the error.
    """
    if not idle:
        return None, ""
    try:
        with _undo_changes_in_place(active, undo):
            return _observe(runner, idle, training=True), ""
    except Exception as error:  # such as of a loss without its targets, or of a batch norm
        return None, type(error).__name__


def _randomise(blocks: list[AdapterBlock], undo: ExitStack) -> None:
    """Give blocks random values, and make them require gradients."""
    generator = torch.Generator("cpu").manual_seed(0)
    for block in blocks:
        undo.callback(block.block.requires_grad_, block.block.requires_grad)
        shape = whole_shape(block.block)
        write(block.block, torch.randn(shape, generator=generator, device="cpu") * SIZE, undo)
        block.block.requires_grad_(True)


def _run_and_note_reads(
    runner: _Runner, blocks: list[AdapterBlock]
) -> tuple[dict[AdapterBlock, Tensor], list[Tensor]]:
    """Return the blocks that the model reads, with the values that it gets, and its outputs."""
    read: dict[AdapterBlock, Tensor] = {}

    def note_read(block: AdapterBlock, *args: Any, **kwargs: Any) -> Any:
        update = type(block).update(block, *args, **kwargs)
        read[block] = update.block  # FSDP2 has gathered it for this forward
        return update

    with ExitStack() as undo:
        for block in blocks:
            # In __dict__, an attribute hides the method of the class.
            block.__dict__["update"] = partial(note_read, block)
            undo.callback(block.__dict__.pop, "update")
        outputs = runner.outputs()
    return read, outputs


def _find_with_gradient(
    outputs: list[Tensor], read: dict[AdapterBlock, Tensor]
) -> set[AdapterBlock]:
    """Return the blocks that get a gradient from a random sum of the outputs."""
    generator = torch.Generator("cpu").manual_seed(1)
    sums = []
    for output in outputs:
        if output.requires_grad:
            factors = torch.randn(output.shape, generator=generator, device="cpu")
            sums.append((output * factors.to(output)).sum())
    if not sums or not read:
        return set()
    values = list(read.values())
    gradients = torch.autograd.grad(sums, values, allow_unused=True)
    repartition(values)
    return {
        block
        for block, gradient in zip(read, gradients)
        if gradient is not None and gradient.count_nonzero()
    }


def _changes_outputs(
    runner: _Runner, block: AdapterBlock, outputs: list[Tensor], training: bool
) -> bool:
    """Whether the outputs change when a block changes."""
    with ExitStack() as undo:
        write(block.block, gather(block.block) + 50 * SIZE, undo)
        changed = runner.run(training)
    if len(changed) != len(outputs):
        return True
    return not all(torch.equal(output, former) for output, former in zip(changed, outputs))


def _find_stuck_blocks(
    runner: _Runner, zeros: set[AdapterBlock], seen: list[_Seen], undo: ExitStack
) -> set[AdapterBlock]:
    """Return those blocks of zeros that get no gradient by their method, and so stay zero."""
    tried: set[Method] = set()  # a single block of each method shows it
    stuck: set[Method] = set()
    for block in runner.blocks:
        modes = [mode for mode in seen if block in mode.reached]
        if block not in zeros or block.method in tried or not modes:
            continue
        tried.add(block.method)
        write(block.block, torch.zeros(whole_shape(block.block), device="cpu"), undo)
        with runner.mode(modes[0].training):
            read, outputs = _run_and_note_reads(runner, [block])
            if block not in _find_with_gradient(outputs, read):
                stuck.add(block.method)
    return {block for block in zeros if block.method in stuck}


# --- merging -------------------------------------------------------------------------------------

ROUNDINGS = 4
"""Merging may change an output by this many times what a tiny change of the blocks changes."""

DRIFTS = (
    "each forward changes this weight, as `weight.data = weight.data.clone()` would, so its update "
    "is added again and again; read and write layer.base_weight there"
)
"""The reason against a weight that every forward changes."""


def _compare_merged(
    view: ModelView, runner: _Runner, seen: _Seen, active: list[ModelBlock]
) -> dict[AdaptedLayer, tuple[bool | None, str]]:
    """Return for each layer whether merging it keeps the outputs, and why not.

    The answer is None if merging is refused.
    """
    if not active:
        return {}
    try:
        borrowers = view.find_borrowers()
        merged = _run_merged(view, runner, seen.training)
    except DishaError as error:
        return {model_block.layer: (None, str(error)) for model_block in active}
    # A layer merges together with those that are tied to it.
    together: dict[AdaptedLayer, list[nn.Module]] = {
        model_block.layer: [model_block.layer] for model_block in active
    }
    for model_block in active:
        together[model_block.layer] += borrowers[model_block.block].values()
    tolerance = _relative_tolerance(seen.outputs, active)
    sums_before = _sum_weights(active)
    allowed = _measure_rounding(runner, seen, tolerance)  # runs the model once
    sums_after = _sum_weights(active)  # other sums: that forward changed a weight
    all_alike = not _describe_difference(merged, seen.outputs, tolerance, allowed)
    answers: dict[AdaptedLayer, tuple[bool | None, str]] = {}
    for layer, layers in together.items():
        difference = ""
        if not all_alike:
            part = ModelView(nn.ModuleList(layers))
            outputs = _run_merged(part, runner, seen.training)
            difference = _describe_difference(outputs, seen.outputs, tolerance, allowed)
        answers[layer] = not difference, difference
    for model_block in active:
        drifts = sums_before.get(model_block.block) != sums_after.get(model_block.block)
        if drifts:
            answers[model_block.layer] = False, DRIFTS
    return answers


def _run_merged(view: ModelView, runner: _Runner, training: bool) -> list[Tensor]:
    """Return the outputs of the model while the layers of a view are merged."""
    with ExitStack() as undo:
        merge(view, undo)
        return runner.run(training)


def _relative_tolerance(outputs: list[Tensor], active: list[ModelBlock]) -> float:
    """Return the square root of the largest rounding step of the outputs' and weights' dtypes."""
    dtypes = {output.dtype for output in outputs}
    dtypes |= {weight.dtype for weight in _dense_weights(active).values()}
    return float(max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5)


def _measure_rounding(runner: _Runner, seen: _Seen, tolerance: float) -> list[float]:
    """Return for each output by how much it may differ when weights are rounded in another way.

    This is measured by a relative change of all blocks by `tolerance`. So it is small where outputs
    are small, and not where large numbers cancel out in them.
    """
    with ExitStack() as undo:
        for block in runner.blocks:
            write(block.block, gather(block.block) * (1 + tolerance), undo)
        outputs = runner.run(seen.training)
    if _shapes_of(outputs) != _shapes_of(seen.outputs):
        return [0.0] * len(seen.outputs)
    return [
        ROUNDINGS * _find_largest(output - former) for output, former in zip(outputs, seen.outputs)
    ]


def _describe_difference(
    outputs: list[Tensor], expected: list[Tensor], tolerance: float, allowed: list[float]
) -> str:
    """Return how merged outputs differ from the expected ones; empty if only by rounding."""
    if len(outputs) != len(expected):
        returned = counted(len(outputs), "tensor")
        return f"merged, the model returns {returned} in place of {len(expected):,}"
    if _shapes_of(outputs) != _shapes_of(expected):
        return "merged, the model returns tensors of other shapes"
    for output, former, limit in zip(outputs, expected, allowed):
        output = output.to(former)
        if not torch.allclose(output, former, rtol=tolerance, atol=limit, equal_nan=True):
            difference = _find_largest(output - former)
            return (
                f"merged, an output differs by up to {difference:.2g}, where its values reach "
                f"{_find_largest(former):.2g}: the model does something else when its weights are "
                "plain"
            )
    return ""


def _shapes_of(tensors: list[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _find_largest(tensor: Tensor) -> float:
    """Return the largest finite magnitude in a tensor, or 0 if it has none."""
    finite = tensor[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


# --- weights that the forward changes ------------------------------------------------------------


def _dense_weights(active: list[ModelBlock]) -> dict[AdapterBlock, nn.Parameter]:
    """Return the adapted parameters whose values are all here, by their blocks."""
    weights = {}
    for _, layer, _, block in active:
        parameter = layer._parameters.get(block.slot.parameter)
        if parameter is None or block.slot.quantized or parameter.is_meta:
            continue
        if not is_sharded(parameter) and not is_partitioned(parameter):
            weights[block] = parameter
    return weights


def _sum_weights(active: list[ModelBlock]) -> dict[AdapterBlock, float]:
    """Return the sums of the adapted weights, by which a change of one shows."""
    sums = {}
    for block, weight in _dense_weights(active).items():
        total = float(_as_real(weight.detach()).sum(dtype=merge_dtype(weight.dtype)))
        if not math.isnan(total):
            sums[block] = total
    return sums


def _restore_data(active: list[ModelBlock], undo: ExitStack) -> None:
    """Put the weights back that a forward replaces by others; nothing is copied."""

    def put_back(weight: nn.Parameter, data: Tensor) -> None:
        if weight.data_ptr() != data.data_ptr():
            weight.data = data

    for weight in _dense_weights(active).values():
        undo.callback(put_back, weight, weight.data)


@contextmanager
def _undo_changes_in_place(active: list[ModelBlock], undo: ExitStack) -> Iterator[None]:
    """Let `undo` put the values back that the body changes in place; only these stay copied."""
    kept = []
    for weight in _dense_weights(active).values():
        kept.append((weight.data, weight.detach().clone()))
    try:
        yield
    finally:
        for data, values in kept:
            if not torch.equal(data, values):
                undo.callback(data.copy_, values)

"""check_adapters: show that each adapted weight of a model acts, trains and merges.

`check_report` has the report, `check_runs` runs the model, and `check_merges` compares it with the
merged model. Here it is found which blocks act and get gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from disha.effective.contexts import open_context
from disha.effective.weight import EffectiveWeight
from disha.errors import ArgumentError, DishaError
from disha.layers.adapted import AdaptedLayer
from disha.layers.blocks import AdapterBlock
from disha.layers.wrappers import clean_key
from disha.model.check_merges import Merging, compare_merged
from disha.model.check_report import CheckedWeight, CheckReport
from disha.model.check_runs import Runner, UndoesWrites, restore_data
from disha.model.inject import guard_encoders, take_out
from disha.model.view import ModelBlock, ModelView
from disha.private_torch import tree_leaves
from disha.sharding.imported import imported_class
from disha.sharding.tensors import gather, write
from disha.sharding.zero import repartition, whole_shape

ELEMENTWISE = {
    f"{side}{name}{end}"
    for name in ("add", "sub", "mul", "div", "truediv")
    for side, end in (("", ""), ("__", "__"), ("__r", "__"))
}
"""Names of operations in which a weight is no matrix."""

NEVER_MULTIPLIED = (
    "it is never multiplied as a matrix, but used element by element, where a layout means "
    "nothing; to train all of it, name it in also_train"
)

SIZE = 0.02
"""Standard deviation of the random values that blocks get during the check."""


def check_adapters(
    model: nn.Module,
    *inputs: Any,
    optimizer: torch.optim.Optimizer | None = None,
    merging: bool = True,
    **kwargs: Any,
) -> CheckReport:
    """Run a model and report for each active block whether it acts, trains and merges.

    The model runs in evaluation mode: twice with random values in all blocks, once for each part of
    the weights while that is merged, once for each block that gets no gradient, and twice without
    updates, with the adapters and as its base. The originals of a part are kept meanwhile: 64 MiB,
    or a 16th of the adapted weights, or one weight.

    If a block does not act or gets no gradient there, the model also runs in training mode, without
    the adapters' own dropout. So a head that only training uses is in order, and so is a model that
    differentiates in its forward (forces of an energy) and keeps the graph of that in training
    only.

    Afterwards, parameters, buffers, modes, gradients and the random states of torch are as before.
    What else a forward changes, such as a counter that is a Python number, is not seen.

    Args:
        model: a model with adapters, not merged.
        inputs: positional arguments for the model.
        optimizer: the optimizer; the report names the parameters that should train but that it
            lacks, and counts those of other modules.
        merging: False to leave merging out, which saves most of the time and memory.
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
        weights = _check(view, undo, active, lambda: runs(*inputs, **kwargs), merging)
        base_changed = _find_whether_base_changed(view, undo, lambda: runs(*inputs, **kwargs))
    if optimizer is None:
        return CheckReport(weights, base_changed=base_changed)
    untrained, unknown = _compare_with_optimizer(model, optimizer)
    return CheckReport(weights, untrained, unknown, base_changed)


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
    """Return the parameters that should train and the optimizer lacks, by their names.

    Return also how many parameters the optimizer has that the model lacks.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    untrained = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in trained:
            untrained.append(clean_key(name))
        trained.discard(id(parameter))
    return tuple(untrained), len(trained)


def _find_whether_base_changed(
    view: ModelView, undo: ExitStack, call: Callable[[], Any]
) -> bool | None:
    """Whether the adapted model, with all updates off, computes something else than its base.

    None if it does not run as its base, or is sharded: then no layer can be plain for a moment.
    """
    if view.is_sharded or view.is_wrapped:
        return None
    # Kept twice, so that the model comes back even if adapting it again fails.
    view.keep_records(undo)
    undo.callback(guard_encoders, view)
    runner = Runner(view, [], call)
    groups = frozenset(layer.disha.group for layer in view.find_layers())
    with torch.inference_mode(False), torch.enable_grad():
        with open_context(groups, (), disables=True):
            without_updates = runner.run(training=False)
        with ExitStack() as plain:
            take_out(view, view.adapters, plain)
            try:
                of_base = runner.run(training=False)
            except Exception:  # a forward that asks its layers for their adapters
                return None
    if len(without_updates) != len(of_base):
        return True
    for output, expected in zip(without_updates, of_base):
        tolerance = torch.finfo(expected.dtype).eps ** 0.5
        if output.shape != expected.shape:
            return True
        if not torch.allclose(output, expected, tolerance, tolerance, equal_nan=True):
            return True
    return False


# --- what the model does with the blocks ---------------------------------------------------------


@dataclass
class _Observation:
    """What the model did with the blocks when it ran in one mode."""

    training: bool  # the mode: training, or evaluation
    outputs: list[Tensor]
    read: set[AdapterBlock]
    acting: set[AdapterBlock]
    with_gradient: set[AdapterBlock]
    error: str  # why gradients could not be computed; empty if they could
    only_elementwise: set[AdapterBlock]  # those of weights that no product was seen to read


def _check(
    view: ModelView,
    undo: ExitStack,
    active: list[ModelBlock],
    call: Callable[[], Any],
    merging: bool,
) -> tuple[CheckedWeight, ...]:
    """Return the rows of the report; `undo` takes back what this changes."""
    for module in view.model.modules():
        undo.callback(setattr, module, "training", module.training)
    view.reshard()
    blocks = [model_block.block for model_block in active]
    runner = Runner(view, blocks, call)
    with torch.inference_mode(False), torch.enable_grad():
        zeros = {block for block in blocks if not gather(block.block).count_nonzero()}
        frozen = {block for block in blocks if not block.block.requires_grad}
        _randomise(blocks, undo)
        restore_data(active, undo)
        undo.callback(view.reshard)  # a forward gathers what is sharded
        with UndoesWrites(active, undo):
            in_evaluation = _observe(runner, blocks, training=False)
        observations = [in_evaluation]
        merged = active if merging else []  # the blocks whose merge is compared
        mergings = compare_merged(view, runner, merged, in_evaluation.outputs, training=False)
        in_order = in_evaluation.acting & in_evaluation.with_gradient
        idle = [block for block in blocks if block not in in_order]
        in_training, error_in_training = _observe_idle(runner, idle, active, undo)
        if in_training is not None:
            observations.append(in_training)
            # What a merge does to blocks that act only in training is seen only there.
            only_there = in_training.acting - in_evaluation.acting
            compared = [model_block for model_block in merged if model_block.block in only_there]
            others = compare_merged(view, runner, compared, in_training.outputs, training=True)
            for layer, other in others.items():
                if mergings[layer].keeps_outputs:  # else there is a reason already
                    mergings[layer] = other
        stuck = _find_stuck_blocks(runner, zeros, observations, undo)
    rows = []
    for model_block in active:
        block = model_block.block
        reason = _reason_against_training(block, observations)
        if reason and error_in_training:
            reason += f"; in training mode it raises {error_in_training} with these inputs"
        elif not reason and block in frozen:
            reason = "it acts, but it is frozen; to train it, call mark_only_adapters_trainable"
        elif not reason and block in stuck:
            reason = "a block of zeros gets no gradient by its method; use init='kaiming'"
        of_layer = mergings.get(model_block.layer, Merging(None))
        rows.append(_make_row(model_block, observations, reason, of_layer))
    return tuple(rows)


def _make_row(
    model_block: ModelBlock,
    observations: list[_Observation],
    reason_against_training: str,
    merging: Merging,
) -> CheckedWeight:
    """Return the row of a block. Why it does not train comes before why it does not merge."""
    block = model_block.block
    is_read = any(block in observation.read for observation in observations)
    acts = any(block in observation.acting for observation in observations)
    reason = reason_against_training
    trains = not reason
    if trains:
        reason = merging.reason
        if not reason and any(block in seen.only_elementwise for seen in observations):
            reason = NEVER_MULTIPLIED
    return CheckedWeight(
        model_block.name,
        model_block.adapter,
        read=is_read,
        acts=acts,
        gradient=trains,
        merges=merging.keeps_outputs,
        reason=reason,
    )


def _reason_against_training(block: AdapterBlock, observations: list[_Observation]) -> str:
    """Return why a block does not act or gets no gradient; empty if it does both."""
    if not any(block in observation.read for observation in observations):
        return "the model does not use this weight, or not with these inputs"
    if not any(block in observation.acting for observation in observations):
        return "the model reads this weight, but the update does not reach the output"
    if any(block in observation.with_gradient for observation in observations):
        return ""
    errors = [observation.error for observation in observations if observation.error]
    if errors:
        return f"it acts, but its gradient can't be computed: {errors[-1]}"
    return "it acts, but a detach or a custom function stops its gradient"


def _observe(runner: Runner, blocks: list[AdapterBlock], *, training: bool) -> _Observation:
    """Run the model in this mode, and return which of the blocks are read, act and get gradients.

    A block without a gradient may act all the same, so the model runs once more for each of these.
    """
    with runner.mode(training=training):
        with _NotesUses() as notes:
            read, outputs = _run_and_note_reads(runner, blocks)
        try:
            with_gradient = _find_with_gradient(outputs, read)
            error = ""
        except DishaError:
            raise
        except RuntimeError as failure:  # for example, the forward has freed a part of the graph
            with_gradient = set()
            error = str(failure).partition(".")[0]  # its first sentence
    outputs = [output.detach() for output in outputs]
    acting = set(with_gradient)
    for block in blocks:
        if block not in acting and _changes_outputs(runner, block, outputs, training):
            acting.add(block)
    only_elementwise = {block for block, values in read.items() if notes.only_elementwise(values)}
    return _Observation(
        training, outputs, set(read), acting, with_gradient, error, only_elementwise
    )


class _NotesUses(TorchFunctionMode):
    """Notes which operations make plain tensors of effective weights."""

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[int, set[str]] = {}  # id of a block's values -> names of operations

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        if isinstance(result, Tensor) and not isinstance(result, EffectiveWeight):
            for value in tree_leaves((args, named)):
                if type(value) is EffectiveWeight:
                    for block in value.updates.blocks:
                        self._uses.setdefault(id(block), set()).add(func.__name__)
        return result

    def only_elementwise(self, values: Tensor) -> bool:
        """Whether all noted uses of a weight with this block are element by element."""
        uses = self._uses.get(id(values), set())
        return bool(uses) and uses <= ELEMENTWISE


def _observe_idle(
    runner: Runner, idle: list[AdapterBlock], active: list[ModelBlock], undo: ExitStack
) -> tuple[_Observation | None, str]:
    """Observe in training mode the blocks that are idle in evaluation.

    The result is (observation, ""); or (None, "") if no block is idle; or, if the model raises in
    training mode, (None, the name of the error).
    """
    if not idle:
        return None, ""
    try:
        with UndoesWrites(active, undo):
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
    runner: Runner, blocks: list[AdapterBlock]
) -> tuple[dict[AdapterBlock, Tensor], list[Tensor]]:
    """Return the blocks that the model reads, with the values that it gets, and its outputs."""
    read: dict[AdapterBlock, Tensor] = {}

    def note_read(block: AdapterBlock, *args: Any, **kwargs: Any) -> Any:
        read[block] = type(block).read_values(block, *args, **kwargs)
        return read[block]  # FSDP2 has gathered it for this forward

    with ExitStack() as undo:
        for block in blocks:
            # In __dict__, an attribute hides the method of the class.
            block.__dict__["read_values"] = partial(note_read, block)
            undo.callback(block.__dict__.pop, "read_values")
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
    runner: Runner, block: AdapterBlock, outputs: list[Tensor], training: bool
) -> bool:
    """Whether the outputs change when a block changes."""
    with ExitStack() as undo:
        write(block.block, gather(block.block) + 50 * SIZE, undo)
        changed = runner.run(training=training)
    if len(changed) != len(outputs):
        return True
    return not all(torch.equal(output, former) for output, former in zip(changed, outputs))


def _find_stuck_blocks(
    runner: Runner, zeros: set[AdapterBlock], observations: list[_Observation], undo: ExitStack
) -> set[AdapterBlock]:
    """Return those blocks of zeros that get no gradient by their method, and so stay zero.

    That is a property of the method, so one block of each method is tried.
    """
    tried: set[str] = set()
    stuck: set[str] = set()
    for block in runner.blocks:
        reaching = [
            observation for observation in observations if block in observation.with_gradient
        ]
        if block not in zeros or block.kind in tried or not reaching:
            continue
        tried.add(block.kind)
        write(block.block, torch.zeros(whole_shape(block.block), device="cpu"), undo)
        with runner.mode(training=reaching[0].training):
            read, outputs = _run_and_note_reads(runner, [block])
            if block not in _find_with_gradient(outputs, read):
                stuck.add(block.kind)
    return {block for block in zeros if block.kind in stuck}

"""check_adapters: show that each adapted weight of a model acts, trains and merges.

`check_report` has the report, `check_runs` runs the model, and `check_merges` compares it with the
merged model. Here it is found which blocks act and get gradients.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from disha.effective.contexts import open_context
from disha.errors import ArgumentError, DishaError
from disha.layers.adapted import AdaptedLayer, set_state
from disha.layers.blocks import AdapterBlock
from disha.layers.wrappers import clean_key
from disha.model.check_merges import (
    Merging,
    compare_merged,
    describe_difference,
    find_tolerance,
)
from disha.model.check_report import CheckedWeight, CheckReport
from disha.model.check_runs import Runner, UndoesWrites
from disha.model.found import ModelBlock
from disha.model.view import ModelView
from disha.sharding.imported import imported_class
from disha.sharding.tensors import gather, write
from disha.sharding.zero import repartition, whole_shape

KEPT = (
    "the model keeps this weight, or what it has computed from it, from one run to the next, so an "
    "update stays when adapters are switched off, or does not come when they are switched on; let "
    "it read the weight in each forward"
)
"""The reason against a weight that a model caches."""

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

    The model runs in evaluation mode: four times with random values in all blocks, once for each
    part of the weights while that is merged, once for each block that gets no gradient, and three
    times without updates, once of them as its base. The originals of a part are kept meanwhile: 64
    MiB, or a 16th of the adapted weights, or one weight.

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
    runs: Any = model
    engine = imported_class("deepspeed.runtime.engine", "DeepSpeedEngine")
    if isinstance(model, engine):
        runs = model.module  # the engine takes every backward for one of training
    blocks = [model_block.block for model_block in active]
    runner = Runner(view, blocks, lambda: runs(*inputs, **kwargs))
    # Whatever the check changes comes back.
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as undo:
        view.reshard()
        view.keep(undo)
        view.keep(undo)  # again: if putting back is interrupted, it is done once more
        weights = _check(view, undo, active, runner, merging)
        base_changed = _find_whether_base_changed(view, runner)
    if optimizer is None:
        return CheckReport(weights, base_changed=base_changed)
    untrained, unknown = _compare_with_optimizer(model, optimizer)
    return CheckReport(weights, untrained, unknown, base_changed)


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


def _find_whether_base_changed(view: ModelView, runner: Runner) -> bool | None:
    """Whether the adapted model, with all updates off, computes something else than its base.

    None if it does not run as its base, or is sharded: then no layer can be plain for a moment.
    Afterwards the model is its base, until `ModelView.keep` puts the adapters back.
    """
    if view.is_sharded or view.wrapper is not None:
        return None
    groups = frozenset(layer.disha.group for layer in view.find_layers())
    with open_context(groups, (), disables=True):
        without_updates = runner.run(training=False)
    for layer in view.find_layers():
        set_state(layer, None)
    view.guard_encoders()
    try:
        of_base = runner.run(training=False)
    except Exception:  # a forward that asks its layers for their adapters
        return None
    tolerance = find_tolerance(of_base)
    allowed = [tolerance] * len(of_base)
    return bool(describe_difference(without_updates, of_base, tolerance, allowed))


# --- what the model does with the blocks ---------------------------------------------------------


@dataclass
class _Seen:
    """What the model did with the blocks when it ran, in one mode or in both."""

    read: set[AdapterBlock]
    acting: set[AdapterBlock]
    with_gradient: set[AdapterBlock]
    error: str = ""  # why gradients could not be computed; empty if they could


def _check(
    view: ModelView, undo: ExitStack, active: list[ModelBlock], runner: Runner, merging: bool
) -> tuple[CheckedWeight, ...]:
    """Return the rows of the report; `undo` takes back what this changes."""
    for module in view.model.modules():
        undo.callback(setattr, module, "training", module.training)
    blocks = runner.blocks
    frozen = [block for block in blocks if not block.block.requires_grad]
    _randomise(blocks, undo)
    undo.callback(view.reshard)  # a forward gathers what is sharded
    seen = _Seen(set(), set(), set())
    with UndoesWrites(active, undo):
        outputs = _observe(runner, blocks, seen, training=False)
    read_at_first = set(seen.read)
    mergings: dict[AdaptedLayer, Merging] = {}
    if merging:
        mergings = compare_merged(view, runner, active, outputs)
    error_in_training = ""
    idle = [block for block in blocks if block not in seen.with_gradient]
    if idle:
        try:
            with UndoesWrites(active, undo):
                _observe(runner, idle, seen, training=True)
        except Exception as error:  # such as of a loss without its targets, or of a batch norm
            name = type(error).__name__
            error_in_training = f"; in training mode it raises {name} with these inputs"
    with UndoesWrites(active, undo):
        kept = _find_kept(view, runner, read_at_first)
    rows = []
    for name, layer, adapter, block in active:
        reason = _reason_against_training(block, seen)
        if block in kept:
            reason = KEPT
        elif reason:
            reason += error_in_training
        elif block in frozen:
            reason = "it acts, but it is frozen; to train it, call mark_only_adapters_trainable"
        merging_of_layer = mergings.get(layer, Merging(None))
        row = CheckedWeight(
            name,
            adapter,
            read=block in seen.read,
            acts=block in seen.acting and block not in kept,
            gradient=block in seen.with_gradient and block not in frozen,
            merges=merging_of_layer.keeps_outputs,
            # Why it does not train comes before why it does not merge.
            reason=reason or merging_of_layer.reason,
        )
        rows.append(row)
    return tuple(rows)


def _find_kept(
    view: ModelView, runner: Runner, read_at_first: set[AdapterBlock]
) -> set[AdapterBlock]:
    """Return the blocks whose weights the model keeps from one run to the next.

    It runs with its adapters on, off and on again. The runs with adapters must read the same
    weights as the first one did.
    """
    groups = frozenset(layer.disha.group for layer in view.find_layers())
    reads: list[set[AdapterBlock]] = []
    for is_off in (False, True, False):
        with runner.mode(training=False), ExitStack() as around:
            if is_off:
                around.enter_context(open_context(groups, (), disables=True))
            read, _ = _run_and_note_reads(runner, runner.blocks)
        repartition(read.values())
        if not is_off:
            reads.append(set(read))
    return read_at_first.union(*reads) - read_at_first.intersection(*reads)


def _reason_against_training(block: AdapterBlock, seen: _Seen) -> str:
    """Return why a block does not act or gets no gradient; empty if it does both."""
    if block not in seen.read:
        return "the model does not use this weight, or not with these inputs"
    if block not in seen.acting:
        return "the model reads this weight, but the update does not reach the output"
    if block in seen.with_gradient:
        return ""
    if seen.error:
        return f"it acts, but its gradient can't be computed: {seen.error}"
    return "it acts, but a detach or a custom function stops its gradient"


def _observe(
    runner: Runner, blocks: list[AdapterBlock], seen: _Seen, *, training: bool
) -> list[Tensor]:
    """Run the model in this mode, note which blocks are read, act and get gradients.

    Return the outputs. A block without a gradient may act all the same, so the model runs once more
    for each of these.
    """
    with runner.mode(training=training):
        read, outputs = _run_and_note_reads(runner, blocks)
        with_gradient = set()
        try:
            with_gradient = _find_with_gradient(outputs, read)
        except DishaError:
            raise
        except Exception as failure:  # for example, the forward has freed a part of the graph
            seen.error = str(failure).partition(".")[0]  # its first sentence
        if "use_reentrant=True" in seen.error:  # such checkpoints know only `backward`
            seen.error = ""
            with_gradient = _find_after_backward(runner, blocks)
    outputs = [output.detach() for output in outputs]
    seen.read.update(read)
    seen.acting |= with_gradient
    seen.with_gradient |= with_gradient
    for block in blocks:
        if block not in seen.acting and _changes_outputs(runner, block, outputs, training):
            seen.acting.add(block)
    return outputs


def _randomise(blocks: list[AdapterBlock], undo: ExitStack) -> None:
    """Give blocks random values, and make them require gradients."""
    generator = torch.Generator("cpu").manual_seed(0)
    for block in blocks:
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
    sums = _random_sums(outputs)
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


def _find_after_backward(runner: Runner, blocks: list[AdapterBlock]) -> set[AdapterBlock]:
    """Return the blocks in which `backward` of a new run leaves a gradient."""
    held = [(parameter, parameter.grad) for parameter in runner.view.list_parameters()]
    for parameter, _ in held:
        parameter.grad = None
    try:
        sums = _random_sums(runner.outputs())
        if sums:
            torch.autograd.backward(sums)
        gradients = {block: block.block.grad for block in blocks}
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient
    return {
        block
        for block, gradient in gradients.items()
        if gradient is not None and gradient.count_nonzero()
    }


def _random_sums(outputs: list[Tensor]) -> list[Tensor]:
    """Return a random sum of each output that has a graph."""
    generator = torch.Generator("cpu").manual_seed(1)
    sums = []
    for output in outputs:
        if output.requires_grad:
            factors = torch.randn(output.shape, generator=generator, device="cpu")
            sums.append((output * factors.to(output)).sum())
    return sums


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

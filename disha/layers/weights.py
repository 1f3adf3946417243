"""The weights of modules, adapted or not: how they are stored, and their values.

What each function returns for a weight of a kind:

                    plain    merged           quantised    computed (parametrised)
    read_weight     W        W + updates      as stored    the computed W
    stored_weight   W        W                as stored    None
    base_of         W        W                dense        the computed W

A sharded weight (DTensor) stays sharded in all of them; `rows_of_base` gathers it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from disha.effective.tensor_parallel import SplitUpdates
from disha.functional import Update
from disha.functional.new_rows import NewRows
from disha.functional.shard_sums import is_inexact, merge_dtype
from disha.functional.weight_updates import Updates, WithNewRows
from disha.layers import bitsandbytes, quantized
from disha.layers.adapters import Adapters, original_class
from disha.layers.blocks import AdapterBlock
from disha.layers.containers import CHILD_NAME
from disha.layers.offloading import offloading_hooks
from disha.layers.spec import BlockSpec
from disha.sharding.tensors import gather, write
from disha.sharding.zero import is_partitioned, whole_shape


def read_weight(module: nn.Module, name: str) -> Any:
    """Return a weight as the module's own class reads it, without the updates of acting blocks.

    None if the module has none of that name.
    """
    computed = module._modules.get("parametrizations")
    if computed is None:
        return _read(module, name)
    with _in_evaluation(computed):
        return _read(module, name)


def _read(module: nn.Module, name: str) -> Any:
    original = original_class(module)
    if original is type(module):
        return getattr(module, name, None)
    return base_reader(original, name)(module)


@contextmanager
def _in_evaluation(computed: nn.Module) -> Iterator[None]:
    """Run the body while parametrizations are in evaluation mode.

    In training mode, torch's spectral_norm updates its estimate whenever the weight is read.
    """
    in_training = [part for part in computed.modules() if part.training]
    try:
        for part in in_training:
            part.training = False
        yield
    finally:
        for part in in_training:
            part.training = True


def matrix_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a module that are matrices or stacks of them, computed ones too."""
    weights: dict[str, Any] = dict(module._parameters)
    if is_parametrized(module):
        computed: Any = module.parametrizations
        weights |= {name: read_weight(module, name) for name in computed}
    return {name: weight for name, weight in weights.items() if _is_matrix(weight)}


def _is_matrix(weight: Any) -> bool:
    """Whether a value is a tensor of real or complex numbers with two dimensions or more."""
    if not isinstance(weight, Tensor) or is_lazy(weight):
        return False
    return len(whole_shape(weight)) >= 2 and is_inexact(weight)


def base_reader(original: type[nn.Module], name: str) -> Callable[[Any], Any]:
    """Return the function by which instances of a class read a parameter."""
    descriptor = inspect.getattr_static(original, name, None)
    if isinstance(descriptor, property) and descriptor.fget is not None:
        return descriptor.fget  # because compiled code can't call `property.__get__`
    if hasattr(descriptor, "__get__"):
        return lambda layer: descriptor.__get__(layer, type(layer))
    look_up: Any = original.__getattr__

    def read(layer: Any) -> Any:
        if name in layer.__dict__:
            return layer.__dict__[name]
        return look_up(layer, name)

    return read


def is_packed(module: nn.Module, name: str) -> bool:
    """Whether a parametrization computes a weight from integers, as of a quantised stack."""
    if not is_parametrized(module, name):
        return False
    stored = module.parametrizations[name]._parameters.values()  # type: ignore[index, union-attr]
    return not any(is_inexact(tensor) for tensor in stored)


def stored_weight(module: nn.Module, name: str) -> Tensor | None:
    """Return a weight as it is stored, or its original while merged; None if it is computed."""
    adapters = module._modules.get(CHILD_NAME)
    if isinstance(adapters, Adapters) and adapters.merged is not None:
        original = adapters.merged.originals.get(name)
        if original is not None:
            return original.weight
    return quantized.held_weight(module, name)


def base_of(layer: nn.Module, spec: BlockSpec) -> Tensor:
    """Return W, the original of an adapted weight, also while merged; dense if it is quantised."""
    stored = stored_weight(layer, spec.parameter)
    if spec.quantized:
        return quantized.dequantize(layer, stored)
    if stored is None:
        return read_weight(layer, spec.parameter)
    return stored


def adapted_weights(layer: Any, adapters: Iterable[str]) -> dict[str, BlockSpec]:
    """Return parameter -> spec, for each parameter of the layer that one of the adapters changes.

    A parameter can have several blocks, for other outputs each; the spec is that of one of them.
    """
    specs = {}
    for parameter, by_adapter in layer.disha.all_blocks.items():
        for adapter, blocks in by_adapter.items():
            if adapter in adapters:
                # The block of a tied parameter knows it by its name in its own layer.
                specs[parameter] = blocks[0].spec.but(parameter=parameter)
    return specs


def start_block(layer: nn.Module, block: AdapterBlock) -> None:
    """Give a block the values that it starts with: new rows those of W, others as `init` says."""
    if block.is_new_rows:
        write(block.block, rows_of_base(layer, block.spec))
    else:
        block.reset_parameters()


def rows_of_base(layer: nn.Module, spec: BlockSpec) -> Tensor:
    """Return the values of W for new rows (in, rows)."""
    base = gather(base_of(layer, spec)).detach()
    if base.is_meta:
        for hook in offloading_hooks(layer):
            base = hook.weights_map[spec.parameter]
    return spec.layout.part(base, spec.outputs).mT


@contextmanager
def untrained_rows_kept(layer: Any, parameters: Iterable[str]) -> Iterator[None]:
    """Run a body that loads W, and let new rows that have not been trained be those of W again.

    They are the rows that are as in W before, or that have lost their values to new memory.
    """
    places = {
        block: block.spec.but(parameter=parameter)
        for parameter in parameters
        for block in layer.disha.blocks_for(parameter, layer.disha)
        if block.is_new_rows
    }
    untrained = {}
    for block, spec in places.items():
        values = block._parameters.get(block.parameter_name)
        # ZeRO-3 and FSDP's flat parameters would have to be gathered by all ranks.
        if values is None or is_partitioned(values) or values.is_meta:
            continue
        former = rows_of_base(layer, spec)
        now = gather(values).detach()
        is_lost = now.isnan()
        if not former.is_meta:
            is_lost |= now == former.to(now)
        untrained[block] = is_lost.all(0)
    yield
    for block, is_untrained in untrained.items():
        now = gather(block.block).detach()
        loaded = rows_of_base(layer, places[block]).to(now)
        write(block.block, torch.where(is_untrained, loaded, now))


def delta_of(layer: nn.Module, block: AdapterBlock) -> Tensor:
    """Return dW of a block of a layer, without its scale, in the weight's shape."""
    spec = block.spec
    if spec.quantized:
        stored = stored_weight(layer, spec.parameter)
        base = quantized.weight_for(block.method, layer, spec, stored, block.block)
    else:
        base = base_of(layer, spec)
    if block.is_new_rows:
        base = base.to(merge_dtype(base.dtype, block.block.dtype))
        return NewRows(block.block, spec.outputs).write_weight(base) - base
    return block.method.delta_weight(spec.layout, block.block, base, spec.outputs)


def sum_with_updates(
    layer: Any, spec: BlockSpec, adapters: Iterable[str], in_parts: bool = False
) -> Tensor:
    """Return W + sum of s * dW of these adapters, with their new rows. Collective if sharded.

    With `in_parts`, W is a DTensor of a tensor-parallel plan, and so is the result: each rank
    computes its part, alone.
    """
    base = base_of(layer, spec)
    layout = spec.layout
    updates = []
    new_rows = []
    for block in layer.disha.blocks_for(spec.parameter, adapters):
        values, ranges = block.block if in_parts else gather(block.block), block.spec.outputs
        if block.is_new_rows:
            new_rows.append(NewRows(values, ranges))
        else:
            layout = block.spec.layout  # that of the spec may be one of new rows
            updates.append(Update(block.method, values, block.scale, output_ranges=ranges))
    effective: Updates = Updates(tuple(updates))
    if new_rows:
        effective = WithNewRows(effective, {None: new_rows})
    if in_parts:
        return SplitUpdates(effective).compute_weight(base, layout)
    return effective.compute_weight(gather(base), layout)


def count_values(parameter: Tensor, module: nn.Module | None = None) -> int:
    """Return the number of values in a parameter of a module; a packed one counts as unpacked."""
    shape = bitsandbytes.unpacked_shape(parameter, module)
    if shape is None:
        shape = whole_shape(parameter)
    return shape.numel()

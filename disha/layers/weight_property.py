"""Read an adapted parameter as an effective weight; and the short forward of `nn.Linear`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from disha.effective.contexts import OPEN_CONTEXTS, Override
from disha.effective.tensor_parallel import SplitUpdates, effective_part
from disha.effective.weight import EffectiveWeight, make_absent, make_effective
from disha.errors import ArgumentError, ModeError
from disha.functional import adapted_linear
from disha.functional.shard_sums import PLAIN
from disha.functional.weight_updates import Updates
from disha.layers.adapters import Adapters
from disha.layers.blocks import AdapterBlock
from disha.layers.containers import CHILD_NAME
from disha.layers.weights import base_reader
from disha.sharding.tensor_parallel import split_of
from disha.sharding.tensors import is_sharded

READERS_OF_PARAMETERS = (
    "torch.nn.modules.module",  # get_parameter, which returns it
    "torch.nn.utils.prune",  # puts it under another name, times a mask
    "torch.nn.utils.weight_norm",  # the older weight_norm: splits it into length and direction
    "torch.nn.utils.parametrize",  # would put it where this class does not look: refused
    "torch.distributed.fsdp",  # replaces it by a shard, and back
    "torch.distributed.checkpoint",  # walks to it by its name, also while it is a shard
    "torch.distributed.pipelining",  # moves it to its stage
    "accelerate.utils.fsdp_utils",  # finds tied ones, to shard them once
    "accelerate.utils.modeling",  # set_module_tensor_to_device and retie_parameters move it
    "accelerate.utils.other",  # recursive_getattr, to find tied ones
)
"""Python modules that read a parameter by its name to return, move or replace it: they get W.

Only the module of the calling code tells such a read from that of a forward.
"""

LINEAR_FORWARD = nn.Linear.forward
"""The forward of torch. If user code replaces it in `nn.Linear`, the replacement runs."""


def weight_property(original: type[nn.Module], name: str) -> property:
    """Return the property that reads a parameter of a class as an effective weight."""
    read_base = base_reader(original, name)
    # Whether the value is in `_parameters`, and nothing in the class computes it.
    is_stored = original.__getattr__ is nn.Module.__getattr__ and not hasattr(original, name)

    def read(layer: nn.Module) -> Any:
        parameters: dict[str, Any] = layer._parameters
        # `read_base` would do in every case, but costs a call.
        base = parameters[name] if is_stored and name in parameters else read_base(layer)
        adapters: Any = layer._modules.get(CHILD_NAME)
        if adapters is None:
            return base
        override = None
        compiling = is_compiling()
        if compiling or OPEN_CONTEXTS:
            override = adapters.find_override(compiling)
            blocks = adapters.acting_blocks(name, override)
        else:
            blocks = adapters.active_blocks.get(name)
        if not blocks:
            return base
        if not compiling:
            caller = sys._getframe(1)
            reader = caller.f_globals.get("__name__", "")
            function = caller.f_code.co_name
            # A wrapper's `__getattr__` in these modules passes on what somebody else reads.
            is_listed = reader.startswith(READERS_OF_PARAMETERS) and function != "__getattr__"
            # Classes with a method of their own for it, as in PyTorch Geometric, save W.
            if is_listed or function == "_save_to_state_dict":
                _refuse_parametrization(reader, layer, name)
                return base
        try:
            is_plain = type(base) in PLAIN and not base.is_meta and base.numel()
            if not is_plain or blocks[0].split is not None:
                return _unusual_weight(adapters, name, base, blocks, override, compiling)
            layout = blocks[0].spec.layout
            is_usual = override is None and not compiling and len(blocks) == 1
            if is_usual and not blocks[0].is_new_rows:
                # What `adapters.updates` does in the usual case, without a call.
                return make_effective(base, layout, Updates((blocks[0].make_update(),)))
            return make_effective(base, layout, adapters.updates(name, override, compiling))
        except AttributeError as error:
            # Python would take it for a missing attribute, and call `nn.Module.__getattr__`, which
            # returns the plain parameter.
            raise RuntimeError(f"the update of {name} failed: {error}") from error

    def write(layer: nn.Module, value: Any) -> None:
        layer.__dict__[name] = value

    def delete(layer: nn.Module) -> None:
        del layer.__dict__[name]

    return property(read, write, delete)


def _refuse_parametrization(reader: str, layer: nn.Module, name: str) -> None:
    """Raise if the reader is about to replace a parameter by a parametrization of it."""
    if reader == "torch.nn.utils.parametrize" and name in layer._parameters:
        raise ArgumentError(
            f"an adapted {name} can't be parametrized, because its adapters would no longer act; "
            "remove the adapters, add the parametrization, and adapt the layer again"
        )


def is_weight_of(layer: nn.Module, name: str, value: Any) -> bool:
    """Whether a value is the effective weight of this parameter.

    Python assigns it in `layer.weight += 1`, after the addition has been written into W.
    """
    return isinstance(value, EffectiveWeight) and value.base is layer._parameters.get(name)


def _unusual_weight(
    adapters: Adapters,
    name: str,
    base: Any,
    blocks: tuple[AdapterBlock, ...],
    override: Override | None,
    compiling: bool,
) -> Any:
    """Read a weight that has no values here, is cut over ranks, or is of another tensor class.

    - on the meta device, with its blocks: an effective weight of meta tensors
    - on the meta device without its blocks, or partitioned by ZeRO-3: an absent weight
    - a DTensor: an effective weight, whose products are those of each rank's part
    - the local tensor of one: the effective weight of this rank's part
    - a tensor of another class: the computed weight
    """
    layout = blocks[0].spec.layout
    split = split_of(base)
    if split is None and base.is_meta:
        # Blocks on the meta device too: the update is made of meta tensors. But accelerate's hook
        # of an offloaded block reads W before it loads D, so such a block is not one of these.
        if all("forward" not in block.__dict__ and block.block.is_meta for block in blocks):
            updates = adapters.updates(name, override, compiling, on_meta=True)
            return make_effective(base, layout, updates)
        return make_absent(base, layout)
    if not base.numel():  # ZeRO-3 gathers it where its layer runs
        return make_absent(base, layout)
    updates = adapters.updates(name, override, compiling)
    if split is not None:
        if not all(is_sharded(block.block) for block in blocks):
            raise ModeError(
                "an adapter can't act: its weight is a DTensor, but its block is not, because the "
                "model was sharded after the adapter was injected (for example by "
                "parallelize_module); inject after parallelize_module, wrap it with fully_shard "
                "instead, or merge the adapter first"
            )
        if not all(split.reads(block.block, block.split) for block in blocks):
            raise ModeError(
                "an adapter can't act: FSDP holds a shard of its weight; call module.unshard() "
                "before reading a weight outside a forward"
            )
        of_split = SplitUpdates(updates)
        if compiling and layout.experts_first:  # dynamo would not find the methods of a DTensor
            return of_split.compute_weight(base, layout)
        return make_effective(base, layout, of_split)
    if type(base) in PLAIN:
        # In some forwards, transformers replaces DTensors by their local tensors.
        return effective_part(base, blocks[0].split, layout, updates)  # type: ignore[arg-type]
    return updates.compute_weight(base, layout)  # a tensor of another class


def linear_forward(layer: Any, input: Tensor) -> Tensor:
    """Run `nn.Linear.forward` with fewer Python calls, which cost most of it for few tokens."""
    parameters = layer._parameters
    adapters = layer._modules.get(CHILD_NAME)
    patched = nn.Linear.forward is not LINEAR_FORWARD
    # `is_compiling()` is asked first: compiled code would depend on all that is asked before it.
    if is_compiling() or patched or OPEN_CONTEXTS or adapters is None or layer._has_own_reading:
        return nn.Linear.forward(layer, input)
    block = adapters.__dict__["only_linear_block"]
    if block is None:
        return nn.Linear.forward(layer, input)
    base = parameters.get("weight")
    # Written out here, because a function would add a call to each forward.
    plain = type(base) in PLAIN and type(input) in PLAIN and not base.is_meta
    if plain and input.layout is torch.strided:
        # `layer.bias` calls `nn.Module.__getattr__`.
        bias = parameters["bias"] if "bias" in parameters else layer.bias  # noqa: SIM401
        return adapted_linear(input, base, bias, (block.make_update(),))
    return nn.Linear.forward(layer, input)

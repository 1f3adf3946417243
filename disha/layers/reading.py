"""The property of an adapted parameter: reading it gives an effective weight."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from disha import functional
from disha.effective import (
    MOVES,
    PLAIN,
    EffectiveWeight,
    Routed,
    called_from,
    effective,
)
from disha.errors import ModeError
from disha.layers.adapters import CHILD_NAME
from disha.layers.blocks import Block
from disha.layers.weights import base_reader
from disha.sharding import is_sharded

__all__ = [
    "weight_property",
]

BY_NAME = nn.Module.get_parameter.__code__
"""The code of `get_parameter`, which reads the attribute but needs the parameter itself."""


def weight_property(original: type[nn.Module], name: str) -> property:
    """Return the property that reads a parameter as an effective weight.

    Args:
        original: the original class, which may compute the weight itself.
        name: the parameter's name.
    """
    read_base = base_reader(original, name)
    keeps = not hasattr(original, name) and original.__getattr__ is nn.Module.__getattr__

    def read(layer: nn.Module) -> Any:
        parameters: dict[str, Any] = layer._parameters
        base = parameters[name] if keeps and name in parameters else read_base(layer)
        adapters: Any = layer._modules.get(CHILD_NAME)
        if adapters is None:
            return base
        # The same as `Adapters.acting`, but inline, because every forward runs this.
        state = adapters.__dict__
        if state["merged"] is not None:
            return base
        # In a graph, `enabled` acts through the blocks' scale: reading it here would recompile.
        if not is_compiling() and (not state["enabled"] or sys._getframe(1).f_code is BY_NAME):
            return base
        if state["route"] is not None:
            return _routed_weight(adapters, name, base)
        blocks = state["live"].get(name)
        if blocks is None:
            return base
        try:
            if type(base) not in PLAIN:
                return _weight_of_another_type(base, blocks)
            if base.is_meta:
                return _weight_on_meta(base, blocks)
            updates = (
                (blocks[0].update(),) if len(blocks) == 1 else tuple([b.update() for b in blocks])
            )
            return effective(base, blocks[0].slot.layout, updates)
        except (KeyError, ModeError):
            # FSDP and accelerate read the weight while its block is absent, to replace or move it.
            if called_from("torch.distributed.fsdp") or called_from(MOVES):
                return base
            raise
        except AttributeError as error:
            # nn.Module would return the plain parameter, and the adapter would have no effect.
            raise RuntimeError(f"the update of {name} failed: {error}") from error

    def write(layer: nn.Module, value: Any) -> None:
        layer.__dict__[name] = value

    def delete(layer: nn.Module) -> None:
        del layer.__dict__[name]

    return property(read, write, delete)


def _routed_weight(adapters: Any, name: str, base: Any) -> Any:
    blocks = tuple(one for one in adapters.blocks().values() if one.slot.parameter == name)
    if not blocks:
        return base
    if type(base) not in PLAIN:
        weight = _weight_of_another_type(base, blocks)
        if isinstance(weight, EffectiveWeight):
            weight.routed = Routed(adapters.route, {})  # so that computing it raises
        return weight
    if base.is_meta:
        return _weight_on_meta(base, blocks)
    return effective(base, blocks[0].slot.layout, (), adapters.routed(name))


def _weight_on_meta(base: Tensor, blocks: tuple[Block, ...]) -> Any:
    """Return the effective weight of a weight on meta: with all of its model, or offloaded.

    This does not run the hook of a block: accelerate reads the weight before it loads the block.
    """
    here = all("forward" not in block.__dict__ and block.block.is_meta for block in blocks)
    updates = tuple(block.update(on_meta=True) for block in blocks) if here else ()
    return effective(base, blocks[0].slot.layout, updates, absent=not here)


def _weight_of_another_type(base: Any, blocks: tuple[Block, ...]) -> Any:
    """Return the value of an adapted weight that is not a plain tensor.

    Between its passes, FSDP replaces parameters by shards and looks them up by name; it gets W. For
    any other type, such as a tensor of a trace, the value is W + sum of s dW, computed.
    """
    if is_sharded(base):
        if called_from("torch.distributed.fsdp"):
            return base
        if all(is_sharded(block.block) for block in blocks):
            updates = tuple(block.update() for block in blocks)
            return effective(base, blocks[0].slot.layout, updates)
        raise ModeError(
            "an adapter can't act: its weight is a DTensor, but its block is not, because the "
            "model was sharded after the adapter was injected (for example by parallelize_module); "
            "wrap it with fully_shard instead, or merge the adapter first"
        )
    updates = tuple(block.update() for block in blocks)
    return functional.effective_weight(base, blocks[0].slot.layout, updates)

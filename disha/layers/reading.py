"""The property of an adapted parameter: reading it gives an effective weight."""

from __future__ import annotations

import inspect
import sys
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from disha import functional
from disha.contexts import OPEN
from disha.effective import (
    MOVES,
    PLAIN,
    EffectiveWeight,
    Routed,
    called_from,
    effective,
    effective_part,
)
from disha.errors import ArgumentError, ModeError
from disha.functional import adapted_linear
from disha.layers.adapters import CHILD_NAME, Adapters
from disha.layers.blocks import Block
from disha.layers.weights import base_reader
from disha.routing import Route
from disha.sharding import is_sharded, split_of

__all__ = [
    "TO_COMPUTED",
    "linear_forward",
    "refuse_change",
    "weight_property",
]

BY_NAME = nn.Module.get_parameter.__code__
"""The code of `get_parameter`, which reads the attribute and must get the parameter itself."""

WEIGHT_NORM = inspect.unwrap(WeightNorm.apply).__code__
"""The code of the old weight_norm, which replaces the parameter by two others."""

PARAMETRIZES = parametrize.register_parametrization.__code__
UNPARAMETRIZES = parametrize.remove_parametrizations.__code__
"""The code of two functions that write what they read into a parameter. Reading refuses them,
because when they change the class of the module, it is too late."""

LINEAR_FORWARD = nn.Linear.forward
"""The forward of torch. If user code replaces it in `nn.Linear`, the replacement runs."""


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
        # Partly the same as `Adapters.acts`, but inline, because every forward runs this.
        state = adapters.__dict__
        if state["merged"] is not None:
            return base
        compiling = is_compiling()
        if not compiling:
            reader = sys._getframe(1).f_code
            if reader is BY_NAME or reader is WEIGHT_NORM:
                return base
            if reader is PARAMETRIZES and name in parameters:
                refuse_change(layer, name, TO_COMPUTED)
            if reader is UNPARAMETRIZES:
                refuse_change(layer, name, FROM_COMPUTED)
        acts = adapters.acts(compiling) if compiling or OPEN else None
        if isinstance(acts, Route):
            return _routed_weight(adapters, acts, name, base, compiling)
        blocks = state["live"].get(name) if acts is None else adapters.acting(name, acts)
        if not blocks:
            return base
        try:
            if type(base) not in PLAIN:
                return _weight_of_another_type(adapters, base, blocks, compiling)
            if base.is_meta:
                return _weight_on_meta(adapters, base, blocks, compiling)
            if blocks[0].split is not None:
                return _weight_of_this_rank(adapters, base, blocks, compiling)
            if compiling or len(blocks) > 1:
                updates = adapters.updates(blocks, compiling)
            else:
                updates = (blocks[0].update(),)
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


def refuse_change(layer: Any, name: str, change: str) -> NoReturn:
    """Raise because a change of a parameter would take the adapters of a layer away.

    Args:
        layer: the layer.
        name: the parameter's name.
        change: one of the changes below.
    """
    raise ArgumentError(
        f"the {name} of an adapted {layer.original_class.__qualname__} can't {change}: its "
        "adapters would no longer act; remove the adapters first, and add them again afterwards"
    )


TO_COMPUTED = "be replaced by a computed one, such as a parametrization"
FROM_COMPUTED = "lose its parametrization"
"""Changes that `refuse_change` refuses."""


def linear_forward(layer: Any, input: Tensor) -> Tensor:
    """Return what the forward of `nn.Linear` returns, with fewer Python calls where it can.

    For few tokens, these calls take longer than the product with the update. So if one block acts
    on a plain weight and input, this computes what `F.linear` of the effective weight would, but
    makes no effective weight. In all other cases it runs the forward of `nn.Linear`.

    Args:
        layer: an adapted `nn.Linear`.
        input: x (..., in).
    """
    parameters, adapters = layer._parameters, layer._modules.get(CHILD_NAME)
    patched = nn.Linear.forward is not LINEAR_FORWARD
    if patched or is_compiling() or adapters is None or OPEN or layer.has_own_reading:
        return nn.Linear.forward(layer, input)
    base, state = parameters.get("weight"), adapters.__dict__
    blocks = state["live"].get("weight", ())
    alone = len(blocks) == 1 and state["merged"] is None and _is_usual(blocks[0])
    plain = type(base) in PLAIN and type(input) in PLAIN and not base.is_meta
    # Nested and sparse inputs go to nn.Linear. This is no function, to save a call per forward.
    if alone and plain and input.layout is torch.strided and not input.is_nested:
        # `layer.bias` takes one more call.
        bias = parameters["bias"] if "bias" in parameters else layer.bias  # noqa: SIM401
        return adapted_linear(input, base, bias, (blocks[0].update(),))
    return nn.Linear.forward(layer, input)


def _is_usual(block: Block) -> bool:
    """Whether the block's weight has the usual layout of a linear layer, and all of it is here."""
    return block.split is None and block.slot.layout.pattern == "out in"


def _routed_weight(adapters: Adapters, route: Route, name: str, base: Any, compiling: bool) -> Any:
    blocks = adapters.some(name)
    if not blocks:
        return base
    if type(base) not in PLAIN and not is_sharded(base):
        raise ModeError(
            f"samples can't be routed while the weight is a {type(base).__name__}: it would be one "
            "effective weight for all samples; export with strict=True, or use one adapter at a "
            "time"
        )
    if type(base) not in PLAIN:
        weight = _weight_of_another_type(adapters, base, blocks, compiling)
        if isinstance(weight, EffectiveWeight):
            weight.routed = Routed(route, {})  # so that computing it raises
        return weight
    if base.is_meta:
        return _weight_on_meta(adapters, base, blocks, compiling)
    if blocks[0].split is not None:
        raise ModeError(
            "samples can't be routed through a tensor-parallel weight; use one adapter at a time, "
            "or exclude the weight"
        )
    return effective(base, blocks[0].slot.layout, (), adapters.routed(name, route, compiling))


def _weight_of_this_rank(
    adapters: Adapters, base: Tensor, blocks: tuple[Block, ...], compiling: bool
) -> Any:
    """Return the effective weight of a rank's part of a tensor-parallel weight.

    In some forwards, `transformers` replaces DTensors by their local tensors.
    """
    split = blocks[0].split
    assert split is not None
    updates = adapters.updates(blocks, compiling)
    return effective_part(base, split, blocks[0].slot.layout, updates, split.cuts)


def _weight_on_meta(
    adapters: Adapters, base: Tensor, blocks: tuple[Block, ...], compiling: bool
) -> Any:
    """Return the effective weight of a weight on meta: with all of its model, or offloaded.

    This does not run the hook of a block: accelerate reads the weight before it loads the block.
    """
    here = all("forward" not in block.__dict__ and block.block.is_meta for block in blocks)
    updates = adapters.updates(blocks, compiling, on_meta=True) if here else ()
    return effective(base, blocks[0].slot.layout, updates, absent=not here)


def _weight_of_another_type(
    adapters: Adapters, base: Any, blocks: tuple[Block, ...], compiling: bool
) -> Any:
    """Return the value of an adapted weight that is not a plain tensor.

    Between its passes, FSDP replaces parameters by shards and looks them up by name; it gets W. For
    any other type, such as a tensor of a trace, the value is W + sum of s dW, computed.
    """
    if is_sharded(base):
        if called_from("torch.distributed.fsdp"):
            return base
        if all(is_sharded(block.block) or block.split == split_of(base) for block in blocks):
            updates = adapters.updates(blocks, compiling)
            return effective(base, blocks[0].slot.layout, updates)
        raise ModeError(
            "an adapter can't act: its weight is a DTensor, but its block is not, because the "
            "model was sharded after the adapter was injected (for example by parallelize_module); "
            "inject after parallelize_module, wrap it with fully_shard instead, or merge the "
            "adapter first"
        )
    updates = adapters.updates(blocks, compiling)
    return functional.effective_weight(base, blocks[0].slot.layout, updates)

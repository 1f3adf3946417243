"""Quantised weights: how to recognise them, how to read them, and how their layers add updates.

A library stores such a weight in a format of its own and computes the product with it, so a forward
hook adds the update to the output. BAT and a dense merge need W's values, and read them with
functions of that library, which the user has imported already: nothing is imported here. To support
another format, recognise it in `quantization_of` and say how to read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from disha.checks import TRAINABLE_DTYPES
from disha.errors import ArgumentError
from disha.functional import Layout, Method, Update, method_names
from disha.functional.products import update_product
from disha.layers import bitsandbytes
from disha.layers.blocks import CHILD_NAME, Adapters, Slot, original_class
from disha.private_torch import saving_hooks, transforms_active
from disha.sharding.imported import imported_class

DENSE_DTYPES = TRAINABLE_DTYPES
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
_NEVER_PACKED = {*DENSE_DTYPES, *_COMPLEX, torch.bool, torch.int64}  # bool: masks, int64: indices
_UNINITIALISED = (UninitializedParameter, UninitializedBuffer)  # torch can't compile `is_lazy`


# --- recognising ---------------------------------------------------------------------------------


class Quantization(NamedTuple):
    """A way to quantise; `read` returns the dense weight, and is None if no way is known."""

    name: str
    read: Callable[[nn.Module, Any], Tensor] | None


ROUNDED = Quantization("rounded by the layer's forward", lambda module, weight: weight.detach())


def quantization_of(module: nn.Module | None, weight: Any) -> Quantization | None:
    """Return how a module's weight is quantised, or None if it is not, or in no known way."""
    if isinstance(weight, _UNINITIALISED):
        return None
    if isinstance(weight, Tensor):
        bits = bitsandbytes.bits_of(module, weight)
        if bits is not None:
            return Quantization(f"bitsandbytes {bits}-bit", bitsandbytes.READERS[bits])
        if type(weight).dequantize is not Tensor.dequantize:
            return Quantization("a quantised tensor", _read_subclass)
        base = imported_class("torchao.utils", "TorchAOBaseTensor")
        if isinstance(weight, base):
            return Quantization("a quantised tensor", None)
    if module is None:
        return None
    if isinstance(weight, Tensor) and weight.dtype in DENSE_DTYPES:
        compressed = {"forward", "quantization_scheme"} <= module.__dict__.keys()
        rounds = compressed or isinstance(module, bitsandbytes.library_classes())  # in its forward
        return ROUNDED if rounds else None
    if not _packs_weight(module):
        return None
    return Quantization("in a format of its own", _read_module if _dequantizes(module) else None)


def _packs_weight(module: nn.Module) -> bool:
    """Whether a module packs its weight in its own tensors, as GPTQ, AWQ, HQQ and fp8 do."""
    sizes = _sizes_of(module)
    plain = original_class(module).forward in (nn.Linear.forward, nn.Embedding.forward)
    if sizes is None or "parametrizations" in module._modules:
        return False
    if plain and "forward" not in module.__dict__:
        return False
    return _dequantizes(module) or any(
        tensor.dtype not in _NEVER_PACKED and tensor.nbytes * 8 >= sizes[0] * sizes[1]
        for tensor in _own_tensors(module)
    )


# --- reading -------------------------------------------------------------------------------------


def _dequantizes(module: nn.Module) -> bool:
    return callable(getattr(module, "dequantize", None))


def _read_module(module: Any, weight: Any) -> Tensor:
    return module.dequantize()


def _read_subclass(module: nn.Module, weight: Any) -> Tensor:
    """Return the dense weight in the dtype that the tensor reports."""
    # The `dequantize` of torchao's NF4Tensor has another meaning.
    original = getattr(weight, "get_original_weight", None)
    dense = weight.dequantize() if original is None else original()
    return dense.to(weight.dtype)


def dequantize(module: nn.Module, weight: Any) -> Tensor:
    """Return a weight of `module` as a dense one; `weight` itself if it is dense."""
    quantization = quantization_of(module, weight)
    if quantization is None:
        return weight
    if quantization.read is None:
        raise ArgumentError(
            f"the weight of {original_class(module).__qualname__} is quantised "
            f"({quantization.name}) and can't be read as numbers; use a method that does not "
            f"read it ({method_names(lambda method: not method.reads_weight)})"
        )
    with torch.no_grad():
        return quantization.read(module, weight)


def weight_for(method: Method, module: nn.Module, slot: Slot, weight: Any, like: Tensor) -> Tensor:
    """Return a quantised weight's values if the method reads them, or a tensor of its shape."""
    assert slot.shape is not None
    if method.reads_weight:
        return dequantize(module, weight)
    return like.new_empty(()).expand(slot.shape)


# --- modules with a quantised weight -------------------------------------------------------------


def quantized_slot(module: nn.Module) -> Slot | None:
    """Return the slot of a module whose weight is quantised, or None if it is not."""
    if getattr(
        type(module), "_is_quantized", False
    ):  # perhaps a class of the user has that name too
        adapters = module._modules.get(CHILD_NAME)
        if isinstance(adapters, Adapters):
            slot = next(iter(adapters.blocks().values())).slot  # perhaps dense by now
            return replace(slot, rows=())
    sizes = _sizes_of(module)
    if sizes is None or quantization_of(module, own_weight(module)) is None:
        return None
    layout = Layout("out in")
    shape = sizes[::-1]
    if isinstance(module, nn.Embedding):
        layout = Layout("index out", padding_idx=module.padding_idx)
        shape = sizes
    return Slot("", "weight", layout, quantized=True, shape=shape)


_SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))


def _sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a module that has attributes for its sizes, or None."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    for names in _SIZES:
        inputs, outputs = (getattr(module, name, None) for name in names)
        if isinstance(inputs, int) and isinstance(outputs, int) and inputs > 0 and outputs > 0:
            return inputs, outputs
    return None


def takes_dense(module: nn.Module) -> bool:
    """Whether a module still computes W x + b when a dense W replaces the quantised one."""
    original = original_class(module)
    return original.forward is nn.Linear.forward or bitsandbytes.is_library_forward(original)


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device of a module with a quantised weight."""
    return next((tensor.device for tensor in _own_tensors(module)), None)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [
        tensor
        for tensor in tensors
        if tensor is not None and not isinstance(tensor, _UNINITIALISED)
    ]


def own_weight(module: nn.Module, name: str = "weight") -> Tensor | None:
    """Return a weight that a module holds itself, or None if it holds none."""
    return module._parameters.get(name, module._buffers.get(name))


# --- base classes of adapted modules -------------------------------------------------------------


class _ListsItself(nn.Module):
    """A base class that adds the adapters to a `state_dict` that leaves children out (HQQ's)."""

    disha: Any

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state of the class, and the adapters."""
        state = super().state_dict(*args, **kwargs)
        listed = kwargs.get("destination")
        self.disha.state_dict(
            destination=state if listed is None else listed,
            prefix=f"{kwargs.get('prefix', '')}disha.",
            keep_vars=kwargs.get("keep_vars", False),
        )
        return state


def leading_bases(original: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    """Return the base classes of an adapted module with a quantised weight, before its own."""
    if bitsandbytes.is_library_forward(original):
        return (bitsandbytes.BitsandbytesLayer,)
    return () if original.state_dict is nn.Module.state_dict else (_ListsItself,)


# --- adding updates to the output of a module ----------------------------------------------------


def attach_hook(module: nn.Module) -> None:
    """Make a module add the updates of its adapters to its output, before other hooks see it."""
    bitsandbytes.refuse_repacked(own_weight(module))
    module.register_forward_hook(add_updates, with_kwargs=True, prepend=True)


def remove_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove a forward hook, also from a copy of the module, for which there is no handle."""
    for number in [n for n, attached in module._forward_hooks.items() if attached is hook]:
        del module._forward_hooks[number]
        module._forward_hooks_with_kwargs.pop(number, None)


def add_updates(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Add the updates that act: the hook of a module with a quantised weight."""
    adapters: Adapters = module.disha
    compiling = is_compiling()
    override = adapters.override(compiling)
    blocks = adapters.blocks_on("weight", override)
    if not blocks:
        return output
    slot = blocks[0].slot
    assert slot.shape is not None
    tensors = (value for value in kwargs.values() if isinstance(value, Tensor))
    input: Any = args[0] if args else next(tensors, None)
    input = input.to(output.device)
    updates = adapters.updates("weight", override, compiling, input.is_meta)
    updates.of_input(input, slot.shape)  # raises if samples can't be routed
    return updates.added(output, input, partial(_delta, module, slot))


def _delta(module: nn.Module, slot: Slot, x: Tensor, update: Update) -> Tensor:
    """Return s dW x of one update; only methods that need W read it."""

    def read() -> Tensor:
        return weight_for(update.method, module, slot, own_weight(module), update.block)

    weight = read()
    # Without a bias, which stands where an embedding has its padding_idx.
    multiply: Any = F.embedding if slot.layout.pattern == "index out" else F.linear
    # Hooks do not nest, and activation checkpointing has some, which keep nothing either.
    others = is_compiling() or transforms_active() or saving_hooks(True)
    if others or not update.method.reads_weight:
        return update_product(multiply, x, weight, slot.layout, update)
    # Backward reads W again. Else each layer would keep a dense copy of its quantised weight.
    dense = id(weight)  # not W itself, which would live as long as this function
    with saved_tensors_hooks(
        lambda saved: None if id(saved) == dense else saved,
        lambda saved: read() if saved is None else saved,
    ):
        return update_product(multiply, x, weight, slot.layout, update)

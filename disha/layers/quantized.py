"""Quantised weights: how to recognise them, how to read them, and how their layers add updates.

A library stores such a weight in a format of its own and computes the product with it, so a forward
hook adds the update to the output. BAT and a dense merge need W's values, and read them with
functions of that library, which the user has imported already: nothing is imported here. To support
another format, recognise it in `quantization_of` and say how to read it.
"""

from __future__ import annotations

from collections.abc import Callable
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
from disha.layers.adapters import Adapters, original_class
from disha.layers.containers import CHILD_NAME
from disha.layers.spec import BlockSpec
from disha.private_torch import saving_hooks, transforms_active
from disha.sharding.imported import imported_class

_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
_MASKS_AND_INDICES = (torch.bool, torch.int64)
_NEVER_PACKED = {*TRAINABLE_DTYPES, *_COMPLEX, *_MASKS_AND_INDICES}
_UNINITIALISED = (UninitializedParameter, UninitializedBuffer)  # torch can't compile `is_lazy`


# --- recognising ---------------------------------------------------------------------------------


class Quantization(NamedTuple):
    """How a weight is quantised."""

    name: str
    read: Callable[[nn.Module, Any], Tensor] | None
    """(module, weight) -> the dense weight; None if it is not known how to read it."""


ROUNDED = Quantization("rounded by the layer's forward", lambda module, weight: weight.detach())
"""A weight that is stored dense, and that its layer rounds in each forward."""


def quantization_of(module: nn.Module | None, weight: Any) -> Quantization | None:
    """Return how a module's weight is quantised; None if it is not, or in an unknown way.

    Without a module, only the tensor itself is asked.
    """
    if isinstance(weight, _UNINITIALISED):
        return None
    quantization = None
    if isinstance(weight, Tensor):
        quantization = _quantization_of_tensor(module, weight)
    if quantization is None and module is not None:
        quantization = _quantization_of_module(module, weight)
    return quantization


def _quantization_of_tensor(module: nn.Module | None, weight: Tensor) -> Quantization | None:
    """Return how a tensor is quantised, as its class or its attributes say."""
    bits = bitsandbytes.bits_of(module, weight)
    if bits is not None:
        return Quantization(f"bitsandbytes {bits}-bit", bitsandbytes.READERS[bits])
    if type(weight).dequantize is not Tensor.dequantize:
        return Quantization("a quantised tensor", _read_subclass)
    if isinstance(weight, imported_class("torchao.utils", "TorchAOBaseTensor")):
        return Quantization("a quantised tensor", None)
    return None


def _quantization_of_module(module: nn.Module, weight: Any) -> Quantization | None:
    """Return how a module quantises its weight, which may be in tensors of other names."""
    if isinstance(weight, Tensor) and weight.dtype in TRAINABLE_DTYPES:
        is_compressed = {"forward", "quantization_scheme"} <= module.__dict__.keys()
        if is_compressed or isinstance(module, bitsandbytes.library_classes()):
            return ROUNDED
        return None
    if not _packs_weight(module):
        return None
    read = _read_module if _can_dequantize(module) else None
    return Quantization("in a format of its own", read)


def _packs_weight(module: nn.Module) -> bool:
    """Whether a module holds its weight in tensors of another form, as GPTQ, AWQ and HQQ do."""
    sizes = _sizes_of(module)
    if sizes is None or "parametrizations" in module._modules:
        return False
    has_forward_of_torch = original_class(module).forward in (
        nn.Linear.forward,
        nn.Embedding.forward,
    )
    if has_forward_of_torch and "forward" not in module.__dict__:
        return False  # it multiplies by a dense weight
    if _can_dequantize(module):
        return True
    inputs, outputs = sizes
    tensors = _held_tensors(module)
    for tensor in tensors:
        if tensor.dtype in TRAINABLE_DTYPES and sorted(tensor.shape) == sorted(sizes):
            return False  # it has a dense weight, under another name
    # A packed weight has at least one bit for each number. So a smaller tensor is no weight: it
    # has scales, or zero points.
    return any(
        tensor.dtype not in _NEVER_PACKED and tensor.nbytes * 8 >= inputs * outputs
        for tensor in tensors
    )


# --- reading -------------------------------------------------------------------------------------


def _can_dequantize(module: nn.Module) -> bool:
    return callable(getattr(module, "dequantize", None))


def _read_module(module: Any, weight: Any) -> Tensor:
    return module.dequantize()


def _read_subclass(module: nn.Module, weight: Any) -> Tensor:
    """Return the dense weight in the dtype that the tensor reports."""
    if hasattr(weight, "get_original_weight"):
        dense = weight.get_original_weight()  # NF4Tensor's `dequantize` does something else
    else:
        dense = weight.dequantize()
    return dense.to(weight.dtype)


def dequantize(module: nn.Module, weight: Any) -> Tensor:
    """Return the dense weight that a weight of a module stands for; itself if it is dense."""
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


def weight_for(
    method: Method, module: nn.Module, spec: BlockSpec, weight: Any, like: Tensor
) -> Tensor:
    """Return the dense weight if the method reads W, or else a tensor of its shape, like `like`."""
    if method.reads_weight:
        return dequantize(module, weight)
    return like.new_empty(()).expand(spec.shape)  # of one number in memory


# --- modules with a quantised weight -------------------------------------------------------------


def quantized_weight(module: nn.Module) -> BlockSpec | None:
    """Return the quantised weight of a module, or None if it has none."""
    sizes = _sizes_of(module)
    if sizes is None or quantization_of(module, held_weight(module)) is None:
        return None
    inputs, outputs = sizes
    layout = Layout("out in")
    shape = (outputs, inputs)
    if isinstance(module, nn.Embedding):
        layout = Layout("index out", padding_idx=module.padding_idx)
        shape = (inputs, outputs)
    return BlockSpec("", layout=layout, shape=shape, quantized=True)


_SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))


def _sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a module that has attributes for its sizes, or None."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    for in_name, out_name in _SIZES:
        inputs = getattr(module, in_name, None)
        outputs = getattr(module, out_name, None)
        if isinstance(inputs, int) and isinstance(outputs, int) and inputs > 0 and outputs > 0:
            return inputs, outputs
    return None


def takes_dense(module: nn.Module) -> bool:
    """Whether a module can compute W x + b with a dense W in place of the quantised one."""
    original = original_class(module)
    return original.forward is nn.Linear.forward or bitsandbytes.is_library_forward(original)


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device of a module with a quantised weight, or None if it has no tensor."""
    tensors = _held_tensors(module)
    return tensors[0].device if tensors else None


def _held_tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module, without those of its children."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [
        tensor
        for tensor in tensors
        if tensor is not None and not isinstance(tensor, _UNINITIALISED)
    ]


def held_weight(module: nn.Module, name: str = "weight") -> Tensor | None:
    """Return a parameter or buffer that a module itself holds, or None."""
    return module._parameters.get(name, module._buffers.get(name))


# --- base classes of adapted modules -------------------------------------------------------------


class _SavesAdapters(nn.Module):
    """A base class for modules whose `state_dict` leaves children out, as HQQ's does."""

    disha: Any

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the class saves, and the adapters."""
        state = super().state_dict(*args, **kwargs)
        destination = kwargs.get("destination")
        if destination is None:
            destination = state
        prefix = f"{kwargs.get('prefix', '')}{CHILD_NAME}."
        self.disha.state_dict(**{**kwargs, "destination": destination, "prefix": prefix})
        return state


def leading_bases(original: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    """Return what an adapted class with a quantised weight inherits from before its original."""
    if bitsandbytes.is_library_forward(original):
        return (bitsandbytes.BitsandbytesLayer,)
    if original.state_dict is not nn.Module.state_dict:
        return (_SavesAdapters,)
    return ()


# --- adding updates to the output of a module ----------------------------------------------------


def attach_hook(module: nn.Module) -> None:
    """Let a module add the updates to its output, before other hooks see the output."""
    bitsandbytes.refuse_repacked(held_weight(module))
    module.register_forward_hook(add_updates, with_kwargs=True, prepend=True)


def remove_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove a hook of forward. A copy of a module has its hooks, but no handle for them."""
    for hooks, with_kwargs in (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for number, attached in list(hooks.items()):
            if attached is hook:
                del hooks[number]
                with_kwargs.pop(number, None)


def add_updates(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Return the output with the updates that act: the hook of a module with a quantised weight."""
    adapters: Adapters = module.disha
    compiling = is_compiling()
    override = adapters.find_override(compiling)
    blocks = adapters.acting_blocks("weight", override)
    if not blocks:
        return output
    spec = blocks[0].spec
    # The module takes one tensor, by position or under a name of its class.
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    input = tensors[0].to(output.device)
    updates = adapters.updates("weight", override, compiling, on_meta=input.is_meta)
    updates.shared_for_input(input, spec.shape)  # raises if samples can't be routed
    return updates.add_updates(output, input, partial(_delta, module, spec))


def _delta(module: nn.Module, spec: BlockSpec, x: Tensor, update: Update) -> Tensor:
    """Return s dW x of one update; W is dequantised only for methods that read it."""

    def read() -> Tensor:
        return weight_for(update.method, module, spec, held_weight(module), update.block)

    weight = read()
    # The third argument is no bias here: for an embedding, it would be its padding_idx.
    multiply: Any = F.embedding if spec.layout.pattern == "index out" else F.linear
    # If hooks are set already, ours can't be added; checkpointing's keep no dense W anyway.
    has_other_hooks = is_compiling() or transforms_active() or saving_hooks(True)
    if has_other_hooks or not update.method.reads_weight:
        return update_product(multiply, x, weight, spec.layout, update)
    dense_id = id(weight)  # the id alone, because W would live as long as these functions

    def save(saved: Tensor) -> Tensor | None:
        return None if id(saved) == dense_id else saved

    def load(saved: Tensor | None) -> Tensor:
        return read() if saved is None else saved

    # Backward dequantises W again. Otherwise autograd would keep a dense copy for each layer.
    with saved_tensors_hooks(save, load):
        return update_product(multiply, x, weight, spec.layout, update)

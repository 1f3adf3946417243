"""Opaque weights: those that are no dense tensor, as quantised ones are.

The module's product of such a weight is left to the library that made it, and a forward hook adds
the update to what the module returns. Methods whose update does not depend on W never read it. The
others, and a dense merge, get W by the means of the library. No such library is imported: whoever
has a quantised model has imported it already.

A weight is opaque in one of four ways:

- bitsandbytes 4-bit: values of four bits, packed in a tensor of any dtype and shape; scales in the
  weight's `quant_state`. 8-bit: int8, with one scale per row in the weight's `SCB` until the first
  forward moves it to the layer's `state`.
- A tensor subclass that says how to dequantise it, as torchao's do, inside a plain `nn.Linear`.
- A module that says its sizes and packs its weight in tensors of its own, as those of GPTQ, AWQ,
  HQQ, BitNet and compressed-tensors and the fp8 linears of transformers do.
- A dense weight that the module's forward rounds: bitsandbytes before it has quantised, and
  compressed-tensors after it has decompressed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from disha import functional
from disha.config import BLOCK_DTYPES
from disha.errors import ArgumentError, ArgumentTypeError
from disha.functional import Layout, Update
from disha.layers.blocks import Slot
from disha.layers.hooks import add_first_hook, remove_first_hook

__all__ = [
    "ROUNDED",
    "Quantisation",
    "attach_hook",
    "dequantised",
    "device_of",
    "front_of",
    "is_library_forward",
    "is_quantised",
    "kept_packed",
    "opaque_slot",
    "original_class",
    "parameter_count",
    "quantisation_of",
    "remove_hook",
    "takes_dense",
    "weight_for",
]


@dataclass(frozen=True)
class Quantisation:
    """How a weight is quantised.

    Attributes:
        name: what messages call it.
        read: (module, weight) -> the dense weight in the dtype in which the layer computes with
            it, or None where that is not known.
    """

    name: str
    read: Callable[[nn.Module, Tensor], Tensor] | None


def quantisation_of(module: nn.Module | None, weight: object) -> Quantisation | None:
    """Return how a weight is quantised, or None where it is in none of the known ways.

    Args:
        module: the module that has it, if known: it may hold a part of the scales.
        weight: the weight, or None where the module has it under another name.
    """
    if isinstance(weight, _UNINITIALISED):
        return None
    if isinstance(weight, Tensor):
        if _quant_state(weight) is not None:
            return FOUR_BIT
        if weight.dtype == torch.int8 and _row_scales(module, weight) is not None:
            return EIGHT_BIT
        if type(weight).dequantize is not Tensor.dequantize:
            return Quantisation("a quantised tensor", _read_subclass)
        if _is_from_torchao(weight):
            return Quantisation("a quantised tensor", None)
        if weight.dtype in _DENSE_DTYPES:
            return ROUNDED if _rounds(module) else None
    return _packed_by(module)


def is_quantised(parameter: Tensor) -> bool:
    """Whether a parameter, known by itself, holds quantised values: none that could be trained."""
    return quantisation_of(None, parameter) is not None


def dequantised(module: nn.Module, weight: Any) -> Tensor:
    """Return a weight of `module` as a dense one; `weight` itself where it is dense.

    Raises:
        ArgumentError: it can't be read as numbers.
    """
    found = quantisation_of(module, weight)
    if found is None:
        dense: Tensor = weight
        return dense
    if found.read is None:
        raise ArgumentError(
            f"the weight of {original_class(module).__qualname__} is quantised ({found.name}) and "
            "can't be read as numbers; only what does not depend on it can be had ('bone')"
        )
    with torch.no_grad():
        return found.read(module, weight)


def weight_for(method: str, module: nn.Module, slot: Slot, weight: Any, like: Tensor) -> Tensor:
    """Return an opaque weight as a method needs it: its numbers, or a tensor of its shape.

    Args:
        method: the method; only one that reads W has it dequantised.
        module: the module.
        slot: the weight.
        weight: what the module holds in its place.
        like: gives the device and the dtype of the tensor that has only a shape.
    """
    assert slot.shape is not None
    if functional.method_of(method).reads_weight:
        return dequantised(module, weight)
    return like.new_empty(()).expand(slot.shape)


def parameter_count(parameter: Tensor) -> int:
    """Return how many numbers a parameter stands for: packing does not make them fewer."""
    state = _quant_state(parameter)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device of a module with an opaque weight."""
    return next((tensor.device for tensor in _own_tensors(module)), None)


def takes_dense(module: nn.Module) -> bool:
    """Whether a module still computes W x + b when a dense W takes the place of the opaque one."""
    original = original_class(module)
    return original.forward is nn.Linear.forward or is_library_forward(original)


_UNINITIALISED = (UninitializedParameter, UninitializedBuffer)
_DENSE_DTYPES = frozenset(BLOCK_DTYPES.values())


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, or the one that it had before it was adapted."""
    cls: type[nn.Module] = getattr(type(module), "original_class", type(module))
    return cls


def _own_tensors(module: nn.Module) -> list[Tensor]:
    own = (*module._parameters.values(), *module._buffers.values())
    return [one for one in own if one is not None and not isinstance(one, _UNINITIALISED)]


def _own_weight(module: nn.Module) -> Tensor | None:
    return module._parameters.get("weight", module._buffers.get("weight"))


def _imported(module: str, name: str) -> Any:
    """Return a name of a module that has been imported by now, or None."""
    return getattr(sys.modules.get(module), name, None)


# --- what the classes of libraries lack ----------------------------------------------------------


class OpaqueLayer(nn.Module):
    """In front of the class of a module with an opaque weight."""

    disha: Any

    def __dir__(self) -> list[str]:
        # jit.trace reads all that is listed, and a weight is not to be read.
        listed: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return [name for name in listed if name != "base_weight"]


class _ListsItself(OpaqueLayer):
    """In front of classes whose `state_dict` has no children, such as HQQ's: adds the adapters."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the class lists, and the adapters."""
        state = super().state_dict(*args, **kwargs)
        listed = kwargs.get("destination")
        self.disha.state_dict(
            destination=state if listed is None else listed,
            prefix=f"{kwargs.get('prefix', '')}disha.",
            keep_vars=kwargs.get("keep_vars", False),
        )
        return state


def front_of(original: type[nn.Module]) -> type[OpaqueLayer]:
    """Return the class to put in front of a module's own when its opaque weight is adapted."""
    if is_library_forward(original):
        return _Bitsandbytes
    return OpaqueLayer if original.state_dict is nn.Module.state_dict else _ListsItself


# --- bitsandbytes --------------------------------------------------------------------------------


def _quant_state(weight: Tensor) -> Any:
    """Return the scales of a 4-bit weight, which pickling leaves on it when its class is lost."""
    return getattr(weight, "quant_state", None)


def _row_scales(module: nn.Module | None, weight: Tensor) -> Tensor | None:
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    return scales if isinstance(scales, Tensor) else None


def _read_4bit(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the dense weight in the layer's compute dtype, or else the dtype it had before."""
    kernels = sys.modules["bitsandbytes.functional"]
    data, state = _unpacked(kernels, weight)
    compute_dtype = getattr(module, "compute_dtype", None)
    if compute_dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = compute_dtype
    dense: Tensor = kernels.dequantize_4bit(data, state)
    return dense


def _unpacked(kernels: Any, weight: Tensor) -> tuple[Tensor, Any]:
    """Return a 4-bit weight's data and a copy of its scales, in the layout that they start in.

    On CPUs with AVX512-BF16, the first forward in eval mode packs both for a kernel, in place:
    scales become a transposed bfloat16 matrix.
    """
    state = copy.copy(_quant_state(weight))
    if not _is_packed(weight):
        return weight.data, state
    absmax = state.absmax.T.reshape(-1).float()
    state.original_nested = False  # else bitsandbytes quantises the scales anew
    data, state = kernels._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = absmax
    return data, state


def _read_8bit(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the dense weight in float32: nothing records the dtype that it had before."""
    kernels = sys.modules["bitsandbytes.functional"]
    dense: Tensor = kernels.int8_vectorwise_dequant(weight.data, _row_scales(module, weight))
    return dense


FOUR_BIT = Quantisation("bitsandbytes 4-bit", _read_4bit)
EIGHT_BIT = Quantisation("bitsandbytes 8-bit", _read_8bit)


def is_library_forward(cls: type[nn.Module]) -> bool:
    """Whether a class's forward is bitsandbytes' own: W x + b by kernels for a quantised W."""
    linear = _imported_classes("Linear4bit", "Linear8bitLt")
    return any(cls.forward is known.forward for known in linear)


def _imported_classes(*names: str) -> tuple[type[nn.Module], ...]:
    """Return classes of bitsandbytes; none if it has not been imported."""
    found = (_imported("bitsandbytes.nn", name) for name in names)
    return tuple(cls for cls in found if cls is not None)


def _is_packed(weight: Tensor) -> bool:
    return getattr(_quant_state(weight), "packing_format_for_cpu", False) is True


@contextmanager
def kept_packed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the modules' state dict be listed without changing its weights.

    bitsandbytes unpacks a packed 4-bit weight when it is saved: in place, and with scales that are
    rounded once more, or not unpacked at all. The 4-bit entries of a state dict that is made in
    here are of no use.
    """
    weights = [weight for module in modules for weight in module._parameters.values()]
    states = [_quant_state(weight) for weight in weights if weight is not None]
    packed = [state for state in states if getattr(state, "packing_format_for_cpu", False)]
    for state in packed:
        state.packing_format_for_cpu = False
    try:
        yield
    finally:
        for state in packed:
            state.packing_format_for_cpu = True


class _KernelOutput(torch.autograd.Function):
    """y = W x + b by the kernel for packed weights, with gradients: dX = dY W, db = sum of dY."""

    @staticmethod
    def forward(
        input: Tensor,
        bias: Tensor | None,
        layer: nn.Module,
        weight: Tensor,
        run: Callable[[Tensor], Tensor],
    ) -> Tensor:
        return run(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, bias, ctx.layer, ctx.weight, _ = inputs
        ctx.dtypes = (input.dtype, None if bias is None else bias.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        input_dtype, bias_dtype = ctx.dtypes
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = dequantised(ctx.layer, ctx.weight)
            grad_input = (grad.to(weight.dtype) @ weight).to(input_dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=bias_dtype)
        return grad_input, grad_bias, None, None, None


class _Bitsandbytes(OpaqueLayer):
    """In front of the linear layers of bitsandbytes: gradients, and dense merged weights."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the library's forward, or a plain product while a dense weight is merged in."""
        input: Any = args[0] if args else next(iter(kwargs.values()), None)
        weight: Any = self._parameters["weight"]
        bias = self._parameters["bias"]
        if self._is_dense():
            return _dense_linear(input, weight, bias)
        if not _is_packed(weight) or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        run = super().forward
        return _KernelOutput.apply(input, bias, self, weight, run)  # type: ignore[no-untyped-call]

    def _is_dense(self) -> bool:
        merged = self.disha.merged
        return merged is not None and any(one.dense for one in merged.originals.values())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._is_dense():
            # A dense weight is saved as a plain layer's, without the quantised one's scales.
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)


def _dense_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return W x + b, computed in W's dtype and returned in the input's, as quantised layers do."""
    bias = None if bias is None else bias.to(weight.dtype)
    return F.linear(input.to(weight.dtype), weight, bias).to(input.dtype)


# --- tensor subclasses ---------------------------------------------------------------------------


def _is_from_torchao(weight: Tensor) -> bool:
    base = _imported("torchao.utils", "TorchAOBaseTensor")
    return base is not None and isinstance(weight, base)


def _read_subclass(module: nn.Module, weight: Any) -> Tensor:
    """Return the dense weight in the dtype that the tensor passes for."""
    # torchao's NF4Tensor has a `dequantize` that means something else.
    original = getattr(weight, "get_original_weight", None)
    dense: Tensor = weight.dequantize() if original is None else original()
    return dense.to(weight.dtype)


# --- modules that round or pack their weight -----------------------------------------------------


def _rounds(module: nn.Module | None) -> bool:
    """Whether a module's forward rounds its dense weight."""
    if module is None:
        return False
    names = ("Linear4bit", "Linear8bitLt", "Embedding4bit", "Embedding8bit")
    if isinstance(module, _imported_classes(*names)):
        return True
    # compressed-tensors gives instances a scheme and a forward.
    return "forward" in module.__dict__ and "quantization_scheme" in module.__dict__


def _read_dense(module: nn.Module, weight: Tensor) -> Tensor:
    return weight.detach()


ROUNDED = Quantisation("rounded by the layer's forward", _read_dense)


def _packed_by(module: nn.Module | None) -> Quantisation | None:
    """Return how a module packs its weight in tensors of its own, or None where it does not.

    It says its sizes, has a forward of its own, and computes no weight by a parametrization. None
    of its tensors is a dense one as large as W. One has at least a bit for each number of W, or
    else the module has a `dequantize`.
    """
    sizes = None if module is None else sizes_of(module)
    if module is None or sizes is None or _has_plain_forward(module):
        return None
    if "parametrizations" in module._modules:
        return None
    own, numbers = _own_tensors(module), sizes[0] * sizes[1]
    if any(one.dtype in _DENSE_DTYPES and one.numel() >= numbers for one in own):
        return None
    if callable(getattr(module, "dequantize", None)):
        return Quantisation("in a format of its own", _read_module)
    if any(_is_packed_dtype(one.dtype) and one.nbytes * 8 >= numbers for one in own):
        return Quantisation("in a format of its own", None)
    return None


def _has_plain_forward(module: nn.Module) -> bool:
    """Whether a module computes as a plain layer does, for which no weight can be packed."""
    plain = (nn.Linear.forward, nn.Embedding.forward)
    return original_class(module).forward in plain and "forward" not in module.__dict__


def _is_packed_dtype(dtype: torch.dtype) -> bool:
    """Whether numbers may be packed in tensors of a dtype; masks are bool, indices are int64."""
    return not (dtype in _DENSE_DTYPES or dtype.is_complex or dtype in (torch.bool, torch.int64))


def _read_module(module: Any, weight: Tensor) -> Tensor:
    dense: Tensor = module.dequantize()
    inputs, outputs = sizes_of(module) or (0, 0)
    if tuple(dense.shape) != (outputs, inputs):
        raise ArgumentError(
            f"{original_class(module).__qualname__}.dequantize() returns a weight of shape "
            f"{tuple(dense.shape)}, expected (out, in) = {(outputs, inputs)}; use 'bone', which "
            "does not read it"
        )
    return dense


_SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a module that says its sizes, or None."""
    embeds = isinstance(module, nn.Embedding)
    for names in (("num_embeddings", "embedding_dim"),) if embeds else _SIZES:
        inputs, outputs = (getattr(module, name, None) for name in names)
        if isinstance(inputs, int) and isinstance(outputs, int) and inputs > 0 and outputs > 0:
            return inputs, outputs
    return None


def opaque_slot(module: nn.Module) -> Slot | None:
    """Return the slot of a module whose weight is opaque, or None where it is not."""
    if getattr(type(module), "is_opaque", False):  # adapted, and maybe dense by now
        adapters: Any = module._modules["disha"]
        slot: Slot = next(iter(adapters.blocks().values())).slot
        return replace(slot, rows=())
    sizes = sizes_of(module)
    if sizes is None or quantisation_of(module, _own_weight(module)) is None:
        return None
    if isinstance(module, nn.Embedding):
        layout = Layout("index out", padding_idx=module.padding_idx)
        return Slot("", "weight", layout, opaque=True, shape=sizes)
    return Slot("", "weight", Layout("out in"), linear=True, opaque=True, shape=sizes[::-1])


# --- adding to what a module returns -------------------------------------------------------------


def attach_hook(module: nn.Module) -> None:
    """Let a module add the updates of its adapters to its output, before other hooks see it."""
    add_first_hook(module, _add_updates)


def remove_hook(module: nn.Module) -> None:
    """Undo `attach_hook`."""
    remove_first_hook(module, _add_updates)


def _add_updates(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    adapters = module.disha
    blocks = adapters.acting("weight")
    routed = adapters.routed("weight")
    if not blocks and routed is None:
        return output
    slot = next(iter(adapters.blocks().values())).slot
    looks_up = slot.layout.pattern == "index out"
    tensors = (value for value in kwargs.values() if isinstance(value, Tensor))
    input: Any = args[0] if args else next(tensors, None)
    _check_output(module, slot, input, output)
    input = input.to(output.device)

    def delta_of(x: Tensor, update: Update) -> Tensor:
        return _delta(module, slot, x, update)

    if routed is not None:
        sampled = input.dim() >= (1 if looks_up else 2)
        return routed.added(output, input, slot.shape, delta_of, sampled)
    for block in blocks:
        output = output + delta_of(input, block.update(input.is_meta)).to(output.dtype)
    return output


def _check_output(module: Any, slot: Slot, input: Any, output: Any) -> None:
    """Raise unless a module has turned one tensor into another as its sizes say.

    Raises:
        ArgumentTypeError: its update can't be added: not one tensor goes in and one out.
        ArgumentError: the output is of another shape (a linear layer in groups, say).
    """
    cls = type(module).original_class.__qualname__
    if not isinstance(output, Tensor) or not isinstance(input, Tensor):
        raise ArgumentTypeError(
            f"the adapter of {cls} can't act: adding to the output of its forward needs one tensor "
            f"in and one out, but it takes {type(input).__name__} and returns "
            f"{type(output).__name__}; leave it out with exclude="
        )
    assert slot.shape is not None
    looks_up = slot.layout.pattern == "index out"
    outputs = slot.shape[1] if looks_up else slot.shape[0]
    expected = (*(input.shape if looks_up else input.shape[:-1]), outputs)
    if tuple(output.shape) != expected:
        raise ArgumentError(
            f"the adapter of {cls} can't act: for an input of shape {tuple(input.shape)} its "
            f"forward returns {tuple(output.shape)}, and its sizes say {expected}; leave it out "
            "with exclude="
        )


def _delta(module: nn.Module, slot: Slot, x: Tensor, update: Update) -> Tensor:
    """Return s dW x of one update; W is read only by methods that need it."""
    weight = weight_for(update.method, module, slot, _own_weight(module), update.block)
    multiply = _look_up if slot.layout.pattern == "index out" else F.linear
    return functional.update_product(multiply, x, weight, slot.layout, update)


def _look_up(indices: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    return F.embedding(indices, table)

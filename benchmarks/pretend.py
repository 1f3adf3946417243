"""A device that only pretends to be one: its memory is the host's, and the CPU computes for it.

To torch, it is a device like a GPU: tensors have to be moved to it, its kernels accept no tensors
of the CPU, autocast has its own state there, and a gradient is computed in a thread of its own. So
it shows, without a GPU, what the paths for devices do. It says nothing about time.

A backend of torch belongs to the process and can't be removed, so it needs a process of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

__all__ = ["NAME", "start"]

NAME = "pretend"

CPU, OTHER = 1, 12
"""How DLPack calls the CPU, and a device that it does not know."""

CASTS = (
    *("linear", "matmul", "mm", "addmm", "bmm", "baddbmm"),
    *("conv1d", "conv2d", "scaled_dot_product_attention"),
)
"""The operations that autocast computes in 16 bits, as on other devices."""

_libraries: list[torch.library.Library] = []


class _Handle(ctypes.Structure):
    """The first fields of the structure in a DLPack capsule."""

    _fields_ = (("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("index", ctypes.c_int32))


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _on(kind: int, tensor: Tensor) -> Tensor:
    """Return a tensor of another device with the same memory."""
    capsule = torch._C._to_dlpack(tensor)
    handle = _Handle.from_address(_pointer(capsule, b"dltensor"))
    handle.device, handle.index = kind, 0
    return torch._C._from_dlpack(capsule)  # type: ignore[no-any-return]


class _Module(backend_registration._DummyBackendModule):
    """What torch asks a device for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self) -> None:
        """Wait for nothing: each operation is done when it returns."""


@cache
def start() -> torch.device:
    """Make the device known to torch, and return it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    every = torch.library.Library("_", "IMPL")
    every.fallback(_compute, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    # Of these two, torch has a kernel that only raises, and comes before the fallback.
    aten.impl("convolution_overrideable", _convolution, "PrivateUse1")
    aten.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    for name in CASTS:
        aten.impl(name, _autocast(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
    _libraries.extend((every, aten))
    return torch.device(NAME, 0)


def _convolution(*args: Any) -> Any:
    return _compute(torch.ops.aten.convolution.default, *args)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Any:
    own = (grad, x, weight, [grad.shape[1]], *args)
    return _compute(torch.ops.aten.convolution_backward.default, *own)


def _compute(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the CPU, in the memory of its operands."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def lowered(value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type == NAME:
            # An output may be given empty, to be resized. Memory of another can't be.
            empty = value.numel() == 0
            below = value.new_empty(value.shape, device="cpu") if empty else _on(CPU, value)
            pairs.append((value, below))
            return below
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def raised(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # What an operation has written into is returned as it was given.
        same = (own for own, below in pairs if below is value)
        return next(same, None) if any(b is value for _, b in pairs) else _on(OTHER, value)

    below, named = tree_map(lowered, (list(args), kwargs))
    for index, argument in enumerate(operation._schema.arguments[: len(below)]):
        if str(argument.type) == "Tensor" and isinstance(below[index], int | float):
            below[index] = torch.tensor(below[index])  # a number, which torch has unwrapped
    if operation._schema.name == "aten::_copy_from":  # the only one between devices
        below[1].copy_(below[0])
        return args[1]
    result = operation(*below, **named)
    for own, changed in pairs:
        if own.shape != changed.shape:
            own.data = _on(OTHER, changed)
    return tree_map(raised, result)


def _autocast(operation: Any) -> Callable[..., Any]:
    """Return an operation that casts its float32 operands to the dtype of autocast."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)

        def cast(value: Any) -> Any:
            floats = isinstance(value, Tensor) and value.dtype in (torch.float32, dtype)
            return value.to(dtype) if floats else value

        with torch._C._ExcludeDispatchKeyGuard(key):
            return operation(*map(cast, args), **{name: cast(one) for name, one in kwargs.items()})

    return kernel

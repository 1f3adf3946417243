"""Products of 16-bit matrices, on a processor that has no instructions for them.

There, torch multiplies 16-bit matrices 10 to 70 times as slowly as float32. So the same operands
are multiplied in float32, and the result is rounded to 16 bits, as such instructions do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_PRODUCTS = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    # In inference mode, torch does not split these into the products above.
    _aten.linear.default,
    _aten.matmul.default,
)


@contextmanager
def fast_16_bit_products() -> Iterator[None]:
    """Multiply 16-bit matrices in float32 where the processor would take far longer."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield
        return
    with RoundedProducts():
        yield


class RoundedProducts(TorchDispatchMode):
    """Compute products of bfloat16 in float32, and round them; forward and backward."""

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if function not in _PRODUCTS or args[0].dtype != torch.bfloat16:
            return function(*args, **named)
        wide = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        return function(*wide, **named).to(torch.bfloat16)

"""In what precision a device computes, whatever the parameters are kept in."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["computing_in_bf16", "computing_in_tf32", "emulates_bf16"]

WITHOUT_BF16 = ("DEFAULT", "NO AVX", "AVX2")
"""What torch calls x86 processors for which it has no fast products in bfloat16."""


def emulates_bf16(device: torch.device) -> bool:
    """Whether a device takes many times as long for products in bfloat16 as in float32."""
    return (
        device.type == "cpu"
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.cpu.get_cpu_capability() in WITHOUT_BF16
    )


def computing_in_bf16(device: torch.device, enabled: bool) -> torch.autocast:
    """Compute in bfloat16 where that is safe (autocast), if `enabled`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@contextmanager
def computing_in_tf32(enabled: bool) -> Iterator[None]:
    """Let CUDA compute float32 products in TF32, if `enabled`; as before afterwards."""
    if not enabled:
        yield
        return
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = True
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before

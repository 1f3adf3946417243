"""Number formats of the machine, and errors when its memory runs out."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from disha import DishaError
from disha.finetune.errors import TrainingError

__all__ = ["FEWER_BITS", "computing_in_tf32", "emulates_bf16", "explaining_lack_of_memory"]

WITHOUT_BF16 = ("DEFAULT", "NO AVX", "AVX2")
"""Torch's names for x86 processors that have no fast products in bfloat16."""

ALLOCATOR = ("can't allocate memory", "not enough memory")
"""Words in errors of the CPU's allocator, which raises a plain RuntimeError."""


def emulates_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies in bfloat16 many times slower than in float32."""
    return (
        device.type == "cpu"
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.cpu.get_cpu_capability() in WITHOUT_BF16
    )


@contextmanager
def computing_in_tf32(enabled: bool) -> Iterator[None]:
    """Let CUDA compute float32 products in TF32 inside the block, if `enabled`."""
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


FEWER_BITS = "keep the model in fewer --bits (bf16, 8 or 4)"

TRAINING = (
    "lower --per_device_train_batch_size (and raise --gradient_accumulation_steps, for the same "
    f"result) or --max_seq_length, give --gradient_checkpointing, or {FEWER_BITS}"
)
"""What to do if memory runs out in training."""


@contextmanager
def explaining_lack_of_memory(remedy: str = TRAINING) -> Iterator[None]:
    """Say what to do if memory runs out inside the block.

    Args:
        remedy: what to do.

    Raises:
        TrainingError: memory runs out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_out = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if isinstance(error, DishaError) or not (is_out or _is_of_allocator(error)):
            raise
        where = "on the GPU" if isinstance(error, torch.OutOfMemoryError) else "on this machine"
        raise TrainingError(f"there is not enough memory {where}; {remedy}") from error


def _is_of_allocator(error: Exception) -> bool:
    return any(words in str(error) for words in ALLOCATOR)

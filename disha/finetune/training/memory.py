"""Saying what to lower when memory does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from disha import DishaError
from disha.finetune.errors import TrainingError

__all__ = ["explaining_lack_of_memory"]

ALLOCATOR = ("can't allocate memory", "not enough memory")
"""What the CPU's allocator says in a RuntimeError of no kind of its own."""


@contextmanager
def explaining_lack_of_memory() -> Iterator[None]:
    """Say which flags to lower, when memory does not suffice for what is done meanwhile.

    Raises:
        TrainingError: it does not.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, DishaError) or not _is_lack_of_memory(error):
            raise
        where = "on the GPU" if isinstance(error, torch.OutOfMemoryError) else "on this machine"
        raise TrainingError(
            f"there is not enough memory {where}; lower --per_device_train_batch_size (and raise "
            "--gradient_accumulation_steps, for the same result) or --max_seq_length, give "
            "--gradient_checkpointing, or keep the model in fewer --bits (bf16, 8 or 4)"
        ) from error


def _is_lack_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ALLOCATOR)

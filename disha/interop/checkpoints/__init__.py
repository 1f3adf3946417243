"""Base checkpoints on disk: merge an adapter file into one, or ask whether the two belong together.

`base` opens a checkpoint and finds the weights of an adapter in it. `merging` writes a copy with
the adapter merged into its weights.
"""

from disha.interop.checkpoints.base import (
    Checkpoint,
    base_shapes,
    base_weights,
    misfits,
    open_checkpoint,
)
from disha.interop.checkpoints.merging import MergedCheckpoint, merge_into_checkpoint

__all__ = [
    "Checkpoint",
    "MergedCheckpoint",
    "base_shapes",
    "base_weights",
    "merge_into_checkpoint",
    "misfits",
    "open_checkpoint",
]

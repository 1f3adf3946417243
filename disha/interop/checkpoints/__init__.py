"""Base checkpoints on disk, and adapter files: merging one into the other, and comparing them.

From bottom to top:

- `reading`: one safetensors file, or a folder of shards, opened without reading tensors
- `names`: how the names of the adapter's model become the checkpoint's
- `matching`: whether the weights of an adapter's layers are there, fit, and are of its base
- `merging`: a copy of the checkpoint with the adapter in its weights
"""

from disha.interop.checkpoints.matching import (
    BaseReport,
    Finding,
    base_shapes,
    base_weights,
    verify_against,
)
from disha.interop.checkpoints.merging import MergedCheckpoint, merge_into_checkpoint
from disha.interop.checkpoints.reading import Checkpoint, open_checkpoint

__all__ = [
    "BaseReport",
    "Checkpoint",
    "Finding",
    "MergedCheckpoint",
    "base_shapes",
    "base_weights",
    "merge_into_checkpoint",
    "open_checkpoint",
    "verify_against",
]

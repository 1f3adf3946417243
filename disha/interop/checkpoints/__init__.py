"""Base checkpoints on disk, and adapter files: merging one into the other, and comparing them.

From bottom to top:

- `reading`: one safetensors file, or a folder of shards, opened without reading tensors
- `names`: where in it the weights of an adapter's layers are
- `updates`: what a block does to a weight, by the weight's layout
- `weights`: the weights and shapes that conversions ask for
- `verifying`: whether an adapter fits a checkpoint, and is of that base
- `writing`: a copy of the checkpoint with the adapter in its weights
- `merging`: `merge_into_checkpoint`, and what it refuses
"""

from disha.interop.checkpoints.merging import MergedCheckpoint, merge_into_checkpoint
from disha.interop.checkpoints.reading import Checkpoint, open_checkpoint
from disha.interop.checkpoints.verifying import BaseReport, Finding, verify_against
from disha.interop.checkpoints.weights import base_shapes, base_weights

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

"""Base checkpoints on disk: merge an adapter file into one, or compare the two.

From bottom to top:

- `reading`: one safetensors file, or a folder of shards, opened without reading tensors
- `names`: maps names in the adapter's model to names in the checkpoint
- `matching`: checks that the checkpoint has the weights of an adapter's layers, and is its base
- `merging`: writes a copy of the checkpoint with the adapter merged into its weights
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

"""Base checkpoints on disk: merge an adapter file into one, or ask whether the two belong together.

A checkpoint is one safetensors file or a folder. Its names are those of the adapter's model, or
begin otherwise: as `transformers` loads a model that sees images, it renames the text layers. It
also stacks experts that are stored one by one, so these get the name of their stack too.
"""

from disha.interop.checkpoints.matching import misfits, summarize_misfits
from disha.interop.checkpoints.merging import MergedCheckpoint, merge_into_checkpoint

__all__ = ["MergedCheckpoint", "merge_into_checkpoint", "misfits", "summarize_misfits"]

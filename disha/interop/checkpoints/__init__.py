"""Base checkpoints on disk: merge an adapter file into one, or ask whether the two belong together.

A checkpoint is one safetensors file or a folder. Its names are those of the adapter's model, or
begin otherwise: `transformers` renames the text layers of models that see images as it loads them.
Single matrices of experts, which it stacks then, get the name of their stack too.
"""

from disha.interop.checkpoints.matching import misfits, summarize_misfits
from disha.interop.checkpoints.merging import MergedCheckpoint, merge_into_checkpoint

__all__ = ["MergedCheckpoint", "merge_into_checkpoint", "misfits", "summarize_misfits"]

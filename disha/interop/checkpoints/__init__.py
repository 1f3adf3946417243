"""Base checkpoints on disk: merge an adapter file into one, or ask whether the two belong together.

A checkpoint is one safetensors file or a folder. An adapter file names weights as the loaded model
does, and a checkpoint may name them differently: `transformers` renames the text layers of a model
that sees images as it loads them, and stacks experts that are stored one by one. So a weight is
also looked for under names that begin otherwise, and single experts are read as a stack.
"""

from disha.interop.checkpoints.matching import misfits, summarize_misfits
from disha.interop.checkpoints.merging import Merge as Merge
from disha.interop.checkpoints.merging import MergedCheckpoint, merge_into_checkpoint
from disha.interop.checkpoints.merging import check_target as check_target
from disha.interop.checkpoints.merging import prepare_merge as prepare_merge

__all__ = ["MergedCheckpoint", "merge_into_checkpoint", "misfits", "summarize_misfits"]

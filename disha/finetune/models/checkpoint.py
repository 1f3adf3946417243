"""Opens base models on disk: a Hugging Face folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from disha.finetune.errors import CheckpointError
from disha.finetune.models.assembly import ModelCheckpoint
from disha.finetune.models.folder import FolderCheckpoint
from disha.finetune.models.gguf import GGUFCheckpoint

__all__ = ["ModelCheckpoint", "open_model"]


def open_model(path: Path) -> ModelCheckpoint:
    """Open the folder or GGUF file at `path`, without reading weights.

    Raises:
        CheckpointError: there is nothing at `path`, it is damaged, or it is of another format.
    """
    if path.is_dir():
        return FolderCheckpoint(path)
    if path.suffix == ".safetensors" and path.is_file():
        raise CheckpointError(
            f"{path} is one safetensors file; name its folder, {path.parent}, which must hold "
            "config.json and tokenizer.json too"
        )
    return GGUFCheckpoint(path)

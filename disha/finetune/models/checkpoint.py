"""The one door to base models on disk, whichever way they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from disha.finetune.errors import CheckpointError
from disha.finetune.models.decoder import Decoder, DecoderConfig
from disha.finetune.models.folder import FolderCheckpoint
from disha.finetune.models.gguf import GGUFCheckpoint
from disha.finetune.models.quantised import WeightBits

__all__ = ["ModelCheckpoint", "open_model"]

SAFETENSORS = ".safetensors"


class ModelCheckpoint(Protocol):
    """A base model on disk, opened but not read."""

    @property
    def path(self) -> Path:
        """The folder or file."""

    @property
    def title(self) -> str:
        """What the model is called."""

    @property
    def folder(self) -> Path | None:
        """The folder that holds the tokenizer's files; None where `fields` describe it."""

    @property
    def fields(self) -> Mapping[str, Any] | None:
        """The metadata of a GGUF file, tokenizer included; None where `folder` holds it."""

    def config(self) -> DecoderConfig:
        """The model's sizes and constants.

        Raises:
            CheckpointError: one is missing, of the wrong type, or not supported.
        """

    def load_model(
        self,
        dtype: torch.dtype,
        device: torch.device | None = None,
        bits: WeightBits | None = None,
    ) -> Decoder:
        """The model, its weights read one after another.

        Args:
            dtype: of all weights that are not quantised, and of what is computed.
            device: where they go; the CPU if not given.
            bits: 8 or 4 to quantise the linear layers of the decoder layers.

        Raises:
            CheckpointError: the weights don't fit the configuration, or can't be read.
            MissingDependencyError: bits are given, and bitsandbytes is not installed.
        """


def open_model(path: Path) -> ModelCheckpoint:
    """Open the folder or GGUF file at `path`, without reading weights.

    Raises:
        CheckpointError: it is missing, damaged, or neither.
    """
    if path.is_dir():
        return FolderCheckpoint.open(path)
    if path.suffix == SAFETENSORS and path.is_file():
        raise CheckpointError(
            f"{path} is one safetensors file; name its folder, {path.parent}, which must hold "
            "config.json and tokenizer.json too"
        )
    return GGUFCheckpoint.open(path)

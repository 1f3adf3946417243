"""Reading a model from a folder as Hugging Face libraries write it.

``config.json`` says what the model is; its weights are in ``model.safetensors``, or in shards with
a ``model.safetensors.index.json``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import disha
from disha.finetune.errors import CheckpointError
from disha.finetune.models.assembly import SLICE, Shape, assemble, check_fit, parameter_shapes
from disha.finetune.models.decoder import Decoder, DecoderConfig
from disha.finetune.models.families import WAY_OUT, config_from_json
from disha.finetune.models.quantised import WeightBits

__all__ = ["FolderCheckpoint"]

CONFIG = "config.json"
DTYPES = ("F16", "BF16", "F32", "F64")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Constants that older libraries stored beside the weights; they follow from config.json.
DERIVED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class FolderCheckpoint:
    """An opened folder.

    Args:
        path: the folder.
        stored: its tensors, still on disk.
        description: what config.json holds.
    """

    path: Path
    stored: disha.interop.checkpoints.Checkpoint
    description: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> FolderCheckpoint:
        """Read config.json and the headers of the safetensors files in the folder at `path`.

        Raises:
            CheckpointError: the folder or one of them is missing, damaged or contradicts another,
                or the weights are pickles.
        """
        if not (path / CONFIG).is_file():
            raise CheckpointError(
                f"{path} holds no {CONFIG}; the base model must be a folder with {CONFIG}, "
                f"safetensors files and tokenizer.json, or one GGUF file{_ggufs_in(path)}"
            )
        try:
            stored = disha.interop.checkpoints.open_checkpoint(path)
            return cls(path, stored, stored.config())
        except disha.DishaError as error:
            raise CheckpointError(str(error)) from error

    @property
    def title(self) -> str:
        """What the model is called."""
        return self.path.resolve().name

    @property
    def folder(self) -> Path | None:
        """Where the tokenizer's files are."""
        return self.path

    @property
    def fields(self) -> Mapping[str, Any] | None:
        """GGUF metadata, of which a folder has none."""
        return None

    def config(self) -> DecoderConfig:
        """The model's sizes and constants.

        Raises:
            CheckpointError: one is missing, of the wrong type, or not supported.
        """
        return config_from_json(self.description, self.path / CONFIG)

    def load_model(
        self,
        dtype: torch.dtype,
        device: torch.device | None = None,
        bits: WeightBits | None = None,
    ) -> Decoder:
        """The model, its weights read one after another into `dtype`.

        Args:
            dtype: of all weights that are not quantised, and of what is computed.
            device: where they go; the CPU if not given.
            bits: 8 or 4 to quantise the linear layers of the decoder layers.

        Raises:
            CheckpointError: tensors are missing, not expected, of another shape, or of a dtype
                that dense weights don't have.
            MissingDependencyError: bits are given, and bitsandbytes is not installed.
        """
        config = self.config()
        self._check_tensors(config)
        return assemble(config, self, dtype, device, bits)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `first` to `last`, exclusive, of the tensor called `name`, memory-mapped."""
        try:
            return self.stored.tensor(name)[first:last]
        except disha.DishaError as error:
            raise CheckpointError(str(error)) from error

    def _check_tensors(self, config: DecoderConfig) -> None:
        foreign = {
            stored.dtype for stored in self.stored.tensors.values() if stored.dtype not in DTYPES
        }
        if foreign:
            raise CheckpointError(
                f"{self.path} holds tensors of dtype {', '.join(sorted(foreign))}; supported are "
                f"{', '.join(DTYPES)}. Use the model's folder in one of these; {WAY_OUT}"
            )
        found = {name: stored.shape for name, stored in self.stored.tensors.items()}
        expected = parameter_shapes(self.path, config, len(found))
        head = found.get(HEAD) if config.tied_head else None

        def is_harmless(name: str) -> bool:
            return DERIVED.search(name) is not None or (name == HEAD and head is not None)

        check_fit(self.path, expected, found, is_harmless)
        if head is not None and not self._is_head_the_embedding(expected[EMBEDDING]):
            raise CheckpointError(
                f"{self.path} has tie_word_embeddings = true, but holds a {HEAD} that is not "
                f"{EMBEDDING}; set tie_word_embeddings to false in {CONFIG} if the head is right"
            )

    def _is_head_the_embedding(self, shape: Shape) -> bool:
        if self.stored.tensors[HEAD].shape != shape:
            return False
        step = max(1, SLICE // shape[1])
        return all(
            torch.equal(
                self.rows(HEAD, first, first + step), self.rows(EMBEDDING, first, first + step)
            )
            for first in range(0, shape[0], step)
        )


def _ggufs_in(path: Path) -> str:
    try:
        files = sorted(path.glob("*.gguf"))
    except OSError:
        return ""
    return f", such as {files[0]}" if files else ""

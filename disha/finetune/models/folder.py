"""Reads a model from a folder in the layout of Hugging Face libraries.

``config.json`` describes the model. Its weights are in ``model.safetensors``, or in several files
that ``model.safetensors.index.json`` lists.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

import disha
from disha.finetune.errors import CheckpointError, raised_as
from disha.finetune.models.assembly import SLICE, ModelCheckpoint, Shape, check_fit
from disha.finetune.models.decoder import DecoderConfig
from disha.finetune.models.families import config_from_json
from disha.finetune.models.fields import WAY_OUT
from disha.finetune.models.hub_cache import name_in_cache

__all__ = ["FolderCheckpoint"]

CONFIG = "config.json"
DTYPES = ("F16", "BF16", "F32", "F64")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

DERIVED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Constants that older libraries stored with the weights. They are computed from config.json."""


class FolderCheckpoint(ModelCheckpoint):
    """An open folder: config.json, and the headers of its safetensors files.

    Args:
        path: the folder.

    Raises:
        CheckpointError: the folder or one of its files is missing or damaged, two files
            contradict each other, or the weights are pickles.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path
        name = name_in_cache(path)
        self.title = name or path.resolve().name
        if not (path / CONFIG).exists():
            files = sorted(path.glob("*.gguf")) if path.is_dir() else []
            found = f", such as {files[0]}" if files else ""
            raise CheckpointError(
                f"{path} holds no {CONFIG}; the base model must be a folder with {CONFIG}, "
                f"safetensors files and tokenizer.json, or one GGUF file{found}"
            )
        try:
            self.stored = disha.interop.checkpoints.open_checkpoint(path)
            self.description = self.stored.config()
        except disha.DishaError as error:
            remedy = "" if name is None else f"; to complete the download, run: hf download {name}"
            raise CheckpointError(f"{error}{remedy}") from error

    def config(self) -> DecoderConfig:
        """Return the model's sizes and constants.

        Raises:
            CheckpointError: one is missing, of the wrong type, or not supported.
        """
        return config_from_json(self.description, self.path / CONFIG)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows `first` to `last` (exclusive) of the tensor `name`."""
        with raised_as(CheckpointError):
            return self.stored.tensor(name, first, last)

    def check_tensors(self, config: DecoderConfig) -> None:
        """Check that the tensors fit, are dense, and that a tied head equals the embedding.

        Raises:
            CheckpointError: one of these is not true.
        """
        dtypes = {stored.dtype for stored in self.stored.tensors.values()}
        if not dtypes <= {*DTYPES}:
            raise CheckpointError(
                f"{self.path} holds tensors of dtype {', '.join(sorted(dtypes - {*DTYPES}))}; "
                f"supported are {', '.join(DTYPES)}. Use the model's folder in one of these; "
                f"{WAY_OUT}"
            )
        found = {
            name: stored.shape
            for name, stored in self.stored.tensors.items()
            if not DERIVED.search(name)
        }
        expected = self.parameter_shapes(config, len(self.stored.tensors))
        head = found.pop(HEAD, None) if config.tied_head else None
        check_fit(self.path, expected, found)
        if head is not None and not self._is_head_the_embedding(head, expected[EMBEDDING]):
            raise CheckpointError(
                f"{self.path} has tie_word_embeddings = true, but holds a {HEAD} that is not "
                f"{EMBEDDING}; set tie_word_embeddings to false in {CONFIG} if the head is right"
            )

    def _is_head_the_embedding(self, head: Shape, embedding: Shape) -> bool:
        step = max(1, SLICE // embedding[1])
        return head == embedding and all(
            torch.equal(
                self.rows(HEAD, first, first + step), self.rows(EMBEDDING, first, first + step)
            )
            for first in range(0, head[0], step)
        )

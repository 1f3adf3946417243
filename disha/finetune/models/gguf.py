"""Reads a model from a GGUF file: architectures llama (Llama, Mistral, SmolLM2), qwen2, qwen3.

The rotary embedding rotates pairs of rows of the query and key projections. For llama, GGUF stores
the two rows of a pair side by side: 2i and 2i + 1. The decoder pairs i and i + head_dim / 2, as the
usual checkpoints do. Within each head: ours[half * head_dim / 2 + i] = theirs[2i + half].

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from disha.files import opened_file
from disha.finetune.errors import CheckpointError, raised_as
from disha.finetune.models.assembly import ModelCheckpoint, check_fit
from disha.finetune.models.decoder import DecoderConfig
from disha.finetune.models.families import LLAMA, QWEN2, QWEN3, family_of
from disha.finetune.models.fields import Fields
from disha.finetune.models.gguf_header import Header, StoredTensor, damaged, read_header
from disha.text import printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["GGUFCheckpoint"]

ARCHITECTURES = {family.name: family for family in (LLAMA, QWEN2, QWEN3)}

# Keys of related models, with the values that have no effect. In llama.cpp, a scale of 0 means that
# nothing is scaled.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "rope.scaling.type": ("linear", "none"),
    "rope.scaling.attn_factor": (1,),
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "attention.scale": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "use_parallel_residual": (False,),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
}

FREQUENCIES = "rope_freqs.weight"
LINEAR = ("rope.scaling.factor", "rope.scale_linear")
"""The newer and the older key of a factor that divides all positions."""


class GGUFCheckpoint(ModelCheckpoint):
    """An open GGUF file: its metadata, and the places of its tensors.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing, not GGUF, damaged, one part of several, or of an
            architecture that is not supported.
    """

    def __init__(self, path: Path) -> None:
        # The adapter file notes the title, and its notes must be Unicode.
        self.path, self.title = path, printable(path.stem)
        header = _header(path)
        self.fields, self.tensors = header.values, header.tensors
        self._family = family_of(self.fields.get("general.architecture"), path, ARCHITECTURES)
        self._keys = Fields(
            self.fields, path, f"{self._family.name}.", "convert the model to GGUF again"
        )
        parts = self.fields.get("split.count", 1)
        if parts not in (0, 1):
            raise CheckpointError(
                f"{path} is one of {parts} parts of a model; merge them into one file first "
                "(llama-gguf-split --merge)"
            )
        self._keys.require_neutral(NEUTRAL)

    def config(self) -> DecoderConfig:
        """Return the model's sizes and constants.

        Raises:
            CheckpointError: one is missing, of the wrong type, or not supported.
        """
        keys = self._keys
        heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
        head_dim = keys.integer("attention.key_length", hidden // max(heads, 1))
        for key in ("attention.value_length", "rope.dimension_count"):
            if keys.integer(key, head_dim) != head_dim:
                raise CheckpointError(
                    f"{self.path} has {keys.prefix}{key} = {keys.get(key)} but heads of width "
                    f"{head_dim}; only models where the two are equal are supported"
                )
        config = DecoderConfig(
            vocabulary=self._vocabulary(),
            hidden=hidden,
            feed_forward=keys.integer("feed_forward_length"),
            layers=keys.integer("block_count"),
            heads=heads,
            kv_heads=keys.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            context=keys.integer("context_length"),
            rope_base=keys.number("rope.freq_base", 10000.0),
            norm_epsilon=keys.number("attention.layer_norm_rms_epsilon"),
            tied_head="output.weight" not in self.tensors,
            qkv_bias=self._family.qkv_bias,
            head_norm=self._family.head_norm,
        )
        # A size says how many factors there are. So they are made after the sizes are checked.
        return replace(config, rope_factors=self._rope_factors(head_dim))

    def check_tensors(self, config: DecoderConfig) -> None:
        """Check that the file holds the tensors that its metadata call for.

        Raises:
            CheckpointError: a tensor is missing, not expected, or of the wrong shape.
        """
        found = {name: tensor.shape for name, tensor in self.tensors.items()}
        shapes = self.parameter_shapes(config, len(found))
        found.pop(FREQUENCIES, None)
        expected = {self._stored_name(name): shape for name, shape in shapes.items()}
        check_fit(self.path, expected, found)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows `first` to `last` (exclusive) of a parameter, dequantised to float32.

        Raises:
            CheckpointError: its type can't be dequantised, or the file is no longer readable.
        """
        numbers = torch.arange(first, last)
        if self._family is LLAMA and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            numbers = _interleaved(numbers, self._head_dim)
        return self._values(self._stored_name(name), numbers)

    def _values(self, name: str, numbers: Tensor) -> Tensor:
        """Return the rows of a stored tensor with these numbers; for a vector, the values."""
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        is_vector = len(tensor.shape) == 1  # stored as one row
        rows = self._rows(tensor, torch.tensor([0]) if is_vector else numbers)
        try:
            values = torch.from_numpy(dequantize(rows, tensor.kind))
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} is of type {tensor.kind.name}, which can't be "
                "dequantised; use a file of another type, such as Q8_0 or F16"
            ) from error
        return values[0][numbers] if is_vector else values

    def _rows(self, tensor: StoredTensor, numbers: Tensor) -> NDArray[np.uint8]:
        """Return the bytes of the rows of a stored tensor with these numbers."""
        import numpy as np

        count = 1 if len(tensor.shape) == 1 else tensor.shape[0]
        first, last = int(numbers.min()), int(numbers.max()) + 1
        content = np.empty((last - first, tensor.nbytes // count), np.uint8)
        with raised_as(CheckpointError), opened_file(self.path) as file:
            file.seek(tensor.start + first * content.shape[1])
            read = file.readinto(content.data)
        if read != content.nbytes:
            raise damaged(self.path, EOFError("it was cut while it was being read"))
        chosen: NDArray[np.uint8] = content[(numbers - first).numpy()]
        return chosen

    def _rope_factors(self, head_dim: int) -> tuple[float, ...] | None:
        if self._keys.get("rope.scaling.type") != "none":
            self._keys.require_neutral(dict.fromkeys(LINEAR, (1, 0)))
        listed = self.tensors.get(FREQUENCIES)
        if listed is None:
            return None
        if listed.shape != (head_dim // 2,):
            raise CheckpointError(
                f"{self.path}: {FREQUENCIES} has shape {listed.shape}, but heads of width "
                f"{head_dim} call for {(head_dim // 2,)}; convert the model to GGUF again"
            )
        return tuple(self._values(FREQUENCIES, torch.arange(head_dim // 2)).tolist())

    def _vocabulary(self) -> int:
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(
                f"{self.path} has no tensor token_embd.weight with a row for each token; it is not "
                "a model"
            )
        return embedding.shape[0]

    @cached_property
    def _head_dim(self) -> int:
        return self.config().head_dim

    @cached_property
    def _names(self) -> Mapping[str, str]:
        """The GGUF name of each module of the decoder."""
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        architecture = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == self._family.name)
        names = get_tensor_name_map(architecture, self.config().layers)
        return {name: stored for name, (_, stored) in names.mapping.items()}

    def _stored_name(self, name: str) -> str:
        """Return the GGUF name of a parameter."""
        module, _, attribute = name.rpartition(".")
        return f"{self._names[module]}.{attribute}"


def _header(path: Path) -> Header:
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder; the base model must be one GGUF file, such as "
            f"{path / 'model.gguf'}, or a folder with config.json"
        )
    if not path.exists():
        raise CheckpointError(
            f"there is no file {path}; the base model must be a GGUF file or a folder with "
            "config.json"
        )
    return read_header(path)


def _interleaved(numbers: Tensor, head_dim: int) -> Tensor:
    """Return where GGUF stores these rows of a query or key projection."""
    head, place = numbers // head_dim, numbers % head_dim
    half, i = place // (head_dim // 2), place % (head_dim // 2)
    return head * head_dim + 2 * i + half

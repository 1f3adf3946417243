"""Reads a model from a GGUF file: architectures llama (Llama, Mistral, SmolLM2), qwen2, qwen3.

The rotary embedding rotates pairs of rows of the query and key projections. For llama, GGUF stores
the two rows of a pair side by side: 2i and 2i + 1. The decoder pairs i and i + head_dim / 2, as the
usual checkpoints do. Within each head: ours[half * head_dim / 2 + i] = theirs[2i + half].

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from disha import DishaError
from disha.files import opened_file
from disha.finetune.errors import CheckpointError
from disha.finetune.models.assembly import ModelCheckpoint, Shape, check_fit
from disha.finetune.models.decoder import DecoderConfig
from disha.finetune.models.families import LLAMA, QWEN2, QWEN3, family_of
from disha.finetune.models.fields import Fields

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

__all__ = ["GGUFCheckpoint"]

ARCHITECTURES = {family.name: family for family in (LLAMA, QWEN2, QWEN3)}

# Keys of related models, with the values that change nothing. To llama.cpp, a scale of 0 is none.
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


class GGUFCheckpoint(ModelCheckpoint):
    """An open GGUF file: its metadata, and the places of its tensors.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing, not GGUF, damaged, one part of several, or of an
            architecture that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.title = path, path.stem
        reader = _reader(path)
        try:
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError) as error:
            raise _damaged(path, error) from error
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
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
        return DecoderConfig(
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
            rope_factors=self._rope_factors(head_dim),
            qkv_bias=self._family.qkv_bias or "blk.0.attn_q.bias" in self.tensors,
            output_bias="blk.0.attn_output.bias" in self.tensors,
            feed_forward_bias="blk.0.ffn_gate.bias" in self.tensors,
            head_norm=self._family.head_norm,
        )

    def check_tensors(self, config: DecoderConfig) -> None:
        """Check that the file holds the tensors that its metadata call for.

        Raises:
            CheckpointError: a tensor is missing, not expected, or of the wrong shape.
        """
        found = {name: _shape(tensor) for name, tensor in self.tensors.items()}
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
        import numpy as np
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        # Map the file each time, so that pages that were read do not stay in memory.
        try:
            stored = np.memmap(
                self.path,
                tensor.data.dtype,
                "r",
                offset=int(tensor.data_offset),
                shape=tensor.data.shape,
            )
        except (OSError, ValueError) as error:
            raise _damaged(self.path, error) from error
        chosen, kind = numbers.numpy(), tensor.tensor_type
        try:
            if len(tensor.shape) == 1:  # a quantised vector is one row
                values = dequantize(stored, kind)[chosen]
            else:
                values = dequantize(stored[chosen], kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} is of type {kind.name}, which can't be dequantised; "
                "use a file of another type, such as Q8_0 or F16"
            ) from error
        return torch.from_numpy(np.asarray(values))  # a copy, not the file's

    def _rope_factors(self, head_dim: int) -> tuple[float, ...] | None:
        keys = self._keys
        older = keys.number("rope.scale_linear", 1.0) or 1.0
        factor = keys.number("rope.scaling.factor", older) or 1.0
        if keys.get("rope.scaling.type") == "none":
            factor = 1.0
        listed = self.tensors.get(FREQUENCIES)
        if listed is None:
            return None if factor == 1.0 else (factor,) * (head_dim // 2)
        if factor != 1.0:
            raise keys.refused(f"rope.scaling.factor beside {FREQUENCIES}", factor)
        if _shape(listed) != (head_dim // 2,):
            raise CheckpointError(
                f"{self.path}: {FREQUENCIES} has shape {_shape(listed)}, but heads of width "
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
        return _shape(embedding)[0]

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


def _reader(path: Path) -> GGUFReader:
    from gguf import GGUFReader

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
    try:
        with opened_file(path) as file:
            start = file.read(4)
        if start != b"GGUF":
            raise CheckpointError(
                f"{path} is not a GGUF file: it begins with {start!r} instead of b'GGUF'"
            )
        return GGUFReader(path)
    except DishaError as error:
        raise CheckpointError(str(error)) from error
    # The reader checks little: on a damaged file, NumPy fails with any of these.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or cut short (GGUF reader: {error}); download or convert it again"
    )


def _shape(tensor: ReaderTensor) -> Shape:
    """Return the shape of a tensor in PyTorch's order; GGUF stores it reversed."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _interleaved(numbers: Tensor, head_dim: int) -> Tensor:
    """Return where GGUF stores these rows of a query or key projection."""
    head, place = numbers // head_dim, numbers % head_dim
    half, i = place // (head_dim // 2), place % (head_dim // 2)
    return head * head_dim + 2 * i + half

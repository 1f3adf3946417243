"""Reading a model from a GGUF file: architectures llama (Llama, Mistral, SmolLM2), qwen2, qwen3.

GGUF names tensors its own way. For llama it keeps the rows of the query and key projections in the
order of interleaved rotary embedding (pairs 2i, 2i + 1); ours, as in the usual checkpoints, pairs
i, i + head_dim / 2. Within each head: ours[half * head_dim / 2 + i] = theirs[2i + half].

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from disha.finetune.errors import CheckpointError
from disha.finetune.models.assembly import Shape, assemble, check_fit, parameter_shapes
from disha.finetune.models.decoder import Decoder, DecoderConfig
from disha.finetune.models.families import LLAMA, QWEN2, QWEN3, SUPPORTED, WAY_OUT, Family
from disha.finetune.models.quantised import WeightBits
from disha.finetune.models.rope import FrequencyFactors, LinearScaling, RopeScaling

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor

__all__ = ["GGUFCheckpoint", "GGUFTensor", "check_is_gguf"]

ARCHITECTURES = {family.name: family for family in (LLAMA, QWEN2, QWEN3)}

# Keys that change what a model computes, with the values that change nothing; llama.cpp takes a
# scale of 0 for none.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
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

OUTER_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a GGUF file, unread.

    Args:
        path: the file.
        name: its name in the file.
        kind: how it is quantised.
        shape: its shape, the slowest-varying size first.
        stored_shape: that of the stored values; quantised rows are bytes.
        stored_dtype: of the stored values, as NumPy names it.
        start: where its bytes begin in the file.
    """

    path: Path
    name: str
    kind: GGMLQuantizationType
    shape: Shape
    stored_shape: Shape
    stored_dtype: str
    start: int

    @classmethod
    def of(cls, path: Path, tensor: ReaderTensor) -> GGUFTensor:
        """What the reader found."""
        return cls(
            path,
            tensor.name,
            tensor.tensor_type,
            tuple(int(size) for size in reversed(tensor.shape)),
            tensor.data.shape,
            tensor.data.dtype.str,
            int(tensor.data_offset),
        )

    def rows(self, numbers: Tensor) -> Tensor:
        """The rows with these numbers (or the values, of a vector), dequantised to float32.

        Raises:
            CheckpointError: its type can't be dequantised, or the file can't be read any more.
        """
        import numpy as np
        from gguf.quants import dequantize

        # Mapped anew each time, so that what was read does not stay in memory.
        try:
            stored = np.memmap(
                self.path, self.stored_dtype, "r", offset=self.start, shape=self.stored_shape
            )
        except (OSError, ValueError) as error:
            raise _damaged(self.path, error) from error
        chosen = numbers.numpy()
        try:
            if len(self.shape) == 1:  # a quantised vector is one row
                values = dequantize(stored, self.kind)[chosen]
            else:
                values = dequantize(stored[chosen], self.kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {self.name} is of type {self.kind.name}, which can't be "
                "dequantised; use a file of another type, such as Q8_0 or F16"
            ) from error
        return torch.from_numpy(np.asarray(values))  # chosen values are copies, not the file's


@dataclass(frozen=True)
class GGUFCheckpoint:
    """An opened GGUF file.

    Args:
        path: where it is.
        fields: every metadata key with its value.
        tensors: every tensor by its GGUF name, still quantised and on disk.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    @classmethod
    def open(cls, path: Path) -> GGUFCheckpoint:
        """Read the header and metadata of the file at `path`.

        Raises:
            CheckpointError: the file is missing, not GGUF, damaged, one part of several, or of
                an architecture that is not supported.
        """
        check_is_gguf(path)
        reader = _reader(path)
        try:
            fields = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError) as error:
            raise _damaged(path, error) from error
        tensors = {tensor.name: GGUFTensor.of(path, tensor) for tensor in reader.tensors}
        checkpoint = cls(path, fields, tensors)
        checkpoint._check_supported()
        return checkpoint

    @property
    def title(self) -> str:
        """What the model is called."""
        return self.path.stem

    @property
    def folder(self) -> Path | None:
        """Where a tokenizer's files are; a GGUF file describes it in its metadata instead."""
        return None

    def config(self) -> DecoderConfig:
        """The model's sizes and constants.

        Raises:
            CheckpointError: one is missing, of the wrong type, or not supported.
        """
        heads, head_dim = self._integer("attention.head_count"), self._head_dim()
        self._require_equal("attention.value_length", head_dim)
        self._require_equal("rope.dimension_count", head_dim)
        return DecoderConfig(
            vocabulary=self._vocabulary(),
            hidden=self._integer("embedding_length"),
            feed_forward=self._integer("feed_forward_length"),
            layers=self._integer("block_count"),
            heads=heads,
            kv_heads=self._integer("attention.head_count_kv", default=heads),
            head_dim=head_dim,
            context=self._integer("context_length"),
            rope_base=self._number("rope.freq_base", default=10000.0),
            norm_epsilon=self._number("attention.layer_norm_rms_epsilon"),
            tied_head="output.weight" not in self.tensors,
            rope_scaling=self._rope_scaling(head_dim),
            qkv_bias=self._family.qkv_bias or self._has("attn_q.bias"),
            output_bias=self._has("attn_output.bias"),
            feed_forward_bias=self._has("ffn_gate.bias"),
            head_norm=self._family.head_norm,
        )

    def load_model(
        self,
        dtype: torch.dtype,
        device: torch.device | None = None,
        bits: WeightBits | None = None,
    ) -> Decoder:
        """The model, its weights dequantised one after another into `dtype`.

        Args:
            dtype: of all weights that are not quantised, and of what is computed.
            device: where they go; the CPU if not given.
            bits: 8 or 4 to quantise the linear layers of the decoder layers.

        Raises:
            CheckpointError: tensors are missing, not expected, of another shape, or of a
                quantised type that can't be dequantised.
            MissingDependencyError: bits are given, and bitsandbytes is not installed.
        """
        config = self.config()
        self._check_tensors(config)
        return assemble(config, self, dtype, device, bits)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `first` to `last`, exclusive, of our parameter called `name`, in our order."""
        numbers = torch.arange(first, last)
        module = name.rpartition(".")[0]
        if self._family is LLAMA and module.endswith(ROTATED):
            numbers = _interleaved(numbers, self._head_dim())
        return self.tensors[_gguf_name(name)].rows(numbers)

    @property
    def _family(self) -> Family:
        return ARCHITECTURES[self.fields["general.architecture"]]

    def _has(self, part: str) -> bool:
        return f"blk.0.{part}" in self.tensors

    def _check_supported(self) -> None:
        found = self.fields.get("general.architecture")
        if not isinstance(found, str) or found not in ARCHITECTURES:
            raise CheckpointError(
                f"{self.path} holds a model of architecture {found!r}; supported are "
                f"{', '.join(map(repr, ARCHITECTURES))} ({SUPPORTED}); {WAY_OUT}"
            )
        parts = self.fields.get("split.count", 1)
        if parts not in (0, 1):
            raise CheckpointError(
                f"{self.path} is one of {parts} parts of a model; "
                "merge them into one file first (llama-gguf-split --merge)"
            )
        for key, neutral in NEUTRAL.items():
            value = self.fields.get(f"{found}.{key}")
            if value is not None and value not in neutral:
                raise self._refused(key, value)

    def _rope_scaling(self, head_dim: int) -> RopeScaling | None:
        kind = self.fields.get(f"{self._family.name}.rope.scaling.type", "linear")
        if kind not in ("none", "linear"):
            raise self._refused("rope.scaling.type", kind)
        older = self._number("rope.scale_linear", default=1.0) or 1.0
        factor = self._number("rope.scaling.factor", default=older) or 1.0
        if kind == "none":
            factor = 1.0
        listed = self.tensors.get(FREQUENCIES)
        if listed is None:
            return None if factor == 1.0 else LinearScaling(factor)
        if factor != 1.0:
            raise self._refused(f"rope.scaling.factor beside {FREQUENCIES}", factor)
        if listed.shape != (head_dim // 2,):
            raise CheckpointError(
                f"{self.path}: {FREQUENCIES} has shape {listed.shape}, but heads of width "
                f"{head_dim} call for {(head_dim // 2,)}; convert the model to GGUF again"
            )
        return FrequencyFactors(tuple(listed.rows(torch.arange(head_dim // 2)).tolist()))

    def _refused(self, key: str, value: object) -> CheckpointError:
        return CheckpointError(
            f"{self.path} asks for {key} = {value!r}, which is not supported; "
            f"ignoring it would give another model; {WAY_OUT}"
        )

    def _check_tensors(self, config: DecoderConfig) -> None:
        found = {name: tensor.shape for name, tensor in self.tensors.items()}
        shapes = parameter_shapes(self.path, config, len(found))
        expected = {_gguf_name(name): shape for name, shape in shapes.items()}
        check_fit(self.path, expected, found, is_harmless=lambda name: name == FREQUENCIES)

    def _head_dim(self) -> int:
        shared = self._integer("embedding_length") // max(self._integer("attention.head_count"), 1)
        return self._integer("attention.key_length", default=shared)

    def _vocabulary(self) -> int:
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(
                f"{self.path} has no tensor token_embd.weight with a row for each token; it is not "
                "a model"
            )
        return embedding.shape[0]

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self._field(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(
                f"{self.path}: {self._family.name}.{key} must be one integer for all layers, "
                f"found {value!r}"
            )
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._field(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise CheckpointError(
                f"{self.path}: {self._family.name}.{key} must be a number, found {value!r}"
            )
        return float(value)

    def _field(self, key: str, default: float | None) -> object:
        value = self.fields.get(f"{self._family.name}.{key}", default)
        if value is None:
            raise CheckpointError(
                f"{self.path} lacks the metadata key {self._family.name}.{key}; "
                "convert the model to GGUF again"
            )
        return value

    def _require_equal(self, key: str, head_dim: int) -> None:
        found = self._integer(key, default=head_dim)
        if found != head_dim:
            raise CheckpointError(
                f"{self.path} has {self._family.name}.{key} = {found} but heads of width "
                f"{head_dim}; only models where the two are equal are supported"
            )


def check_is_gguf(path: Path) -> None:
    """Check that `path` is a file that begins as GGUF files do.

    Raises:
        CheckpointError: it is missing, a folder, empty, unreadable or something else.
    """
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder; the base model must be one GGUF file, such as "
            f"{path / 'model.gguf'}, or a folder with config.json"
        )
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no file {path}; the base model must be a GGUF file or a folder with "
            "config.json"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    if not start:
        raise CheckpointError(f"{path} is empty; fetch or convert the GGUF file again")
    if start != b"GGUF":
        raise CheckpointError(
            f"{path} is not a GGUF file: it begins with {start!r} instead of b'GGUF'"
        )


def _reader(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    # The reader maps the file and lets NumPy fail on whatever damage it meets.
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or cut short (GGUF reader: {error}); fetch or convert it again"
    )


def _gguf_name(name: str) -> str:
    """The GGUF name of a parameter of ours."""
    module, _, attribute = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if layer is None:
        return f"{OUTER_TENSORS[module]}.{attribute}"
    return f"blk.{layer[1]}.{LAYER_TENSORS[layer[2]]}.{attribute}"


def _interleaved(numbers: Tensor, head_dim: int) -> Tensor:
    """The number in GGUF's order of each of our rows of a query or key projection."""
    head, place = numbers // head_dim, numbers % head_dim
    half, i = place // (head_dim // 2), place % (head_dim // 2)
    return head * head_dim + 2 * i + half

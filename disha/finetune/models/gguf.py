"""Reading a Llama-family model from a GGUF file.

GGUF names tensors its own way, and keeps the rows of the query and key projections in the order
of interleaved rotary embedding (pairs 2i, 2i + 1); ours, as in the usual checkpoints, pairs
i, i + head_dim / 2. Within each head: ours[half * head_dim / 2 + i] = theirs[2i + half].

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from disha.finetune.errors import CheckpointError
from disha.finetune.models.decoder import Decoder, DecoderConfig

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

__all__ = ["GGUFCheckpoint", "check_is_gguf"]

SUPPORTED_ARCHITECTURE = "llama"

# These change what a Llama model computes, in ways our decoder does not follow.
UNSUPPORTED_KEYS = (
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "expert_count",
    "attention.sliding_window",
    "attention.scale",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
)
NEUTRAL_VALUES = ("none", 0, 1)

OUTER_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class GGUFCheckpoint:
    """An opened GGUF file.

    Args:
        path: where it is; for messages.
        fields: every metadata key with its value.
        tensors: every tensor by its GGUF name, still quantised and on disk.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, ReaderTensor]

    @classmethod
    def open(cls, path: Path) -> GGUFCheckpoint:
        """Read the header and metadata of the file at `path`.

        Raises:
            CheckpointError: the file is missing, not GGUF, damaged, one part of several, or of
                another architecture than Llama's.
        """
        check_is_gguf(path)
        reader = _reader(path)
        try:
            fields = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError) as error:
            raise _damaged(path, error) from error
        checkpoint = cls(path, fields, {tensor.name: tensor for tensor in reader.tensors})
        checkpoint._check_supported()
        return checkpoint

    def config(self) -> DecoderConfig:
        """The model's sizes and constants.

        Raises:
            CheckpointError: one is missing, of the wrong type, or not supported.
        """
        heads = self._integer("attention.head_count")
        hidden = self._integer("embedding_length")
        head_dim = self._integer("attention.key_length", default=hidden // max(heads, 1))
        self._require_equal("attention.value_length", head_dim)
        self._require_equal("rope.dimension_count", head_dim)
        return DecoderConfig(
            vocabulary=self._vocabulary(),
            hidden=hidden,
            feed_forward=self._integer("feed_forward_length"),
            layers=self._integer("block_count"),
            heads=heads,
            kv_heads=self._integer("attention.head_count_kv", default=heads),
            head_dim=head_dim,
            context=self._integer("context_length"),
            rope_base=self._number("rope.freq_base", default=10000.0),
            norm_epsilon=self._number("attention.layer_norm_rms_epsilon"),
            tied_head="output.weight" not in self.tensors,
        )

    def load_model(self, dtype: torch.dtype, device: torch.device | None = None) -> Decoder:
        """The model, its weights dequantised one tensor at a time into `dtype`.

        Args:
            dtype: of all weights.
            device: where they go; the CPU if not given.

        Raises:
            CheckpointError: a tensor is missing, not expected, of another shape, or of a
                quantised type that can't be dequantised.
        """
        config = self.config()
        with torch.device("meta"):
            model = Decoder(config)
        names = dict(_tensor_names(config))
        self._check_tensors(names, model)
        for source, target in names.items():
            values = self._values(source, dtype).to(device or torch.device("cpu"))
            if source.endswith((".attn_q.weight", ".attn_k.weight")):
                values = _to_half_rotation(values, config.head_dim)
            module, _, attribute = target.rpartition(".")
            setattr(model.get_submodule(module), attribute, nn.Parameter(values))
        model.tie_head()
        return model

    def _check_supported(self) -> None:
        found = self.fields.get("general.architecture")
        if found != SUPPORTED_ARCHITECTURE:
            raise CheckpointError(
                f"{self.path} holds a model of architecture {found!r}; supported is "
                f"{SUPPORTED_ARCHITECTURE!r} (Llama, SmolLM2 and others of that family)"
            )
        parts = self.fields.get("split.count", 1)
        if parts not in (0, 1):
            raise CheckpointError(
                f"{self.path} is one of {parts} parts of a model; "
                "merge them into one file first (llama-gguf-split --merge)"
            )
        for key in UNSUPPORTED_KEYS:
            value = self.fields.get(f"{SUPPORTED_ARCHITECTURE}.{key}")
            if value is not None and value not in NEUTRAL_VALUES:
                raise CheckpointError(
                    f"{self.path} asks for {key} = {value!r}, which is not supported; "
                    "ignoring it would give another model"
                )
        if "rope_freqs.weight" in self.tensors:
            raise CheckpointError(
                f"{self.path} holds rope_freqs.weight, scaled rotary frequencies as in Llama 3.1 "
                "and later, which is not supported; use a model without, such as Llama 2 or SmolLM2"
            )

    def _check_tensors(self, names: Mapping[str, str], model: Decoder) -> None:
        missing = sorted(names.keys() - self.tensors.keys())
        unexpected = sorted(self.tensors.keys() - names.keys())
        if missing or unexpected:
            raise CheckpointError(
                f"{self.path} does not hold the tensors of a Llama model: "
                f"missing {_listed(missing)}; not expected {_listed(unexpected)}"
            )
        for source, target in names.items():
            # GGUF lists the fastest-varying size first.
            found = tuple(int(size) for size in reversed(self.tensors[source].shape))
            expected = tuple(model.get_parameter(target).shape)
            if found != expected:
                raise CheckpointError(
                    f"{self.path}: tensor {source} has shape {found}, but the file's own metadata "
                    f"call for {expected}; the file is damaged or was converted wrongly"
                )

    def _values(self, name: str, dtype: torch.dtype) -> Tensor:
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} is of type {tensor.tensor_type.name}, which can't be "
                "dequantised; use a file of another type, such as Q8_0 or F16"
            ) from error
        # A copy, so that nothing refers to the file, which may go away or change.
        return torch.tensor(values, dtype=dtype)

    def _vocabulary(self) -> int:
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path} has no tensor token_embd.weight; it is not a model")
        return int(embedding.shape[-1])

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self._field(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(
                f"{self.path}: {SUPPORTED_ARCHITECTURE}.{key} must be one integer for all layers, "
                f"found {value!r}"
            )
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._field(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise CheckpointError(
                f"{self.path}: {SUPPORTED_ARCHITECTURE}.{key} must be a number, found {value!r}"
            )
        return float(value)

    def _field(self, key: str, default: float | None) -> object:
        value = self.fields.get(f"{SUPPORTED_ARCHITECTURE}.{key}", default)
        if value is None:
            raise CheckpointError(
                f"{self.path} lacks the metadata key {SUPPORTED_ARCHITECTURE}.{key}; "
                "convert the model to GGUF again"
            )
        return value

    def _require_equal(self, key: str, head_dim: int) -> None:
        found = self._integer(key, default=head_dim)
        if found != head_dim:
            raise CheckpointError(
                f"{self.path} has {SUPPORTED_ARCHITECTURE}.{key} = {found} but heads of width "
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
            f"{path / 'model.gguf'} (folders with config.json are not supported yet)"
        )
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no file {path}; the base model must be an existing GGUF file"
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


def _tensor_names(config: DecoderConfig) -> Iterator[tuple[str, str]]:
    """Each GGUF tensor name of such a model with the name of our parameter."""
    for source, target in OUTER_TENSORS.items():
        if source != "output" or not config.tied_head:
            yield f"{source}.weight", f"{target}.weight"
    for layer in range(config.layers):
        for source, target in LAYER_TENSORS.items():
            yield f"blk.{layer}.{source}.weight", f"model.layers.{layer}.{target}.weight"


def _to_half_rotation(weight: Tensor, head_dim: int) -> Tensor:
    return rearrange(
        weight, "(head i half) columns -> (head half i) columns", half=2, i=head_dim // 2
    ).contiguous()


def _listed(names: list[str], most: int = 4) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

"""LoRA as a GGUF file for llama.cpp, for models of the Llama family.

Tensors are `blk.<n>.<part>.weight.lora_a` (rank, in) and `.lora_b` (out, rank), in float32.
llama.cpp adds alpha / rank B A x, with one alpha for the file. In Llama models, GGUF stores the
rows of q and k in the order of interleaved rotary embeddings, so the rows of B have that order too:
within a head of d rows, row 2i + half is the usual row half * d / 2 + i.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from disha.errors import ArgumentError, ConversionError, MissingPackageError
from disha.files import AdapterHeader
from disha.files.contents import adapter_contents
from disha.files.saving import PathLike, checked_path, save
from disha.interop.low_rank import (
    BaseWeight,
    LoraReport,
    LowRankUpdate,
    base_weights,
    check_limits,
    commonest,
    listed,
    low_rank_updates,
)
from disha.model import ModelView
from disha.text import counted

__all__ = ["ARCHITECTURES", "MODEL_TYPES", "export_gguf", "write_gguf"]

ARCHITECTURES: Mapping[str, bool] = {"llama": True, "qwen2": False}
"""GGUF's name of an architecture -> whether GGUF stores the rows of q and k in another order."""

MODEL_TYPES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""Model type in `transformers` -> architecture in GGUF."""

EMBEDDING, HEAD = "token_embd", "output"


@dataclass(frozen=True)
class _Base:
    """What is known about the GGUF file of the base model; None for what is not.

    Attributes:
        architecture: its name in GGUF.
        heads: query heads.
        kv_heads: key and value heads.
        tied_head: whether the embedding is the output head too.
    """

    architecture: str
    heads: int | None
    kv_heads: int | None
    tied_head: bool | None

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ArgumentError(
                f"architecture {self.architecture!r} is unknown; LoRA can be written as GGUF for "
                f"{', '.join(ARCHITECTURES)}"
            )

    def heads_of(self, name: str) -> int | None:
        """Return the heads by which GGUF orders the rows of a weight, or None if it does not."""
        if not ARCHITECTURES[self.architecture] or not name.endswith((".attn_q", ".attn_k")):
            return None
        heads = self.heads if name.endswith(".attn_q") else self.kv_heads
        if heads is None:
            raise ArgumentError("GGUF orders rows of q and k by heads; give `heads` and `kv_heads`")
        return heads


def export_gguf(
    model: nn.Module,
    path: PathLike,
    adapter: str = "default",
    rank: int | None = None,
    max_error: float | None = None,
    *,
    architecture: str | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
) -> LoraReport:
    """Write an adapter of a Llama-family model as a LoRA in a GGUF file for llama.cpp.

    llama.cpp reads it beside the GGUF file of the base model (`--lora`). Layers must have the usual
    names, `model.layers.0.self_attn.q_proj` and so on, with or without `model.`. Bone and tile are
    exact; BAT is truncated to `rank`. Factors are float32 for blocks of any dtype. The package
    `gguf` must be installed.

    If the model is sharded, call this on all ranks; the first one writes.

    Args:
        model: a model with adapters.
        path: the file to write.
        adapter: the adapter's name.
        rank: largest rank of a layer. BAT needs it; if it is smaller than r, Bone is truncated too.
        max_error: largest ||dW - B A|| / ||dW|| of a layer.
        architecture: `general.architecture` of the base model's GGUF file; by default the one for
            `model.config.model_type`, or else `"llama"`.
        heads: query heads; by default those of `model.config`.
        kv_heads: key and value heads; by default those of `model.config`.

    Returns:
        A `LoraReport`, with the rank and the error of every layer.

    Raises:
        ConversionError: the GGUF file of the base model has no such layer, parameters were trained
            with the blocks, or the error of a layer is above `max_error`.
        ArgumentError: an argument is out of range, unknown, or missing.
        ArgumentTypeError: an argument is of the wrong type.
        MissingPackageError: `gguf` is not installed.
        AdapterStateError: the adapter holds values that are not finite, here or in float32.
        AdapterIOError: the file can't be written; what was there is unchanged.

    Nothing is written if this raises.

    Examples:
        >>> import tempfile, pathlib
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop import lora
        >>> model = nn.ModuleDict({"lm_head": nn.Linear(8, 16)})
        >>> model = disha.inject_adapters(model, "lm_head", r=4, init="kaiming")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(lora.export_gguf(model, pathlib.Path(folder, "lora.gguf")).layers)
        (LoraLayer(name='lm_head', method='bone', r=4, rank=4, error=0.0),)
    """
    view = ModelView(model)
    ranks, action = view.ranks(), f"export adapter {adapter!r} as GGUF"
    header, tensors = adapter_contents(view, adapter)
    with ranks.agreeing(action):
        target = checked_path(path)
        check_limits(rank, max_error)
        base = _base_of(view, architecture, heads, kv_heads)
        names = _gguf_names(header, base)
    weights = base_weights(view, adapter)
    updates = low_rank_updates(header, tensors, rank=rank, max_error=max_error, base=weights)
    with ranks.agreeing(action):
        if ranks.writes:
            _write(target, updates, names, base)
    return LoraReport.of(target, updates)


def write_gguf(
    path: PathLike,
    header: AdapterHeader,
    tensors: Mapping[str, Tensor],
    *,
    architecture: str = "llama",
    heads: int | None = None,
    kv_heads: int | None = None,
    tied_head: bool | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    base: BaseWeight | None = None,
) -> LoraReport:
    """Write an adapter without its model as a GGUF file, as `export_gguf` does.

    Args:
        path: the file to write.
        header: the adapter's header.
        tensors: its tensors.
        architecture: `general.architecture` of the base model's GGUF file.
        heads: query heads of the base model; needed if q is adapted.
        kv_heads: key and value heads; needed if k is adapted.
        tied_head: whether the embedding of the base model is its output head too; None if unknown.
        rank: largest rank of a layer.
        max_error: largest relative error of a layer.
        base: returns the base weights; only BAT needs it.

    Returns:
        A `LoraReport`, with the rank and the error of every layer.

    Raises:
        DishaError: as for `export_gguf`; also if `heads` or `base` is missing.

    Examples:
        >>> import tempfile, pathlib
        >>> from torch import nn
        >>> import disha
        >>> from disha.files.contents import adapter_contents
        >>> from disha.interop import lora
        >>> from disha.model import ModelView
        >>> model = nn.ModuleDict({"lm_head": nn.Linear(8, 16)})
        >>> model = disha.inject_adapters(model, "lm_head", r=4, init="kaiming")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "lora.gguf")
        ...     lora.write_gguf(path, *adapter_contents(ModelView(model)), tied_head=False).error
        0.0
    """
    target = checked_path(path)
    model = _Base(architecture, heads, kv_heads, tied_head)
    names = _gguf_names(header, model)
    updates = low_rank_updates(header, tensors, rank=rank, max_error=max_error, base=base)
    _write(target, updates, names, model)
    return LoraReport.of(target, updates)


def _base_of(
    view: ModelView, architecture: str | None, heads: int | None, kv_heads: int | None
) -> _Base:
    config: Any = getattr(view.model, "config", None)
    model_type = getattr(config, "model_type", "llama")
    tied = getattr(config, "tie_word_embeddings", None)
    head = view.parameters_by_name.get("lm_head.weight")
    if head is not None:
        tied = len(head.names) > 1
    heads = heads or getattr(config, "num_attention_heads", None)
    kv_heads = kv_heads or getattr(config, "num_key_value_heads", None) or heads
    return _Base(architecture or MODEL_TYPES.get(model_type, model_type), heads, kv_heads, tied)


# --- names ---------------------------------------------------------------------------------------


def _gguf_names(header: AdapterHeader, base: _Base) -> dict[str, str]:
    """Return layer -> the name of its weight in GGUF, without `.weight`."""
    if header.also_train:
        raise ConversionError(
            f"a LoRA for llama.cpp holds updates of layers only, and {listed(header.also_train)} "
            "were trained with the blocks; convert the merged model (merge_adapters)"
        )
    gguf = _package()
    numbers = [int(one) for layer in header.layers for one in re.findall(r"\d+", layer.name)]
    architecture = next(
        key for key, one in gguf.MODEL_ARCH_NAMES.items() if one == base.architecture
    )
    known = gguf.get_tensor_name_map(architecture, max(numbers, default=0) + 1)
    names = {layer.name: known.get_name(layer.name) for layer in header.layers}
    counts = Counter(names.values())
    unknown = [
        layer.name
        for layer in header.layers
        if layer.layout.pattern != ("index out" if names[layer.name] == EMBEDDING else "out in")
        or names[layer.name] is None
        or counts[names[layer.name]] > 1
    ]
    if unknown:
        raise ConversionError(
            f"the GGUF file of a {base.architecture} model has no place of its own for "
            f"{len(unknown)} of {counted(len(names), 'layer')} ({listed(unknown)}); merge them"
        )
    if HEAD in counts and base.tied_head:
        raise ConversionError(
            "lm_head is adapted, but it shares its weight with the embedding; leave it out"
        )
    if EMBEDDING in counts and base.tied_head is not False:
        raise ConversionError(
            "the embedding is adapted, and llama.cpp would apply its LoRA to an output head with "
            "the same weight, as there is or may be here; leave it out, or export from the model"
        )
    return names


# --- the file ------------------------------------------------------------------------------------


def _write(
    path: Path, updates: Sequence[LowRankUpdate], names: Mapping[str, str], base: _Base
) -> None:
    """Write the file.

    llama.cpp multiplies by alpha / rank, with each layer's own rank, and reads an alpha of 0 as the
    rank. So alpha is the rank that most layers have, and the rest of the scale is in B.
    """
    alpha = commonest(update.rank for update in updates)
    tensors: dict[str, Tensor] = {}
    for update in updates:
        name = names[update.record.name]
        a = update.a.float()
        b = (update.b.double() * (update.record.scale * update.rank / alpha)).float()
        heads = base.heads_of(name)
        if heads is not None:
            b = rearrange(b, "(h half i) r -> (h i half) r", h=heads, half=2)
        # llama.cpp looks up rows of an embedding's A, so it is transposed.
        tensors[f"{name}.weight.lora_a"] = a.T.contiguous() if name == EMBEDDING else a
        tensors[f"{name}.weight.lora_b"] = b.contiguous()

    def write(new: Path) -> None:
        gguf = _package()
        writer = gguf.GGUFWriter(new, base.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    save(path, write)


def _package() -> Any:
    """Return the package `gguf`."""
    try:
        import gguf
    except ImportError as error:
        raise MissingPackageError(
            'writing GGUF needs the package gguf; run: pip install "disha-torch[gguf]"'
        ) from error
    return gguf

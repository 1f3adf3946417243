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
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from disha.config import check_positive_int
from disha.errors import (
    AdapterStateError,
    ArgumentError,
    ConversionError,
    MissingPackageError,
)
from disha.files import AdapterHeader, LayerRecord
from disha.files.atomic import PathLike, checked_path, write_files
from disha.files.contents import adapter_contents
from disha.interop.low_rank import (
    BaseWeight,
    LoraReport,
    LowRankUpdate,
    Progress,
    base_weights,
    check_limits,
    commonest,
    listed,
    low_rank_updates,
)
from disha.model import ModelView
from disha.text import counted

__all__ = ["ARCHITECTURES", "export_gguf", "write_gguf"]

ARCHITECTURES: Mapping[str, bool] = {"llama": True, "qwen2": False}
"""GGUF's name of an architecture -> whether GGUF stores the rows of q and k in another order."""

MODEL_TYPES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""Model type in `transformers` -> architecture in GGUF."""

LAYER_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_IN_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
_EMBEDDING = re.compile(r"(?:model\.)?embed_tokens")
_HEAD = "lm_head"


@dataclass(frozen=True)
class _Base:
    """What is known about the GGUF file of the base model.

    Attributes:
        architecture: its name in GGUF.
        heads: query heads, or None if unknown.
        kv_heads: key and value heads, or None if unknown.
        tied_head: whether the embedding is the output head too, or None if unknown.
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
        for name, value in (("heads", self.heads), ("kv_heads", self.kv_heads)):
            if value is not None:
                check_positive_int(name, value)

    def interleaves(self, name: str) -> bool:
        """Whether GGUF stores the rows of the weight of that name in another order."""
        return ARCHITECTURES[self.architecture] and name.endswith((".attn_q", ".attn_k"))

    def heads_of(self, name: str) -> int | None:
        """Return the number of heads that the rows of q or k belong to."""
        return self.heads if name.endswith(".attn_q") else self.kv_heads

    def check_rows(self, name: str, layer: LayerRecord) -> None:
        """Raise if the rows of a weight can't be put in order.

        Raises:
            ArgumentError: its heads are not known, or don't divide the rows.
        """
        if not self.interleaves(name):
            return
        heads = self.heads_of(name)
        if heads is None:
            raise ArgumentError(
                f"GGUF orders the rows of q and k of {self.architecture} models by heads; give "
                "`heads` and `kv_heads` of the base model"
            )
        if layer.out_features % (2 * heads):
            raise ArgumentError(
                f"{layer.name} has {layer.out_features} rows, which can't be split into {heads} "
                "heads of an even size; give `heads` and `kv_heads` of the base model"
            )


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
    with ranks.agreeing(action):
        _package()
        check_limits(rank, max_error)
        target = checked_path(path)
        base = _base_of(view, architecture, heads, kv_heads)
    header, tensors = adapter_contents(view, adapter)
    with ranks.agreeing(action):
        names = _gguf_names(header, base)
    updates = low_rank_updates(
        header,
        tensors,
        rank=rank,
        max_error=max_error,
        base=base_weights(view, adapter),
    )
    with ranks.agreeing(action):
        alpha, factors = _factors(updates, names, base)
        if ranks.writes:
            write_files({target: partial(_write, base.architecture, alpha, factors)})
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
    progress: Progress = iter,
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
        progress: receives the layers, and yields each before it is converted.

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
    _package()
    target = checked_path(path)
    model = _Base(architecture, heads, kv_heads, tied_head)
    names = _gguf_names(header, model)
    updates = low_rank_updates(
        header, tensors, rank=rank, max_error=max_error, base=base, progress=progress
    )
    alpha, factors = _factors(updates, names, model)
    write_files({target: partial(_write, architecture, alpha, factors)})
    return LoraReport.of(target, updates)


# --- what the base model is like -----------------------------------------------------------------


def _base_of(
    view: ModelView, architecture: str | None, heads: int | None, kv_heads: int | None
) -> _Base:
    config = getattr(view.model, "config", None)
    model_type = getattr(config, "model_type", None)
    if architecture is None and model_type is not None and model_type not in MODEL_TYPES:
        raise ArgumentError(
            f"the model type {model_type!r} is unknown; LoRA can be written as GGUF for "
            f"{', '.join(MODEL_TYPES)}. If the model's GGUF file has the architecture "
            f"{' or '.join(ARCHITECTURES)}, give it as `architecture`"
        )
    heads = _first(config, "num_attention_heads", "heads") if heads is None else heads
    if kv_heads is None:
        kv_heads = _first(config, "num_key_value_heads", "kv_heads") or heads
    known = MODEL_TYPES.get(model_type or "llama", "llama")
    return _Base(architecture or known, heads, kv_heads, _is_head_tied(view, config))


def _first(config: Any, *names: str) -> int | None:
    """Return the first of these attributes that a configuration has."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _is_head_tied(view: ModelView, config: Any) -> bool | None:
    """Whether the output head shares the embedding's weight; None if that is unknown."""
    found = view.modules
    head = found.get(_HEAD)
    embedding = next((found[name] for name in found if _EMBEDDING.fullmatch(name)), None)
    if head is None or embedding is None:
        tied = getattr(config, "tie_word_embeddings", getattr(config, "tied_head", None))
        return tied if isinstance(tied, bool) else None
    return head._parameters.get("weight") is embedding._parameters.get("weight")


# --- names ---------------------------------------------------------------------------------------


def _gguf_names(header: AdapterHeader, base: _Base) -> dict[str, str]:
    """Return layer -> the name of its weight in GGUF, without `.weight`.

    Raises:
        ConversionError: a part of the adapter has no name in GGUF.
        ArgumentError: the heads of the base model are needed, but not known.
    """
    if header.also_train:
        raise ConversionError(
            f"a LoRA for llama.cpp holds updates of layers only, and parameters were trained "
            f"with the blocks ({listed(header.also_train)}); convert the merged model "
            "(merge_adapters)"
        )
    stacks = [layer.name for layer in header.layers if layer.layout.expert_dim is not None]
    if stacks:
        raise ConversionError(
            f"LoRA of stacks of experts can't be written as GGUF ({listed(stacks)}); leave them "
            "out (`exclude`), or convert the merged model (merge_adapters, disha merge)"
        )
    names = {layer.name: _gguf_name(layer) for layer in header.layers}
    unknown = [name for name, found in names.items() if found is None]
    if unknown:
        raise ConversionError(
            f"the GGUF file of a {base.architecture} model has no place for {len(unknown)} of "
            f"{counted(len(names), 'layer')} ({listed(unknown)}); allowed are lm_head, "
            f"embed_tokens and layers.<n>. with {', '.join(LAYER_PARTS)}; the last two also after "
            "'model.'"
        )
    known = {name: found for name, found in names.items() if found is not None}
    counts = Counter(known.values())
    twice = [name for name, found in known.items() if counts[found] > 1]
    if twice:
        raise ConversionError(
            f"{listed(twice)} have the same names in GGUF, so one would replace another; leave out "
            "those that the model's GGUF file does not have (`exclude`)"
        )
    if base.tied_head and "output" in known.values():
        raise ConversionError(
            "lm_head is adapted, but it shares its weight with the embedding, and the GGUF file of "
            "such a model has no output head; leave lm_head out (`exclude`)"
        )
    if base.tied_head is not False and "token_embd" in known.values():
        raise ConversionError(
            "the embedding is adapted, and llama.cpp would apply its LoRA to the output head too "
            "if they share a weight"
            + (
                ", as they do here; leave it out (`exclude`)"
                if base.tied_head
                else "; whether they do is unknown here, so export from the model"
            )
        )
    for layer in header.layers:
        base.check_rows(known[layer.name], layer)
    return known


def _gguf_name(layer: LayerRecord) -> str | None:
    if layer.layout.pattern == "index out":
        return "token_embd" if _EMBEDDING.fullmatch(layer.name) else None
    if layer.layout.pattern != "out in":
        return None
    if layer.name == _HEAD:
        return "output"
    found = _IN_LAYER.fullmatch(layer.name)
    part = found and LAYER_PARTS.get(found[2])
    return f"blk.{int(found[1])}.{part}" if found and part else None


# --- the file ------------------------------------------------------------------------------------


def _factors(
    updates: Sequence[LowRankUpdate], names: Mapping[str, str], base: _Base
) -> tuple[int, dict[str, Tensor]]:
    """Return alpha, and the tensors by their names.

    llama.cpp multiplies by alpha / rank, with each layer's own rank, and reads an alpha of 0 as the
    rank. So alpha is the rank that most layers have, and the rest of the scale is in B.
    """
    alpha = commonest(update.rank for update in updates)
    tensors = {}
    for update in updates:
        name, layer = names[update.record.name], update.record
        a = update.a.float()
        b = (update.b.double() * (layer.scale * update.rank / alpha)).float()
        if base.interleaves(name):
            b = rearrange(b, "(h half i) r -> (h i half) r", h=base.heads_of(name), half=2)
        # llama.cpp looks up rows of an embedding's A, so it is transposed.
        tensors[f"{name}.weight.lora_a"] = a.T.contiguous() if name == "token_embd" else a
        tensors[f"{name}.weight.lora_b"] = b.contiguous()
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise AdapterStateError(
            f"{listed(broken)} would not be finite in float32; nothing was written. Lower the "
            "adapter's scale"
        )
    return alpha, tensors


def _write(architecture: str, alpha: int, factors: Mapping[str, Tensor], path: str) -> None:
    gguf = _package()
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, tensor in factors.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _package() -> Any:
    """Return the package `gguf`."""
    try:
        import gguf
    except ImportError as error:
        raise MissingPackageError(
            'writing GGUF needs the package gguf; run: pip install "disha-torch[gguf]"'
        ) from error
    return gguf

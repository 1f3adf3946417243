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
    check_rank,
    commonest,
    listed,
    low_rank_updates,
)
from disha.model import ModelView
from disha.text import counted

__all__ = ["export_gguf", "write_gguf"]

MODEL_TYPES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""Model type in `transformers` -> architecture in GGUF."""

FIELDS = ("model_type", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
"""What a model's configuration must say."""

EMBEDDING, HEAD = "token_embd", "output"


def export_gguf(
    model: nn.Module,
    path: PathLike,
    adapter: str = "default",
    rank: int | None = None,
) -> LoraReport:
    """Write an adapter of a Llama-family model as a LoRA in a GGUF file for llama.cpp.

    llama.cpp reads it beside the GGUF file of the base model (`--lora`). Layers must have the usual
    names, `model.layers.0.self_attn.q_proj` and so on, with or without `model.`. Bone and tile are
    exact; BAT is truncated to `rank`. Factors are float32 for blocks of any dtype. `model.config`
    says the architecture and the heads. The package `gguf` must be installed.

    If the model is sharded, call this on all ranks; the first one writes.

    Args:
        model: a model with adapters.
        path: the file to write.
        adapter: the adapter's name.
        rank: largest rank of a layer. BAT needs it; if it is smaller than r, Bone is truncated too.

    Returns:
        A `LoraReport`, with the rank and the error of every layer.

    Raises:
        ConversionError: the GGUF file of the base model has no such layer, or parameters were
            trained with the blocks.
        ArgumentError: `rank` is out of range or missing, or the model's configuration does not say
            its heads.
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
    header, tensors = adapter_contents(view, adapter, base=False)
    with ranks.agreeing(action):
        target = checked_path(path)
        check_rank(rank)
        config = getattr(model, "config", None)
        fields: dict[str, Any] = {name: getattr(config, name, None) for name in FIELDS}
        head = view.parameters_by_name.get("lm_head.weight")
        if head is not None:
            fields["tie_word_embeddings"] = len(head.names) > 1
        names = _gguf_names(header, fields)
    updates = low_rank_updates(header, tensors, rank=rank, base=base_weights(view, adapter))
    with ranks.agreeing(action):
        if ranks.writes:
            _write(target, updates, names, fields)
    return LoraReport.of(target, updates)


def write_gguf(
    path: PathLike,
    header: AdapterHeader,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    rank: int | None = None,
    base: BaseWeight | None = None,
) -> LoraReport:
    """Write an adapter without its model as a GGUF file, as `export_gguf` does.

    Args:
        path: the file to write.
        header: the adapter's header.
        tensors: its tensors.
        config: the content of the base model's `config.json`: the type of the model, its heads, and
            whether its embedding is tied.
        rank: largest rank of a layer.
        base: returns the base weights; only BAT needs it.

    Examples:
        >>> import tempfile, pathlib
        >>> from torch import nn
        >>> import disha
        >>> from disha.files.contents import adapter_contents
        >>> from disha.interop import lora
        >>> from disha.model import ModelView
        >>> model = disha.inject_adapters(nn.ModuleDict({"lm_head": nn.Linear(8, 16)}), "head", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "lora.gguf")
        ...     lora.write_gguf(path, *adapter_contents(ModelView(model)), {}).error
        0.0
    """
    target = checked_path(path)
    names = _gguf_names(header, config)
    updates = low_rank_updates(header, tensors, rank=rank, base=base)
    _write(target, updates, names, config)
    return LoraReport.of(target, updates)


# --- the base ------------------------------------------------------------------------------------


def _architecture(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type") or "llama"
    if model_type not in MODEL_TYPES:
        raise ConversionError(
            f"LoRA can be written as GGUF for {', '.join(MODEL_TYPES)}, not for {model_type}"
        )
    return MODEL_TYPES[model_type]


def _heads_of(name: str, config: Mapping[str, Any]) -> int | None:
    """Return the heads by which GGUF orders the rows of a weight, or None if it does not."""
    if _architecture(config) != "llama" or not name.endswith((".attn_q", ".attn_k")):
        return None
    heads: int | None = config.get("num_attention_heads")
    if heads is None:
        raise ArgumentError(
            "GGUF orders rows of q and k by heads, and the model has no configuration that says "
            "num_attention_heads; add one (--base for the command)"
        )
    # Without a number of key and value heads, there are as many.
    return heads if name.endswith("q") else config.get("num_key_value_heads") or heads


# --- names ---------------------------------------------------------------------------------------


def _gguf_names(header: AdapterHeader, config: Mapping[str, Any]) -> dict[str, str]:
    """Return layer -> the name of its weight in GGUF, without `.weight`."""
    if header.also_train:
        raise ConversionError(
            f"a LoRA for llama.cpp can't hold {listed(header.also_train)}, which trained with the "
            "blocks; convert the merged model (merge_adapters)"
        )
    gguf, family = _package(), _architecture(config)
    numbers = [int(one) for layer in header.layers for one in re.findall(r"\d+", layer.name)]
    architecture = next(key for key, one in gguf.MODEL_ARCH_NAMES.items() if one == family)
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
            f"GGUF has no place of its own for {len(unknown)} of {counted(len(names), 'layer')} "
            f"({listed(unknown)}); merge them"
        )
    tied = config.get("tie_word_embeddings")
    if (HEAD in counts and tied) or (EMBEDDING in counts and tied is not False):
        raise ConversionError(
            "the embedding or lm_head is adapted, and may share its weight with the other, which "
            "llama.cpp would adapt too; leave it out"
        )
    return names


# --- the file ------------------------------------------------------------------------------------


def _write(
    path: Path,
    updates: Sequence[LowRankUpdate],
    names: Mapping[str, str],
    config: Mapping[str, Any],
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
        heads = _heads_of(name, config)
        if heads is not None:
            b = rearrange(b, "(h half i) r -> (h i half) r", h=heads, half=2)
        # llama.cpp looks up rows of an embedding's A, so it is transposed.
        tensors[f"{name}.weight.lora_a"] = a.T.contiguous() if name == EMBEDDING else a
        tensors[f"{name}.weight.lora_b"] = b.contiguous()

    def write(new: Path) -> None:
        gguf = _package()
        writer = gguf.GGUFWriter(new, _architecture(config))
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

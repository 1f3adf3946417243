"""``disha convert``: adapters to and from the formats of other libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from disha.cli.flags import Flags, parsed
from disha.cli.output import require_free, show, with_progress
from disha.errors import AdapterFileError, AdapterIOError, ArgumentError
from disha.files import ADAPTER_NAME
from disha.files.atomic import checked_path
from disha.files.contents import Contents, blocks_only, read_contents, write_contents
from disha.files.header import AdapterHeader
from disha.files.json_files import read_json
from disha.files.reading import opened_file
from disha.functional import method_of
from disha.interop import image_lora, lora, peft
from disha.interop.checkpoints import Checkpoint, base_shapes, base_weights, open_checkpoint
from disha.interop.checkpoints.matching import refuse_tied
from disha.interop.checkpoints.reading import INDEX, SINGLE
from disha.interop.experts import ExpertForm
from disha.interop.gguf import MODEL_TYPES
from disha.interop.image_names import Component, component_of
from disha.interop.low_rank import SERVED_RANKS, BaseWeight, LoraReport, is_stack
from disha.interop.peft_files import CONFIG_NAME
from disha.model import join
from disha.text import counted, printable

__all__ = ["run"]

DESCRIPTION = """Convert an adapter to the format of another library, or back to an adapter file.

SOURCE is one of these. The command finds out which:
  - an adapter file of disha
  - a folder that PEFT has saved: MiSS, Bone, or a LoRA that is a Bone adapter
  - a LoRA file of an image model that is a Bone adapter
  - a checkpoint of transformers' Trainer with an adapter file (disha.integrations.transformers)

--to sets the format of OUT:
  disha  an adapter file
  peft   a folder of PEFT's MiSS
  lora   a LoRA folder in PEFT's layout, which most runtimes read
  gguf   the LoRA file of llama.cpp, for models of the Llama family
  diffusers, kohya, comfyui
         a LoRA file for an image model, with the keys that these programs read

Bone and tile are exact as LoRA. BAT is truncated to --rank, and the error is reported. A stack of
experts becomes one LoRA, which PEFT reads, and vLLM for GPT-OSS. With --experts separate, each
expert gets its own LoRA, which SGLang reads, and vLLM for Mixtral and Qwen-MoE.

examples:
  disha convert adapter.safetensors for-peft --to peft
  disha convert for-peft adapter.safetensors --to disha --base path/to/model
  disha convert adapter.safetensors for-vllm --to lora
  disha convert mixtral.safetensors for-vllm --to lora --experts separate --base path/to/model
  disha convert bat.safetensors as-lora --to lora --base path/to/model --rank 32 --max-error 0.1
  disha convert adapter.safetensors adapter.gguf --to gguf --base path/to/model
  disha convert unet.safetensors style.safetensors --to comfyui"""

Format = Literal["disha", "peft", "lora", "gguf", "diffusers", "kohya", "comfyui"]

IMAGES: tuple[Format, ...] = ("diffusers", "kohya", "comfyui")

ONLY_FOR: Mapping[str, tuple[Format, ...]] = {
    "rank": ("lora", "gguf", *IMAGES),
    "max_error": ("lora", "gguf", *IMAGES),
    "pad_rank": ("lora",),
    "experts": ("lora",),
    "architecture": ("gguf",),
    "heads": ("gguf",),
    "kv_heads": ("gguf",),
    "dropout": ("peft",),
}
"""A flag that only some formats use -> these formats."""

SERVED_BY_DEFAULT = 16
"""The largest rank that vLLM takes without --max-lora-rank."""

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""The fields of a config.json that count the experts of a layer."""

GGUF_MAGIC = b"GGUF"
FOLDERS: dict[str, Format] = {"MISS": "peft", "BONE": "peft", "LORA": "lora"}
"""PEFT's name of a method -> the format of a folder that PEFT saved with this method."""


@dataclass(frozen=True)
class ConvertFlags(Flags):
    """The arguments of `disha convert`.

    Args:
        source: The adapter: a file, or a folder that PEFT has saved.
        out: The result: a folder for peft and lora, a file for all others.
        to: The format of the result.
        base: The checkpoint of the base. It is needed to read peft, to write BAT as LoRA, to write
            experts of GPT-OSS or separate experts, and to read experts from a LoRA. For gguf, its
            config.json gives the numbers of heads.
        rank: Largest rank of a layer as LoRA. BAT needs it.
        dropout: Dropout to write for peft, instead of the adapter's. PEFT's BAT has no dropout, so
            give 0.0 for BAT.
        max_error: Largest relative error of a layer's update, such as 0.1. A larger error is
            refused.
        pad_rank: Give all layers the same rank as LoRA, one that vLLM allows: 8, 16, 32, 64, 128,
            256, 320 or 512. The rest is zeros, so the update stays the same.
        experts: How to write stacks of experts as LoRA: stacked (the default) or separate.
        architecture: GGUF's name for the architecture of the base; by default that of its
            config.json, or llama.
        heads: Query heads of the base, for gguf; by default those of its config.json.
        kv_heads: Key and value heads of the base, for gguf; by default those of its config.json.
        component: For a LoRA file of an image model: the component of the pipeline to read, or the
            one that the adapter is for. By default, the file or the names of the layers show it.
        no_also_train: Leave out the parameters that were saved with the blocks.
        overwrite: Replace an existing file or folder.
    """

    source: Path
    out: Path
    to: Format = field(kw_only=True)
    base: Path | None = None
    rank: int | None = None
    dropout: float | None = None
    max_error: float | None = None
    pad_rank: bool = False
    experts: ExpertForm | None = None
    architecture: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    component: Component | None = None
    no_also_train: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Raise if a flag is given that the format does not use, or if the result exists."""
        for name, targets in ONLY_FOR.items():
            given = getattr(self, name) is not None and getattr(self, name) is not False
            if given and self.to not in targets:
                raise ArgumentError(
                    f"--{name.replace('_', '-')} has no effect with --to {self.to}; leave it out"
                )
        require_free(self.out, self.overwrite)


def run(arguments: Sequence[str]) -> None:
    """Convert an adapter, with the given command-line arguments."""
    flags = parsed(ConvertFlags, "convert", arguments, DESCRIPTION)
    flags.check()
    base = None if flags.base is None else open_checkpoint(flags.base)
    source_format, contents = _read(flags, base)
    _refuse_other_experts(*contents, base)
    report = None
    if flags.to == "disha":
        write_contents(flags.out, *contents)
    elif flags.to == "peft":
        peft.write_folder(flags.out, *contents, dropout=flags.dropout)
    elif flags.to == "lora":
        options = _lora_options(flags, contents[0], base)
        report = lora.write_lora(
            flags.out,
            *contents,
            pad=flags.pad_rank,
            experts=flags.experts or "stacked",
            model_type=_model_type(base),
            **options,
        )
    elif flags.to in IMAGES:
        report = _write_image_lora(flags, contents, base)
    else:
        options = {**_lora_options(flags, contents[0], base), **_gguf_options(flags, base)}
        report = lora.write_gguf(flags.out, *contents, **options)
    notes = (
        _notes_on_servers(report, contents[0], flags)
        if report is not None and flags.to == "lora"
        else []
    )
    summary = "\n".join([*notes, f"{flags.source} ({source_format}) -> {flags.out} ({flags.to})"])
    layers = counted(len(contents[0].layers), "layer")
    show(
        flags.json,
        f"{report}\n{summary}" if report else f"{summary}: {layers}, exact",
        {
            "source": str(flags.source),
            "from": source_format,
            "path": str(flags.out),
            "to": flags.to,
            "layers": _layer_fields(contents[0], report),
            "error": report.error if report else 0.0,
            "notes": notes,
        },
    )


def _write_image_lora(
    flags: ConvertFlags, contents: Contents, base: Checkpoint | None
) -> LoraReport:
    names = [layer.name for layer in contents[0].layers]
    component = component_of(names) if flags.component is None else flags.component
    options = _lora_options(flags, contents[0], base)
    weights = options.pop("base")
    bases: dict[str, BaseWeight] = {} if weights is None else {component: weights}
    return image_lora.write_file(flags.out, {component: contents}, flags.to, bases=bases, **options)


def _notes_on_servers(report: LoraReport, header: AdapterHeader, flags: ConvertFlags) -> list[str]:
    """Return what a user of vLLM or SGLang must know about a LoRA."""
    notes = []
    largest = max((layer.rank for layer in report.layers), default=0)
    allowed = next((rank for rank in SERVED_RANKS if rank >= largest), None)
    if allowed is None:
        notes.append(f"vLLM takes ranks up to {SERVED_RANKS[-1]}, and this LoRA has {largest}")
    elif largest > SERVED_BY_DEFAULT:
        notes.append(f"rank {largest}: start vLLM with --max-lora-rank {allowed}")
    if flags.pad_rank:
        notes.append("the ranks are padded with zeros")
    elif len({layer.rank for layer in report.layers}) > 1:
        notes.append("SGLang reads one rank for all layers: pad them with --pad-rank")
    if len({layer.scale for layer in header.layers}) > 1:
        notes.append(
            "SGLang reads one scale for all layers, and these have several; write them into the "
            "blocks first (disha combine)"
        )
    if any(is_stack(layer) for layer in header.layers) and flags.experts is None:
        notes.append(
            "the experts are stacked, as PEFT reads them, and vLLM for GPT-OSS; SGLang, and vLLM "
            "for other models, need --experts separate"
        )
    if report.also_train:
        notes.append(
            "vLLM and SGLang refuse a LoRA with parameters that were trained with it; leave them "
            "out with --no-also-train, or merge the adapter (disha merge)"
        )
    return notes


def _layer_fields(header: AdapterHeader, report: LoraReport | None) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            "method": one.method,
            "r": one.r,
            "rank": getattr(one, "rank", None),
            "error": getattr(one, "error", 0.0),
        }
        for one in (report or header).layers
    ]


# --- reading -------------------------------------------------------------------------------------


def _read(flags: ConvertFlags, base: Checkpoint | None) -> tuple[Format, Contents]:
    """Return the format of the source, and the adapter in it."""
    path = checked_path(flags.source)
    in_checkpoint = path / ADAPTER_NAME
    path = in_checkpoint if in_checkpoint.is_file() else path
    source_format = _format_of(path)
    if source_format in IMAGES:
        return source_format, _one_component(flags, image_lora.read_file(path))
    if flags.component is not None and flags.to not in IMAGES:
        raise ArgumentError(
            f"--component has no effect, because neither {path} nor {flags.out} is a LoRA file of "
            "an image model; leave it out"
        )
    if source_format == "gguf":
        raise ArgumentError(
            f"{path} is GGUF, which can be written but not read; convert its original adapter"
        )
    if source_format == "disha":
        contents: Contents = read_contents(path, also_train=not flags.no_also_train)
    elif source_format == "lora":
        contents = lora.read_lora(
            path, model_type=_model_type(base), also_train=not flags.no_also_train
        )
        saved = contents[0].also_train
        if base is not None:
            refuse_tied(base, path, saved)
        elif any(contents[1][name].dim() > 1 for name in saved):
            raise ArgumentError(
                f"{path} holds {', '.join(saved)}, trained with the LoRA. PEFT may have untied "
                "them from other parameters, and only the base shows whether; give --base "
                "CHECKPOINT, or leave them out with --no-also-train"
            )
    else:
        contents = _read_peft(path, base, not flags.no_also_train)
    return source_format, blocks_only(*contents) if flags.no_also_train else contents


def _one_component(flags: ConvertFlags, found: Mapping[str, Contents]) -> Contents:
    component = next(iter(found)) if len(found) == 1 else ""
    component = component if flags.component is None else flags.component
    if component not in found:
        raise ArgumentError(
            f"{flags.source} holds {', '.join(found)}, and an adapter file is for one model; give "
            "--component with one of these names"
        )
    return found[component]


def _format_of(path: Path) -> Format:
    """Return the format of a file by its first bytes, or of a folder by its configuration."""
    if not path.is_dir():
        with opened_file(path) as file:
            if file.read(len(GGUF_MAGIC)) == GGUF_MAGIC:
                return "gguf"
        return image_lora.form_of(path) or "disha"
    if not (path / CONFIG_NAME).exists():
        _refuse_whole_model(path)
        raise AdapterIOError(
            f"{path} is a folder without {CONFIG_NAME} and {ADAPTER_NAME}; name an adapter file, a "
            "folder that PEFT has saved, or a checkpoint saved with AdapterCheckpoints"
        )
    method = read_json(path / CONFIG_NAME).get("peft_type")
    if not isinstance(method, str) or method not in FOLDERS:
        raise AdapterFileError(
            f"{path} holds an adapter of peft_type {method!r}; allowed are {', '.join(FOLDERS)}"
        )
    return FOLDERS[method]


def _refuse_whole_model(folder: Path) -> None:
    """Raise if a folder is a checkpoint of `Trainer` that holds the blocks among all weights."""
    if not any((folder / name).exists() for name in (SINGLE, INDEX)):
        return
    tensors = open_checkpoint(folder).tensors
    blocks = [name for name in tensors if ".disha." in name]
    if blocks:
        raise AdapterFileError(
            f"{folder} holds a complete model of {counted(len(tensors), 'tensor')}, with "
            f"{counted(len(blocks), 'block')} such as {printable(blocks[0])}, but not the scale "
            "and the layouts of the adapter. Build the model, call inject_adapters as for the "
            "training, load these tensors (load_state_dict), and call disha.save_adapter. With "
            "AdapterCheckpoints, later checkpoints hold an adapter file"
        )


def _read_peft(path: Path, base: Checkpoint | None, also_train: bool) -> Contents:
    folder = peft.read_folder(path)
    if base is None:
        raise ArgumentError(
            f"{path} does not say how large the inputs of its layers are, but the base does; give "
            "--base CHECKPOINT"
        )
    names = [*(join(name, "weight") for name in folder.blocks), *folder.beside]
    contents = peft.contents_of(folder, base_shapes(base, names), also_train=also_train)
    refuse_tied(base, path, contents[0].also_train)
    return contents


# --- options for writing -------------------------------------------------------------------------


def _lora_options(
    flags: ConvertFlags, header: AdapterHeader, base: Checkpoint | None
) -> dict[str, Any]:
    weights = None
    if any(method_of(layer.method).reads_weight for layer in header.layers):
        if flags.rank is None:
            raise ArgumentError(
                f"the update in {flags.source} is not low-rank, so as LoRA it is truncated to a "
                "rank; give --rank R, and --max-error PART to refuse a larger error"
            )
        if base is None:
            raise ArgumentError(
                f"the update in {flags.source} depends on the base weights, which the adapter does "
                "not hold; give --base CHECKPOINT"
            )
        weights = base_weights(base, header)
    return {
        "rank": flags.rank,
        "max_error": flags.max_error,
        "base": weights,
        "progress": partial(with_progress, total=len(header.layers), what="converting"),
    }


def _refuse_other_experts(
    header: AdapterHeader, tensors: Mapping[str, Tensor], base: Checkpoint | None
) -> None:
    """Raise if the config.json of the base says that it has other experts than the adapter."""
    config = {} if base is None else base.config()
    known = [config[name] for name in EXPERT_COUNTS if isinstance(config.get(name), int)]
    for layer in header.layers:
        if is_stack(layer) and known:
            count, shape = known[0], tuple(tensors[layer.key].shape)
            inner = layer.in_features if layer.name.endswith("gate_up_proj") else layer.out_features
            width = config.get("hidden_size", inner)
            if (shape[0], inner) != (count, width):
                raise ArgumentError(
                    f"{layer.name} is for {shape[0]} experts of width {inner}, and the base has "
                    f"{count} of width {width}; give the base that the adapter is for"
                )


def _model_type(base: Checkpoint | None) -> str | None:
    """Return the model type in the config.json of a base."""
    kind = None if base is None else base.config().get("model_type")
    return kind if isinstance(kind, str) else None


def _gguf_options(flags: ConvertFlags, base: Checkpoint | None) -> dict[str, Any]:
    config = {} if base is None else base.config()
    heads = config.get("num_attention_heads") if flags.heads is None else flags.heads
    # Without the key, and with null, there are as many as heads.
    kv_heads = config.get("num_key_value_heads") or (heads if config else None)
    tied = config.get("tie_word_embeddings")
    return {
        "architecture": flags.architecture or _architecture(config),
        "heads": heads,
        "kv_heads": kv_heads if flags.kv_heads is None else flags.kv_heads,
        "tied_head": tied if isinstance(tied, bool) else None,
    }


def _architecture(config: Mapping[str, Any]) -> str:
    """Return GGUF's name of the architecture of a base, by its config.json."""
    model_type = config.get("model_type", "llama")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ArgumentError(
            f"the model type {model_type!r} of the base is unknown; LoRA can be written as GGUF "
            f"for {', '.join(MODEL_TYPES)}. If its GGUF file has one of these architectures, give "
            "--architecture"
        )
    return MODEL_TYPES[model_type]

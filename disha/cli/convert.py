"""``disha convert``: an adapter for other libraries, and theirs for this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from disha.cli.flags import Flags, parsed
from disha.cli.output import require_free, show, shown
from disha.cli.sources import Form, Source, read_source
from disha.errors import ArgumentError
from disha.files.contents import write_contents
from disha.functional import method_of
from disha.interop import lora, peft
from disha.interop.checkpoints import Checkpoint, base_weights, open_checkpoint
from disha.interop.gguf import MODEL_TYPES
from disha.interop.low_rank import LoraReport

__all__ = ["run"]

DESCRIPTION = """Turn an adapter into one for other libraries, or theirs into ours.

SOURCE is an adapter file of disha, or a folder that PEFT has saved: MiSS, Bone, or a LoRA that is
a Bone adapter. What it is shows by itself.

OUT is a folder of MiSS (--to peft); a LoRA folder in PEFT's layout, which most runtimes read
(--to lora); the LoRA file of llama.cpp, for models of the Llama family (--to gguf); or an adapter
file of disha (--to disha). As LoRA, Bone and tile are exact; BAT is cut to --rank, and what that
loses is reported.

examples:
  disha convert adapter.safetensors for-peft --to peft
  disha convert for-peft adapter.safetensors --to disha --base path/to/model
  disha convert adapter.safetensors for-vllm --to lora
  disha convert bat.safetensors as-lora --to lora --base path/to/model --rank 32 --max-error 0.1
  disha convert adapter.safetensors adapter.gguf --to gguf --base path/to/model"""

FOR_LORA = ("rank", "max_error")
FOR_GGUF = ("architecture", "heads", "kv_heads")
"""Flags that only some targets have a use for."""


@dataclass(frozen=True)
class ConvertFlags(Flags):
    """The arguments of `disha convert`."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The adapter: a file, or a folder that PEFT has saved."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """What to write: a folder for peft and lora, a file for disha and gguf."""

    to: Form
    """What to write it as."""

    base: Annotated[Path | None, tyro.conf.arg(metavar="CHECKPOINT")] = None
    """The base: needed to read peft, and to write BAT as LoRA; tells gguf of its heads."""

    rank: Annotated[int | None, tyro.conf.arg(metavar="R")] = None
    """Largest rank of a layer as LoRA; needed for BAT."""

    dropout: Annotated[float | None, tyro.conf.arg(metavar="P")] = None
    """Dropout to write for peft, in place of the adapter's; 0.0 for BAT, which has none there."""

    max_error: Annotated[float | None, tyro.conf.arg(metavar="PART")] = None
    """Refuse to lose more than this part of a layer's update, such as 0.1."""

    architecture: Annotated[str | None, tyro.conf.arg(metavar="NAME", aliases=("--arch",))] = None
    """What GGUF calls the base's architecture; by default that of its config.json, or llama."""

    heads: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Query heads of the base, for gguf; by default those of its config.json."""

    kv_heads: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Key and value heads of the base, for gguf; by default those of its config.json."""

    also_train: bool = True
    """Leave out the parameters saved beside the blocks."""

    overwrite: bool = False
    """Replace what is there."""


def run(arguments: Sequence[str]) -> None:
    """Convert an adapter, as command-line `arguments` say."""
    flags = parsed(ConvertFlags, "convert", arguments, DESCRIPTION)
    _refuse_useless(flags)
    require_free(flags.out, flags.overwrite)
    base = None if flags.base is None else open_checkpoint(flags.base)
    source = read_source(flags.source, base, also_train=flags.also_train)
    report = WRITERS[flags.to](flags, source, base)
    summary = f"{source.path} ({source.form}) -> {flags.out} ({flags.to})"
    if report is None:
        text = f"{summary}: {len(source.header.layers)} layers, exact"
    else:
        text = f"{report}\n{summary}"
    show(flags.json, text, _fields(flags, source, report))


def _refuse_useless(flags: ConvertFlags) -> None:
    """Raise if a flag is given that the target has no use for."""
    useless = [] if flags.to in ("lora", "gguf") else [*FOR_LORA]
    useless += [] if flags.to == "gguf" else [*FOR_GGUF]
    useless += [] if flags.to == "peft" else ["dropout"]
    given = [name for name in useless if getattr(flags, name) is not None]
    if given:
        name = given[0].replace("_", "-")
        raise ArgumentError(f"--{name} says nothing for --to {flags.to}; leave it out")


def _fields(flags: ConvertFlags, source: Source, report: LoraReport | None) -> dict[str, Any]:
    if report is None:
        layers = [
            {"name": one.name, "method": one.method, "r": one.r, "rank": None, "error": 0.0}
            for one in source.header.layers
        ]
    else:
        layers = [
            {
                "name": one.name,
                "method": one.method,
                "r": one.r,
                "rank": one.rank,
                "error": one.error,
            }
            for one in report.layers
        ]
    return {
        "source": str(source.path),
        "from": source.form,
        "path": str(flags.out),
        "to": flags.to,
        "layers": layers,
        "error": 0.0 if report is None else report.error,
    }


# --- writing -------------------------------------------------------------------------------------


def _to_disha(flags: ConvertFlags, source: Source, base: Checkpoint | None) -> None:
    write_contents(flags.out, *source.contents)


def _to_peft(flags: ConvertFlags, source: Source, base: Checkpoint | None) -> None:
    peft.write_folder(flags.out, *source.contents, dropout=flags.dropout)


def _to_lora(flags: ConvertFlags, source: Source, base: Checkpoint | None) -> LoraReport:
    return lora.write_lora(flags.out, *source.contents, **_lora_arguments(flags, source, base))


def _to_gguf(flags: ConvertFlags, source: Source, base: Checkpoint | None) -> LoraReport:
    config = {} if base is None else base.config()
    heads = config.get("num_attention_heads") if flags.heads is None else flags.heads
    kv_heads = config.get("num_key_value_heads", heads if config else None)
    tied = config.get("tie_word_embeddings")
    return lora.write_gguf(
        flags.out,
        *source.contents,
        architecture=flags.architecture or _architecture(config),
        heads=heads,
        kv_heads=kv_heads if flags.kv_heads is None else flags.kv_heads,
        tied_head=tied if isinstance(tied, bool) else None,
        **_lora_arguments(flags, source, base),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    """Return what GGUF calls the architecture of a base, by its config.json."""
    kind = config.get("model_type", "llama")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ArgumentError(
            f"the base is a {kind!r}, and LoRA as GGUF is known for {', '.join(MODEL_TYPES)}; if "
            "its GGUF file is of one of these architectures, pass architecture="
        )
    return MODEL_TYPES[kind]


def _lora_arguments(
    flags: ConvertFlags, source: Source, base: Checkpoint | None
) -> Mapping[str, Any]:
    header = source.header
    reads_weight = any(method_of(layer.method).reads_weight for layer in header.layers)
    return {
        "rank": flags.rank,
        "max_error": flags.max_error,
        "base": base_weights(base, header) if reads_weight and base is not None else None,
        "progress": partial(shown, total=len(header.layers), what="converting"),
    }


WRITERS: Mapping[str, Callable[[ConvertFlags, Source, Checkpoint | None], LoraReport | None]] = {
    "disha": _to_disha,
    "peft": _to_peft,
    "lora": _to_lora,
    "gguf": _to_gguf,
}

"""Convert an adapter to the format of another library, or back to an adapter file.

SOURCE is an adapter file, a folder with one (a checkpoint of Trainer), a folder that PEFT has
saved, or a LoRA file of an image model. What is a LoRA must be a Bone adapter.

--to sets the format of OUT:
  disha             an adapter file
  peft              a folder of PEFT's MiSS
  lora              a LoRA folder in PEFT's layout, which most runtimes read, and which the script
                    convert_lora_to_gguf.py of llama.cpp turns into GGUF (with --pad_rank)
  diffusers         a LoRA file for an image model

Bone and tile are exact as LoRA; on some rows of a weight, they need --base. BAT is cut to --rank,
and the error is reported.

Examples:
  disha convert adapter.safetensors for-peft --to peft
  disha convert for-peft adapter.safetensors --to disha --base path/to/model
  disha convert bat.safetensors as-lora --to lora --base path/to/model --rank 32
"""

from __future__ import annotations

import json
import os
import shlex
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from disha.cli.dispatcher import Parser
from disha.cli.output import fit
from disha.errors import AdapterFileError, ArgumentError
from disha.files import ADAPTER_NAME, AdapterContents
from disha.files.contents import keep_blocks, read_contents, write_contents
from disha.files.disk import require_free
from disha.interop import image_lora, peft
from disha.interop.checkpoints.matching import base_shapes, base_weights
from disha.interop.checkpoints.reading import Checkpoint, open_checkpoint
from disha.interop.lora.reading import read_lora
from disha.interop.lora.writing import write_lora
from disha.interop.low_rank import SERVED_RANKS, LoraReport
from disha.interop.peft_format import CONFIG_NAME
from disha.text import counted

FORMATS = ("disha", "peft", "lora", "diffusers")
PEFT_METHODS = ("MISS", "BONE", "LORA")
NOTED_BASE = "base"
"""The key of the note on the base that `disha finetune` leaves: it trains language models."""


def main(words: Sequence[str]) -> None:
    """Convert an adapter."""
    flags = _parser().parse(words)
    require_free(flags.out, flags.overwrite)
    base = None if flags.base is None else open_checkpoint(flags.base)
    contents = _read(flags, base)
    if flags.no_also_train:
        contents = keep_blocks(contents)
    report = _write(flags, contents, base)
    if report is not None:
        print(fit(str(report)))
    layers = counted(len(contents.layers), "layer")
    print(f"{flags.source} -> {flags.out} ({flags.to}): {layers}")
    if report is not None and flags.to == "lora" and NOTED_BASE in contents.metadata:
        print(_serving_command(flags, contents, report))


def _parser() -> Parser:
    parser = Parser("convert", __doc__)
    parser.add_argument("source", type=Path, help="the adapter")
    parser.add_argument("out", type=Path, help="a folder for peft and lora, a file for all others")
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format of OUT")
    parser.add_argument("--base", type=Path, help="the checkpoint of the base")
    parser.add_argument("--rank", type=int, help="largest rank of a layer as LoRA")
    parser.add_argument("--pad_rank", action="store_true", help="lora: one rank for all layers")
    parser.add_argument("--experts", default="stacked", help="lora: stacked or separate")
    parser.add_argument("--dropout", type=float, help="peft: instead of the adapter's")
    parser.add_argument("--component", help="image models: such as unet or text_encoder")
    parser.add_argument("--no_also_train", action="store_true", help="convert the blocks alone")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def _read(flags: Namespace, base: Checkpoint | None) -> AdapterContents:
    path = flags.source
    if (path / ADAPTER_NAME).is_file():
        path /= ADAPTER_NAME
    if path.is_dir():
        return _read_folder(path, flags, base)
    if not image_lora.has_factors(path):
        return read_contents(path)
    found = image_lora.read_file(path)
    component = flags.component or next(iter(found))
    if component not in found or (flags.component is None and len(found) > 1):
        raise ArgumentError(f"{path} holds {', '.join(found)}; choose one with --component")
    return found[component]


def _read_folder(path: Path, flags: Namespace, base: Checkpoint | None) -> AdapterContents:
    """Read a folder that PEFT has saved."""
    settings = path / CONFIG_NAME
    if not settings.is_file():
        raise AdapterFileError(
            f"{path} has neither {ADAPTER_NAME} nor {CONFIG_NAME}; name an adapter file, a folder "
            "that PEFT has saved, or a checkpoint saved with AdapterCheckpoints"
        )
    method = json.loads(settings.read_bytes()).get("peft_type")
    if method not in PEFT_METHODS:
        raise AdapterFileError(f"{path} is of peft_type {method!r}, not {', '.join(PEFT_METHODS)}")
    saved = not flags.no_also_train
    if method == "LORA":
        contents = read_lora(path, model_type=_config(base).get("model_type"), also_train=saved)
    else:
        if base is None:
            raise ArgumentError(f"{path} does not tell the sizes of its layers; give --base")
        contents = peft.read_folder(path, partial(base_shapes, base), also_train=saved)
    _refuse_tied(path, contents, base)
    return contents


def _serving_command(flags: Namespace, contents: AdapterContents, report: LoraReport) -> str:
    """Return the command with which vLLM serves a language model and the written adapter."""
    base = json.loads(contents.metadata[NOTED_BASE])["base_model_name_or_path"]
    if base.startswith("./"):
        base = os.path.normpath(flags.source.parent / base)
    largest = max(layer.rank for layer in report.layers)
    served = [rank for rank in SERVED_RANKS if rank >= largest]
    if not served:
        return f"vLLM serves no rank above {SERVED_RANKS[-1]}, and a layer has {largest}"
    words = ["vllm", "serve", str(flags.base or base), "--enable-lora"]
    words += ["--max-lora-rank", str(served[0])]
    words += ["--lora-modules", f"{flags.out.name}={flags.out}"]
    return f"to serve it: {shlex.join(words)}"


def _config(base: Checkpoint | None) -> dict[str, Any]:
    return {} if base is None else base.config()


def _refuse_tied(path: Path, contents: AdapterContents, base: Checkpoint | None) -> None:
    """PEFT has a copy of a tied embedding alone, where an adapter file sets the head too."""
    config = _config(base)
    tensors = contents.tensors
    matrices = [name for name in contents.also_train if tensors[name].dim() > 1]
    # A table has a row for each token of the base, or more. Other heads have fewer rows.
    tables = [name for name in matrices if len(tensors[name]) >= config.get("vocab_size", 0)]
    if tables and config.get("tie_word_embeddings", True):
        raise ArgumentError(
            f"{path} holds {tables[0]}, and PEFT unties an embedding; give a --base that does not "
            "tie its embeddings, or --no_also_train"
        )


def _write(
    flags: Namespace, contents: AdapterContents, base: Checkpoint | None
) -> LoraReport | None:
    if flags.to == "disha":
        write_contents(flags.out, contents)
        return None
    if flags.to == "peft":
        peft.write_folder(flags.out, contents, dropout=flags.dropout)
        return None
    _refuse_tied(flags.source, contents, base)
    weights = None if base is None else base_weights(base, contents)
    if flags.to == "lora":
        return write_lora(
            flags.out,
            contents,
            rank=flags.rank,
            pad=flags.pad_rank,
            experts=flags.experts,
            model_type=_config(base).get("model_type"),
            base=weights,
        )
    components = {flags.component: contents}
    bases = {flags.component: weights}
    return image_lora.write_file(flags.out, components, rank=flags.rank, bases=bases)

"""Convert an adapter to the format of another library, or back to an adapter file.

SOURCE is an adapter file, a folder with one (a checkpoint of Trainer), a folder that PEFT has
saved, or a LoRA file of an image model. A LoRA becomes an adapter of the method lora, or Bone again
if this command has written it.

--to sets the format of OUT:
  disha             an adapter file
  peft              a folder of PEFT's MiSS
  lora              a LoRA folder in PEFT's layout, which most runtimes read, and which the script
                    convert_lora_to_gguf.py of llama.cpp turns into GGUF (with --pad_rank)
  diffusers         a LoRA file for an image model

Bone and tile are exact as LoRA; for an adapter on some rows of a weight, name the base by --base.
BAT is not low-rank, so it is cut to --rank, and the largest error of a layer is reported.

A folder of PEFT names the base and its task, if --base or the notes of the adapter tell them. It
holds the chat template of the adapter, and the tokenizer if the adapter has new tokens. For a LoRA,
the command with which vLLM serves it is printed.

Examples:
  disha convert adapter.safetensors for-peft --to peft
  disha convert for-peft adapter.safetensors --to disha --base path/to/model
  disha convert bat.safetensors as-lora --to lora --base path/to/model --rank 32
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from disha.cli.dispatcher import Parser
from disha.cli.output import fit
from disha.errors import ArgumentError
from disha.files import ADAPTER_NAME, AdapterContents, find_adapter
from disha.files.contents import keep_blocks, write_contents
from disha.files.disk import require_free, save
from disha.finetune.flags import COUNT
from disha.finetune.notes import (
    BASE_KEY,
    PROMPT_KEY,
    TEMPLATE_KEY,
    TEMPLATE_NAME,
    TOKENS_KEY,
    base_note,
    read_noted_base,
    read_noted_bits,
)
from disha.interop import image_lora, peft
from disha.interop.checkpoints.matching import (
    base_weights_of_checkpoint,
    find_noted_base,
    read_adapter,
)
from disha.interop.checkpoints.reading import Checkpoint, open_checkpoint, ties_embeddings
from disha.interop.lora import write_lora
from disha.interop.low_rank import LoraReport, find_served_rank, is_stack
from disha.interop.peft_format import task_of
from disha.text import counted, first_few

FORMATS = ("disha", "peft", "lora", "diffusers")
TAKEN_BY = {
    "rank": ("lora", "diffusers"),
    "pad_rank": ("lora",),
    "experts": ("lora",),
}
"""Flag -> the formats that it is for."""


def main(words: Sequence[str]) -> None:
    """Convert an adapter."""
    flags = _parser().parse(words)
    _refuse_unused(flags)
    require_free(flags.out, flags.overwrite)
    source = find_adapter(flags.source)
    folder = peft.find_folder(source)
    if folder is not None:
        source = folder
    elif (source / ADAPTER_NAME).is_file():  # a checkpoint of Trainer
        source /= ADAPTER_NAME
    base = None
    if flags.base is not None:
        base = open_checkpoint(flags.base)
    elif folder is not None:
        base = find_noted_base(folder)
    config = {} if base is None else base.config()
    contents = _read(source, flags, base, config)
    base_name = _find_base_name(flags.base, source, contents)
    contents = replace(contents, metadata=_complete_notes(flags, contents, config, base_name))
    tokenizer = None
    if flags.to == "lora" and TOKENS_KEY in contents.metadata and base_name is not None:
        from disha.finetune.tokenizer import load_tokenizer  # transformers takes seconds to import

        tokenizer, _ = load_tokenizer(base_name, contents.metadata)
    report = _write(flags, contents, base, config)
    if flags.to in ("peft", "lora"):
        _write_template(flags.out, contents.metadata)
    if tokenizer is not None:
        tokenizer.save_pretrained(flags.out)
    text = f"{flags.source} -> {flags.out} ({flags.to}): {counted(len(contents.layers), 'layer')}"
    if report is not None:
        text += f", largest error {report.error:.3g}" if report.error else ", exact"
    print(fit(text))
    if flags.to == "lora" and report is not None:
        print(fit(_describe_serving(flags, contents, report, config, base_name)))


def _parser() -> Parser:
    parser = Parser("convert", __doc__)
    parser.add_argument("source", type=Path, help="the adapter")
    parser.add_argument("out", type=Path, help="a folder for peft and lora, a file for all others")
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format of OUT")
    parser.add_argument("--base", type=Path, help="the checkpoint of the base")
    parser.add_argument("--rank", type=COUNT, help="largest rank of a layer as LoRA")
    parser.add_argument("--pad_rank", action="store_true", help="lora: one rank for all layers")
    forms = ("stacked", "separate")
    parser.add_argument("--experts", choices=forms, help="lora: how; stacked by default")
    parser.add_argument("--component", help="image models: such as unet or text_encoder")
    parser.add_argument("--no_also_train", action="store_true", help="convert the blocks alone")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def _refuse_unused(flags: Namespace) -> None:
    """Raise if a flag is given that the format does not take."""
    for name, formats in TAKEN_BY.items():
        if getattr(flags, name) not in (None, False) and flags.to not in formats:
            raise ArgumentError(
                f"--{name} is for --to {' and '.join(formats)}, not for --to {flags.to}; leave it "
                "out"
            )
    if flags.to == "diffusers" and flags.component is None:
        raise ArgumentError(
            "--to diffusers needs to know what the adapter is of; name it with --component: "
            f"{', '.join(image_lora.COMPONENTS)}"
        )


# --- reading -------------------------------------------------------------------------------------


def _read(
    path: Path, flags: Namespace, base: Checkpoint | None, config: Mapping[str, Any]
) -> AdapterContents:
    is_image_lora = not path.is_dir() and image_lora.has_factors(path)
    if flags.component is not None and not is_image_lora and flags.to != "diffusers":
        raise ArgumentError(f"--component is for image models, and {path} is of none; leave it out")
    if is_image_lora:
        adapters = image_lora.read_file(path)
        component = flags.component
        if component is None and len(adapters) == 1:
            [component] = adapters
        if component not in adapters:
            raise ArgumentError(f"{path} holds {', '.join(adapters)}; choose one with --component")
        return adapters[component]
    contents: AdapterContents = read_adapter(path, base)
    if flags.no_also_train:
        contents = keep_blocks(contents)
    if path.is_dir():
        _refuse_tied(path, contents, config)
        has_new_rows = any(layer.is_new_rows for layer in contents.layers)
        if has_new_rows and ties_embeddings(config) is not False:
            raise ArgumentError(
                f"{path} has new rows of a table, and only the model tells what the table is tied "
                "to; load it there (load_adapter), and save it (save_adapter)"
            )
    return contents


def _refuse_tied(path: Path, contents: AdapterContents, config: Mapping[str, Any]) -> None:
    """Raise if PEFT has a tied embedding alone, where an adapter file sets the head too."""
    tensors = contents.tensors
    matrices = [name for name in contents.also_train if tensors[name].dim() > 1]
    # A table has a row for each token of the base, or more. Other heads have fewer rows.
    tables = [name for name in matrices if len(tensors[name]) >= config.get("vocab_size", 0)]
    if tables and ties_embeddings(config) is not False:
        raise ArgumentError(
            f"{path} holds {tables[0]}, which may be an embedding, and PEFT unties an embedding; "
            "give a --base that does not tie its embeddings, or --no_also_train"
        )


# --- notes ---------------------------------------------------------------------------------------


def _find_base_name(given: Path | None, source: Path, contents: AdapterContents) -> str | None:
    """Return the folder or the name of the base: the one that is given, or that is noted."""
    if given is not None and given.is_dir():
        return str(given)
    name = contents.metadata.get("base_model_name_or_path")  # as PEFT notes it
    if name is None and BASE_KEY in contents.metadata:
        try:
            name = read_noted_base(source, contents.metadata)
        except ArgumentError:  # the base is not where it was
            return None
    return name


def _complete_notes(
    flags: Namespace, contents: AdapterContents, config: Mapping[str, Any], base_name: str | None
) -> dict[str, str]:
    """Return the notes of an adapter, with the base and the task as the target format has them."""
    notes = dict(contents.metadata)
    if base_name is None:
        return notes
    if flags.to == "disha":
        notes[BASE_KEY] = base_note(base_name, read_noted_bits(notes), flags.out)
        return notes
    notes["base_model_name_or_path"] = base_name
    task = None
    if PROMPT_KEY in notes:
        task = "CAUSAL_LM"  # disha finetune has trained it, which trains no other models
    elif config.get("architectures"):
        task = task_of(config["architectures"][0], config.get("is_encoder_decoder", False))
    if task is not None:
        notes.setdefault("task_type", task)
    return notes


# --- writing -------------------------------------------------------------------------------------


def _write(
    flags: Namespace,
    contents: AdapterContents,
    base: Checkpoint | None,
    config: Mapping[str, Any],
) -> LoraReport | None:
    """Write an adapter in the format that is asked for; return a report on LoRA factors."""
    if flags.to == "disha":
        write_contents(flags.out, contents)
        return None
    if flags.to == "peft":
        peft.write_folder(flags.out, contents)
        return None
    _refuse_tied(flags.source, contents, config)
    weights = None if base is None else base_weights_of_checkpoint(base, contents)
    if flags.to == "lora":
        return write_lora(
            flags.out,
            contents,
            rank=flags.rank,
            pad=flags.pad_rank,
            experts=flags.experts or "stacked",
            model_type=config.get("model_type"),
            base=weights,
        )
    return image_lora.write_file(
        flags.out, flags.component, contents, rank=flags.rank, base=weights
    )


def _write_template(folder: Path, notes: Mapping[str, str]) -> None:
    """Write the chat template that an adapter was trained with, if it is not the base's."""
    if TEMPLATE_KEY in notes:
        template = notes[TEMPLATE_KEY]
        save(folder / TEMPLATE_NAME, lambda new: new.write_text(template, encoding="utf-8"))


# --- what is printed -----------------------------------------------------------------------------


def _describe_serving(
    flags: Namespace,
    contents: AdapterContents,
    report: LoraReport,
    config: Mapping[str, Any],
    base_name: str | None,
) -> str:
    """Return how to serve a LoRA with vLLM, or why vLLM refuses it and what to do instead."""
    model = "BASE" if base_name is None else base_name
    if report.also_train:
        merge = shlex.join(["disha", "merge", model, str(flags.source), f"{flags.out}-merged"])
        return (
            f"vLLM and SGLang refuse it, because it holds {first_few(report.also_train, 3, ', ')}; "
            f"to serve it, merge it: {merge}"
        )
    has_stacks = any(is_stack(layer) for layer in contents.layers)
    reads_stacks = config.get("model_type") == "gpt_oss"
    if has_stacks and flags.experts != "separate" and not reads_stacks:
        return "vLLM reads stacked experts of GPT-OSS only; for others, give --experts separate"
    rank = max(layer.rank for layer in report.layers)
    largest = find_served_rank(rank)
    name = flags.out.resolve().name
    command = ["vllm", "serve", model, "--enable-lora", "--max-lora-rank", str(largest)]
    # One place more than adapters: vLLM 0.32 for processors lets an adapter in the last place act
    # on requests for the base too.
    command += ["--max-loras", "2", "--lora-modules", f"{name}={flags.out}"]
    if TEMPLATE_KEY in contents.metadata:
        command += ["--chat-template", str(flags.out / TEMPLATE_NAME)]
    return f"to serve it: {shlex.join(command)}"

"""The base model and its tokenizer, as `transformers` loads them, and the note that finds them.

An adapter file notes its base as JSON. A path in it begins with a dot and is relative to the folder
of the adapter file, so that both can be moved together. Any other text is a name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import disha
from disha.errors import ArgumentError, MissingPackageError

FEW_BITS = ("8", "4")
BITS = ("bf16", "fp32", *FEW_BITS)
# The keys of notes in an adapter file.
BASE_KEY, TEMPLATE_KEY, TOKENS_KEY = "base", "chat_template", "new_tokens"
NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)


def load_base(
    name: str,
    bits: str = "fp32",
    device: torch.device | None = None,
    notes: Mapping[str, str] = MappingProxyType({}),
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a base in evaluation mode and its tokenizer; `bits` is one of `BITS`, or `auto`.

    `notes` are those of an adapter file: its chat template, and the tokens that it has added.
    """
    source, file = _source(name)
    dtype = _dtype(bits, device)
    options: dict[str, Any] = {"dtype": dtype}
    if device is not None:
        options["device_map"] = {"": device}
    if file:
        options["quantization_config"] = GgufConfig(dequantize=True)
    if bits in FEW_BITS:
        options["quantization_config"] = _quantization(name, bits, dtype)
    try:
        if not file:
            _require_causal(AutoConfig.from_pretrained(source), name)
        tokenizer = AutoTokenizer.from_pretrained(source, **file)
        model = AutoModelForCausalLM.from_pretrained(source, **file, **options)
    except OSError as error:
        raise ArgumentError(f"can't load the base {name}: {error}") from error
    if bits == "4":
        _quantize_stacks(model)
        for module in model.modules():
            # bitsandbytes would pack weights for this processor, and they would take no adapter.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = notes.get(TEMPLATE_KEY, tokenizer.chat_template)
    if TOKENS_KEY in notes:
        _add_tokens(model, tokenizer, json.loads(notes[TOKENS_KEY]))
    if tokenizer.chat_template:
        _end_with_turns(model.generation_config, tokenizer)
    return model, tokenizer


def _end_with_turns(generation: Any, tokenizer: Any) -> None:
    """Let answers end with the token that ends them in the chat template, if it has one."""
    turns = [{"role": role, "content": role} for role in ("user", "assistant")]
    rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("assistant")[2]
    tokens = tokenizer.encode(rest, add_special_tokens=False)
    known = generation.eos_token_id
    ends = [known] if isinstance(known, int) else known or []
    if tokens and tokens[0] in tokenizer.added_tokens_decoder:
        generation.eos_token_id = sorted({*ends, tokens[0]})


def _add_tokens(model: Any, tokenizer: Any, tokens: list[str]) -> None:
    """Add those tokens that are new, with rows at the mean of the others."""
    known = len(tokenizer)
    tokenizer.add_tokens(tokens)
    if len(tokenizer) > len(model.get_input_embeddings().weight):  # some tables have spare rows
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            rows = layer.weight.data
            rows[known : len(tokenizer)] = rows[:known].mean(0)


def best_device() -> torch.device:
    """Return this process's accelerator, or the processor if there is none."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return torch.device("cpu")
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))


def is_gguf(name: str) -> bool:
    """Return whether a base is a GGUF file."""
    return name.lower().endswith(".gguf")


def _source(name: str) -> tuple[str, dict[str, str]]:
    """Return the folder or name that `from_pretrained` takes for a base, and the file in it."""
    path = Path(name)
    if is_gguf(name) and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if path.is_file():
        raise ArgumentError(f"the base {name} must be a folder, a GGUF file or a name")
    if not path.is_dir() and not NAME.fullmatch(name):
        raise ArgumentError(f"there is no file or folder {name} to load the base from")
    return name, {}


def _dtype(bits: str, device: torch.device | None) -> torch.dtype | str:
    if bits == "auto":
        return bits
    if bits in FEW_BITS:
        # Accelerators multiply bfloat16 faster than float32; few processors do.
        return torch.float32 if (device or best_device()).type == "cpu" else torch.bfloat16
    return torch.bfloat16 if bits == "bf16" else torch.float32


def _quantization(name: str, bits: str, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    if is_gguf(name):
        raise ArgumentError(f"a GGUF file can't be quantised to {bits} bits; use bf16 or fp32")
    try:
        import bitsandbytes as bitsandbytes
    except ImportError as error:
        raise MissingPackageError(
            f'{bits} bits need the package bitsandbytes; run: pip install "disha-torch[quant]"'
        ) from error
    if bits == "8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # accelerate shards no integers
    )


def _quantize_stacks(model: PreTrainedModel) -> None:
    """Quantise the stacks of experts, which transformers leaves as they are."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for layer in disha.plan_adapters(model, "all-linear", r=1).layers:
        if layer.geometry.stack:
            replace_parameter_4bit(layer.module, layer.attribute, True, "nf4")


def _require_causal(config: Any, name: str) -> None:
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    classes = config.architectures or [known.get(config.model_type)]
    if config.model_type not in known or set(classes).isdisjoint(known.values()):
        raise ArgumentError(f"{name} is not a causal language model: it is {classes[0]}")


def base_note(name: str, bits: str, adapter: Path) -> str:
    """Return the note of a base for an adapter file."""
    path = Path(name)
    if path.exists():
        try:
            relative = os.path.relpath(path.absolute(), adapter.parent.resolve())
            name = f"./{Path(relative).as_posix()}"
        except ValueError:  # another drive of Windows
            name = str(path.absolute())
    return json.dumps({"base_model_name_or_path": name, "bits": bits})


def notes_at(path: Path, notes: Mapping[str, str], base: str, bits: str) -> dict[str, str]:
    """Return the notes for an adapter file at a path: those given, and that of its base."""
    return {**notes, BASE_KEY: base_note(base, bits, path)}


def noted_base(adapter: str | Path) -> tuple[str, str]:
    """Return the base that an adapter file notes, and its bits."""
    file = disha.inspect_adapter(adapter)
    adapter = file.path
    try:
        note = json.loads(file.metadata[BASE_KEY])
        name = note["base_model_name_or_path"]
        bits = note.get("bits", "fp32")
        is_path = name.startswith("./")
        BITS.index(bits)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(f"{adapter} notes no base that can be used; name it too") from error
    if not is_path:
        return name, bits
    path = Path(os.path.normpath(adapter.parent.resolve() / name))
    if not path.exists():
        raise ArgumentError(f"{adapter} notes the base {path}, which is not there; give --base")
    return str(path), bits


def template_at(name: str) -> str:
    """Return the chat template in a file, or that of a model."""
    path = Path(name)
    if path.is_file() or path.suffix == ".jinja":
        return path.read_text(encoding="utf-8")
    return str(AutoTokenizer.from_pretrained(name).chat_template)

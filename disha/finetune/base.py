"""The base model and its tokenizer, as `transformers` loads them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import enable_fsdp_ram_efficient_loading
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled

import disha
from disha.errors import ArgumentError
from disha.finetune.notes import (
    EOS_KEY,
    FEW_BITS,
    TEMPLATE_KEY,
    is_gguf,
    read_noted_tokens,
)
from disha.text import brief, first_few


def load_base(
    name: str,
    bits: str = "fp32",
    device: torch.device | None = None,
    notes: Mapping[str, str] = MappingProxyType({}),
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a base in evaluation mode and its tokenizer; `bits` is one of `BITS`, or `auto`.

    `notes` are those of an adapter file: its chat template, and the tokens that it has added.
    """
    source, options = source_of(name)
    dtype = choose_dtype(bits, device)
    options |= {"dtype": dtype, "attn_implementation": attn_implementation}
    if device is not None:
        options["device_map"] = {"": device}
    if is_gguf(name):
        options["quantization_config"] = GgufConfig(dequantize=True)
    if bits in FEW_BITS:
        options["quantization_config"] = _quantization(bits, dtype)
    causal: Any = AutoModelForCausalLM
    with _explain_loading(name):
        model, loading = causal.from_pretrained(source, **options, output_loading_info=True)
        missing = sorted(loading["missing_keys"])
        if missing:  # transformers has filled them with random values
            raise ValueError(f"it has no values for {first_few(missing, 3, ', ')}; get it again")
    tokenizer, added = load_tokenizer(name, notes)
    if device is not None and device.type == "meta":
        _give_memory(model)
    if bits == "4":
        quantize_stacks(model)
        for module in model.modules():
            # bitsandbytes would pack weights for this processor, and they would take no adapter.
            module.support_avx512bf16_for_cpu = False
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    fit_to_tokenizer(model, tokenizer, added)
    end_answers(model.generation_config, tokenizer, notes)
    return model, tokenizer


@contextmanager
def _explain_loading(name: str) -> Iterator[None]:
    """Name the base in an error of `transformers`."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise ArgumentError(f"can't load the base {name}: {error}") from error


def load_tokenizer(name: str, notes: Mapping[str, str]) -> tuple[PreTrainedTokenizerBase, int]:
    """Return a base's tokenizer with what notes ask for, and how many new tokens it has."""
    source, options = source_of(name)
    tokenizer: Any
    with _explain_loading(name):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if TEMPLATE_KEY in notes:
        tokenizer.chat_template = notes[TEMPLATE_KEY]
    elif tokenizer.chat_template:
        tokenizer.chat_template = tokenizer.get_chat_template()  # of several, the default
    if EOS_KEY in notes:
        tokenizer.eos_token = notes[EOS_KEY]
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    tokens = [token for token in read_noted_tokens(notes) if token not in known]
    return tokenizer, tokenizer.add_tokens(tokens)


def end_answers(generation: Any, tokenizer: Any, notes: Mapping[str, str]) -> None:
    """Let answers end as the notes say, and as turns end in the chat template if there is one."""
    known = generation.eos_token_id
    ends = {known} if isinstance(known, int) else {*(known or ())}
    if EOS_KEY in notes:
        if tokenizer.eos_token_id in (None, tokenizer.unk_token_id):
            raise ArgumentError(
                f"answers are to end with {brief(notes[EOS_KEY])}, which is not a token of the "
                "base; choose another token, or name the base that the adapter was trained on"
            )
        ends.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        turns = [{"role": role, "content": role} for role in ("user", "assistant")]
        rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("assistant")[2]
        first = tokenizer.encode(rest, add_special_tokens=False)[:1]
        ends.update(token for token in first if token in tokenizer.added_tokens_decoder)
    generation.eos_token_id = sorted(ends) or None


def fit_to_tokenizer(model: Any, tokenizer: Any, added: int) -> None:
    """Give a model rows for the tokens that were added last, at the mean of the others."""
    if not added:
        return
    known = len(tokenizer) - added
    if len(tokenizer) > len(model.get_input_embeddings().weight):  # some tables have spare rows
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            rows = layer.weight.data
            rows[known : len(tokenizer)] = rows[:known].mean(0)


def load_without_values(
    name: str, notes: Mapping[str, str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a base whose weights are not read, and take no memory, and its tokenizer."""
    tokenizer, added = load_tokenizer(name, notes)
    model = make_on_meta(name)
    _give_memory(model)
    fit_to_tokenizer(model, tokenizer, added)
    return model, tokenizer


def make_on_meta(name: str) -> PreTrainedModel:
    """Return a base by its configuration, on the meta device."""
    source, options = source_of(name)
    made: Any = AutoModelForCausalLM
    with _explain_loading(name), torch.device("meta"):
        return made.from_config(AutoConfig.from_pretrained(source, **options))


def is_sharded(training: Any) -> bool:
    """Whether an engine shards the base of a run among the ranks."""
    return bool(training.fsdp) or is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]


def loading_device(name: str, bits: str, training: Any) -> torch.device | None:
    """Return the device that a rank loads the base onto; None where an engine shards the base.

    | engine | who reads the base |
    |---|---|
    | FSDP | the first rank of each machine; the others are on meta until the base is sharded |
    | ZeRO-3 | the first rank, as `transformers` has it |
    | others, and bases of few bits | each rank, onto its device |
    """
    if not is_sharded(training) or bits in FEW_BITS:
        return training.device
    if is_fsdp_enabled() and training.local_process_index > 0 and not is_gguf(name):
        return torch.device("meta")
    return None


def let_first_rank_load(name: str, bits: str, training: Any) -> None:
    """Let FSDP shard a base that one rank of each machine reads, where accelerate can.

    accelerate 1.15 gives the other ranks floating-point parameters, and no buffers.
    """
    is_decided = not training.fsdp or "cpu_ram_efficient_loading" in training.fsdp_config
    if is_decided or bits in FEW_BITS or is_gguf(name):
        return
    made = make_on_meta(name)
    parameters = dict(made.named_parameters(remove_duplicate=False))
    if made.state_dict().keys() <= parameters.keys():
        training.fsdp_plugin_args["cpu_ram_efficient_loading"] = True
        enable_fsdp_ram_efficient_loading()


def _give_memory(model: PreTrainedModel) -> None:
    """Give parameters on the meta device memory without values; pages are taken when written to.

    accelerate tells the parameters of an optimizer apart by their addresses, and then takes the
    values of the first rank.
    """
    model._apply(  # type: ignore[no-untyped-call]
        lambda held: torch.empty_like(held, device="cpu") if held.is_meta else held
    )
    model.tie_weights()


def best_device() -> torch.device:
    """Return this process's accelerator, or the processor if there is none."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return torch.device("cpu")
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))


def source_of(name: str) -> tuple[str, dict[str, Any]]:
    """Return the folder or name that `from_pretrained` takes for a base, and its options."""
    options: dict[str, Any] = {"trust_remote_code": False}  # else transformers asks on a terminal
    if is_gguf(name):
        path = Path(name)
        options["gguf_file"] = path.name
        return str(path.parent), options
    return name, options


def choose_dtype(bits: str, device: torch.device | None) -> torch.dtype | str:
    if bits == "auto":
        return bits
    if bits in FEW_BITS:
        # Accelerators multiply bfloat16 faster than float32; few processors do.
        return torch.float32 if (device or best_device()).type == "cpu" else torch.bfloat16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[bits]


def _quantization(bits: str, dtype: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=bits == "4",
        load_in_8bit=bits == "8",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=dtype,  # accelerate shards no integers
    )


def quantize_stacks(model: PreTrainedModel) -> None:
    """Quantise the stacks of experts, which transformers leaves as they are."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for layer in disha.plan_adapters(model, "all-linear", r=1).layers:
        if layer.geometry.stack:
            replace_parameter_4bit(layer.module, layer.attribute, True, "nf4")


def template_at(name: str) -> str:
    """Return the chat template in a file, or that of a model."""
    path = Path(name)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    tokenizer, _ = load_tokenizer(name, {})
    return tokenizer.get_chat_template()

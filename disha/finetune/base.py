"""The base model, as `transformers` loads it, with its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import disha
from disha.finetune.flags import FEW_BITS
from disha.finetune.source import explain_loading, source_of
from disha.finetune.tokenizer import end_answers, fit_to_tokenizer, load_tokenizer
from disha.text import first_few


def load_base(
    name: str,
    bits: str = "fp32",
    device: torch.device | None = None,
    notes: Mapping[str, str] = MappingProxyType({}),
    attn_implementation: str | None = None,
    *,
    read: tuple[PreTrainedTokenizerBase, int] | None = None,
    has_values: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a base in evaluation mode and its tokenizer; `bits` is one of `BITS`, or `auto`.

    `notes` are those of an adapter file: its chat template, and the tokens that it has added.
    `read` is what `load_tokenizer` has returned for them. A base without values takes no memory:
    its weights are not read.
    """
    if has_values:
        model = _load_model(name, bits, device, attn_implementation)
    else:
        model = make_on_meta(name, attn_implementation, _choose_dtype(bits, device))
        _give_memory(model)
    tokenizer, added = read or load_tokenizer(name, notes)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    fit_to_tokenizer(model, tokenizer, added)
    end_answers(model.generation_config, tokenizer, notes)
    return model, tokenizer


def _load_model(
    name: str, bits: str, device: torch.device | None, attn_implementation: str | None
) -> PreTrainedModel:
    """Return a base with its values, held in memory as `bits` says."""
    source, options = source_of(name)
    dtype = _choose_dtype(bits, device)
    options |= {"dtype": dtype, "attn_implementation": attn_implementation}
    if device is not None:
        options["device_map"] = {"": device}
        if device.type == "meta":
            options["use_kernels"] = False  # transformers 5.25 has them for real devices only
    if "gguf_file" in options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    if bits in FEW_BITS:
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=bits == "4",
            load_in_8bit=bits == "8",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_storage=dtype,  # accelerate shards no integers
        )
    causal: Any = AutoModelForCausalLM
    with explain_loading(name):
        model, loading = causal.from_pretrained(source, **options, output_loading_info=True)
        missing = sorted(loading["missing_keys"])
        if missing:  # transformers has filled them with random values
            raise ValueError(f"it has no values for {first_few(missing, 3, ', ')}; get it again")
    if device is not None and device.type == "meta":
        _give_memory(model)
    if bits == "4":
        quantize_stacks(model)
        for module in model.modules():
            # bitsandbytes would pack weights for this processor, and they would take no adapter.
            module.support_avx512bf16_for_cpu = False
    return model


def make_on_meta(
    name: str, attn_implementation: str | None = None, dtype: torch.dtype | str | None = None
) -> PreTrainedModel:
    """Return a base by its configuration, on the meta device."""
    source, options = source_of(name)
    made: Any = AutoModelForCausalLM
    with explain_loading(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, **options)
        return made.from_config(config, attn_implementation=attn_implementation, dtype=dtype)


def _give_memory(model: PreTrainedModel) -> None:
    """Give parameters on the meta device memory without values; pages are taken when written to.

    A trainer moves the model, and accelerate tells its parameters apart by their addresses, before
    they get the values of the first rank.
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


# --- dtypes and few bits -------------------------------------------------------------------------


def _choose_dtype(bits: str, device: torch.device | None) -> torch.dtype | str:
    if bits == "auto":
        return bits
    if bits in FEW_BITS:
        # Accelerators multiply bfloat16 faster than float32; few processors do.
        return torch.float32 if (device or best_device()).type == "cpu" else torch.bfloat16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[bits]


def quantize_stacks(model: PreTrainedModel) -> None:
    """Quantise the stacks of experts, which transformers leaves as they are."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for layer in disha.plan_adapters(model, "all-linear", r=1).layers:
        if layer.geometry.stack:
            module = model.get_submodule(layer.module)
            replace_parameter_4bit(module, layer.parameter, True, "nf4")

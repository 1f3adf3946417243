"""What `disha finetune --dry_run` shows: the plan, one row, the steps, and the memory of a step.

No weight is read: the base is made from its configuration, of tensors that have no values. The step
is the trainer's on one device, with the dtype, the quantised storage and the recomputation that the
device would have. The operations are those of a processor, whose kernels for attention keep as much
as those of a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer import utils as trl_utils

import disha
from disha.finetune.base import (
    Base,
    choose_dtype,
    fit_to_tokenizer,
    quantize_stacks,
    read_tokenizer,
    source_of,
)
from disha.finetune.notes import FEW_BITS
from disha.finetune.trainer import TILE, Trainer, score_positions
from disha.integrations.memory import memory_modes, step_memory, with_values
from disha.text import counted

SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 141)
"""The memory of devices that people have, in GiB."""

TAKEN, LOST = 2**30, 0.05
"""What a device's runtime takes for itself, and the share that is lost between tensors."""

SCORED = ("log_probs", "entropy", "is_top1")
"""What trl asks of the head in training."""

TILE_OF_TRL = 32768
"""How many columns of the head trl multiplies at a time on an accelerator."""


@dataclass(frozen=True)
class BaseWithoutValues(Base):
    """A base that is made from its configuration, in a mode of torch without values."""

    fake: Any = None

    def load(
        self, device: torch.device | None, notes: Mapping[str, str]
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the model and the tokenizer, as if they were loaded."""
        source, file = source_of(self.name)
        tokenizer, added = read_tokenizer(self.name, notes)
        config = AutoConfig.from_pretrained(source, **file)
        dtype = choose_dtype(self.bits, device)
        with self.fake:
            model = make_without_values(config, self.bits, dtype, self.attn_implementation)
            fit_to_tokenizer(model, tokenizer, added)
        return model, tokenizer

    def mode(self) -> AbstractContextManager[Any]:
        """Return a context in which tensors have no values."""
        mode: AbstractContextManager[Any] = self.fake
        return mode


def preview(trainer: Trainer, make_model: Callable[[Any], Any]) -> None:
    """Print the plan, one row, the steps, and the memory of a step.

    `make_model` returns the adapted model in a mode without values.
    """
    print(disha.summary(trainer.model))
    row = trainer.train_dataset[0]
    print(f"\none of {counted(len(trainer.train_dataset), 'row')}; [[ ]] marks what is learned:")
    print(_mark_learned(row["input_ids"], row["labels"], trainer.processing_class))
    *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    print(f"\n{counted(steps, 'step')}; one needs on a device, simulated:")
    try:
        parts = _simulate_step(trainer, make_model)
    except Exception as error:  # not every operation and optimizer knows tensors without memory
        print(f"unknown: {type(error).__name__}: {error}")
        return
    for part, size in parts.items():
        print(f"{part:12}{size / 2**20:10,.1f} MiB")
    needed = (parts["peak"] * (1 + LOST) + TAKEN) / 2**30
    fitting = [size for size in SIZES if size >= needed]
    verdict = f"fits {fitting[0]} GB" if fitting else f"needs {needed:,.0f} GB"
    print(verdict)


def _mark_learned(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    text = ""
    pairs = zip(ids, labels, strict=True)
    for learned, run in itertools.groupby(pairs, key=lambda pair: pair[1] != -100):
        part = tokenizer.decode([token for token, _ in run])
        text += f"[[{part}]]" if learned else part
    return text


def _simulate_step(trainer: Trainer, make_model: Callable[[Any], Any]) -> dict[str, int]:
    """Return the bytes of a step with the first batch of a trainer, which has the longest rows."""
    training = trainer.args
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(training)
    modes = memory_modes()
    model = make_model(modes[0])
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable(training.gradient_checkpointing_kwargs)
    trained = [value for value in model.parameters() if value.requires_grad]
    tile = TILE_OF_TRL
    if training.simulated_device.type == "cpu":
        tile = TILE
    return simulate_step(
        model,
        next(iter(trainer.get_train_dataloader())),
        optimizer(trained, **options),
        modes,
        autocast=_autocast_dtype(training),
        tile=tile,
    )


def _autocast_dtype(training: Any) -> torch.dtype | None:
    if training.fp16:
        return torch.float16
    return torch.bfloat16 if training.bf16 else None


def simulate_step(
    model: Any,
    batch: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    modes: Any,
    *,
    autocast: torch.dtype | None = None,
    tile: int = TILE,
) -> dict[str, int]:
    """Return the bytes of a step by what they are for, as if every token were learned."""
    trl_utils.add_fused_lm_head(model.train(), outputs=SCORED)

    def loss_of() -> Tensor:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss: Tensor = model(**batch, fused_lm_head=True).loss
        return loss

    # Which positions are learned depends on values, and simulated tensors have none.
    with score_positions(only_learned=False, tile=tile):
        return step_memory(model, optimizer, loss_of, modes)


# --- a model without values ----------------------------------------------------------------------


def make_without_values(
    config: Any, bits: str, dtype: torch.dtype | str, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Return a model in a dtype, or quantised. To be called in a mode without values."""
    made: Any = AutoModelForCausalLM
    model = made.from_config(config, dtype=dtype, attn_implementation=attn_implementation).eval()
    if bits in FEW_BITS:
        quantize = _quantize_8 if bits == "8" else _quantize_4
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and module is not head:
                model.set_submodule(name, quantize(module, model.dtype))
        setattr(model, f"is_loaded_in_{bits}bit", True)
    if bits == "4":
        quantize_stacks(model)
    return model


def _quantize_8(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """Return a linear layer without values in 8 bits."""
    from bitsandbytes import nn as quantized
    from bitsandbytes.functional import int8_vectorwise_quant

    sizes = linear.in_features, linear.out_features, linear.bias is not None
    with with_values():  # the class of its weight holds no fake tensor
        make: Any = quantized.Linear8bitLt  # type: ignore[attr-defined]
        layer = make(*sizes, has_fp16_weights=False, device="meta")
    data, scales, _ = int8_vectorwise_quant(linear.weight.data.half())
    layer.weight = nn.Parameter(data, requires_grad=False)
    layer.bias = linear.bias
    vars(layer.weight).update(CB=data, SCB=scales, has_fp16_weights=False)
    return layer


def _quantize_4(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """Return a linear layer without values in 4 bits."""
    from bitsandbytes import nn as quantized
    from bitsandbytes.functional import quantize_4bit

    sizes = linear.in_features, linear.out_features, linear.bias is not None
    with with_values():  # the class of its weight holds no fake tensor
        quantize_4bit(torch.zeros(64), compress_statistics=True)  # makes a map that is kept
        make: Any = quantized.LinearNF4  # type: ignore[attr-defined]
        layer = make(*sizes, dtype, quant_storage=dtype, device="meta")
    data, layer.quant_state = quantize_4bit(
        linear.weight.data, quant_type="nf4", compress_statistics=True, quant_storage=dtype
    )
    layer.weight = nn.Parameter(data, requires_grad=False)
    layer.bias = linear.bias
    layer.register_forward_pre_hook(_note_state)  # FSDP makes a parameter of its own
    _note_state(layer)
    return layer


def _note_state(layer: Any, *_: object) -> None:
    """Note on a weight how it is quantised, as the class of bitsandbytes does."""
    noted = {"compress_statistics": True, "quant_type": "nf4"}
    vars(layer.weight).update(noted, quant_state=layer.quant_state)

"""How much memory training will take, told without a model: from its sizes alone.

What autograd keeps between forward and backward is counted on a decoder of one layer and of two,
made of tensors that have shapes but no values; every further layer keeps what the second one does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import disha
from disha.finetune.models.decoder import Decoder, DecoderConfig
from disha.finetune.settings import FinetuneSettings
from disha.finetune.settings.adapter import ALL_PROJECTIONS

__all__ = ["MemoryEstimate", "estimate_memory", "meta_decoder"]

QUANTISED_BYTES = {"8": 1.0, "4": 0.5 + 0.127 / 8}
"""Bytes per weight of a quantised layer; of nf4 with the doubly quantised scales of its blocks."""

ADAM_BYTES = 3 * 4
"""Bytes of a trained parameter's gradient and two moments, in float32."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes on each process.

    Args:
        base: the base model's weights.
        adapter: what is trained.
        optimiser: its gradients and the optimiser's moments.
        kept: what is kept from forward to backward, of one batch of full length.
    """

    base: int
    adapter: int
    optimiser: int
    kept: int

    @property
    def total(self) -> int:
        """All of them; what an operation needs while it runs comes on top."""
        return self.base + self.adapter + self.optimiser + self.kept


def estimate_memory(
    config: DecoderConfig, settings: FinetuneSettings, plan: disha.Plan
) -> MemoryEstimate:
    """Estimate what training takes.

    Args:
        config: the decoder's sizes.
        settings: of the run; batch size, length, number formats and checkpointing count.
        plan: what would be adapted, of `disha.plan_adapters` on such a model.
    """
    dtype = torch.float32 if settings.model.bits == "fp32" else torch.bfloat16
    model = meta_decoder(config, dtype)
    return MemoryEstimate(
        base=_base_bytes(model, settings),
        adapter=plan.added * 4,
        optimiser=plan.trainable * ADAM_BYTES,
        kept=_kept_bytes(config, settings, dtype),
    )


def meta_decoder(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return a decoder that has shapes but no values."""
    with torch.device("meta"), _created_in(dtype):
        return Decoder(config)


def _base_bytes(model: Decoder, settings: FinetuneSettings) -> int:
    total = sum(parameter.nbytes for parameter in model.parameters())
    if not settings.model.quantised:
        return total
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    packed = QUANTISED_BYTES[settings.model.bits] * sum(weight.numel() for weight in weights)
    return total - sum(weight.nbytes for weight in weights) + int(packed)


def _kept_bytes(config: DecoderConfig, settings: FinetuneSettings, dtype: torch.dtype) -> int:
    rows, time = settings.training.per_device_train_batch_size, settings.data.max_seq_length
    one, two = (_kept_by(config, layers, settings, dtype) for layers in (1, 2))
    layer, outside = two - one, 2 * one - two
    if not settings.training.gradient_checkpointing:
        return outside + config.layers * layer
    return outside + layer + config.layers * rows * time * config.hidden * dtype.itemsize


def _kept_by(
    config: DecoderConfig, layers: int, settings: FinetuneSettings, dtype: torch.dtype
) -> int:
    """Bytes that a decoder of so many layers keeps for backward, all projections adapted."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    sizes = (settings.training.per_device_train_batch_size, settings.data.max_seq_length)
    with FakeTensorMode(), _created_in(dtype):
        model = Decoder(_of_layers(config, layers)).requires_grad_(False)
        adapted = disha.plan_adapters(model, ALL_PROJECTIONS, settings.adapter.bone_r).layers
        for layer in adapted:
            _add_block(layer.module, layer.r, layer.out_features)
        kept = _Kept(model, settings.adapter.bone_r)
        if settings.adapter.kind == "bat":
            # Where Bone keeps the sums of its inputs' shards, BAT keeps the inputs.
            for layer in adapted:
                layer.module.register_forward_pre_hook(kept.note_input)
        tokens = torch.zeros(sizes, dtype=torch.int64)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=settings.training.bf16),
            torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor),
        ):
            logits = model.lm_head(model.model(tokens)).float()
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
    return kept.nbytes


def _add_block(layer: nn.Module, r: int, out_features: int) -> None:
    """Let a layer keep what it keeps with a Bone block.

    An adapted layer computes its whole weight where tensors have no values.
    """
    block = nn.Parameter(torch.zeros(r, out_features, dtype=torch.float32))
    layer.register_parameter("block", block)

    def add_update(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        delta = disha.functional.bone_delta(inputs[0], block, out_features)
        return output + delta.to(output.dtype)

    layer.register_forward_hook(add_update)


def _of_layers(config: DecoderConfig, layers: int) -> DecoderConfig:
    windowed = tuple(layer for layer in config.windowed_layers if layer < layers)
    return dataclasses.replace(config, layers=layers, windowed_layers=windowed)


@contextmanager
def _created_in(dtype: torch.dtype) -> Iterator[None]:
    """Let parameters be made in `dtype` meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Kept:
    """The memory behind the tensors that autograd saves, each counted once."""

    def __init__(self, model: Decoder, r: int) -> None:
        self._r = r
        self._sums = 0
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self._found: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used again

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self._found.values()) - self._sums

    def note_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = self.note(inputs[0])
        self._sums += x.nbytes // x.shape[-1] * self._r

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters:
            self._found[storage._cdata] = storage
        return tensor

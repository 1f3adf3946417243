"""``--dry_run``: describes a run without training, and estimates its memory.

The estimate needs the sizes of the model, but not its weights. Autograd keeps tensors between
forward and backward. Their memory is counted for one layer and for two, with tensors that have
shapes but no values. A model with more layers keeps as much for each of them as for the second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import disha
from disha.finetune.adapting import ALL_PROJECTIONS, plan
from disha.finetune.inputs import Inputs
from disha.finetune.models.decoder import Decoder, DecoderConfig
from disha.finetune.progress import counted
from disha.finetune.settings import FinetuneSettings
from disha.finetune.training.loop import planned_steps

__all__ = ["MemoryEstimate", "estimate_memory", "meta_decoder", "preview"]

QUANTISED_BYTES = {"8": 1.0, "4": 0.5 + 0.127 / 8}
"""Bytes per weight of a quantised layer. For 4 bits, this includes the scales of the blocks."""

ADAM_BYTES = 3 * 4
"""Bytes per trained value: its gradient and two moments, in float32."""


def preview(inputs: Inputs, settings: FinetuneSettings, processes: int = 1) -> str:
    """Return what would be adapted and trained, in how many steps and in how much memory.

    Args:
        inputs: the inputs of the run.
        settings: the settings of the run.
        processes: how many processes train together.

    Raises:
        DishaError: the adapter does not fit the model.
    """
    config = inputs.base.config
    model = meta_decoder(config) if config else inputs.base.load(torch.device("cpu"))
    planned = plan(model, settings.adapter)
    rows, held_out = len(inputs.dataset.training), len(inputs.dataset.held_out)
    lines = [
        str(planned),
        _steps(inputs, settings, processes),
        f"{counted(rows, 'row')} to train on; {held_out:,} held out{inputs.tally.remarks}",
    ]
    if config is None:
        lines.append("memory: not estimated for a model given by --model")
    else:
        found = estimate_memory(config, settings, planned)
        lines.append(
            f"memory of each process: about {_gib(found.total)}: base model {_gib(found.base)}, "
            f"adapter {_gib(found.adapter)}, gradients and optimiser {_gib(found.optimiser)}, "
            f"kept for backward {_gib(found.kept)} at {settings.data.max_seq_length} tokens a row"
        )
    return "\n".join(lines)


def _steps(inputs: Inputs, settings: FinetuneSettings, processes: int) -> str:
    training = settings.training
    batches = inputs.source.batches_per_epoch()
    steps = planned_steps(
        settings.training, batches, settings.training.gradient_accumulation_steps * processes
    )
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    line = f"{counted(steps, 'step')} of {counted(rows, 'row')}"
    if batches is not None:
        epochs = steps * training.gradient_accumulation_steps * processes / batches
        line += f", {epochs:.2f} passes over the data"
    return line


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


# --- memory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes on each process.

    Args:
        base: the base model's weights.
        adapter: the adapter's parameters.
        optimiser: the gradients and the optimiser's moments of all trained parameters.
        kept: the tensors that autograd keeps from forward to backward, for a batch of full length.
    """

    base: int
    adapter: int
    optimiser: int
    kept: int

    @property
    def total(self) -> int:
        """The sum. Temporary memory of single operations is not included."""
        return self.base + self.adapter + self.optimiser + self.kept


def estimate_memory(
    config: DecoderConfig, settings: FinetuneSettings, plan: disha.Plan
) -> MemoryEstimate:
    """Estimate the memory of a run.

    Args:
        config: the decoder's sizes.
        settings: the settings of the run. Batch size, length, number formats and checkpointing
            change the result.
        plan: the plan that `disha.plan_adapters` returns for such a model.
    """
    dtype = torch.float32 if settings.model.bits == "fp32" else torch.bfloat16
    return MemoryEstimate(
        base=_base_bytes(meta_decoder(config, dtype), settings),
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
    """Return the bytes that a decoder of `layers` layers keeps, all projections adapted."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    r = settings.adapter.bone_r
    windowed = tuple(layer for layer in config.windowed_layers if layer < layers)
    config = dataclasses.replace(config, layers=layers, windowed_layers=windowed)
    sizes = (settings.training.per_device_train_batch_size, settings.data.max_seq_length)
    with FakeTensorMode(), _created_in(dtype):
        model = Decoder(config).requires_grad_(False)
        adapted = disha.plan_adapters(model, ALL_PROJECTIONS, r).layers
        for layer in adapted:
            _add_block(layer.module, layer.r, layer.out_features)
        kept = _Kept(model, r)
        if not disha.functional.METHODS[settings.adapter.method_name].reduces:
            # Such a method keeps its inputs, not the sums of their shards.
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
    """Add a Bone block to a layer without values.

    A layer adapted by the library would compute its complete weight here.
    """
    block = nn.Parameter(torch.zeros(r, out_features, dtype=torch.float32))
    layer.register_parameter("block", block)

    def add_update(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        delta = disha.functional.bone_delta(inputs[0], block, out_features)
        return output + delta.to(output.dtype)

    layer.register_forward_hook(add_update)


@contextmanager
def _created_in(dtype: torch.dtype) -> Iterator[None]:
    """Create parameters in `dtype` within the block."""
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
        self._found: dict[int, torch.UntypedStorage] = {}  # held, so that no address is reused

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

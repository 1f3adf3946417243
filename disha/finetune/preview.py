"""``--dry_run``: what a run would do."""

from __future__ import annotations

import torch

from disha.finetune.adapting import plan
from disha.finetune.estimate import estimate_memory, meta_decoder
from disha.finetune.inputs import Inputs
from disha.finetune.settings import FinetuneSettings
from disha.finetune.training.loop import planned_steps

__all__ = ["preview"]


def preview(inputs: Inputs, settings: FinetuneSettings, processes: int = 1) -> str:
    """Say what would be adapted, what would train, how long and in how much memory.

    Args:
        inputs: of the run.
        settings: of the run.
        processes: how many train together.

    Raises:
        DishaError: the adapter does not fit the model.
    """
    config = inputs.base.config
    model = meta_decoder(config) if config else inputs.base.load(torch.device("cpu"))
    planned = plan(model, settings.adapter)
    lines = [str(planned), _steps(inputs, settings, processes), _rows(inputs)]
    if config is None:
        lines.append("memory: not estimated for a model given by --model")
    else:
        found = estimate_memory(config, settings, planned)
        lines.append(
            f"memory of each process: some {_gib(found.total)}: base model {_gib(found.base)}, "
            f"adapter {_gib(found.adapter)}, gradients and optimiser {_gib(found.optimiser)}, "
            f"kept for backward {_gib(found.kept)} at {settings.data.max_seq_length} tokens a row"
        )
    return "\n".join(lines)


def _steps(inputs: Inputs, settings: FinetuneSettings, processes: int) -> str:
    training = settings.training
    batches = inputs.source.batches_per_epoch()
    steps = planned_steps(settings.training, batches, processes)
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    line = f"{steps:,} steps of {rows:,} rows"
    if batches is not None:
        epochs = steps * training.gradient_accumulation_steps * processes / batches
        line += f", {epochs:.2f} passes over the data"
    return line


def _rows(inputs: Inputs) -> str:
    rows, held_out = len(inputs.dataset.training), len(inputs.dataset.held_out)
    return f"{rows:,} rows to train on; {held_out:,} held out{inputs.tally.remarks}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

"""What a training step needs on a device, counted in a step that runs without memory.

In torch's fake mode, operations give tensors that have shapes alone, and torch's tracker adds up
the storages that live at once: what an allocator has to give out. Several devices are one process,
in a group that communicates nothing.
"""

from __future__ import annotations

from typing import Any

from disha.finetune.trainer import score_learned_positions
from disha.functional.private_torch import FAKE_MODE, memory_tracker, required
from disha.sharding.tensors import local_part


def print_memory(trainer: Any) -> None:
    """Print what a step of the first batch needs on a device, as if every token were learned."""
    score_learned_positions(False)  # because which they are is a question of values
    batch = next(iter(trainer.get_train_dataloader()))
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    model, optimizer = trainer.accelerator.prepare(
        trainer.model.train(), trainer.create_optimizer()
    )
    fake = required(FAKE_MODE)(allow_non_fake_inputs=True)
    # These stand for the weights in all operations. While they live, each weight is counted once.
    weights = [fake.from_tensor(local_part(weight)) for weight in model.parameters()]
    with fake, memory_tracker() as tracker:
        tracker.track_external(weights)
        model(**batch, fused_lm_head=True).log_probs.sum().backward()
        [peak] = tracker.get_tracker_snapshot("peak").values()
        optimizer.step()  # which makes its state; from then on, each step has it too
        [after] = tracker.get_tracker_snapshot().values()
    trained = sum(weight.nbytes for weight in weights if weight.requires_grad)
    print(
        f"weights     {(peak['Other'] - trained) / 2**20:10,.1f} MiB\n"
        f"adapter     {trained / 2**20:10,.1f} MiB\ngradients   {trained / 2**20:10,.1f} MiB\n"
        f"optimizer   {after['Optstate'] / 2**20:10,.1f} MiB\n"
        f"activations {(peak['Total'] - peak['Other'] - trained) / 2**20:10,.1f} MiB\n"
        f"peak        {(peak['Total'] + after['Optstate']) / 2**20:10,.1f} MiB"
    )

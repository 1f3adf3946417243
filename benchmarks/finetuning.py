"""The table of `disha finetune`.

Its first case compares a step of the command's loop with the bare training step (forward, backward,
AdamW) on equal batches. The others run the command on a real model and real text, in every way of
training, and report the held-out loss before and after.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import disha
from benchmarks.protocol import compare, synchroniser
from benchmarks.settings import FinetuneSizes, Profile, R
from disha.finetune.base_model import demo_model
from disha.finetune.data.batches import TextBatches, TokenBatch
from disha.finetune.data.examples import Example, StoredExamples
from disha.finetune.folder_lock import FolderLock
from disha.finetune.metrics import Metrics, recording
from disha.finetune.models.checkpoint import open_model
from disha.finetune.settings import TrainingSettings
from disha.finetune.training.loop import training_steps
from disha.finetune.training.objectives import TextObjective

__all__ = ["bare_step", "end_to_end", "finetuning", "loop", "loop_step"]


def finetuning(profile: Profile, device: torch.device) -> list[dict[str, Any]]:
    """Measure the loop, and each way of training."""
    runs = profile.finetune.runs.items()
    return [
        loop(profile.finetune, device),
        *(end_to_end(title, flags, profile.finetune.steps) for title, flags in runs),
    ]


def loop(sizes: FinetuneSizes, device: torch.device) -> dict[str, Any]:
    """Time a step of the command's loop and a bare step, on batches of equal sizes."""
    with tempfile.TemporaryDirectory() as folder, recording(FolderLock(Path(folder))) as metrics:
        steps = {"bare": bare_step(sizes, device), "loop": loop_step(sizes, device, metrics)}
        seconds = compare(steps, sizes.budget, synchronise=synchroniser(device))
    return {
        "what": "loop",
        "model": "SmolLM2-135M",
        "layers": sizes.layers,
        "batch": sizes.batch,
        "accumulation": sizes.accumulation,
        "length": sizes.length,
        "r": R,
        "seconds": seconds,
        "left_out": {},
    }


def end_to_end(title: str, flags: Sequence[str], steps: int) -> dict[str, Any]:
    """Run the command, and return what its report says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "disha", "finetune", "--demo", "--output_dir", folder]
        length = ("--max_steps", str(steps), "--eval_steps", "0", "--verify", "False")
        subprocess.run([*command, *length, *flags], check=True, stdout=subprocess.DEVNULL)
        report = json.loads((Path(folder) / "report.json").read_text())
    return {
        "what": "run",
        "title": title,
        "flags": list(flags),
        "steps": report["training"]["steps"],
        "before": report["loss"]["before"],
        "after": report["loss"]["after"],
        "trainable": report["parameters"]["trainable"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "left_out": {},
    }


def _objective(sizes: FinetuneSizes, device: torch.device) -> TextObjective:
    model = open_model(demo_model()).load_model(torch.float32, device)
    model.model.layers = model.model.layers[: sizes.layers]
    disha.inject_adapters(model, r"\.(q|k|v|o|gate|up|down)_proj$", R)
    return TextObjective(model).train()


def _source(sizes: FinetuneSizes) -> TextBatches:
    """Return random rows of one length. The second half of each is learned."""
    generator = torch.Generator().manual_seed(0)
    count, length = 64 * sizes.batch, sizes.length + 1
    ids = torch.randint(1000, (count, length), generator=generator).tolist()
    examples = [Example(tuple(row), ((length // 2, length),)) for row in ids]
    return TextBatches(StoredExamples(examples), sizes.batch, seed=0)


def bare_step(sizes: FinetuneSizes, device: torch.device) -> Callable[[], None]:
    """Return a training step with nothing around it."""
    objective, source = _objective(sizes, device), _source(sizes)
    batches: Iterator[TokenBatch] = itertools.cycle(
        [source.collate(batch).to(device) for batch in source.batches(1)]
    )
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step() -> None:
        for batch in itertools.islice(batches, sizes.accumulation):
            (objective(batch) / (batch.weight * sizes.accumulation)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def loop_step(sizes: FinetuneSizes, device: torch.device, metrics: Metrics) -> Callable[[], None]:
    """Return what the command does in a step: one turn of the loop, and a line of metrics."""
    settings = TrainingSettings(
        gradient_accumulation_steps=sizes.accumulation,
        max_steps=1_000_000,
        learning_rate=1e-4,
        warmup_ratio=0.0,
    )
    steps = training_steps(_objective(sizes, device), _source(sizes), settings)

    def step() -> None:
        metrics.record_step(next(steps))

    return step

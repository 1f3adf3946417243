"""The table of `disha finetune`.

Its first case compares a step of the command's loop with the bare training step (forward, backward,
AdamW) on equal batches. The others run the command on the demo's model and text, in every way of
training, and report the held-out loss before and after. They hold out fewer rows than the demo,
whose evaluations would take most of the time.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import disha
from benchmarks.protocol import compare, synchroniser
from benchmarks.settings import FinetuneSizes, Profile, R
from disha.finetune.base_model import demo_model
from disha.finetune.data.batches import TextBatches, TokenBatch
from disha.finetune.data.docstrings import docstring_pairs
from disha.finetune.data.examples import Example, StoredExamples
from disha.finetune.data.rows import Row
from disha.finetune.folder_lock import FolderLock
from disha.finetune.metrics import Metrics, recording
from disha.finetune.models.checkpoint import open_model
from disha.finetune.settings import DEMO_SETTINGS, TrainingSettings
from disha.finetune.training.loop import training_steps
from disha.finetune.training.objectives import TextObjective

__all__ = ["bare_step", "end_to_end", "finetuning", "loop", "loop_step"]

TRAINED_ROWS = 512
"""Rows that the runs draw from, more than any of them needs."""


def finetuning(profile: Profile, device: torch.device) -> list[dict[str, Any]]:
    """Measure the loop, and each way of training."""
    sizes = profile.finetune
    return [
        loop(sizes, device),
        *(end_to_end(title, flags, sizes) for title, flags in sizes.runs.items()),
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


def end_to_end(title: str, flags: Sequence[str], sizes: FinetuneSizes) -> dict[str, Any]:
    """Run the command, and return what its report says."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = docstring_pairs()
        own = {
            "base_model_name_or_path": demo_model(),
            "data_path": _written(rows.training, TRAINED_ROWS, folder / "training.jsonl"),
            "eval_path": _written(rows.held_out, sizes.held_out, folder / "held_out.jsonl"),
            "output_dir": folder / "output",
            "max_steps": sizes.steps,
            "bone_r": R,
            "max_seq_length": DEMO_SETTINGS.data.max_seq_length,
            "learning_rate": DEMO_SETTINGS.training.learning_rate,
            "samples": 0,
        }
        words = [word for flag, value in own.items() for word in (f"--{flag}", str(value))]
        command = [sys.executable, "-m", "disha", "finetune", *words, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((folder / "output" / "report.json").read_text())
    return {
        "what": "run",
        "title": title,
        "flags": list(flags),
        "steps": report["training"]["steps"],
        "held_out": report["data"]["held_out"]["rows"],
        "before": report["loss"]["before"],
        "after": report["loss"]["after"],
        "trainable": report["parameters"]["trainable"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "left_out": {},
    }


def _written(rows: Iterable[Row], count: int, path: Path) -> Path:
    chosen = itertools.islice(rows, count)
    lines = [{name: row.text(name) for name in ("query", "response")} for row in chosen]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


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

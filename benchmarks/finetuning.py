"""`python -m benchmarks.finetuning`: the fine-tuning command, measured whole.

Two things are measured: what the command's loop costs beside the bare training step (forward,
backward, AdamW) on the same batches, and whether the held-out loss falls end to end in every way
of training that the command offers, on a real model and real text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import disha
from benchmarks.protocol import Budget, compare, synchroniser
from benchmarks.results import describe, read_results, write_results
from disha.finetune.base_model import demo_model
from disha.finetune.data.batches import TokenBatch
from disha.finetune.data.examples import Example
from disha.finetune.data.sources import ShuffledExamples
from disha.finetune.metrics import Metrics, recording
from disha.finetune.models.checkpoint import open_model
from disha.finetune.settings.training import TrainingSettings
from disha.finetune.training.loop import training_steps
from disha.finetune.training.objectives import DecoderObjective

__all__ = ["FULL", "QUICK", "RUNS", "Profile", "Run", "bare_step", "loop", "loop_step", "main"]

R = 64


@dataclass(frozen=True)
class Run:
    """One way of training, by the command's flags."""

    title: str
    flags: tuple[str, ...]


RUNS = (
    Run("Bone", ("--init_weights", "True")),
    Run("BAT", ("--init_weights", "bat")),
    Run("QBone, 8 bits", ("--bits", "8")),
    Run("QBone, 4 bits (nf4)", ("--bits", "4")),
)


@dataclass(frozen=True)
class Profile:
    """What a run of these benchmarks is set to.

    Args:
        name: of the profile.
        layers: how many of the model's decoder layers the loop is measured on.
        batch: sequences in a batch.
        accumulation: batches in a step.
        length: tokens in each sequence.
        budget: of measuring the loop.
        steps: optimiser steps of each end-to-end run.
        runs: those.
    """

    name: str
    layers: int
    batch: int
    accumulation: int
    length: int
    budget: Budget
    steps: int
    runs: tuple[Run, ...]


FULL = Profile(
    name="full",
    layers=30,
    batch=4,
    accumulation=1,
    length=128,
    budget=Budget(150.0, least_rounds=10, most_rounds=40, warm_up=1),
    steps=20,
    runs=RUNS,
)
QUICK = Profile(
    name="quick",
    layers=1,
    batch=1,
    accumulation=1,
    length=32,
    budget=Budget(2.0, least_rounds=2, most_rounds=5, warm_up=1),
    steps=1,
    runs=RUNS[:1],
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write a file of results.

    Args:
        arguments: of the command line; the process's by default.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetuning", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all works")
    parser.add_argument("--out", type=Path, default=Path("bench-output/finetuning.json"))
    parser.add_argument("--go_on", action="store_true", help="keep what the file has already")
    asked = parser.parse_args(arguments)
    profile = QUICK if asked.quick else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = read_results(asked.out) if asked.go_on else describe(profile.name, device)
    tables = results["tables"]
    if "loop" not in tables:
        tables["loop"] = [loop(profile, device)]
        write_results(asked.out, results)
    done = tables.setdefault("runs", [])
    for run in profile.runs:
        if run.title in {one["title"] for one in done}:
            continue
        print(f"{run.title} ...", flush=True)
        done.append(end_to_end(run, profile))
        write_results(asked.out, results)  # so that a run that is stopped leaves what it has
    print(f"results: {asked.out}")
    return 0


def loop(profile: Profile, device: torch.device) -> dict[str, Any]:
    """Time a step of the command's loop and a bare step, on batches of the same sizes."""
    with tempfile.TemporaryDirectory() as folder, recording(Path(folder)) as metrics:
        steps = {"bare": bare_step(profile, device), "loop": loop_step(profile, device, metrics)}
        seconds = compare(steps, profile.budget, synchronise=synchroniser(device))
    return {
        "model": "SmolLM2-135M",
        "layers": profile.layers,
        "batch": profile.batch,
        "accumulation": profile.accumulation,
        "length": profile.length,
        "r": R,
        "seconds": seconds,
    }


def end_to_end(run: Run, profile: Profile) -> dict[str, Any]:
    """Fine-tune by the command, and return what its report says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "disha", "finetune", "--demo", "--output_dir", folder]
        length = ("--max_steps", str(profile.steps), "--eval_steps", "0", "--verify", "False")
        subprocess.run([*command, *length, *run.flags], check=True, stdout=subprocess.DEVNULL)
        report = json.loads((Path(folder) / "report.json").read_text())
    return {
        "title": run.title,
        "flags": list(run.flags),
        "steps": report["training"]["steps"],
        "before": report["loss"]["before"],
        "after": report["loss"]["after"],
        "trainable": report["parameters"]["trainable"],
        "peak_memory_bytes": report["peak_memory_bytes"],
    }


def _objective(profile: Profile, device: torch.device) -> DecoderObjective:
    model = open_model(demo_model()).load_model(torch.float32, device)
    model.model.layers = model.model.layers[: profile.layers]
    disha.inject_adapters(model, r"\.(q|k|v|o|gate|up|down)_proj$", R)
    return DecoderObjective(model).train()


def _source(profile: Profile) -> ShuffledExamples:
    """Random rows of one length, half of each to be learned: enough for steps without end."""
    generator = torch.Generator().manual_seed(0)
    count, length = 64 * profile.batch, profile.length + 1
    ids = torch.randint(1000, (count, length), generator=generator).tolist()
    examples = [Example(tuple(row), ((length // 2, length),)) for row in ids]
    return ShuffledExamples(examples, profile.batch, seed=0)


def bare_step(profile: Profile, device: torch.device) -> Callable[[], None]:
    """Return a training step without anything around it."""
    objective, source = _objective(profile, device), _source(profile)
    batches: Iterator[TokenBatch] = itertools.cycle(
        [source.collate(batch).to(device) for batch in source.batches(1)]
    )
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step() -> None:
        for batch in itertools.islice(batches, profile.accumulation):
            (objective(batch) / (batch.weight * profile.accumulation)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def loop_step(profile: Profile, device: torch.device, metrics: Metrics) -> Callable[[], None]:
    """Return what the command does in a step: the loop, and a line of metrics."""
    settings = TrainingSettings(
        gradient_accumulation_steps=profile.accumulation,
        max_steps=1_000_000,
        learning_rate=1e-4,
        warmup_ratio=0.0,
    )
    steps = training_steps(_objective(profile, device), _source(profile), settings)

    def step() -> None:
        metrics.record_step(next(steps))

    return step


if __name__ == "__main__":
    sys.exit(main())

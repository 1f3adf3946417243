"""A training that goes on from its checkpoints, to be killed. Run by `test_killed.py`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import torch._dynamo  # which takes a second, when the first optimiser is made

import disha
from disha.finetune.folder_lock import FolderLock
from disha.finetune.metrics import recording
from disha.finetune.training.checkpoints import Checkpoints
from disha.finetune.training.loop import make_optimizer, training_steps
from tests.finetune.training.tiny import PackedPairs, examples, objective, plan

PLAN = plan(max_steps=90, warmup_ratio=0.2)
SETUP = {"seed": 1}
SOURCE = PackedPairs(examples(22), 2, 1)
"""Eleven rows of two texts, six batches, three steps an epoch."""


def train(folder: Path, pause: float = 0.0, started=None) -> None:
    """Train to the end from wherever the checkpoints in `folder` are.

    Args:
        folder: gets checkpoints, metrics, and at the end the adapter.
        pause: seconds to wait in every step.
        started: an event to set once training goes on.
    """
    torch.set_num_threads(1)
    trained = objective(dropout=0.2)
    optimizer = make_optimizer(trained, PLAN)
    checkpoints = Checkpoints(folder, limit=2)
    torch.manual_seed(7)
    saved = checkpoints.newest_good(print)
    losses = []
    if saved is not None:
        assert saved.setup == SETUP
        checkpoints.restore(saved, trained, optimizer)
        losses = list(saved.history["losses"])
    start = None if saved is None else saved.progress
    with recording(FolderLock(folder), after=None if start is None else start.step) as metrics:
        for step in training_steps(trained, SOURCE, PLAN, optimizer=optimizer, start=start):
            if started is not None:
                started.set()
            losses.append(step.loss)
            metrics.record_step(step)
            if step.step % 2 == 0:
                history = {"losses": losses}
                checkpoints.save(trained, optimizer, step.progress, setup=SETUP, history=history)
            time.sleep(pause)
    (folder / "losses.json").write_text(json.dumps(losses))
    disha.save_adapter(trained.model, folder / "adapter.safetensors")

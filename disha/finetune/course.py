"""What a checkpoint notes of its run: the settings, and how long it has trained so far."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from disha.errors import ArgumentError
from disha.text import first_few

TRAINER_STATE = "trainer_state.json"
"""What a complete checkpoint has; its name in `transformers.trainer`, which is slow to import."""

FREE = re.compile(
    "base|output_dir|overwrite_output_dir|resume.*|max_steps|num_train_epochs|samples|merge"
    "|save_.*|load_best_model_at_end|early_stopping_patience|log.*|report_to|run_name|disable_tqdm"
    "|eval_(strategy|steps|delay|on_start)|(per_device_)?eval_batch_size"
    "|use_cpu|gradient_checkpointing.*|dataloader_.*|torch_compile.*"
)
"""The flags that may change when a run goes on: how long it trains, and what it saves, measures and
shows; what takes memory or time and is not learned; and the base, whose weights are compared."""


class Course(TrainerCallback, ExportableState):
    """Notes settings and seconds in the `trainer_state.json` of each checkpoint."""

    def __init__(self, settings: Mapping[str, Any], seconds: float = 0.0) -> None:
        self.settings = json.loads(json.dumps(settings, default=str))
        self.seconds = seconds
        """How long the run had trained when this process began."""
        self._began = time.monotonic()

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        """Start to count the seconds of this process."""
        self._began = time.monotonic()

    def total_seconds(self) -> float:
        """Return how long the run has trained, with what it had trained before it was resumed."""
        return self.seconds + time.monotonic() - self._began

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        noted = {"settings": self.settings, "seconds": self.total_seconds()}
        return {"args": noted, "attributes": {}}


def read_course(checkpoint: str) -> Course:
    """Return what a checkpoint notes of its run."""
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE)))
    noted: dict[str, Any] = (state.stateful_callbacks or {}).get(Course.__name__, {})
    return Course(**noted.get("args", {"settings": {}}))


def require_same_settings(now: Course, noted: Course) -> None:
    """Raise if flags say other than they did, and the checkpoint would win over them."""
    changed = [
        f"--{name} was {before}, and is {now.settings[name]}"
        for name, before in noted.settings.items()
        if now.settings.get(name, before) != before and not FREE.fullmatch(name)
    ]
    if changed:
        raise ArgumentError(
            f"a run is resumed with its settings: {first_few(changed, 5, '; ')}. Give the earlier "
            "ones, or start over with --overwrite_output_dir"
        )

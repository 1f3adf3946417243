"""The settings of a run, which each checkpoint notes, and with which a run goes on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from disha.errors import ArgumentError
from disha.text import first_few

FREE = re.compile(
    "base|output_dir|overwrite_output_dir|resume.*|max_steps|num_train_epochs|samples|merge"
    "|save_.*|load_best_model_at_end|early_stopping_patience|log.*|report_to|run_name|disable_tqdm"
    "|eval_(strategy|steps|delay|on_start)|(per_device_)?eval_batch_size"
    "|use_cpu|gradient_checkpointing.*|dataloader_.*|torch_compile.*"
)
"""The flags that may change when a run goes on: how long it trains, and what it saves, measures and
shows; what takes memory or time and is not learned; and the base, whose weights are compared."""


class Course(TrainerCallback, ExportableState):
    """Notes the settings in the `trainer_state.json` of each checkpoint."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {"settings": self.settings}, "attributes": {}}


def require_same_settings(settings: Mapping[str, Any], checkpoint: str) -> None:
    """Raise if flags say other than they did, and the checkpoint would win over them."""
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    noted = (state.stateful_callbacks or {}).get(Course.__name__, {"args": {"settings": {}}})
    changed = [
        f"--{name} was {before}, and is {settings[name]}"
        for name, before in noted["args"]["settings"].items()
        if settings.get(name, before) != before and not FREE.fullmatch(name)
    ]
    if changed:
        raise ArgumentError(
            f"a run is resumed with its settings: {first_few(changed, 5, '; ')}. Give the earlier "
            "ones, or start over with --overwrite_output_dir"
        )

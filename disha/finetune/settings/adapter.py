"""What is put into the base model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from disha.finetune.errors import SettingsError
from disha.finetune.settings.checks import require, require_at_least, require_part

__all__ = ["ALL_PROJECTIONS", "AdapterSettings"]

ALL_PROJECTIONS = r"\.(q|k|v|o|gate|up|down)_proj$"
"""The names of the linear layers of a decoder layer."""


@dataclass(frozen=True)
class AdapterSettings:
    """The adapter."""

    bone_r: int = 64
    """The adapter's rank: a layer gets r x out_features parameters (out_features x r with bat,
    rounded up to whole blocks; r x bone_r_out as a tile)."""

    init_weights: Literal["True", "bat"] = "True"
    """True for Bone, bat for BAT."""

    method: Literal["bone", "bat"] | None = None
    """The same as init_weights, by the library's names."""

    bone_r_out: int | None = None
    """Train a tile of this many columns, repeated over the outputs (upstream's "mini"); the
    outputs of every layer must be a multiple of it."""

    target: str | None = None
    """Regular expression for the names of the layers to adapt, or all-linear; all seven
    projections of each decoder layer, or all linear layers of any other model, if not given."""

    also_train: str | None = None
    """Regular expression for the names of parameters to train besides, such as norm."""

    adapter_dropout: float = 0.0
    """Part of the adapters' inputs that is left out at random while training."""

    @property
    def kind(self) -> Literal["bone", "bat"]:
        """The library's name of the method."""
        if self.method is not None:
            return self.method
        return "bat" if self.init_weights == "bat" else "bone"

    @property
    def title(self) -> str:
        """What a reader calls the kind of adapter."""
        if self.kind == "bat":
            return "BAT"
        return "Bone" if self.bone_r_out is None else "Bone (tile)"

    def check(self) -> None:
        """Check everything that can be checked without reading the model.

        Raises:
            SettingsError: a setting is out of range, or contradicts another.
        """
        require_at_least(1, self, ["bone_r"])
        require_part(self, ["adapter_dropout"])
        if self.init_weights == "bat" and self.method == "bone":
            raise SettingsError(
                "--init_weights bat and --method bone contradict each other; give one of them"
            )
        if self.bone_r_out is not None:
            require(self.bone_r_out >= 1, "bone_r_out", self.bone_r_out, "at least 1")
            if self.kind == "bat":
                raise SettingsError(
                    "--bone_r_out does not go with BAT; leave it out, or train Bone"
                )
        for name in ("target", "also_train"):
            _require_regex(name, getattr(self, name))


def _require_regex(name: str, pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise SettingsError(
            f"--{name} must be a regular expression, got {pattern!r}: {error}"
        ) from error

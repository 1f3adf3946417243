"""Checks that settings share. Complaints name the flag, what was given and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from disha.finetune.errors import SettingsError

__all__ = [
    "given",
    "require",
    "require_adapter",
    "require_at_least",
    "require_file_or_folder",
    "require_part",
    "require_positive",
]


def given(value: Path | None, flag: str) -> Path:
    """Return a path that must have been given.

    Raises:
        SettingsError: it was not.
    """
    if value is None:
        raise SettingsError(f"{flag} is missing; give it, or try --demo")
    return value


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise `SettingsError` unless `condition` holds."""
    if not condition:
        raise SettingsError(f"--{name} must be {allowed}, got {value}")


def require_adapter(adapter: Path | None, *, compare: bool, merge: bool) -> None:
    """Require an adapter where something is to be done with it.

    Raises:
        SettingsError: there is none.
    """
    if adapter is None and (compare or merge):
        flag = "--compare" if compare else "--merge"
        raise SettingsError(f"{flag} needs an adapter; give --adapter adapter.safetensors too")


def require_at_least(least: float, settings: object, names: Sequence[str]) -> None:
    """Require the named settings to be finite and at least `least`."""
    for name in names:
        value = getattr(settings, name)
        require(math.isfinite(value) and value >= least, name, value, f"at least {least:g}")


def require_positive(settings: object, names: Sequence[str]) -> None:
    """Require the named settings to be finite and greater than 0."""
    for name in names:
        value = getattr(settings, name)
        require(math.isfinite(value) and value > 0, name, value, "greater than 0")


def require_part(settings: object, names: Sequence[str]) -> None:
    """Require the named settings to be a part of a whole: from 0 up to but not including 1."""
    for name in names:
        value = getattr(settings, name)
        require(0 <= value < 1, name, value, "at least 0 and less than 1")


def require_file_or_folder(path: Path, name: str) -> None:
    """Require something to be at `path`."""
    if not path.exists():
        raise SettingsError(
            f"--{name} {path} does not exist; it must be a file or a folder of rows"
        )

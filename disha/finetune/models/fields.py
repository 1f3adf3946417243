"""Typed access to the keys that describe a model, in a config.json or a GGUF file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disha.finetune.errors import CheckpointError, UnsupportedModelError

__all__ = ["WAY_OUT", "Fields"]

WAY_OUT = (
    "folders of other language models need transformers (pip install 'disha-torch[transformers]'); "
    "any model can be given as --model module:function, a function that returns an nn.Module"
)


@dataclass(frozen=True)
class Fields:
    """The values in a file, by key.

    Args:
        values: the file's values.
        path: the file; for messages.
        prefix: the beginning of all keys in the file.
        remedy: what to do if a key is missing.
    """

    values: Mapping[str, Any]
    path: Path
    prefix: str = ""
    remedy: str = "get the model's folder again, as the library that made it wrote it"

    def get(self, key: str, default: object = None) -> Any:
        """Return a value without a check; the default if it is null or the key is missing."""
        value = self.values.get(self.prefix + key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a value that must be an integer.

        Raises:
            CheckpointError: it is not an integer, or is missing and has no default.
        """
        value = self._required(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._mistyped(key, "one integer", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a value that must be a finite number.

        Raises:
            CheckpointError: it is not a finite number, or is missing and has no default.
        """
        value = self._required(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._mistyped(key, "a number", value)
        if not abs(value) <= sys.float_info.max:  # an integer in JSON can be larger
            raise CheckpointError(
                f"{self.path}: {self.prefix}{key} must be finite, found one too large for a float"
            )
        return float(value)

    def flag(self, key: str) -> bool:
        """Return a value that must be true or false; false if it is missing.

        Raises:
            CheckpointError: it is neither.
        """
        value = self.get(key) or False
        if not isinstance(value, bool):
            raise self._mistyped(key, "true or false", value)
        return value

    def require_neutral(self, neutral: Mapping[str, tuple[object, ...]]) -> None:
        """Check that no key asks for something that the decoder does not compute.

        Args:
            neutral: keys of related models, with the values that have no effect.

        Raises:
            CheckpointError: a key has another value.
        """
        for key, allowed in neutral.items():
            value = self.get(key, allowed[0])
            if value not in allowed:
                raise self.refused(key, value, f"only {allowed[0]!r} is supported")

    def refused(self, key: str, value: object, allowed: str) -> UnsupportedModelError:
        """Return the error for a value that the decoder does not support."""
        return UnsupportedModelError(
            f"{self.path} asks for {self.prefix}{key} = {value!r}, which is not supported, and "
            f"ignoring it would give another model; {allowed}; {WAY_OUT}"
        )

    def _required(self, key: str, default: object) -> object:
        value = self.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path} lacks the key {self.prefix}{key}; {self.remedy}")
        return value

    def _mistyped(self, key: str, expected: str, value: object) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {self.prefix}{key} must be {expected}, found {value!r}"
        )

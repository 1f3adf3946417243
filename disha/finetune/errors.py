"""Errors of fine-tuning. Each is also a built-in exception that Python users expect.

Errors in the input derive from `BadInputError` and end the command with exit code 2. Other errors
end it with exit code 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from disha.errors import DishaError

__all__ = [
    "BadInputError",
    "BadRowError",
    "CheckpointError",
    "DataError",
    "OutputError",
    "PeerError",
    "SettingsError",
    "TokenizerError",
    "TrainingError",
    "UnsupportedModelError",
    "VerificationError",
    "raised_as",
]


class BadInputError(DishaError, ValueError):
    """The input of the command can't be used."""


class SettingsError(BadInputError):
    """A setting is missing, out of range, or contradicts another."""


class CheckpointError(BadInputError):
    """A model file is missing, damaged or not supported."""


class UnsupportedModelError(CheckpointError):
    """The built-in decoder does not compute this kind of model."""


class TokenizerError(BadInputError):
    """A tokenizer is not supported, or its file is damaged."""


class DataError(BadInputError):
    """A data file is missing, or a row of it can't be used."""


class BadRowError(DataError):
    """A row can't be used. Other rows may be fine."""


class OutputError(DishaError, OSError):
    """A result can't be written."""


class TrainingError(DishaError, RuntimeError):
    """The work can't go on, such as when the loss is not finite, or memory runs out."""


class PeerError(TrainingError):
    """Another process of the same training failed, and prints the reason."""


class VerificationError(DishaError, RuntimeError):
    """The saved adapter does not give the trained model's loss in a fresh process."""


@contextmanager
def raised_as(kind: type[DishaError], before: str = "") -> Iterator[None]:
    """Raise errors of the library in the block as errors of another kind.

    Args:
        kind: the kind.
        before: text to put before the message, such as the flag that is wrong.
    """
    try:
        yield
    except DishaError as error:
        raise kind(f"{before}{error}") from error

"""What can go wrong while fine-tuning, each kind also the built-in that Python users expect.

What is wrong with the input derives from `BadInputError` and ends the command with exit code 2;
what fails on the way ends it with 1.
"""

from __future__ import annotations

from disha import DishaError

__all__ = [
    "BadInputError",
    "BadRowError",
    "CheckpointError",
    "DataError",
    "MissingDependencyError",
    "OutputError",
    "PeerError",
    "SettingsError",
    "TokenizerError",
    "TrainingError",
    "VerificationError",
]


class BadInputError(DishaError, ValueError):
    """What the command was given can't be used."""


class SettingsError(BadInputError):
    """A setting is missing, out of range, or contradicts another."""


class CheckpointError(BadInputError):
    """A model file is missing, damaged, or of a kind that is not supported."""


class TokenizerError(BadInputError):
    """A tokenizer is of a kind that is not supported, or its description is damaged."""


class DataError(BadInputError):
    """A data file is missing, or a row of it can't be used."""


class BadRowError(DataError):
    """A row can't be used; the others maybe can."""


class MissingDependencyError(DishaError, ImportError):
    """A package that only this part of disha needs is not installed."""


class OutputError(DishaError, OSError):
    """A result could not be written."""


class TrainingError(DishaError, RuntimeError):
    """Training can't go on, such as when the loss is no longer a finite number."""


class PeerError(TrainingError):
    """Another process of the same training failed. It says why, so this one need not."""


class VerificationError(DishaError, RuntimeError):
    """The saved adapter, loaded in a fresh process, does not give the trained model's loss."""

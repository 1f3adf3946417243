"""The errors that disha raises on purpose.

Every one is a `DishaError`, so one `except` catches them all; each is also the built-in
that Python users expect for its cause. Messages say what was asked, what was found, what is
allowed and what to do.
"""

from __future__ import annotations

from disha.text import printable

__all__ = [
    "AdapterFileError",
    "AdapterIOError",
    "AdapterStateError",
    "ArgumentError",
    "ArgumentTypeError",
    "ConversionError",
    "DishaError",
    "MergeError",
    "MissingPackageError",
    "ModeError",
    "TargetError",
]


class DishaError(Exception):
    """Base of everything that the library raises on purpose.

    Example:
        >>> import disha
        >>> from torch import nn
        >>> try:
        ...     disha.inject_adapters(nn.Linear(4, 4), "all-linear", r=0)
        ... except disha.DishaError as error:
        ...     print(error)
        r must be at least 1, got 0
    """

    def __init__(self, *args: object) -> None:
        # A message may hold names from a file that is anybody's.
        super().__init__(*(printable(a, lines=True) if isinstance(a, str) else a for a in args))


class ArgumentError(DishaError, ValueError):
    """An argument has a value that is not allowed."""


class ArgumentTypeError(DishaError, TypeError):
    """An argument is of a type that is not allowed."""


class TargetError(ArgumentError):
    """The modules asked for can't be adapted, or none of them is there."""


class AdapterStateError(DishaError, ValueError):
    """A state dict does not fit the adapter it is loaded into."""


class AdapterFileError(DishaError, ValueError):
    """A file is not a valid adapter file, or not one for this model."""


class AdapterIOError(DishaError, OSError):
    """A file could not be read or written."""


class ConversionError(DishaError, ValueError):
    """An adapter can't be expressed in another library's format, or not that closely."""


class MissingPackageError(DishaError, ImportError):
    """What was asked for needs a package that is not installed."""


class ModeError(DishaError, RuntimeError):
    """The operation does not go with what the model is doing: disabled, routed or merged."""


class MergeError(ModeError):
    """The operation does not go with merged weights, or merging is not possible."""

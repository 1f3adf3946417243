"""Checks of arguments: each raises, or returns the value in its final type."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real
from typing import Any

import torch

from disha.errors import ArgumentError, ArgumentTypeError
from disha.text import brief

LARGEST_SCALE = Fraction(torch.finfo(torch.float32).max)
"""A fraction, because numpy would round a float to its own type before comparing."""

BLOCK_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""The dtypes that a user can choose for blocks, by their names in JSON."""

TRAINABLE_DTYPES = frozenset({*BLOCK_DTYPES.values(), torch.complex64})
"""The dtypes of blocks, and of parameters that are trained with an adapter. Files have no other."""


def check_type(name: str, value: object, types: Any, wanted: str) -> None:
    """Raise unless a value is of one of the types. A bool does not count as a number."""
    if isinstance(value, bool) or not isinstance(value, types):
        raise ArgumentTypeError(
            f"{name} must be {wanted}, got {brief(value)} of type {type(value).__name__}"
        )


def check_positive_int(name: str, value: Any) -> int:
    """Return a value that is an int of at least 1."""
    check_type(name, value, int, "an int of at least 1")
    if value < 1:
        raise ArgumentError(f"{name} must be at least 1, got {value}")
    return value


def check_scale(scale: Any, name: str = "scale") -> float:
    """Return a number that is finite in float32, its dtype in compiled graphs."""
    check_type(name, scale, Real, "a number")
    if not abs(scale) <= LARGEST_SCALE:  # false for NaN
        raise ArgumentError(
            f"{name} must be finite and at most {float(LARGEST_SCALE):.3g}, got {brief(scale)}"
        )
    return float(scale)


def check_dtype(dtype: object) -> None:
    """Raise unless `dtype` is None or one that a block can have."""
    if dtype is not None and dtype not in BLOCK_DTYPES.values():
        allowed = ", ".join(map(str, BLOCK_DTYPES.values()))
        raise ArgumentError(f"a block can't be trained in {brief(dtype)}; allowed are {allowed}")


def check_regexes(name: str, regexes: Any) -> tuple[str, ...]:
    """Return one regex, several, or None as a tuple."""
    if regexes is None:
        return ()
    if isinstance(regexes, str):
        return (regexes,)
    check_type(name, regexes, Sequence, "a regex (str) or a list of them")
    for regex in regexes:
        check_type(name, regex, str, "a regex (str) or a list of them")
    return tuple(regexes)


REPEATED_REPETITION = re.compile(r"\((\?:)?(\\.|\[[^]]*\]|[^\\()[\]])[*+]\)[*+{]")
"""Finds `(a+)+` in a regex, which takes hours where it does not match."""


def compile_regex(argument: str, regex: str) -> re.Pattern[str]:
    """Compile a regex, or raise an error that names the argument."""
    check_type(argument, regex, str, "a regex (str)")
    endless = REPEATED_REPETITION.search(regex)
    if endless is not None:
        raise ArgumentError(
            f"{argument} {brief(regex)} repeats a repetition, {brief(endless[0])}, and could take "
            "hours; write it with one"
        )
    try:
        return re.compile(regex)
    except (re.error, RecursionError, OverflowError) as error:
        raise ArgumentError(f"{argument} {brief(regex)} is not a valid regex: {error}") from error

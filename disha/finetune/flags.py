"""How the commands read their flags."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from disha.errors import ArgumentError
from disha.text import nearest

Given = list[tuple[str, list[str]]]
"""Flags without their dashes, each with its values."""

FEW_BITS = ("8", "4")
BITS = ("bf16", "fp16", "fp32", *FEW_BITS)
"""How a base can be held in memory."""


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """Return what reads a finite number in a range, float or int, as the `type` of a flag."""

    def read(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and math.isfinite(value)):
            noun = "a whole number" if kind is int else "a number"
            end = "" if most == math.inf else f" to {most:g}"
            raise argparse.ArgumentTypeError(f"must be {noun} from {least:g}{end}, got {word!r}")
        return value

    return read


COUNT = number(int, 1)
"""Reads a number of things, of which there is one or more."""

SCALE = number(float, -1e38, 1e38)  # finite in float32
"""Reads a scale of an adapter."""


def _path(word: str) -> Path:
    """Return a path; an empty one would be the current folder."""
    if not word:
        raise argparse.ArgumentTypeError("is empty; name a file or a folder")
    return Path(word)


class FlagParser(argparse.ArgumentParser):
    """Raises where `argparse` would end the process, and names the flag that is meant."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.register("type", Path, _path)

    def parse(
        self, words: Iterable[str], values: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Return the values of the flags, which may be spelled with dashes or underscores."""
        spelled = [_use_underscores(word) for word in words]
        flags, unknown = self.parse_known_args(spelled, values)
        if unknown:
            named = [word for word in unknown if word.startswith("--")]
            raise tell_unknown(self.prog, named or unknown, [*self._option_string_actions])
        return flags

    def error(self, message: str) -> NoReturn:
        """Raise `ArgumentError`."""
        raise ArgumentError(f"{message}; see {self.prog} --help")


def tell_unknown(command: str, unknown: Sequence[str], known: Sequence[str]) -> ArgumentError:
    """Return an error that names all words that a command does not take, and what is meant."""
    return ArgumentError(
        f"{command} does not take {', '.join(word + nearest(word, known) for word in unknown)}"
    )


def read_words(words: Iterable[str]) -> Given:
    """Return the flags in the words of a command line, spelled with underscores."""
    given: Given = []
    for word in words:
        if word == "-h":
            given.append(("help", []))
        elif word.startswith("--"):
            name, equals, value = _use_underscores(word)[2:].partition("=")
            given.append((name, [value] if equals else []))
        elif given:
            given[-1][1].append(word)
        else:
            raise ArgumentError(f"{word!r} is no flag; flags begin with --")
    return given


def _use_underscores(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"

"""How the commands read their flags."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import NoReturn

from disha.errors import ArgumentError
from disha.text import nearest

Given = list[tuple[str, list[str]]]
"""Flags without their dashes, each with its values."""


class FlagParser(argparse.ArgumentParser):
    """Raises where `argparse` would end the process, and names the flag that is meant."""

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

"""How the commands read their flags."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import NoReturn

from disha.errors import ArgumentError
from disha.text import nearest


class FlagParser(argparse.ArgumentParser):
    """Raises where `argparse` would end the process, and names the flag that is meant."""

    def parse(
        self, words: Iterable[str], values: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Return the values of the flags, which may be spelled with dashes or underscores."""
        spelled = [_use_underscores(word) for word in words]
        flags, unknown = self.parse_known_args(spelled, values)
        if unknown:
            near = nearest(unknown[0], self._option_string_actions)
            raise ArgumentError(f"{self.prog} does not take {unknown[0]}{near}")
        return flags

    def error(self, message: str) -> NoReturn:
        """Raise `ArgumentError`."""
        raise ArgumentError(f"{message}; see {self.prog} --help")


def _use_underscores(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"

"""One row as token ids."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["IGNORED", "Example"]

IGNORED = -100
"""The label of a position that is not part of the loss."""


@dataclass(frozen=True)
class Example:
    """One row as token ids.

    Args:
        tokens: all of them.
        learned: the spans of tokens, as (first, end), that count in the loss; the first token can't
            be in one, as nothing comes before it.
    """

    tokens: tuple[int, ...]
    learned: tuple[tuple[int, int], ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before those that are learned."""
        return self.tokens[: self.learned[0][0]]

    @property
    def supervised(self) -> int:
        """How many tokens count in the loss."""
        return sum(end - first for first, end in self.learned)

"""Rows as token ids, stored compactly."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from disha.finetune.data.mixing import drawn, mixed_order
from disha.finetune.data.order import permutation

__all__ = ["IGNORED", "Example", "StoredExamples"]

IGNORED = -100
"""The label of a position that is not part of the loss."""


@dataclass(frozen=True)
class Example:
    """One row as token ids.

    Args:
        tokens: all token ids of the row.
        learned: the spans of tokens, as (first, end), that count in the loss. The first token is in
            no span, because nothing comes before it.
    """

    tokens: tuple[int, ...]
    learned: tuple[tuple[int, int], ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first learned one."""
        return self.tokens[: self.learned[0][0]]

    @property
    def supervised(self) -> int:
        """How many tokens count in the loss."""
        return sum(end - first for first, end in self.learned)


class StoredExamples(Sequence[Example]):
    """Examples in arrays, which take 4 bytes a token; a tuple of numbers takes about 30.

    Args:
        examples: the first examples.
        weights: the weights of the data sets that they are from, if they have weights.
    """

    def __init__(self, examples: Iterable[Example] = (), *, weights: Sequence[float] = ()) -> None:
        self._tokens, self._spans = _Pieces(), _Pieces()
        self._weights, self._sizes = weights, list[int]()
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        """Add an example at the end."""
        self._tokens.append(example.tokens)
        self._spans.append([bound for span in example.learned for bound in span])

    def end_part(self) -> None:
        """Note that the examples of a data set are complete."""
        self._sizes.append(len(self) - sum(self._sizes))

    @property
    def drawn(self) -> list[int]:
        """How many examples an epoch draws, from each data set if they have weights."""
        return drawn(self._sizes, self._weights) if self._weights else [len(self)]

    def __len__(self) -> int:
        return len(self._tokens.ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[one] for one in range(len(self))[index]]
        place = range(len(self))[index]
        bounds = self._spans.piece(place)
        learned = tuple(zip(bounds[::2], bounds[1::2], strict=True))
        return Example(tuple(self._tokens.piece(place)), learned)

    def digest(self) -> str:
        """Return a hash of all examples."""
        digest = hashlib.sha256()
        for pieces in (self._tokens, self._spans):
            digest.update(f"{len(pieces.ends)} {len(pieces.numbers)}".encode())
            digest.update(pieces.ends)
            digest.update(pieces.numbers)
        if self._weights:
            digest.update(repr(self._sizes).encode())
        return digest.hexdigest()

    def shuffled(self, seed: int) -> Iterator[Example]:
        """Yield the examples that an epoch draws, in an order that `seed` decides."""
        if not self._weights:
            return (self[index] for index in permutation(len(self), seed))
        sizes = self._sizes
        order = mixed_order(
            sizes, self._weights, seed, lambda place, seed: permutation(sizes[place], seed)
        )
        return (self[index] for index in order)


class _Pieces:
    """Many sequences of numbers in one array."""

    def __init__(self) -> None:
        self.numbers, self.ends = array("i"), array("q")

    def append(self, piece: Sequence[int]) -> None:
        self.numbers.extend(piece)
        self.ends.append(len(self.numbers))

    def piece(self, index: int) -> array[int]:
        return self.numbers[self.ends[index - 1] if index else 0 : self.ends[index]]

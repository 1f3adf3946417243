"""Rows as token ids, stored compactly."""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from disha.finetune.data.order import drawn, mixed_order, permutation
from disha.finetune.errors import OutputError

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
    """Examples in arrays. An array takes 4 bytes for a token, and a tuple of numbers about 30.

    Args:
        examples: the first examples.
        weights: the weights of the data sets that they are from, if they have weights.
        on_disk: keep the tokens in a temporary file.
    """

    def __init__(
        self,
        examples: Iterable[Example] = (),
        *,
        weights: Sequence[float] = (),
        on_disk: bool = False,
    ) -> None:
        self._tokens, self._spans = _Pieces(on_disk), _Pieces()
        self._weights, self._sizes = weights, list[int]()
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        """Add an example at the end.

        Raises:
            OutputError: the temporary file can't be written.
        """
        self._tokens.append(example.tokens)
        self._spans.append([bound for span in example.learned for bound in span])

    def end_part(self) -> None:
        """Note that the examples of a data set are complete."""
        self._sizes.append(len(self) - sum(self._sizes))

    @property
    def drawn(self) -> list[int]:
        """How many examples an epoch draws: of each data set if they have weights, else of all."""
        return drawn(self._sizes, self._weights) if self._weights else [len(self)]

    def __len__(self) -> int:
        return len(self._tokens.ends) - 1

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
            digest.update(pieces.ends)
            for index in range(len(self)):
                digest.update(pieces.piece(index))
        if self._weights:
            digest.update(repr(self._sizes).encode())
        return digest.hexdigest()

    def hashes(self) -> Iterator[int]:
        """Yield a number for each example, which is the same for the same tokens."""
        return (hash(self._tokens.piece(index).tobytes()) for index in range(len(self)))

    def shuffled(self, seed: int) -> Iterator[Example]:
        """Yield the examples that an epoch draws, in an order that `seed` decides."""
        if self._weights:
            order = mixed_order(self._sizes, self._weights, seed)
        else:
            order = permutation(len(self), seed)
        return (self[index] for index in order)


class _Pieces:
    """Many sequences of numbers in one array, or in a temporary file."""

    def __init__(self, on_disk: bool = False) -> None:
        self._file = tempfile.TemporaryFile() if on_disk else None  # noqa: SIM115
        self._numbers, self.ends = array("i"), array("q", [0])

    def append(self, piece: Sequence[int]) -> None:
        numbers = array("i", piece)
        if self._file is None:
            self._numbers.extend(numbers)
        else:
            try:
                self._file.write(numbers)
                self._file.flush()  # otherwise, a full disk would show when a piece is read
            except OSError as error:
                raise OutputError(
                    f"the tokens that --streaming keeps in a file in {tempfile.gettempdir()} can't "
                    f"be written: {error.strerror}; set TMPDIR to a folder with room"
                ) from error
        self.ends.append(self.ends[-1] + len(numbers))

    def piece(self, index: int) -> array[int]:
        first, end = self.ends[index], self.ends[index + 1]
        if self._file is None:
            return self._numbers[first:end]
        piece = array("i")
        self._file.seek(first * piece.itemsize)
        piece.frombytes(self._file.read((end - first) * piece.itemsize))
        return piece

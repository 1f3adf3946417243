"""Text to token ids and back, whatever file the tokenizer came from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer

__all__ = ["Tokenizer", "is_text"]

SPACE = "▁"
"""How SentencePiece writes a space inside tokens."""

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""How it names tokens of one byte."""


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: the tokenizer proper.
        end: the token id put after a text in training.
        begin: the token id to put before every text, if the model wants one.
        ends: the token ids any of which ends a generated text; `end` is always one.
        chat_template: the model's own template of conversations, in Jinja, if it has one.
        named: special tokens under the names that chat templates use, such as ``bos_token``.
    """

    backend: BackendTokenizer
    end: int
    begin: int | None
    ends: frozenset[int] = frozenset()
    chat_template: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", self.ends | {self.end})
        # A tokenizer.json can ask for a length, which is not for encode to decide.
        self.backend.no_truncation()
        self.backend.no_padding()

    def encode(self, text: str, *, special: bool = True, continues: bool = False) -> list[int]:
        """Token ids of `text`, without begin or end tokens added.

        Args:
            text: any text.
            special: whether names of special tokens, such as ``<|im_end|>``, mean those tokens.
                With False they are ordinary text, as text from strangers should be.
            continues: whether `text` continues other text. SentencePiece puts a space before a
                text, which must not be in the middle of one.
        """
        if continues and self._puts_space_first:
            # Nothing merges with a line break, so what follows one is encoded as it stands.
            start, both = self._ids("\n", special), self._ids(f"\n{text}", special)
            if both[: len(start)] == start:
                return both[len(start) :]
        return self._ids(text, special)

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text`, and where in it the characters of each are, as (first, end).

        Names of special tokens mean those tokens.
        """
        self.backend.encode_special_tokens = False
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def knows(self, *tokens: str) -> bool:
        """Whether each of `tokens` is in the vocabulary."""
        return all(self.backend.token_to_id(token) is not None for token in tokens)

    def settles(self, index: int) -> bool:
        """Whether the text before a token can no longer change once the token has come.

        SentencePiece has tokens of one byte, and the text of a run of them depends on all of them.
        Tokens that are left out of text don't end the run.
        """
        token = self.backend.id_to_token(index)
        return token is not None and index not in self.special and not BYTE.fullmatch(token)

    @cached_property
    def special(self) -> frozenset[int]:
        """The ids of special tokens, which text from strangers must not make."""
        added = self.backend.get_added_tokens_decoder().items()
        return frozenset(index for index, token in added if token.special)

    @cached_property
    def _puts_space_first(self) -> bool:
        tokens = self.backend.encode("a", add_special_tokens=False).tokens
        return bool(tokens) and tokens[0].startswith(SPACE)

    def _ids(self, text: str, special: bool) -> list[int]:
        self.backend.encode_special_tokens = not special
        return self.backend.encode(text, add_special_tokens=False).ids


def is_text(text: str) -> bool:
    """Whether `text` can be cut into tokens. Bytes of a command line may be no characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""The tokenizer that all commands use: text to token ids and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from disha.finetune.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer

__all__ = ["Tokenizer", "is_text"]

SPACE = "▁"
"""How SentencePiece writes a space inside tokens."""

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""How SentencePiece names tokens of one byte."""


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: the tokenizer of the tokenizers library.
        end: the token id that training puts after a text.
        begin: the token ids to put before every text.
        ends: the token ids that end a generated text; `end` is added to them.
        chat_template: the model's own Jinja template for conversations; None if it has none.
        named: special tokens under the names that chat templates use, such as ``bos_token``.
        source: the file or folder that it came from; for messages.
        now: the time that the chat template sees, in seconds since 1970; None for the present. Some
            templates write today's date.
        vocabulary: how many tokens the model knows; None if that is not known. A tokenizer may have
            added tokens beyond them.
    """

    backend: BackendTokenizer
    end: int
    begin: tuple[int, ...] = ()
    ends: frozenset[int] = frozenset()
    chat_template: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)
    source: object = "the given tokenizer"
    now: float | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", self.ends | {self.end})
        # A tokenizer.json can ask to cut or pad texts, but `encode` must do neither.
        self.backend.no_truncation()
        self.backend.no_padding()

    def encode(self, text: str, *, special: bool = True, continues: bool = False) -> list[int]:
        """Return the token ids of `text`, without begin or end tokens added.

        Args:
            text: any text.
            special: whether names of special tokens, such as ``<|im_end|>``, mean those tokens.
                With False they are ordinary text, which is right for text from strangers.
            continues: whether `text` continues other text. SentencePiece puts a space before
                every text, but a text that continues another must not get one.
        """
        if continues and self._puts_space_first:
            # Nothing merges with a line break, so encode the text after one, and drop the break.
            start, both = self._ids("\n", special), self._ids(f"\n{text}", special)
            if both[: len(start)] == start:
                return both[len(start) :]
        return self._ids(text, special)

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of `text`, and the place of each token in it, as (first, end).

        Names of special tokens mean those tokens. The model may not know them; see `known`.
        """
        self.backend.encode_special_tokens = False
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def known(self, ids: list[int]) -> list[int]:
        """Return token ids that the model has embeddings for.

        Raises:
            TokenizerError: it has none for one of them.
        """
        unknown = min(self._unknown.intersection(ids), default=None) if self._unknown else None
        if unknown is not None:
            raise TokenizerError(
                f"{self.backend.id_to_token(unknown)!r} is token {unknown}, but the model knows "
                f"{self.vocabulary} tokens only; give another --template or --tokenizer, or "
                "enlarge the embedding of the model"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def knows(self, *tokens: str) -> bool:
        """Return whether all of `tokens` are in the vocabulary, and the model knows them."""
        ids = [self.backend.token_to_id(token) for token in tokens]
        return all(index is not None and index not in self._unknown for index in ids)

    def settles(self, index: int) -> bool:
        """Return whether this token makes the text so far final.

        SentencePiece has tokens of one byte. The text of a run of them depends on all of them, so
        it is final only when another token follows. A special token has no text, so it does not end
        the run.
        """
        token = self.backend.id_to_token(index)
        return token is not None and index not in self.special and not BYTE.fullmatch(token)

    @cached_property
    def special(self) -> frozenset[int]:
        """The ids of special tokens. Text from strangers must not be encoded to them."""
        added = self.backend.get_added_tokens_decoder().items()
        return frozenset(index for index, token in added if token.special)

    @cached_property
    def _puts_space_first(self) -> bool:
        tokens = self.backend.encode("a", add_special_tokens=False).tokens
        return bool(tokens) and tokens[0].startswith(SPACE)

    def _ids(self, text: str, special: bool) -> list[int]:
        self.backend.encode_special_tokens = not special
        return self.known(self.backend.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _unknown(self) -> frozenset[int]:
        """The ids of added tokens that the model has no embedding for."""
        if self.vocabulary is None:
            return frozenset()
        added = self.backend.get_added_tokens_decoder()
        return frozenset(index for index in added if index >= self.vocabulary)


def is_text(text: str) -> bool:
    """Return whether `text` is valid Unicode. Text from a command line may hold other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

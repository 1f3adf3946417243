"""The tokenizer described inside a GGUF file: byte-level BPE.

How text is cut before merging depends on the model and is only named in the file
(``tokenizer.ggml.pre``). ``smollm`` cuts off every single digit, then cuts as GPT-2 does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disha.finetune.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as BackendTokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

__all__ = ["Tokenizer"]

SUPPORTED_MODEL = "gpt2"

CONTROL, USER_DEFINED = 3, 4
"""The types of tokens, in ``tokenizer.ggml.token_type``, that are never made by merging."""


def _gpt2_pieces() -> PreTokenizer:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)


def _digits_then_gpt2_pieces() -> PreTokenizer:
    from tokenizers.pre_tokenizers import Digits, Sequence

    return Sequence([Digits(individual_digits=True), _gpt2_pieces()])


PRE_TOKENIZERS: Mapping[str, Callable[[], PreTokenizer]] = {
    "gpt-2": _gpt2_pieces,
    "smollm": _digits_then_gpt2_pieces,
}


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: the tokenizer proper.
        end: the token id that ends a text.
        begin: the token id to put before every text, if the model wants one.
    """

    backend: BackendTokenizer
    end: int
    begin: int | None

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], path: Path) -> Tokenizer:
        """Build the tokenizer that a GGUF file's metadata describe.

        Args:
            fields: the file's metadata.
            path: where the file is; for messages.

        Raises:
            TokenizerError: another kind of tokenizer, or a damaged description.
        """
        _check_kind(fields, path)
        tokens: Sequence[str] = _list(fields, "tokens", str, path)
        end = _token_id(fields, "eos_token_id", len(tokens), path)
        begin = None
        if fields.get("tokenizer.ggml.add_bos_token", False):
            begin = _token_id(fields, "bos_token_id", len(tokens), path)
        return cls(_backend(fields, tokens, path), end, begin)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`, without begin or end tokens added.

        Args:
            text: any text.
            special: whether names of special tokens, such as ``<|im_end|>``, mean those tokens;
                False takes them as ordinary text, as befits text from strangers.
        """
        self.backend.encode_special_tokens = not special
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def knows(self, token: str) -> bool:
        """Whether `token`, as a whole, is in the vocabulary."""
        return self.backend.token_to_id(token) is not None


def _check_kind(fields: Mapping[str, Any], path: Path) -> None:
    model = _field(fields, "model", path)
    if model != SUPPORTED_MODEL:
        raise TokenizerError(
            f"{path} has a tokenizer of kind {model!r}; supported is {SUPPORTED_MODEL!r} "
            "(byte-level BPE)"
        )
    pieces = _field(fields, "pre", path)
    if pieces not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"{path} cuts text the way named {pieces!r} (tokenizer.ggml.pre); supported are "
            f"{', '.join(sorted(PRE_TOKENIZERS))}. Any other would give wrong token ids"
        )


def _backend(fields: Mapping[str, Any], tokens: Sequence[str], path: Path) -> BackendTokenizer:
    from tokenizers import Tokenizer as BackendTokenizer
    from tokenizers import decoders, models

    merges = [_merge(pair, path) for pair in _list(fields, "merges", str, path)]
    types: Sequence[int] = _list(fields, "token_type", int, path)
    if len(types) != len(tokens):
        raise TokenizerError(
            f"{path} has {len(tokens)} tokens but {len(types)} token types; the file is damaged"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        backend = BackendTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the package raises bare Exception for a merge it can't use
        raise TokenizerError(f"{path} has a damaged list of merges: {error}") from error
    backend.pre_tokenizer = PRE_TOKENIZERS[_field(fields, "pre", path)]()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_whole(tokens, types, CONTROL))
    backend.add_tokens(_whole(tokens, types, USER_DEFINED))
    return backend


def _whole(tokens: Sequence[str], types: Sequence[int], wanted: int) -> list[AddedToken]:
    from tokenizers import AddedToken

    pairs = zip(tokens, types, strict=True)
    return [AddedToken(token, normalized=False) for token, kind in pairs if kind == wanted]


def _merge(pair: str, path: Path) -> tuple[str, str]:
    left, gap, right = pair.partition(" ")
    if not (left and gap and right):
        raise TokenizerError(f"{path} has a damaged merge, {pair!r}: two tokens are expected")
    return left, right


def _field(fields: Mapping[str, Any], key: str, path: Path) -> Any:
    value = fields.get(f"tokenizer.ggml.{key}")
    if value is None:
        raise TokenizerError(
            f"{path} lacks the metadata key tokenizer.ggml.{key}; convert the model to GGUF again "
            "with its tokenizer"
        )
    return value


def _list(fields: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    values = _field(fields, key, path)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise TokenizerError(
            f"{path} has a tokenizer.ggml.{key} that is no list of {kind.__name__}; "
            "the file is damaged"
        )
    return values


def _token_id(fields: Mapping[str, Any], key: str, size: int, path: Path) -> int:
    value = _field(fields, key, path)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size:
        raise TokenizerError(
            f"{path} has tokenizer.ggml.{key} = {value!r}, which is not among its {size} tokens"
        )
    return value

"""The tokenizer described inside a GGUF file, of one of two kinds.

- ``gpt2``: byte-level BPE. Text is cut into pieces before tokens merge. The file only names the
  way to cut it (``tokenizer.ggml.pre``); it is the way of the model's own tokenizer.json.
- ``llama``: SentencePiece BPE. The file holds scores, not merges. Two neighbours can merge if their
  joined text is a token. The pair with the best score merges first, and among equals the leftmost.
  Text that is no token becomes bytes.

Source: llama.cpp, ``src/llama-vocab.cpp``. Its defaults apply if a key is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disha.finetune.errors import TokenizerError
from disha.finetune.text.tokenizer import SPACE, Tokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as BackendTokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

__all__ = ["tokenizer_from_gguf"]

WAY_OUT = "give the model's own tokenizer with --tokenizer tokenizer.json"

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""The types of tokens in ``tokenizer.ggml.token_type``; type 6, a single byte, is not needed here.
Merging never makes unknown, control or user-defined tokens."""

LONGEST_TOKEN, MOST_MERGED = 1024, 16_000_000
"""In characters. The tokens of a vocabulary of 256,000 join in 600,000 ways, which have 5 million
characters together."""

ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")
"""Control tokens that end a text, even if no key of the file names them."""

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def tokenizer_from_gguf(fields: Mapping[str, Any], path: Path) -> Tokenizer:
    """Build the tokenizer that a GGUF file's metadata describe.

    Args:
        fields: the file's metadata.
        path: where the file is; for messages.

    Raises:
        TokenizerError: the kind of tokenizer is not supported, or its description is damaged.
    """
    described = _Description(fields, path)
    kind = described.text("model")
    if kind not in KINDS:
        raise TokenizerError(
            f"{path} has a tokenizer of kind {kind!r}; supported are 'gpt2' (byte-level BPE) and "
            f"'llama' (SentencePiece). To use the model nevertheless, {WAY_OUT}"
        )
    backend, begins = KINDS[kind](described)
    end = described.token_id("eos_token_id")
    begin: tuple[int, ...] = ()
    if fields.get("tokenizer.ggml.add_bos_token", begins):
        begin = (described.token_id("bos_token_id"),)
    template = fields.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        end,
        begin,
        ends=described.ends(),
        chat_template=template if isinstance(template, str) else None,
        named=described.named(),
        source=path,
    )


class _Description:
    """A GGUF file's description of its tokenizer. Each value is checked when it is used.

    Args:
        fields: the file's metadata.
        path: where the file is; for messages.
    """

    def __init__(self, fields: Mapping[str, Any], path: Path) -> None:
        self.fields = fields
        self.path = path
        self.tokens: Sequence[str] = self.items("tokens", str)
        self.types: Sequence[int] = self.items("token_type", int)
        if len(self.types) != len(self.tokens):
            raise TokenizerError(
                f"{path} has {len(self.tokens)} tokens but {len(self.types)} token types; the "
                "file is damaged"
            )

    def field(self, key: str) -> Any:
        value = self.fields.get(f"tokenizer.ggml.{key}")
        if value is None:
            raise TokenizerError(
                f"{self.path} lacks the metadata key tokenizer.ggml.{key}; convert the model to "
                f"GGUF again with its tokenizer, or {WAY_OUT}"
            )
        return value

    def text(self, key: str) -> str:
        value = self.field(key)
        if not isinstance(value, str):
            raise TokenizerError(
                f"{self.path} has tokenizer.ggml.{key} = {value!r:.60}, which is not text; the "
                "file is damaged"
            )
        return value

    def items(self, key: str, kind: type) -> Any:
        values = self.field(key)
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise TokenizerError(
                f"{self.path} has a tokenizer.ggml.{key} that is not a list of {kind.__name__}; "
                "the file is damaged"
            )
        return values

    def token_id(self, key: str) -> int:
        value = self.field(key)
        size = len(self.tokens)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size:
            raise TokenizerError(
                f"{self.path} has tokenizer.ggml.{key} = {value!r}, which is not among its "
                f"{size} tokens"
            )
        return value

    def of_type(self, wanted: int) -> list[str]:
        pairs = zip(self.tokens, self.types, strict=True)
        return [token for token, kind in pairs if kind == wanted]

    def vocabulary(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def ends(self) -> frozenset[int]:
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        told = {self.token_id(key) for key in keys if f"tokenizer.ggml.{key}" in self.fields}
        tokens = enumerate(zip(self.tokens, self.types, strict=True))
        known = {index for index, (token, kind) in tokens if kind == CONTROL and token in ENDS}
        return frozenset(told | known)

    def named(self) -> dict[str, str]:
        keys = {
            "bos_token": "bos_token_id",
            "eos_token": "eos_token_id",
            "unk_token": "unknown_token_id",
            "pad_token": "padding_token_id",
        }
        present = {
            name: key for name, key in keys.items() if f"tokenizer.ggml.{key}" in self.fields
        }
        return {name: self.tokens[self.token_id(key)] for name, key in present.items()}


@dataclass(frozen=True)
class _Cut:
    """How a model cuts text into pieces. Tokens merge only inside a piece.

    Args:
        pieces: returns the step of the tokenizer that cuts.
        composed: whether characters are composed first (Unicode's NFC).
        whole_pieces: whether a piece that is a token needs no merging.
        begins: whether texts have a begin token by default.
    """

    pieces: Callable[[], PreTokenizer]
    composed: bool = False
    whole_pieces: bool = False
    begins: bool = False


def _gpt2_pieces() -> PreTokenizer:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)


def _digits_then_gpt2_pieces() -> PreTokenizer:
    from tokenizers.pre_tokenizers import Digits, Sequence

    return Sequence([Digits(individual_digits=True), _gpt2_pieces()])


def _pieces_like(pattern: str) -> Callable[[], PreTokenizer]:
    def pieces() -> PreTokenizer:
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

        split = Split(Regex(pattern), behavior="isolated")
        return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])

    return pieces


LLAMA3 = _Cut(_pieces_like(LLAMA3_PATTERN), whole_pieces=True, begins=True)
CUTS: Mapping[str, _Cut] = {
    "gpt-2": _Cut(_gpt2_pieces),
    "llama-bpe": LLAMA3,
    "llama-v3": LLAMA3,
    "llama3": LLAMA3,
    "qwen2": _Cut(_pieces_like(QWEN2_PATTERN), composed=True),
    "smollm": _Cut(_digits_then_gpt2_pieces),
}


def _byte_level(described: _Description) -> tuple[BackendTokenizer, bool]:
    """Return the tokenizer, and whether texts have a begin token by default."""
    from tokenizers import decoders, models, normalizers

    name = described.text("pre")
    if name not in CUTS:
        raise TokenizerError(
            f"{described.path} cuts text in the way named {name!r} (tokenizer.ggml.pre); supported "
            f"are {', '.join(sorted(CUTS))}. Any other would give wrong token ids; {WAY_OUT}"
        )
    cut = CUTS[name]
    merges = [_merge(pair, described.path) for pair in described.items("merges", str)]
    backend = _merging(
        described,
        lambda: models.BPE(
            vocab=described.vocabulary(), merges=merges, ignore_merges=cut.whole_pieces
        ),
    )
    if cut.composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = cut.pieces()
    backend.decoder = decoders.ByteLevel()
    return _with_whole_tokens(backend, described), cut.begins


def _merge(pair: str, path: Path) -> tuple[str, str]:
    left, gap, right = pair.partition(" ")
    if not (left and gap and right):
        raise TokenizerError(f"{path} has a damaged merge, {pair!r}: two tokens are expected")
    return left, right


def _sentencepiece(described: _Description) -> tuple[BackendTokenizer, bool]:
    """Return the tokenizer, and True: texts have a begin token by default."""
    from tokenizers import decoders, models, normalizers

    _require_plain_sentencepiece(described)
    unknown = described.of_type(UNKNOWN)
    backend = _merging(
        described,
        lambda: models.BPE(
            vocab=described.vocabulary(),
            merges=_merges_by_score(described),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        ),
    )
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if described.fields.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(SPACE))
        undo.append(decoders.Strip(" ", left=1))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(undo)
    return _with_whole_tokens(backend, described), True


def _require_plain_sentencepiece(described: _Description) -> None:
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - set(described.tokens)
    if missing:
        raise TokenizerError(
            f"{described.path} has a SentencePiece tokenizer without {len(missing)} of the 256 "
            f"byte tokens, such as {min(missing)}; {WAY_OUT}"
        )
    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if described.fields.get(f"tokenizer.ggml.{key}"):
            raise TokenizerError(
                f"{described.path} changes text before cutting it (tokenizer.ggml.{key}), which "
                f"is not supported; {WAY_OUT}"
            )


def _merges_by_score(described: _Description) -> list[tuple[str, str]]:
    """Return all pairs of tokens that join to a token; the token with the best score first."""
    scores: Sequence[float] = described.items("scores", float)
    if len(scores) != len(described.tokens):
        raise TokenizerError(
            f"{described.path} has {len(described.tokens)} tokens but {len(scores)} scores; the "
            "file is damaged"
        )
    mergeable = {
        token: score
        for token, kind, score in zip(described.tokens, described.types, scores, strict=True)
        if kind in (NORMAL, USER_DEFINED, UNUSED)
    }
    splits = list(_splits(mergeable, described.path))
    return sorted(splits, key=lambda pair: (-mergeable["".join(pair)], -len(pair[0])))


def _splits(tokens: Collection[str], path: Path) -> Iterator[tuple[str, str]]:
    """Yield all pairs of tokens that join to a token."""
    characters = 0
    for token in tokens:
        if len(token) > LONGEST_TOKEN:
            raise TokenizerError(
                f"{path} has a token of {len(token):,} characters; at most {LONGEST_TOKEN:,} are "
                "allowed"
            )
        for place in range(1, len(token)):
            if token[:place] in tokens and token[place:] in tokens:
                characters += len(token)
                if characters > MOST_MERGED:
                    raise TokenizerError(
                        f"{path} has tokens that join in too many ways, of more than "
                        f"{MOST_MERGED:,} characters together; {WAY_OUT}"
                    )
                yield token[:place], token[place:]


def _merging(described: _Description, model: Callable[[], Any]) -> BackendTokenizer:
    from tokenizers import Tokenizer as BackendTokenizer

    try:
        return BackendTokenizer(model())
    except TokenizerError:
        raise
    except Exception as error:  # the package raises bare Exception for a merge it can't use
        raise TokenizerError(f"{described.path} has a damaged list of merges: {error}") from error


def _with_whole_tokens(backend: BackendTokenizer, described: _Description) -> BackendTokenizer:
    backend.add_special_tokens(_added(described.of_type(UNKNOWN)))
    backend.add_special_tokens(_added(described.of_type(CONTROL)))
    backend.add_tokens(_added(described.of_type(USER_DEFINED)))
    return backend


def _added(tokens: Sequence[str]) -> list[AddedToken]:
    from tokenizers import AddedToken

    return [AddedToken(token, normalized=False) for token in tokens]


KINDS: Mapping[str, Callable[[_Description], tuple[BackendTokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}

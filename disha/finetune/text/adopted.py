"""Tokenizers that the user's own code makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from disha.finetune.errors import TokenizerError
from disha.finetune.text.from_folder import begin_of
from disha.finetune.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer

__all__ = ["adopt"]

USUAL_ENDS = ("</s>", "<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<eos>")
"""Usual names of the token that ends a text. A ``tokenizers.Tokenizer`` does not name its own."""


def adopt(tokenizer: object) -> Tokenizer:
    """Convert a tokenizer to a `Tokenizer`.

    A ``tokenizers.Tokenizer`` does not name its end token. It is taken to be the token that the
    tokenizer appends to texts, or else the token with a usual name.

    Args:
        tokenizer: a `Tokenizer`, a ``tokenizers.Tokenizer``, or a fast tokenizer of transformers.

    Raises:
        TokenizerError: it is none of these, or its end token can't be found.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    from tokenizers import Tokenizer as BackendTokenizer

    if isinstance(tokenizer, BackendTokenizer):
        return _bare(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, BackendTokenizer):
        return _of_transformers(tokenizer, backend)
    raise TokenizerError(
        f"a tokenizer of class {type(tokenizer).__name__} can't be used; give a "
        "disha.finetune.text.tokenizer.Tokenizer, a tokenizers.Tokenizer, or a fast tokenizer of "
        "transformers"
    )


def _bare(backend: BackendTokenizer) -> Tokenizer:
    end = _appended(backend)
    if end is None:
        usual = [backend.token_to_id(token) for token in USUAL_ENDS]
        found = [index for index in usual if index is not None]
        if len(found) != 1:
            raise TokenizerError(
                f"the tokenizer does not say which token ends a text, and {len(found)} of the "
                f"usual ones ({', '.join(USUAL_ENDS)}) are in its vocabulary; wrap it as "
                "disha.finetune.text.tokenizer.Tokenizer(backend, end, begin)"
            )
        end = found[0]
    return Tokenizer(backend, end, begin_of(backend))


def _appended(backend: BackendTokenizer) -> int | None:
    """Return the token that the tokenizer appends to a text; None if it appends none."""
    bare = backend.encode("a", add_special_tokens=False).ids
    processed = backend.encode("a").ids
    ends_bare = not bare or processed[-1:] == bare[-1:]
    return None if ends_bare else processed[-1]


def _of_transformers(tokenizer: Any, backend: BackendTokenizer) -> Tokenizer:
    end = tokenizer.eos_token_id
    if end is None:
        raise TokenizerError(
            "the tokenizer does not say which token ends a text; set its eos_token"
        )
    if not backend.encode("a", add_special_tokens=False).ids:  # transformers makes an empty one
        raise TokenizerError(
            "the tokenizer makes no tokens of a text, as its files are missing; put tokenizer.json "
            "or the files that it is made from into the model's folder"
        )
    template = tokenizer.chat_template
    return Tokenizer(
        backend,
        end,
        begin_of(backend),
        chat_template=template if isinstance(template, str) else None,
        named={
            name: str(token)
            for name, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        },
    )
